"""Groups: the attempts at one task that GRPO compares with each other.

A group is used whole or not at all. One attempt that failed, or has no reward, or of which nothing can be
learned, and the group is dropped: to fill in a 0 would teach that the failure was the policy's doing, and
to leave the attempt out would compare with a mean that it was not part of by chance.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from agentlightning.adapter.triplet import TraceToTripletBase
from agentlightning.algorithm.policy_update import Choice, GroupMember
from agentlightning.demo.softmax_policy import SoftmaxPolicy
from agentlightning.types import AttemptedRollout, Rollout, Span, Triplet
from agentlightning.types.rewards import find_final_reward


@dataclass
class GatheredGroups:
    """What one step's rollouts came to."""

    groups: list[list[GroupMember]] = field(default_factory=list[list[GroupMember]])
    """Those that are whole, in order."""

    rewards: list[float] = field(default_factory=list[float])
    """Of all rollouts that have one, also of those whose group was dropped."""

    dropped_groups: int = 0
    dropped_rollouts: Counter[str] = field(default_factory=Counter[str])
    """Rollouts that broke their group, by why: ``failed``, ``unrewarded`` or ``unusable``."""

    retried_attempts: int = 0
    """Attempts that came to nothing and were followed by another."""

    unusable_calls: Counter[str] = field(default_factory=Counter[str])
    """Model calls that nothing can be learned from, by reason."""

    failures: Counter[str] = field(default_factory=Counter[str])
    """Why rollouts failed, in the words of the store."""

    def numbers(self) -> dict[str, float]:
        """All counts, for ``Algorithm.report``."""
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
    """Makes groups of rollouts that have ended.

    Args:
        policy: whose words are to be found in the spans; reads texts where token ids were not recorded.
        model: its name; calls of other models are none of our business.
        adapter: makes triplets of spans.
        group_size: rollouts of one task, which follow each other.
    """

    policy: SoftmaxPolicy
    model: str
    adapter: TraceToTripletBase
    group_size: int

    def gather(self, rollouts: Sequence[Rollout | None], spans: Mapping[str, Sequence[Span]]) -> GatheredGroups:
        """The groups, and what was dropped.

        Args:
            rollouts: group by group; None for one that the store knows no more.
            spans: of the newest attempt of each that succeeded, by rollout id.
        """
        gathered = GatheredGroups()
        for begin in range(0, len(rollouts), self.group_size):
            group = [self._member(rollout, spans, gathered) for rollout in rollouts[begin : begin + self.group_size]]
            whole = [member for member in group if member is not None]
            if len(whole) == len(group):
                gathered.groups.append(whole)
            else:
                gathered.dropped_groups += 1
        return gathered

    def _member(
        self, rollout: Rollout | None, spans: Mapping[str, Sequence[Span]], gathered: GatheredGroups
    ) -> GroupMember | None:
        if isinstance(rollout, AttemptedRollout):
            gathered.retried_attempts += rollout.attempt.sequence_id - 1
        if rollout is None or rollout.status != "succeeded":
            gathered.dropped_rollouts["failed"] += 1
            gathered.failures[_why(rollout)] += 1
            return None
        seen = spans.get(rollout.rollout_id, ())
        reward = find_final_reward(seen)
        if reward is None:
            gathered.dropped_rollouts["unrewarded"] += 1
            return None
        gathered.rewards.append(reward)
        choices = self._choices(seen, gathered.unusable_calls)
        if not choices:
            gathered.dropped_rollouts["unusable"] += 1
            return None
        return GroupMember(rollout.rollout_id, reward, choices)

    def _choices(self, spans: Sequence[Span], unusable: Counter[str]) -> list[Choice]:
        adapted = self.adapter.examine(spans)
        unusable.update(each.reason for each in adapted.unusable)
        choices: list[Choice] = []
        for triplet in adapted.made:
            if triplet.metadata.get("model") not in (None, self.model):
                continue
            said = self._choices_of_call(triplet)
            if not said:
                unusable["the reply has no word, or one that the policy never says"] += 1
            choices.extend(said)
        return choices

    def _choices_of_call(self, triplet: Triplet) -> list[Choice]:
        """One choice for each word of the reply; none if one of them is not the policy's."""
        prompt: Sequence[int] = triplet.prompt["token_ids"]
        reply: Sequence[int] = triplet.response["token_ids"]
        logprobs: Sequence[float] | None = triplet.metadata.get("logprobs")
        if not prompt or not reply:  # recorded by something that knows no tokens: the texts say the same
            prompt = self.policy.encode("\n".join(_text_of(message) for message in triplet.prompt["messages"]))
            reply = self.policy.encode(_text_of(triplet.response["message"] or {}))
            logprobs = None
        if any(self.policy.place_of(token_id) is None for token_id in reply):
            return []
        return [
            Choice((*prompt, *reply[:place]), token_id, None if logprobs is None else logprobs[place])
            for place, token_id in enumerate(reply)
        ]


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        parts = [cast("Mapping[str, Any]", part) for part in cast("list[Any]", content) if isinstance(part, dict)]
        return " ".join(str(part.get("text", "")) for part in parts)
    return content if isinstance(content, str) else ""


def _why(rollout: Rollout | None) -> str:
    if rollout is None:
        return "the store knows it no more"
    return f"{rollout.status}, {rollout.reason_code or 'no reason'}: {rollout.reason_message or 'not explained'}"
