"""The work of an adapter grows with the number of calls, not with its square."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

import agentlightning.adapter
from agentlightning import LlmProxyTraceToTriplet, RewardMatchPolicy, TracerTraceToTriplet, TraceToMessages
from agentlightning.adapter.containment import shortest_around
from agentlightning.types import Span
from recorded_spans import written

Make = Callable[..., Span]
HERE = str(agentlightning.adapter.__path__[0])
FEW = 40


def lines_run(work: Callable[[], Any]) -> int:
    """How many lines of the adapters run, each turn of a loop counted."""
    count = 0

    def on_line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += 1
        return on_line

    def on_call(frame: FrameType, event: str, argument: Any) -> Any:
        return on_line if frame.f_code.co_filename.startswith(HERE) else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def calls(number: int, shape: str, span: Make, proxied: Make, reward: Make) -> list[Span]:
    """An attempt of many calls that proxy and library recorded."""
    root = span("agent", at=(0, 10_000))
    spans = [root]
    for index in range(number):
        at = {
            "in turn": (10 + index, 10.5 + index),
            "at once": (10.0, 20.0),
            "growing": (10.0, 20.0 + index),
            "the same": (10 + index, 10.5 + index),
        }[shape]
        asked = "q" if shape == "the same" else f"q{index}"
        spans += [
            proxied(asked, "a", ([1], [index]), at=at),
            span("chat policy", written(asked, "a", f"c{index}"), parent=root, at=at),
            reward(1.0, parent=root, at=at),
        ]
    return spans


ADAPTERS: dict[str, Any] = {
    "tracer": TracerTraceToTriplet(),
    "siblings": TracerTraceToTriplet(reward_match=RewardMatchPolicy.FIRST_SIBLING),
    "proxy": LlmProxyTraceToTriplet(),
    "messages": TraceToMessages(),
}
SHAPES = ["in turn", "at once", "growing", "the same"]
FAST = [
    ("tracer", "growing"),
    ("tracer", "the same"),
    ("siblings", "in turn"),
    ("proxy", "at once"),
    ("messages", "in turn"),
]


def check_growth(adapter: Any, few: list[Span], many: list[Span], number: int) -> None:
    works = [lines_run(lambda spans=spans: adapter.examine(spans)) for spans in (few, many)]
    assert works[1] < 4.8 * works[0], works
    assert len(adapter.examine(many).made) == number


@pytest.mark.parametrize(("name", "shape"), FAST)
def test_four_times_the_calls_are_four_times_the_work(
    name: str, shape: str, span: Make, proxied: Make, reward: Make
) -> None:
    few, many = (calls(number, shape, span, proxied, reward) for number in (FEW, 4 * FEW))
    check_growth(ADAPTERS[name], few, many, 4 * FEW)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_two_thousand_calls(name: str, shape: str, span: Make, proxied: Make, reward: Make) -> None:
    few, many = (calls(number, shape, span, proxied, reward) for number in (500, 2_000))
    check_growth(ADAPTERS[name], few, many, 2_000)


intervals = st.tuples(st.integers(0, 6), st.integers(0, 6)).map(lambda pair: (float(min(pair)), float(max(pair))))


@settings(max_examples=200, deadline=None)
@given(st.lists(intervals, max_size=8), st.lists(intervals, max_size=8))
def test_the_shortest_interval_around_another(
    wanted: list[tuple[float, float]], around: list[tuple[float, float]]
) -> None:
    """Against the definition."""

    def expected(one: tuple[float, float]) -> int | None:
        places = [place for place, each in enumerate(around) if each[0] <= one[0] and one[1] <= each[1] and each != one]
        return min(places, key=lambda place: (around[place][1] - around[place][0], place), default=None)

    assert shortest_around(wanted, around) == [expected(each) for each in wanted]
