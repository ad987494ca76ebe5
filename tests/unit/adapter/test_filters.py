"""Side calls of an agent are left out by a filter, and counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from agentlightning import CallFilter, LlmProxyTraceToTriplet, ModelCall, TracerTraceToTriplet, TraceToMessages
from agentlightning.errors import InvalidValue
from agentlightning.types import Span

Make = Callable[..., Span]
ALL: list[Any] = [TracerTraceToTriplet, LlmProxyTraceToTriplet, TraceToMessages]


@pytest.fixture
def spans(span: Make, proxied: Make) -> list[Span]:
    """A call with tools below two agents, and a call for a title."""
    tools = [{"type": "function", "function": {"name": "f"}}]
    messages = [{"role": "system", "content": "You write code."}, {"role": "user", "content": "a"}]
    planner = span("invoke_agent", {"gen_ai.agent.name": "planner"})
    coder = span("invoke_agent", {"gen_ai.agent.name": "coder"}, parent=planner)
    request = {"agentlightning.llm.request": json.dumps({"messages": messages, "tools": tools})}
    main = proxied("a", "1", ([1], [1]), more=request, parent=coder)
    title = proxied("Name this", "2", ([2], [2]), more={"gen_ai.request.model": "small"}, parent=planner)
    return [planner, coder, main, title]


@pytest.mark.parametrize("adapter", ALL)
@pytest.mark.parametrize(
    "call_filter",
    [
        CallFilter(models=["policy"]),
        CallFilter(has_tools=True),
        CallFilter(agent="coder$"),
        CallFilter(agent="^planner/coder$"),
        CallFilter(system="write code"),
        CallFilter(models={"policy"}, has_tools=True, agent="coder", system="code"),
        lambda call: call.prompt_token_ids == [1],
    ],
)
def test_calls_are_left_out_and_counted(
    adapter: Any, call_filter: Callable[[ModelCall], bool], spans: list[Span]
) -> None:
    adapted = adapter(call_filter=call_filter).examine(spans)
    assert (len(adapted.made), adapted.unusable) == (1, [])
    assert [(each.span_id, each.reason) for each in adapted.set_aside] == [
        (spans[3].span_id, "call_filter leaves the call out")
    ]
    assert len(adapter(call_filter=None).examine(spans).made) == 2


@pytest.mark.parametrize("adapter", ALL)
def test_side_calls_are_left_out_unless_asked_for(adapter: Any, spans: list[Span]) -> None:
    adapted = adapter().examine(spans)
    assert (len(adapted.made), adapted.unusable) == (1, [])
    ((span_id, reason),) = [(each.span_id, each.reason) for each in adapted.set_aside]
    assert span_id == spans[3].span_id
    assert "a call on the side" in reason


@pytest.mark.parametrize("adapter", ALL)
def test_calls_without_tools_in_a_conversation_with_tools_are_used(adapter: Any, proxied: Make) -> None:
    """A plan before the tools, and an answer after them."""
    tools = [{"type": "function", "function": {"name": "f"}}]
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user", "assistant", "user")]
    requests = [{"messages": turns[:2]}, {"messages": turns[:4], "tools": tools}, {"messages": turns}]
    side = {"messages": [{"role": "system", "content": "title"}, *turns[1:]]}
    spans = [
        proxied("q", str(number), ([number], [number]), more={"agentlightning.llm.request": json.dumps(request)})
        for number, request in enumerate([*requests, side], 1)
    ]
    adapted = adapter().examine(spans)
    assert len(adapted.made) == 3
    assert [each.span_id for each in adapted.set_aside] == [spans[3].span_id]


@pytest.mark.parametrize("adapter", ALL)
def test_where_no_call_has_tools_all_are_used(adapter: Any, proxied: Make) -> None:
    spans = [proxied(f"question {number}", str(number), ([number], [number])) for number in (1, 2, 3)]
    assert len(adapter().examine(spans).made) == 3


@pytest.mark.parametrize("adapter", ALL)
def test_a_filter_that_is_none_is_named(adapter: Any) -> None:
    with pytest.raises(InvalidValue, match="'mian' is neither a function"):
        adapter(call_filter="mian")


def test_the_other_way_round(spans: list[Span]) -> None:
    (triplet,) = TracerTraceToTriplet(call_filter=CallFilter(has_tools=False)).adapt(spans)
    assert triplet.response["token_ids"] == [2]


def test_calls_in_a_reward_function_are_counted_as_well(proxied: Make, reward: Make) -> None:
    judged = reward(1.0)
    judge = proxied("how good?", "very", ([9], [9]), parent=judged)
    adapted = TracerTraceToTriplet().examine([judged, judge])
    assert [(each.span_id, each.reason) for each in adapted.set_aside] == [
        (judge.span_id, "a reward function made the call")
    ]
