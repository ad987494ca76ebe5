"""Spans to triplets: tokens, log-probabilities, rewards, and what cannot be used."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider

from agentlightning import LlmProxyTraceToTriplet, RewardMatchPolicy, TracerTraceToTriplet, TraceTree
from agentlightning.adapter.adapters import TraceToTripletBase
from agentlightning.types import Span

Make = Callable[..., Span]
BOTH: list[Any] = [TracerTraceToTriplet, LlmProxyTraceToTriplet]


@pytest.mark.parametrize("adapter", BOTH)
def test_a_call_that_the_proxy_recorded(adapter: type[TraceToTripletBase], proxied: Make, reward: Make) -> None:
    spans = [proxied("2 + 2?", "4", ([1, 2], [7, 8]), [-0.5, -0.25], {"gen_ai.response.id": "r1"}), reward(0.5)]
    (triplet,) = adapter().adapt(spans)
    assert triplet.prompt == {
        "token_ids": [1, 2],
        "messages": [{"role": "user", "content": "2 + 2?"}],
        "tools": None,
    }
    assert triplet.response == {"token_ids": [7, 8], "message": {"role": "assistant", "content": "4"}}
    assert triplet.reward == 0.5
    assert triplet.metadata == {
        "logprobs": [-0.5, -0.25],
        "model": "policy",
        "model_version": "3",
        "response_id": "r1",
        "finish_reason": "stop",
        "agent_name": "",
        "span_id": spans[0].span_id,
        "sequence_id": spans[0].sequence_id,
    }


@pytest.mark.parametrize("adapter", BOTH)
def test_calls_come_in_the_order_of_time_and_a_reward_belongs_to_those_before_it(
    adapter: type[TraceToTripletBase], proxied: Make, reward: Make
) -> None:
    spans = [proxied("a", "1", ([1], [1])), proxied("b", "2", ([2], [2])), reward(1.0), proxied("c", "3", ([3], [3]))]
    triplets = adapter().adapt(list(reversed(spans)))
    assert [(each.prompt["token_ids"], each.reward) for each in triplets] == [([1], 1.0), ([2], 1.0), ([3], None)]


@pytest.mark.parametrize("adapter", BOTH)
def test_what_cannot_be_used_is_named_and_logged_once(
    adapter: type[TraceToTripletBase], proxied: Make, span: Make, caplog: pytest.LogCaptureFixture
) -> None:
    failed = proxied("a", "", error="503 from the backend")
    empty = span("chat policy", {"agentlightning.llm.request": "{", "agentlightning.llm.response": "null"})
    good = proxied("b", "2", ([2], [2]))
    adapted = adapter().examine([failed, empty, good, span("something else")])
    assert [each.metadata["span_id"] for each in adapted.made] == [good.span_id]
    assert [(each.span_id, each.name) for each in adapted.unusable] == [
        (failed.span_id, "chat policy"),
        (empty.span_id, "chat policy"),
    ]
    assert "the call failed: 503 from the backend" in adapted.unusable[0].reason
    with caplog.at_level(logging.WARNING):
        assert len(adapter().adapt([failed, empty, good])) == 1
        assert len(adapter().adapt([good])) == 1
    (record,) = caplog.records
    assert "2 spans of model calls could not be used" in record.message
    assert failed.span_id in record.message


def test_without_token_ids_texts_are_enough_unless_they_are_asked_for(proxied: Make) -> None:
    plain = proxied("a", "1")
    (triplet,) = TracerTraceToTriplet().adapt([plain])
    assert (triplet.prompt["token_ids"], triplet.response["token_ids"], triplet.metadata["logprobs"]) == ([], [], None)
    for strict in (TracerTraceToTriplet(_skip_empty_token_spans=True), LlmProxyTraceToTriplet()):
        adapted = strict.examine([plain])
        assert adapted.made == []
        assert "return_token_ids" in adapted.unusable[0].reason


@pytest.mark.parametrize("logprobs", [[-0.5], [-0.5, float("nan")], [], None])
def test_logprobs_that_do_not_stand_beside_their_tokens_are_none(logprobs: list[float] | None, proxied: Make) -> None:
    (triplet,) = LlmProxyTraceToTriplet().adapt([proxied("a", "b", ([1], [7, 8]), logprobs)])
    assert triplet.response["token_ids"] == [7, 8]
    assert triplet.metadata["logprobs"] is None


def test_token_ids_are_also_read_from_the_reply_itself(span: Make) -> None:
    reply = {"prompt_token_ids": [1], "choices": [{"message": {"role": "assistant", "content": "x"}, "token_ids": [2]}]}
    call = span(
        "chat m",
        {"agentlightning.llm.request": '{"messages": []}', "agentlightning.llm.response": json.dumps(reply)},
    )
    (triplet,) = LlmProxyTraceToTriplet().adapt([call])
    assert (triplet.prompt["token_ids"], triplet.response["token_ids"]) == ([1], [2])


def test_one_call_recorded_by_client_and_proxy_is_one_triplet_with_tokens(span: Make, proxied: Make) -> None:
    outer = span("openai.chat.completion", {"gen_ai.prompt.0.content": "a"}, at=(10, 20))
    inside = proxied("a", "1", ([1], [2]), parent=outer, at=(11, 19))
    (triplet,) = TracerTraceToTriplet().adapt([outer, inside])
    assert triplet.metadata["span_id"] == inside.span_id

    lost_its_parent = proxied("a", "1", ([1], [2]), at=(11, 19))
    root = span("agent", at=(0, 100), span_id="a" * 16)
    outer = span("openai.chat", {"gen_ai.prompt.0.content": "a"}, at=(10, 20), parent=root)
    (triplet,) = TracerTraceToTriplet().adapt([root, outer, lost_its_parent])
    assert triplet.metadata["span_id"] == lost_its_parent.span_id
    apart = TracerTraceToTriplet(repair_hierarchy=False)
    assert len(apart.examine([root, outer, lost_its_parent]).made) == 1
    assert len(apart.examine([root, outer, lost_its_parent]).unusable) == 1

    same_reply = {"gen_ai.response.id": "r9"}
    text = {"gen_ai.prompt.0.content": "a", "gen_ai.completion.0.content": "1"}
    beside = span("openai.chat", {**text, **same_reply}, at=(50, 51))
    (triplet,) = TracerTraceToTriplet().adapt([beside, proxied("a", "1", ([1], [2]), more=same_reply, at=(70, 71))])
    assert triplet.response["token_ids"] == [2]


def test_agents_are_told_apart(span: Make, proxied: Make) -> None:
    writer = span("invoke_agent writer", {"gen_ai.agent.name": "writer"})
    critic = span("invoke_agent critic", {"agent.name": "critic"}, parent=writer)
    spans = [writer, critic, proxied("a", "1", ([1], [1]), parent=writer), proxied("b", "2", ([2], [2]), parent=critic)]
    assert [each.metadata["agent_name"] for each in TracerTraceToTriplet().adapt(spans)] == ["writer", "critic"]
    only = TracerTraceToTriplet(agent_match="crit").adapt(spans)
    assert [(each.metadata["agent_name"], each.prompt["token_ids"]) for each in only] == [("critic", [2])]


def test_calls_of_a_reward_function_are_not_the_agents(proxied: Make, reward: Make) -> None:
    call, judged = proxied("a", "1", ([1], [1])), reward(1.0)
    spans = [call, judged, proxied("how good?", "very", ([9], [9]), parent=judged)]
    assert [each.prompt["token_ids"] for each in TracerTraceToTriplet().adapt(spans)] == [[1]]
    everything = TracerTraceToTriplet(exclude_llm_call_in_reward=False).adapt(spans)
    assert [each.prompt["token_ids"] for each in everything] == [[1], [9]]


def test_rewards_of_siblings(span: Make, proxied: Make, reward: Make) -> None:
    one, two = span("turn"), span("turn")
    spans = [
        one,
        two,
        proxied("a", "1", ([1], [1]), parent=one),
        reward(0.1, parent=one),
        proxied("b", "2", ([2], [2]), parent=two),
        proxied("c", "3", ([3], [3]), parent=two),
        reward(0.3, parent=two),
        reward(9.0),
    ]
    by_sibling = TracerTraceToTriplet(reward_match=RewardMatchPolicy.FIRST_SIBLING, repair_hierarchy=False)
    assert [each.reward for each in by_sibling.adapt(spans)] == [0.1, None, 0.3]
    assert [each.reward for each in TracerTraceToTriplet(repair_hierarchy=False).adapt(spans)] == [0.1, 0.3, 0.3]


def test_spans_of_the_opentelemetry_sdk(tmp_path: Path) -> None:
    made: list[Any] = []
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("t")
    with tracer.start_as_current_span("agent") as outer:
        with tracer.start_as_current_span("chat m") as inner:
            inner.set_attribute("gen_ai.request.model", "m")
            inner.set_attribute("prompt_token_ids", [1, 2])
            inner.set_attribute("response_token_ids", [3])
        made.append(inner)
    made.append(outer)
    (triplet,) = TracerTraceToTriplet().adapt(made)
    assert (triplet.prompt["token_ids"], triplet.response["token_ids"]) == ([1, 2], [3])
    tree = TracerTraceToTriplet().visualize(made, str(tmp_path / "trace"), "chat")
    assert tree.names_tuple() == ("agent", [("chat m", [])])
    assert "lightblue" in (tmp_path / "trace.dot").read_text()


@pytest.mark.parametrize("adapter", BOTH)
def test_nothing_comes_of_nothing(adapter: type[TraceToTripletBase]) -> None:
    assert adapter().adapt([]) == []


def test_a_final_reward_goes_to_the_last_call_without_one(proxied: Make, reward: Make) -> None:
    calls = [proxied("a", "1", ([1], [1])), proxied("b", "2", ([2], [2]))]
    assert [each.reward for each in TraceTree.from_spans(calls).to_trajectory(final_reward=5)] == [None, 5]
    rewarded = TraceTree.from_spans([*calls, reward(1)])
    assert [each.reward for each in rewarded.to_trajectory(final_reward=5)] == [1, 1]
