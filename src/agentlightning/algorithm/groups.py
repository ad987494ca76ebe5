"""Groups: the attempts at one task that `GRPO` compares with each other.

A group is used as a whole or not at all. If one of its attempts failed, has no reward, or has no call to train on, the
group is dropped. A reward of 0 in its place would teach that the policy caused the failure; and the mean of the others
would be the mean of another experiment, because attempts do not fail at random.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from agentlightning.adapter.adapters import TraceToTripletBase
from agentlightning.algorithm.batches import EndedRollout
from agentlightning.algorithm.policy import GroupMember, Policy, SampledCall
from agentlightning.errors import InvalidValue
from agentlightning.types import AttemptedRollout, Rollout, Span

_SAME_REWARD = 1e-9
"""A standard deviation up to this is rounding: all rewards of the group are equal."""


def group_advantages(rewards: Sequence[float], *, scale_by_deviation: bool) -> list[float]:
    """Return how much better than its group each attempt did.

    ``A_i = (r_i - mean(r)) / std(r)`` with the population's standard deviation: Shao et al., DeepSeekMath, 2024,
    https://arxiv.org/abs/2402.03300, section 4.1.2 (GRPO). Or ``A_i = r_i - mean(r)``: Liu et al., Understanding
    R1-Zero-Like Training, 2025, https://arxiv.org/abs/2503.20783 (Dr. GRPO), because dividing by the deviation gives
    tasks that are almost always, or almost never, solved more weight than others.

    Args:
        rewards: r_1 … r_G, shape [G], finite, at least one.
        scale_by_deviation: GRPO, else Dr. GRPO.

    Returns:
        Shape [G]. They sum to 0, and all are 0 if all rewards are equal: such a group teaches nothing.
    """
    mean = math.fsum(rewards) / len(rewards)
    differences = [reward - mean for reward in rewards]
    deviation = math.sqrt(math.fsum(difference * difference for difference in differences) / len(rewards))
    if deviation <= _SAME_REWARD:
        return [0.0] * len(rewards)
    return [difference / deviation for difference in differences] if scale_by_deviation else differences


@dataclass
class StepGroups:
    """What the rollouts of one step gave: the complete groups, and counts of everything that was dropped."""

    groups: list[list[GroupMember]] = field(default_factory=list[list[GroupMember]])
    """The complete groups, in the order of their tasks."""
    rewards: list[float] = field(default_factory=list[float])
    """Of all rollouts that have one, also of those whose group was dropped."""
    dropped_groups: int = 0
    dropped_rollouts: Counter[str] = field(default_factory=Counter[str])
    """Rollouts because of which their group was dropped, by cause: ``failed``, ``unrewarded`` or ``unusable``."""
    retried_attempts: int = 0
    """Attempts that ended without a result and were followed by another."""
    unusable_calls: Counter[str] = field(default_factory=Counter[str])
    """Model calls that cannot be trained on, by reason."""
    failures: Counter[str] = field(default_factory=Counter[str])
    """Rollouts that did not succeed, by status and reason as the store gives them."""

    def numbers(self) -> dict[str, float]:
        """Return all counts, for ``Algorithm.report``."""
        numbers = {
            "groups_used": float(len(self.groups)),
            "groups_dropped": float(self.dropped_groups),
            "rollouts_failed": float(self.dropped_rollouts["failed"]),
            "rollouts_unrewarded": float(self.dropped_rollouts["unrewarded"]),
            "rollouts_unusable": float(self.dropped_rollouts["unusable"]),
            "attempts_retried": float(self.retried_attempts),
            "calls_unusable": float(self.unusable_calls.total()),
        }
        if self.rewards:
            numbers["reward_mean"] = math.fsum(self.rewards) / len(self.rewards)
        return numbers


@dataclass(frozen=True)
class GroupReader:
    """Makes groups of rollouts and their spans.

    Args:
        policy: reads the tokens of each call.
        model: name of the policy; calls of other models are ignored.
        adapter: makes triplets of spans.
        group_size: number of consecutive rollouts that have the same task.
        scale_by_deviation: see ``group_advantages``.
    """

    policy: Policy
    model: str
    adapter: TraceToTripletBase
    group_size: int
    scale_by_deviation: bool

    def read(self, rollouts: Sequence[EndedRollout | None]) -> StepGroups:
        """Return the complete groups, and counts of what was dropped.

        Args:
            rollouts: group after group; None for one that is not in the store any more.
        """
        step = StepGroups()
        for begin in range(0, len(rollouts), self.group_size):
            group = [self._attempt(each, step) for each in rollouts[begin : begin + self.group_size]]
            complete = [attempt for attempt in group if attempt is not None]
            if len(complete) < len(group):
                step.dropped_groups += 1
                continue
            advantages = group_advantages(
                [reward for _, reward, _ in complete], scale_by_deviation=self.scale_by_deviation
            )
            step.groups.append(
                [
                    GroupMember(rollout_id, reward, advantage, calls)
                    for (rollout_id, reward, calls), advantage in zip(complete, advantages, strict=True)
                ]
            )
        return step

    def _attempt(self, ended: EndedRollout | None, step: StepGroups) -> tuple[str, float, list[SampledCall]] | None:
        rollout = None if ended is None else ended.rollout
        if isinstance(rollout, AttemptedRollout):
            step.retried_attempts += rollout.attempt.sequence_id - 1
        if ended is None or rollout is None or rollout.status != "succeeded":
            step.dropped_rollouts["failed"] += 1
            step.failures[_failure_of(rollout)] += 1
            return None
        reward = ended.reward
        if reward is None:
            step.dropped_rollouts["unrewarded"] += 1
            return None
        step.rewards.append(reward)
        calls = self._calls(ended.spans, step.unusable_calls)
        if not calls:
            step.dropped_rollouts["unusable"] += 1
            return None
        return rollout.rollout_id, reward, calls

    def _calls(self, spans: Sequence[Span], unusable: Counter[str]) -> list[SampledCall]:
        adapted = self.adapter.examine(spans)
        unusable.update(each.reason for each in adapted.unusable)
        calls: list[SampledCall] = []
        for triplet in adapted.made:
            if triplet.metadata.get("model") not in (None, self.model):
                continue
            try:
                calls.append(self.policy.read_call(triplet))
            except InvalidValue as error:
                unusable[error.message] += 1
        return calls


def _failure_of(rollout: Rollout | None) -> str:
    if rollout is None:
        return "not in the store any more"
    return f"{rollout.status}, {rollout.reason_code or 'no reason'}: {rollout.reason_message or 'not explained'}"
