"""``Sample``: one token sequence to train on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Turn:
    """One reply of the model inside of a sample."""

    start: int
    """Place of its first token in ``Sample.input_ids``."""
    end: int
    """Place after its last token."""
    span_id: str
    """The span of the call."""
    model: str | None
    model_version: str | None
    """Which weights wrote it, as the proxy recorded."""
    finish_reason: str | None
    is_trained: bool
    """Whether this sample trains its tokens. False: another sample, which begins with the same turns, does."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One token sequence to train on: a conversation from its first prompt to its last reply.

    The three lists have the same length, the number of tokens of the sequence.
    """

    input_ids: list[int]
    """Token ids, exactly those that the server read and wrote."""
    sampled: list[bool]
    """Whether the model wrote the token, and this sample trains it. Prompts, results of tools, and replies that another
    sample trains are false."""
    logprobs: list[float] | None
    """Natural logarithms of the probabilities with which the ``sampled`` tokens were written; 0.0 for all others. None
    if the server did not say one of them."""
    rollout_id: str
    attempt_id: str
    turns: tuple[Turn, ...]
    """The model's replies, in their order."""
    reward: float | None = None
    """The final reward of the attempt; None: it has none, which is not a reward of 0."""
    rewards: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """Its dimensions by name."""
    group: str | None = None
    """Samples of the same group are compared with each other."""

    @property
    def finish_reason(self) -> str | None:
        """Why the last reply ended, in OpenAI's words."""
        return self.turns[-1].finish_reason if self.turns else None

    @property
    def is_truncated(self) -> bool:
        """Whether the last reply was cut off because it was too long."""
        return self.finish_reason == "length"

    @property
    def model_versions(self) -> tuple[str | None, ...]:
        """The versions of the weights that wrote what this sample trains, each once, in their order."""
        return tuple(dict.fromkeys(turn.model_version for turn in self.turns if turn.is_trained))

    @property
    def prompt_length(self) -> int:
        """How many tokens come before the first reply."""
        return self.turns[0].start if self.turns else len(self.input_ids)
