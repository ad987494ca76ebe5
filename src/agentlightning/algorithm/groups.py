"""Groups: the attempts at one task that `GRPO` compares with each other.

An attempt that failed, has no reward, or has no call to train on is left out, and the others are compared with each
other, if two are left. It is not an attempt with reward 0: that would teach that the policy caused the failure, which
only the user knows (`OnFailure`). Attempts may not fail at random, so the mean of the others can be too high or too
low. ``drop_group`` avoids that, at the price of most groups: of groups of 16 with 10 % failures 0.9^16 = 19 % remain.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from agentlightning.adapter.adapters import TraceToTripletBase
from agentlightning.algorithm.batches import EndedRollout
from agentlightning.algorithm.policy import GroupMember, Policy, SampledCall
from agentlightning.errors import InvalidValue
from agentlightning.lifecycle import reasons
from agentlightning.types import AttemptedRollout, Rollout, Span

OnFailure: TypeAlias = Literal["drop_member", "drop_group"] | float
"""What becomes of a group with a failed attempt: the attempt is left out, or the group is, or the attempt has this
reward."""

_NOT_THE_AGENT = frozenset({
    reasons.CANCELLED, reasons.POISON, reasons.RELEASED, reasons.REQUEUED, reasons.SUPERSEDED, reasons.UNCONFIRMED,
    reasons.UNRESPONSIVE, reasons.WORKER_LOST,
})  # fmt: skip
"""Reasons of failures that say nothing about what the policy did."""

_DROPPED_WORDS = {
    "failed": "failed rollouts",
    "unrewarded": "rollouts without a reward",
    "unusable": "rollouts without a model call that can be learned from",
    "on_defaults": "rollouts that ran with the default resources of their runner",
}

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
    """What the rollouts of one step gave: the groups to learn from, and counts of everything that was dropped."""

    groups: list[list[GroupMember]] = field(default_factory=list[list[GroupMember]])
    """In the order of their tasks, each of at least two attempts."""
    rewards: list[float] = field(default_factory=list[float])
    """Of all rollouts that have one, also of those whose group was dropped."""
    dropped_groups: int = 0
    dropped_rollouts: Counter[str] = field(default_factory=Counter[str])
    """Rollouts that cannot be learned from, by cause: a key of ``_DROPPED_WORDS``."""
    equal_groups: int = 0
    """Groups of which all rewards are equal: they teach nothing."""
    repeated_groups: int = 0
    """Of these, those of which all attempts said exactly the same."""
    retried_attempts: int = 0
    """Attempts that ended without a result and were followed by another."""
    unusable_calls: Counter[str] = field(default_factory=Counter[str])
    """Model calls that cannot be trained on, by reason."""
    calls_set_aside: int = 0
    """Records of model calls that the adapter left out on purpose: calls on the side, second records of a call."""
    no_model_calls: int = 0
    """Attempts with a reward and without any recorded model call, although they were given the policy to call."""
    failures: Counter[str] = field(default_factory=Counter[str])
    """Rollouts that did not succeed, by status and reason as the store gives them."""

    def numbers(self) -> dict[str, float]:
        """Return all counts, for ``Algorithm.report``."""
        numbers = {
            "groups_used": float(len(self.groups)),
            "groups_dropped": float(self.dropped_groups),
            "failures": float(self.failures.total() + self.retried_attempts),
            "rollouts_failed": float(self.failures.total()),
            "rollouts_unrewarded": float(self.dropped_rollouts["unrewarded"]),
            "rollouts_unusable": float(self.dropped_rollouts["unusable"]),
            "rollouts_on_defaults": float(self.dropped_rollouts["on_defaults"]),
            "attempts_retried": float(self.retried_attempts),
            "calls_unusable": float(self.unusable_calls.total()),
            "calls_set_aside": float(self.calls_set_aside),
            "no_model_calls": float(self.no_model_calls),
        }
        if self.groups:
            numbers["frac_reward_zero_std"] = self.equal_groups / len(self.groups)
        if self.rewards:
            numbers["reward_mean"] = math.fsum(self.rewards) / len(self.rewards)
        return numbers

    @property
    def attempts(self) -> int:
        """How many attempts there are to learn from."""
        return sum(map(len, self.groups))

    @property
    def has_spread(self) -> bool:
        """Whether any attempt was better than another at the same task."""
        return self.equal_groups < len(self.groups)

    def describe_dropped(self) -> str:
        """Return what was dropped and why, in words."""
        counts = [f"{_DROPPED_WORDS[cause]}: {count}" for cause, count in self.dropped_rollouts.most_common()]
        common = [*self.failures.most_common(1), *self.unusable_calls.most_common(1)]
        most = "".join(f"; {count}× {reason}" for reason, count in common)
        if self.no_model_calls:
            most += f"; {self.no_model_calls}× no model call was recorded: do agents call the endpoint of their LLM?"
        groups = "1 group" if self.dropped_groups == 1 else f"{self.dropped_groups} groups"
        what = f"dropped {groups}" if self.dropped_groups else "left some rollouts out of their groups"
        return f"{what} ({', '.join(counts)}{most})"

    def describe_equal(self) -> str:
        """Return why, as far as can be told, no attempt was better than another."""
        if self.repeated_groups == self.equal_groups:
            return (
                "all attempts at a task gave exactly the same replies. Does the agent pin temperature 0 or a seed "
                "(only through an LLM proxy can GRPO impose its own sampling), or does the policy give all "
                "probability to one reply?"
            )
        low, high = min(self.rewards), max(self.rewards)
        if high - low <= _SAME_REWARD:
            return (
                f"the replies differ, but every reward is {low:g}. Does the reward depend on the reply at all? Can the "
                "policy give the right reply (a SoftmaxPolicy needs its words in the vocabulary)? Are the tasks far "
                "too hard, or too easy?"
            )
        return (
            f"the replies differ, and rewards go from {low:g} to {high:g}, but only between tasks. Does the reward "
            "depend on the task alone? Is each task always solved, or never? A larger group_size finds rare successes."
        )


@dataclass(frozen=True)
class GroupReader:
    """Makes groups of rollouts and their spans.

    Args:
        policy: reads the tokens of each call.
        model: name of the policy; calls of other models are ignored.
        adapter: makes triplets of spans.
        group_size: number of consecutive rollouts that have the same task.
        scale_by_deviation: see ``group_advantages``.
        on_failure: what becomes of a group with a failed attempt.
    """

    policy: Policy
    model: str
    adapter: TraceToTripletBase
    group_size: int
    scale_by_deviation: bool
    on_failure: OnFailure = "drop_member"

    def read(self, rollouts: Sequence[EndedRollout | None]) -> StepGroups:
        """Return the groups to learn from, and counts of what was dropped.

        Args:
            rollouts: group after group; None for one that is not in the store any more.
        """
        step = StepGroups()
        for begin in range(0, len(rollouts), self.group_size):
            group = [self._attempt(each, step) for each in rollouts[begin : begin + self.group_size]]
            usable = [attempt for attempt in group if attempt is not None]
            if len(usable) < (len(group) if self.on_failure == "drop_group" else 2):
                step.dropped_groups += 1
                continue
            advantages = group_advantages(
                [reward for _, reward, _ in usable], scale_by_deviation=self.scale_by_deviation
            )
            if not any(advantages):
                step.equal_groups += 1
                replies = {tuple(tuple(call.completion_ids) for call in calls) for _, _, calls in usable}
                step.repeated_groups += len(replies) == 1
            step.groups.append(
                [
                    GroupMember(rollout_id, reward, advantage, calls)
                    for (rollout_id, reward, calls), advantage in zip(usable, advantages, strict=True)
                ]
            )
        return step

    def _attempt(self, ended: EndedRollout | None, step: StepGroups) -> tuple[str, float, list[SampledCall]] | None:
        rollout = None if ended is None else ended.rollout
        if isinstance(rollout, AttemptedRollout):
            step.retried_attempts += rollout.attempt.sequence_id - 1
        has_failed = rollout is None or rollout.status != "succeeded"
        step.failures.update([_failure_of(rollout)] if has_failed else [])
        if ended is not None and ended.on_defaults:
            step.dropped_rollouts["on_defaults"] += 1
            return None
        reward = reward_of(ended, self.on_failure)
        if ended is None or rollout is None or reward is None:
            step.dropped_rollouts["failed" if has_failed else "unrewarded"] += 1
            return None
        step.rewards.append(reward)
        calls = self._calls(ended.spans, step)
        if not calls:
            step.dropped_rollouts["unusable"] += 1
            return None
        return rollout.rollout_id, reward, calls

    def _calls(self, spans: Sequence[Span], step: StepGroups) -> list[SampledCall]:
        adapted, unusable = self.adapter.examine(spans), step.unusable_calls
        step.no_model_calls += not adapted.has_calls
        unusable.update(each.reason for each in adapted.unusable)
        step.calls_set_aside += len(adapted.set_aside)
        calls: list[SampledCall] = []
        for triplet in adapted.made:
            if triplet.metadata.get("model") not in (None, self.model):
                continue
            try:
                calls.append(self.policy.read_call(triplet))
            except InvalidValue as error:
                unusable[error.message] += 1
        return calls


def reward_of(ended: EndedRollout | None, on_failure: OnFailure) -> float | None:
    """Return the reward of an attempt; None if it has none.

    If ``on_failure`` is a number, that is the reward of one that failed by itself: by an error of the agent, or because
    it took too long or too much memory. A worker that was lost, or a rollout that was cancelled, is nobody's failure.
    """
    if ended is None or ended.rollout.status == "succeeded" or isinstance(on_failure, str):
        return None if ended is None else ended.reward
    is_own = ended.rollout.status == "failed" and ended.rollout.reason_code not in _NOT_THE_AGENT
    return float(on_failure) if is_own else None


def _failure_of(rollout: Rollout | None) -> str:
    if rollout is None:
        return "not in the store any more"
    return f"{rollout.status}, {rollout.reason_code or 'no reason'}: {rollout.reason_message or 'not explained'}"
