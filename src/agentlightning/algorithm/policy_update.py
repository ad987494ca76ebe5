"""One step of learning: from groups of attempts to new logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from agentlightning.demo.policy_math import (
    choice_loss,
    choice_slope,
    entropy,
    entropy_gradient,
    group_advantages,
    kl_penalty,
    kl_slope,
    logits_gradient,
)
from agentlightning.demo.softmax_policy import Context, SoftmaxPolicy
from agentlightning.errors import InvalidValue


@dataclass(frozen=True, slots=True)
class Choice:
    """One word that the policy said."""

    context: Context
    token_id: int
    logprob: float | None
    """Under the policy that said it, at temperature 1. None: not recorded; then that is the one to be updated."""


@dataclass(frozen=True, slots=True)
class GroupMember:
    """One attempt of a group: all that the policy said in it, and what it was worth."""

    rollout_id: str
    reward: float
    choices: Sequence[Choice]


@dataclass(frozen=True)
class PolicyUpdate:
    """How the policy learns from one step's groups. The defaults are those that the guessing game of `agl demo` needs.

    Raises:
        InvalidValue: a number is out of its range.
    """

    learning_rate: float = 30.0
    """How far a row of logits goes along its gradient. Each row has its own: the mean over the choices made in its
    context, so that rare contexts learn as fast as frequent ones. Tables take far larger rates than networks."""

    clip: float = 0.2
    """How far the ratio of new to old probability counts, to each side of 1. Matters from the second epoch on."""

    epochs: int = 1
    """How often to go over the same groups."""

    entropy_weight: float = 0.15
    """What one nat of entropy is worth, in advantages, at the beginning; it goes down to 0 at the end in a line."""

    kl_weight: float = 0.0
    """What one nat of distance from the policy at the beginning of the run costs, in advantages."""

    scale_by_deviation: bool = False
    """Whether advantages are divided by the deviation of their group's rewards: GRPO. If not: Dr. GRPO."""

    def __post_init__(self) -> None:
        numbers = (self.learning_rate, self.clip, self.entropy_weight, self.kl_weight)
        if not all(math.isfinite(number) and number >= 0 for number in numbers) or self.clip == 0 or self.epochs < 1:
            raise InvalidValue(f"{self} is out of range: no number may be negative, clip and epochs not 0")


@dataclass(frozen=True)
class UpdateNumbers:
    """Means over the choices, at the last epoch. All 0 if there was nothing to learn from."""

    loss: float
    entropy: float
    clipped: float
    """Share of the choices that were clipped."""
    kl: float


@dataclass(frozen=True, slots=True)
class _Sample:
    place: int
    old_logprob: float
    reference_logprob: float
    advantage: float


def update_policy(
    policy: SoftmaxPolicy,
    reference: SoftmaxPolicy,
    groups: Sequence[Sequence[GroupMember]],
    settings: PolicyUpdate,
    progress: float,
) -> UpdateNumbers:
    """Change the policy by what the groups teach.

    Args:
        policy: is changed, row by row.
        reference: what ``kl_weight`` holds it to.
        groups: attempts at one task each.
        settings: how to learn.
        progress: share of the run that is behind, from 0 to less than 1.

    Returns:
        What the last epoch saw, before it changed the rows.
    """
    samples = _samples_by_context(policy, reference, groups, settings.scale_by_deviation)
    entropy_weight = settings.entropy_weight * (1 - progress)
    numbers = UpdateNumbers(0.0, 0.0, 0.0, 0.0)
    for _ in range(settings.epochs):
        totals = _Totals()
        for context, seen in samples.items():
            gradient = _row_gradient(policy.logprobs(context), seen, settings, entropy_weight, totals)
            row = policy.logits(context)
            policy.set_logits(
                context, [x - settings.learning_rate * slope for x, slope in zip(row, gradient, strict=True)]
            )
        numbers = totals.means()
    return numbers


def _samples_by_context(
    policy: SoftmaxPolicy, reference: SoftmaxPolicy, groups: Sequence[Sequence[GroupMember]], scale_by_deviation: bool
) -> dict[Context, list[_Sample]]:
    samples: dict[Context, list[_Sample]] = {}
    for group in groups:
        advantages = group_advantages([member.reward for member in group], scale_by_deviation=scale_by_deviation)
        for member, advantage in zip(group, advantages, strict=True):
            for choice in member.choices:
                place = policy.place_of(choice.token_id)
                assert place is not None, "choices are read with the policy's own vocabulary"
                current = policy.logprobs(choice.context)[place] if choice.logprob is None else choice.logprob
                reference_logprob = reference.logprobs(choice.context)[place]
                sample = _Sample(place, current, reference_logprob, advantage)
                samples.setdefault(choice.context, []).append(sample)
    return samples


class _Totals:
    """Sums over choices."""

    def __init__(self) -> None:
        self.count = 0
        self.loss = self.entropy = self.clipped = self.kl = 0.0

    def means(self) -> UpdateNumbers:
        count = self.count or 1
        return UpdateNumbers(self.loss / count, self.entropy / count, self.clipped / count, self.kl / count)


def _row_gradient(
    logprobs: Sequence[float],
    samples: Sequence[_Sample],
    settings: PolicyUpdate,
    entropy_weight: float,
    totals: _Totals,
) -> list[float]:
    """The gradient of the mean loss of one context's choices by its row of logits."""
    slopes = [0.0] * len(logprobs)
    for sample in samples:
        logprob = logprobs[sample.place]
        slope = choice_slope(logprob, sample.old_logprob, sample.advantage, settings.clip)
        totals.loss += choice_loss(logprob, sample.old_logprob, sample.advantage, settings.clip)
        totals.clipped += slope == 0 and sample.advantage != 0
        totals.kl += kl_penalty(logprob, sample.reference_logprob)
        if settings.kl_weight:
            slope += settings.kl_weight * kl_slope(logprob, sample.reference_logprob)
        slopes[sample.place] += slope / len(samples)
    totals.count += len(samples)
    totals.entropy += entropy(logprobs) * len(samples)
    return [
        descent - entropy_weight * spread
        for descent, spread in zip(logits_gradient(logprobs, slopes), entropy_gradient(logprobs), strict=True)
    ]
