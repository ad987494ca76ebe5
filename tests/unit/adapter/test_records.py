"""One call that several libraries and the proxy recorded is one sample; different calls are never merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from agentlightning import LlmProxyTraceToTriplet, TracerTraceToTriplet, TraceToMessages
from agentlightning.types import Span
from recorded_spans import written

Make = Callable[..., Span]
ALL: list[Any] = [TracerTraceToTriplet, LlmProxyTraceToTriplet, TraceToMessages]


def tokens(adapted: Any) -> list[Any]:
    return [each.response["token_ids"] for each in adapted.made]


@pytest.mark.parametrize("adapter", ALL)
def test_replies_that_share_an_id_are_several_calls(adapter: Any, proxied: Make) -> None:
    same_id = {"gen_ai.response.id": "chatcmpl-0"}
    spans = [proxied(f"q{n}", f"a{n}", ([n], [n]), more=same_id) for n in (1, 2, 3)]
    adapted = adapter().examine(spans)
    assert (len(adapted.made), adapted.unusable, adapted.set_aside) == (3, [], [])


@pytest.mark.parametrize("response_id", [None, "c1"])
@pytest.mark.parametrize("skew", [-3.0, 0.0, 0.2, 100.0])
def test_proxy_and_library_together_make_one_sample(
    response_id: str | None, skew: float, span: Make, proxied: Make, reward: Make
) -> None:
    """Also where the library writes no id, and where the clocks of the two hosts differ."""
    spans = [
        proxied("hi", "42", ([1, 2], [3]), more={"gen_ai.response.id": "c1"}, at=(100.01, 101.0)),
        span("generate_content policy", written("hi", "42", response_id), at=(100.0 + skew, 101.02 + skew)),
        reward(1.0, at=(105.0, 105.0)),
    ]
    for order in (spans, spans[::-1]):
        adapted = TracerTraceToTriplet().examine(order)
        assert [(each.prompt["token_ids"], each.reward) for each in adapted.made] == [([1, 2], 1.0)]
        assert (adapted.unusable, [each.span_id for each in adapted.set_aside]) == ([], [spans[1].span_id])
        assert len(TraceToMessages().examine(order).made) == 1


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("is_merged", [False, True])
def test_choices_that_proxy_and_library_recorded_are_samples_once(
    is_merged: bool, is_nested: bool, span: Make, proxied: Make
) -> None:
    """Also where the library wrote them as one text, as some do with streams."""
    reply = {"choices": [{"message": {"role": "assistant", "content": text}} for text in ("a0", "a1")]}
    ids = {"agentlightning.llm.choices.1.response_token_ids": [4]}
    more = {"agentlightning.llm.response": json.dumps(reply), **ids}
    said = ["a0a1"] if is_merged else ["a0", "a1"]
    by_library = written("hi", None) | {"gen_ai.request.choice.count": 2}
    by_library["gen_ai.output.messages"] = json.dumps([{"role": "assistant", "content": text} for text in said])
    outer = span("chat policy", by_library, at=(1.0, 2.0))
    call = proxied("hi", "a0", ([1], [3]), more=more, at=(1.1, 1.9))
    if is_nested:
        call.parent_id = outer.span_id
    adapted = TracerTraceToTriplet().examine([call, outer])
    assert [(each.response["message"]["content"], each.response["token_ids"]) for each in adapted.made] == [
        ("a0", [3]),
        ("a1", [4]),
    ]
    assert (adapted.unusable, [each.span_id for each in adapted.set_aside]) == ([], [outer.span_id])
    alone = TracerTraceToTriplet().examine([outer])
    assert (len(alone.made), len(alone.unusable)) == ((0, 1) if is_merged else (2, 0))


def test_a_call_that_was_made_twice_stays_two_calls(span: Make, proxied: Make) -> None:
    """A record of the proxy stands for one record of a library, so a third one is a call past the proxy."""
    twice = [proxied("hi", "42", ([1], [n])) for n in (7, 8)]
    by_library = [span("chat policy", written("hi", "42")) for _ in range(2)]
    assert tokens(TracerTraceToTriplet().examine([*twice, *by_library])) == [[7], [8]]
    assert tokens(TracerTraceToTriplet().examine([*twice, *by_library, span("chat policy", written("hi", "42"))])) == [
        [7],
        [8],
        [],
    ]
    other_library = [span("ChatCompletion", written("hi", "42")) for _ in range(2)]
    assert tokens(TracerTraceToTriplet().examine([*twice, *by_library, *other_library])) == [[7], [8]]


def test_other_content_is_another_call(span: Make, proxied: Make) -> None:
    call = proxied("hi", "42", ([1], [7]), more={"gen_ai.response.id": "c1"})
    for other in (written("hi", "43"), written("ho", "42"), written("hi", "42", "c2"), written("hi", "43", "c1")):
        assert len(TracerTraceToTriplet().examine([call, span("chat policy", other)]).made) == 2


def test_a_library_that_records_only_the_id_is_found_by_it(span: Make, proxied: Make) -> None:
    call = proxied("hi", "42", ([1], [7]), more={"gen_ai.response.id": "c1"})
    silent = {"gen_ai.operation.name": "chat", "gen_ai.response.id": "c1"}
    adapted = TracerTraceToTriplet().examine([call, span("chat policy", silent)])
    assert (tokens(adapted), adapted.unusable, len(adapted.set_aside)) == ([[7]], [], 1)
    other = TracerTraceToTriplet().examine([call, span("chat policy", {**silent, "gen_ai.response.id": "c2"})])
    assert (tokens(other), len(other.unusable)) == ([[7]], 1)


def test_a_failure_that_both_recorded_is_one(span: Make, proxied: Make) -> None:
    spans = [
        proxied("hi", "", error="503", more={"agentlightning.llm.response": "null"}),
        span("chat policy", written("hi", None), error="503"),
    ]
    adapted = TracerTraceToTriplet().examine(spans)
    assert [each.span_id for each in adapted.unusable] == [spans[0].span_id]


def test_calls_of_tools_are_compared_by_what_they_say(span: Make, proxied: Make) -> None:
    """Libraries write arguments anew, and some leave out the ids."""
    call = {"id": "c9", "type": "function", "function": {"name": "f", "arguments": '{"a":  1}'}}
    reply = {"choices": [{"message": {"role": "assistant", "content": None, "tool_calls": [call]}}]}
    by_proxy = proxied("hi", "", ([1], [7]), more={"agentlightning.llm.response": json.dumps(reply)})
    parts = [{"type": "tool_call", "name": "f", "arguments": {"a": 1}}]
    attributes = written("hi", None) | {"gen_ai.output.messages": json.dumps([{"role": "assistant", "parts": parts}])}
    assert tokens(TracerTraceToTriplet().examine([by_proxy, span("chat policy", attributes)])) == [[7]]


def test_calls_inside_of_each_other_are_one_only_if_they_say_the_same(span: Make, proxied: Make) -> None:
    """A library may leave its span open while the agent makes the next call."""
    outer = span("openai.chat", written("a", "1"), at=(10, 20))
    same = span("ChatCompletion", written("a", "1"), parent=outer, at=(11, 19))
    other = span("openai.chat", written("b", "2"), parent=outer, at=(12, 18))
    triplets = TracerTraceToTriplet().adapt([outer, same, other])
    assert [each.metadata["span_id"] for each in triplets] == [outer.span_id, other.span_id]


def test_calls_that_only_overlap_in_time_are_not_one(span: Make) -> None:
    """Two calls at the same time, with the same reply: repairing puts one into the other."""
    root = span("agent", at=(0, 100))
    spans = [
        root,
        span("chat policy", written("a", "yes"), parent=root, at=(1, 10)),
        span("chat policy", written("b", "yes"), parent=root, at=(2, 5)),
    ]
    assert len(TracerTraceToTriplet().adapt(spans)) == 2


def test_the_outermost_record_without_a_problem_is_kept(span: Make) -> None:
    """Google's ADK writes a span around the one that has the messages."""
    outer = span("call_llm", {"gen_ai.operation.name": "chat"}, at=(1, 9))
    inner = span("generate_content policy", written("a", "1"), parent=outer, at=(2, 8))
    adapted = TracerTraceToTriplet().examine([outer, inner])
    assert [each.metadata["span_id"] for each in adapted.made] == [inner.span_id]
    assert (adapted.unusable, [each.span_id for each in adapted.set_aside]) == ([], [outer.span_id])


def test_the_agent_is_known_from_either_record(span: Make, proxied: Make) -> None:
    agent = span("invoke_agent coder", {"gen_ai.agent.name": "coder", "gen_ai.operation.name": "invoke_agent"})
    by_library = span("chat policy", written("a", "1"), parent=agent)
    by_proxy = proxied("a", "1", ([1], [2]))
    (triplet,) = TracerTraceToTriplet(agent_match="cod").adapt([agent, by_library, by_proxy])
    assert (triplet.metadata["agent_name"], triplet.response["token_ids"]) == ("coder", [2])


def test_rewards_of_siblings_belong_to_the_call_whoever_recorded_it(span: Make, proxied: Make, reward: Make) -> None:
    turn = span("turn")
    spans = [
        turn,
        span("chat policy", written("a", "1"), parent=turn),
        proxied("a", "1", ([1], [2])),
        reward(0.3, parent=turn),
    ]
    (triplet,) = TracerTraceToTriplet(reward_match="first_sibling").adapt(spans)  # pyright: ignore[reportArgumentType]
    assert triplet.reward == 0.3


@pytest.mark.parametrize("adapter", ALL)
def test_what_the_proxy_marked_is_unusable(adapter: Any, proxied: Make, span: Make) -> None:
    """Also where a library, which knows no tokens, has nothing against it."""
    marked = proxied("a", "1", ([1], [2]), more={"agentlightning.llm.unusable": "not_received"})
    adapted = adapter().examine([marked, span("chat policy", written("a", "1"))])
    assert (adapted.made, [each.reason for each in adapted.unusable]) == ([], ["not_received"])
