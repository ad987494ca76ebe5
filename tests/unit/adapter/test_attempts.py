"""Spans of several attempts, and of several rollouts, never mix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from agentlightning import LlmProxyTraceToTriplet, TracerTraceToTriplet, TraceToMessages, TraceTree, find_final_reward
from agentlightning.errors import InvalidValue
from agentlightning.types import Span
from agentlightning.types.attempt_spans import by_attempt, newest_attempts

Make = Callable[..., Span]
TRIPLETS: list[Any] = [TracerTraceToTriplet, LlmProxyTraceToTriplet]
EARLY, LATE = "at-0190000000007000800000000000000a", "at-01900000000170008000000000000001"


def of(attempt: str, *spans: Span, rollout: str = "ro-1") -> list[Span]:
    return [
        span.model_copy(update={"rollout_id": rollout, "attempt_id": attempt, "sequence_id": number})
        for number, span in enumerate(spans, start=1)
    ]


@pytest.mark.parametrize("adapter", TRIPLETS)
def test_only_the_newest_attempt_is_used(adapter: Any, proxied: Make, reward: Make) -> None:
    lost = of("first", proxied("a", "1", ([1], [1])))
    won = of("second", proxied("a", "2", ([2], [2])), reward(1.0))
    adapted = adapter().examine([*lost, *won])
    assert [(each.response["token_ids"], each.reward) for each in adapted.made] == [([2], 1.0)]
    assert [each.span_id for each in adapted.unusable] == [lost[0].span_id]
    assert "earlier attempt" in adapted.unusable[0].reason
    conversations = TraceToMessages().examine([*lost, *won])
    assert (len(conversations.made), len(conversations.unusable)) == (1, 1)


@pytest.mark.parametrize("adapter", TRIPLETS)
def test_all_attempts_are_used_each_by_itself_if_asked(adapter: Any, proxied: Make, reward: Make) -> None:
    """The first one was lost without a reward, and gets none of its successor."""
    first = of("first", proxied("a", "1", ([1], [1])))
    second = of("second", proxied("a", "2", ([2], [2])), reward(1.0))
    other = of("first", proxied("b", "3", ([3], [3])), reward(0.5), rollout="ro-2")
    triplets = adapter(attempts="all").adapt([*first, *second, *other])
    assert [(each.response["token_ids"], each.reward) for each in triplets] == [([1], None), ([2], 1.0), ([3], 0.5)]
    assert len(TraceToMessages(attempts="all").adapt([*first, *second, *other])) == 3
    with pytest.raises(InvalidValue, match="latest"):
        adapter(attempts="latest")


@pytest.mark.parametrize("adapter", TRIPLETS)
def test_rollouts_stay_apart(adapter: Any, proxied: Make, reward: Make) -> None:
    spans = [
        *of("x", proxied("a", "1", ([1], [1])), rollout="ro-1"),
        *of("y", proxied("b", "2", ([2], [2])), reward(0.5), rollout="ro-2"),
    ]
    assert [each.reward for each in adapter().adapt(spans)] == [None, 0.5]


def test_attempts_that_repeat_the_ids_of_spans_are_told_apart(proxied: Make, reward: Make) -> None:
    """An agent that seeds the source of its ids writes the same ones in each attempt."""
    spans = [
        *of("first", proxied("a", "1", ([1], [1]), span_id="a" * 16), reward(0.1, parent="a" * 16)),
        *of("second", proxied("a", "2", ([2], [2]), span_id="a" * 16), reward(0.2, parent="a" * 16)),
    ]
    assert [each.reward for each in TracerTraceToTriplet(attempts="all").adapt(spans)] == [0.1, 0.2]
    tree = TraceTree.from_spans(spans)
    assert [len(root.children) for root in tree.children] == [1, 1]


def test_which_attempt_is_the_newest() -> None:
    """By the time in ids of our stores, in whatever order the spans come; else the last one to come."""
    assert newest_attempts([("r", LATE), ("r", EARLY)]) == {"r": ("r", LATE)}
    assert newest_attempts([("r", EARLY), ("r", LATE), ("q", EARLY)]) == {"r": ("r", LATE), "q": ("q", EARLY)}
    assert newest_attempts([("r", "b"), ("r", "a")]) == {"r": ("r", "a")}
    assert newest_attempts([("r", LATE), ("r", "mine")]) == {"r": ("r", "mine")}
    same_time = EARLY[:-1] + "0"
    assert newest_attempts([("r", EARLY), ("r", same_time)]) == {"r": ("r", same_time)}


def test_attempts_come_in_the_order_of_their_first_spans(span: Make) -> None:
    first, second = of("b", span("x"), span("y")), of("a", span("z"))
    assert list(by_attempt([first[0], *second, first[1]])) == [("ro-1", "b"), ("ro-1", "a")]


def test_the_final_reward_is_that_of_the_newest_attempt(span: Make, reward: Make) -> None:
    lost = of("first", reward(0.1))
    assert find_final_reward([*lost, *of("second", span("x"))]) is None
    won = of("second", reward(0.5), reward(0.7))
    assert find_final_reward([*lost, *won]) == 0.7
    assert find_final_reward([*lost, *won[::-1]]) == 0.7
    assert find_final_reward([each.model_copy(update={"sequence_id": 0}) for each in won[::-1]]) == 0.5
    assert find_final_reward([]) is None


def test_rewards_of_a_tree_of_several_attempts(proxied: Make, reward: Make) -> None:
    spans = [*of("first", proxied("a", "1", ([1], [1]))), *of("second", proxied("a", "2", ([2], [2])), reward(1.0))]
    assert [each.reward for each in TraceTree.from_spans(spans).to_trajectory()] == [None, 1.0]
