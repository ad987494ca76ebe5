"""The beam of `APO`: prompts with their scores, and where the search stands."""

from __future__ import annotations

import math

from pydantic import BaseModel

from agentlightning.types import PromptTemplate


class ScoredPrompt(BaseModel):
    """A prompt, and how it was measured."""

    prompt: PromptTemplate
    rewards: list[float | None] = []
    """Of its validation rollouts; None for one without a reward. Empty: it was not measured."""
    on_defaults: int = 0
    """How many more ran with the default resources of their runner, and so not with this prompt."""
    score: float | None = None
    """Mean over all of them; None if it was not measured, or none had a reward."""

    def judged(self, failure_reward: float) -> ScoredPrompt:
        """Return it with the score for which a rollout without a reward has this one."""
        if all(reward is None for reward in self.rewards):
            return self
        counted = [failure_reward if reward is None else reward for reward in self.rewards]
        return self.model_copy(update={"score": math.fsum(counted) / len(counted)})

    @property
    def lowest(self) -> float:
        """Its lowest reward, at most 0."""
        return min([0.0, *(reward for reward in self.rewards if reward is not None)])

    @property
    def failures(self) -> int:
        """How many of its rollouts have no reward."""
        return sum(reward is None for reward in self.rewards)


class SearchState(BaseModel):
    """Where the search stands.

    Candidates are saved before they are evaluated: their rollout ids follow from their places, and models would not
    write the same prompts again.
    """

    round: int
    beam: list[ScoredPrompt]
    candidates: list[PromptTemplate] | None = None
    calls: int = 0
    """How often models were asked."""
    lowest: float = 0.0
    """The lowest reward that any rollout had, at most 0."""


def score_of(prompt: ScoredPrompt) -> float:
    """Return what prompts are ordered by: the score, or less than any."""
    return -math.inf if prompt.score is None else prompt.score
