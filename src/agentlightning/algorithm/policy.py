"""`Policy`: the protocol of what `GRPO` trains, and the plain data that passes between the two.

`GRPO` decides which rollouts run, reads from their spans what the policy sampled and how good it was, and computes
advantages. The policy serves its model while agents run, and changes its own weights. `agl.SoftmaxPolicy` is one; a
language model on a GPU can be another, because everything that crosses this seam is token ids and numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from agentlightning.errors import InvalidValue
from agentlightning.types import Triplet


@dataclass(frozen=True, slots=True)
class SampledCall:
    """One model call of an attempt, as tokens: P of the prompt and C of the completion."""

    prompt_ids: Sequence[int]
    """Token ids of the prompt, shape [P]. Never trained on."""
    completion_ids: Sequence[int]
    """Token ids that the policy sampled, shape [C], at least one."""
    logprobs: Sequence[float] | None
    """Natural logarithm of each completion token's probability, shape [C], at temperature 1, under the weights that
    sampled it. None: not recorded. The policy then uses its present weights, so the ratio of new to old is 1."""


@dataclass(frozen=True, slots=True)
class GroupMember:
    """One attempt of a group: everything that the policy sampled in it, and how good it was."""

    rollout_id: str
    reward: float
    advantage: float
    """The reward compared with those of the group. It applies to every completion token of the attempt."""
    calls: Sequence[SampledCall]
    """At least one, in the order in which the agent made them."""


@dataclass(frozen=True)
class PolicyUpdate:
    """How a policy learns from one step's groups. The defaults suit the guessing game of `agl demo`.

    Raises:
        InvalidValue: a number is out of its range.
    """

    learning_rate: float = 30.0
    """Step size along the gradient. `SoftmaxPolicy` applies it to each row of logits separately, to the mean over the
    tokens sampled in that context, so that rare contexts learn as fast as frequent ones. Tables take far larger rates
    than neural networks."""
    clip: float = 0.2
    """ε of PPO: the ratio of new to old probability counts within 1 ± ε. It matters from the second epoch on."""
    epochs: int = 1
    """How often to pass over the same groups."""
    entropy_weight: float = 0.15
    """Value of one nat of entropy, in advantages, at the start of the run. It falls linearly to 0 at the end."""
    kl_weight: float = 0.0
    """Cost of one nat of distance from the policy at the start of the run, in advantages. With rewards from 0 to 1,
    0.04 hardly holds the policy back, and 1 keeps it near its start."""
    scale_by_deviation: bool = False
    """Whether advantages are divided by the standard deviation of their group's rewards, as GRPO does. If not, they
    are not scaled, as Dr. GRPO proposes."""

    def __post_init__(self) -> None:
        numbers = (self.learning_rate, self.clip, self.entropy_weight, self.kl_weight)
        if not all(math.isfinite(number) and number >= 0 for number in numbers) or self.clip == 0 or self.epochs < 1:
            raise InvalidValue(f"{self} is out of range: no number may be negative, clip and epochs not 0")


@dataclass(frozen=True)
class PolicyBatch:
    """What a policy learns from in one step."""

    groups: Sequence[Sequence[GroupMember]]
    """Attempts at one task each; the advantages of a group sum to 0. Empty if no group of the step was complete."""
    settings: PolicyUpdate
    progress: float
    """Share of the run's steps that are done, from 0 to less than 1; for schedules."""


class ModelEndpoint(Protocol):
    """A server of the OpenAI protocol that answers with the policy's present weights.

    If it asks for a key, it has that as the attribute ``api_key``.
    """

    version: str
    """Number of updates behind the weights that answer. `GRPO` sets it after each update; replies should carry it."""

    @property
    def url(self) -> str:
        """Base URL for OpenAI's clients, such as ``http://127.0.0.1:8000/v1``. Final once `start` has returned."""
        ...

    async def start(self) -> None:
        """Listen; requests are answered after it returns. Raises ``OSError`` if the address cannot be listened on."""
        ...

    async def stop(self) -> None:
        """Finish the requests in progress, and free the port. May be called again."""
        ...


@runtime_checkable
class Policy(Protocol):
    """A model that can be sampled from by agents and trained on what they did with it.

    `GRPO` calls `update`, `save_state` and `load_state` in a worker thread, one at a time, so that they may take long.
    While `update` runs behind an LLM proxy, no request reaches the endpoint. Without a proxy requests may arrive at any
    time, and must be answered with the weights from before or after the update.
    """

    def make_endpoint(self, *, model: str, host: str, port: int, seed: int) -> ModelEndpoint:
        """Return a server for this policy, which is not started yet.

        Args:
            model: name that requests use for it.
            host: address to listen on. For a server that runs elsewhere it may be ignored.
            port: 0 takes a free one.
            seed: of the sampling.

        Where agents are to reach it by HTTPS there is one more argument: ``tls``, an
        `agentlightning.security.tls.TlsFiles`.
        """
        ...

    def read_call(self, triplet: Triplet) -> SampledCall:
        """Return the tokens of one recorded call, as they are to be trained on.

        Args:
            triplet: ``prompt`` has ``token_ids`` [P] and ``messages``, ``response`` has ``token_ids`` [C] and
                ``message``, ``metadata`` has ``logprobs`` [C] or None. The token ids are empty if the call was
                recorded as text only; a policy whose tokens do not follow from the text must refuse it then.

        Raises:
            InvalidValue: the call cannot be trained on. `GRPO` counts it under the error's message, which should
                therefore be the same for all calls with the same problem.
        """
        ...

    def begin_run(self) -> None:
        """Take the present weights as the reference that ``kl_weight`` holds the policy to.

        Called once, when a run begins; a run that is resumed gets its reference by `load_state`.
        """
        ...

    def update(self, batch: PolicyBatch) -> Mapping[str, float]:
        """Change the weights by what the batch teaches.

        Returns:
            Numbers to report with the step, by name, such as ``loss``, ``entropy``, ``clipped`` and ``kl``.
        """
        ...

    def save_state(self, folder: Path) -> dict[str, Any]:
        """Return everything that `load_state` needs to continue: weights, reference, optimiser.

        `GRPO` puts the JSON object into the run's checkpoint, which is replaced atomically. Large arrays belong into
        files in ``folder``, under a new name at each call, and only their names into the object. The files of the call
        before must stay until the next call, because a crash before the checkpoint is replaced goes back to them.
        """
        ...

    def load_state(self, state: Mapping[str, Any], folder: Path) -> None:
        """Become the policy that `save_state` saved.

        Raises:
            InvalidValue: the state is damaged, or belongs to a policy of another shape.
        """
        ...
