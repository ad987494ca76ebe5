"""Spans as a tree in time, whatever holes they have."""

from __future__ import annotations

from typing import Any

import pytest

from agentlightning.cli.waterfall import _bar, lines
from agentlightning.types import Event, Span, TraceStatus


def span(name: str, parent: str | None = None, start: float | None = 0.0, end: float | None = 1.0, **more: Any) -> Span:
    made = Span.from_attributes(
        rollout_id="ro-1", attempt_id="at-1", attributes=more.pop("attributes", {}), name=name, span_id=name
    )
    return made.model_copy(update={"parent_id": parent, "start_time": start, "end_time": end} | more)


def tree(*spans: Span) -> list[tuple[int, str]]:
    return [(each.depth, each.span.name) for each in lines(spans)]


def test_children_are_below_their_parents_in_the_order_in_which_they_began() -> None:
    spans = [span("b", "root", 2), span("leaf", "a", 1.5), span("root", None, 0), span("a", "root", 1)]
    assert tree(*spans) == [(0, "root"), (1, "a"), (2, "leaf"), (1, "b")]


def test_a_span_whose_parent_is_missing_is_a_root() -> None:
    assert tree(span("orphan", "nowhere", 1), span("root")) == [(0, "root"), (0, "orphan")]


@pytest.mark.parametrize("parents", [{"a": "a"}, {"a": "b", "b": "a"}, {"a": "c", "b": "a", "c": "b"}])
def test_circles_of_parents_are_drawn_once(parents: dict[str, str]) -> None:
    found = lines([span("root"), *(span(name, parent) for name, parent in parents.items())])
    assert sorted(each.span.name for each in found) == sorted(["root", *parents])


def test_nesting_may_be_deeper_than_the_stack_of_python() -> None:
    deep = [span(str(number), str(number - 1) if number else None) for number in range(5_000)]
    assert lines(deep)[-1].depth == 4_999


def test_equal_ids_and_missing_times_lose_nothing() -> None:
    spans = [span("x"), span("x"), span("y", "x", None, None)]
    found = lines(spans)
    assert len(found) == 3
    assert [each.seconds for each in found if each.span.name == "y"] == [None]


def test_times_are_counted_from_the_earliest_span() -> None:
    first, second = lines([span("a", None, 100.0, 103.0), span("b", "a", 101.0, 100.5)])
    assert (first.start, first.seconds) == (0.0, 3.0)
    assert (second.start, second.seconds) == (1.0, 0.0)  # a clock that went back takes no negative time


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({"attributes": {"gen_ai.usage.input_tokens": 12, "gen_ai.usage.output_tokens": 3}}, "12 → 3 tokens"),
        ({"attributes": {"gen_ai.usage.output_tokens": 3}}, "? → 3 tokens"),
        (
            {"attributes": {"agentlightning.llm.retries": 2, "agentlightning.llm.model_version": "7"}},
            "2 retries, weights 7",
        ),
        (
            {"attributes": {"agentlightning.reward.0.name": "primary", "agentlightning.reward.0.value": 0.5}},
            "primary reward 0.5",
        ),
        ({"status": TraceStatus(status_code="ERROR", description="boom\x1b[0m")}, "error: boom\ufffd[0m"),
        (
            {"events": [Event(name="exception", attributes={"exception.type": "KeyError", "exception.message": "x"})]},
            "raised KeyError: x",
        ),
        ({"end": None}, "not ended"),
        ({"attributes": {"agentlightning.operation.name": "search"}}, "search"),
        ({}, ""),
    ],
)
def test_what_matters_is_noted(fields: dict[str, Any], note: str) -> None:
    [line] = lines([span("x", **fields)])
    assert line.note == note


def test_bars_show_where_in_the_whole_time_a_span_lies() -> None:
    whole, late, instant, open_end = lines(
        [span("a", None, 0, 10), span("b", "a", 5, 10), span("c", "a", 9.99, 9.99), span("d", "a", 9.995, None)]
    )
    assert _bar(whole, 10.0, 8) == "████████"
    assert _bar(late, 10.0, 8) == "    ████"
    assert _bar(instant, 10.0, 8) == "       ▏"
    assert _bar(open_end, 10.0, 8) == "       ┄"
    assert _bar(instant, 0.0, 3) == "▏  "
