"""Calls and rewards have the order of the store: the clocks of the hosts that wrote them change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from agentlightning import LlmProxyTraceToTriplet, RewardMatchPolicy, TracerTraceToTriplet, TraceToMessages
from agentlightning.types import OtelResource, Span

Make = Callable[..., Span]
BOTH: list[Any] = [TracerTraceToTriplet, LlmProxyTraceToTriplet]
RUNNER = OtelResource(attributes={"service.name": "agent", "host.name": "runner"}, schema_url="")
PROXY = OtelResource(attributes={"service.name": "agentlightning-proxy"}, schema_url="")


def attempt(events: list[str], proxy_skew: float, *, traced: bool) -> list[Span]:
    """An agent on one host, whose calls the proxy on another one records; both write into one store.

    Args:
        events: ``call``: a call that both recorded; ``past``: one past the proxy; ``reward``.
        proxy_skew: how many seconds the proxy's clock is ahead.
        traced: whether the agent tells the proxy the span that makes the call.
    """
    ids: dict[str, Any] = {"rollout_id": "ro-1", "attempt_id": "at-1", "trace_id": "a" * 32}
    root = "f" * 16
    spans: list[Span] = []

    def add(name: str, attributes: dict[str, Any], at: float, **more: Any) -> None:
        times = {"start_time": at, "end_time": at + 0.8}
        number = len(spans) + 1
        given = {"resource": RUNNER, "parent_id": root, "span_id": f"{number:016x}", **ids, **times, **more}
        spans.append(Span.from_attributes(name=name, attributes=attributes, sequence_id=number, **given))

    for place, event in enumerate(events):
        at = 1000.0 + place
        if event == "reward":
            add("agentlightning.annotation", {"agentlightning.reward.0.value": place / 10}, at)
            continue
        # Calls repeat each other; which of two equal ones went past the proxy could not be told.
        asked, said = (
            {"role": "user", "content": f"{event}{place % 3}"},
            {"role": "assistant", "content": f"a{place % 2}"},
        )
        by_library = len(spans) + (2 if event == "call" else 1)
        if event == "call":
            found = {
                "agentlightning.llm.request": json.dumps({"messages": [asked]}),
                "agentlightning.llm.response": json.dumps({"choices": [{"message": said}]}),
                "agentlightning.llm.prompt_token_ids": [1],
                "agentlightning.llm.response_token_ids": [place],
            }
            above = {"parent_id": f"{by_library:016x}"} if traced else {"parent_id": None, "trace_id": f"{place:032x}"}
            add("chat policy", found, at + 0.1 + proxy_skew, resource=PROXY, **above)
        parts = [{**each, "parts": [{"type": "text", "content": each["content"]}]} for each in (asked, said)]
        found = {"gen_ai.input.messages": json.dumps(parts[:1]), "gen_ai.output.messages": json.dumps(parts[1:])}
        add("chat policy", found | {"gen_ai.operation.name": "chat"}, at)
    add("invoke_agent a", {"gen_ai.agent.name": "a"}, 999.0, parent_id=None, span_id=root)
    return spans


def seen(adapter: Any, spans: list[Span]) -> list[Any]:
    adapted = adapter.examine(spans)
    assert adapted.unusable == []
    return [(each.response["token_ids"], each.reward, each.metadata["agent_name"]) for each in adapted.made]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(["call", "call", "past", "reward"]), min_size=1, max_size=12),
    st.floats(-50, 50, allow_nan=False),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_skew_changes_nothing(events: list[str], skew: float, traced: bool, random: Any) -> None:
    expected = [
        ([place] if event == "call" else [], reward_after(events, place), "a")
        for place, event in enumerate(events)
        if event != "reward"
    ]
    for adapter in (TracerTraceToTriplet(), TracerTraceToTriplet(repair_hierarchy=False)):
        spans = attempt(events, skew, traced=traced)
        random.shuffle(spans)
        assert seen(adapter, spans) == expected
    proxied = [(tokens, reward, "") for tokens, reward, _ in expected if tokens]
    spans = attempt(events, skew, traced=traced)
    assert [each[:2] for each in seen(LlmProxyTraceToTriplet(), spans)] == [each[:2] for each in proxied]
    assert len(TraceToMessages().examine(spans).made) == len(expected)
    by_sibling = TracerTraceToTriplet(reward_match=RewardMatchPolicy.FIRST_SIBLING)
    assert seen(by_sibling, spans) == seen(by_sibling, attempt(events, 0.0, traced=traced))


def reward_after(events: list[str], place: int) -> float | None:
    return next((later / 10 for later in range(place + 1, len(events)) if events[later] == "reward"), None)


@pytest.mark.parametrize("adapter", BOTH)
def test_without_sequence_ids_times_decide(adapter: Any, proxied: Make, reward: Make) -> None:
    spans = [
        proxied("b", "2", ([2], [2]), at=(5, 6)),
        reward(0.5, at=(4, 4)),
        proxied("a", "1", ([1], [1]), at=(1, 2)),
    ]
    unknown = [each.model_copy(update={"sequence_id": 0}) for each in spans]
    assert [(each.response["token_ids"], each.reward) for each in adapter().adapt(unknown)] == [([1], 0.5), ([2], None)]
    known = adapter().adapt(spans)
    assert [(each.response["token_ids"], each.reward) for each in known] == [([2], 0.5), ([1], None)]


@pytest.mark.parametrize("adapter", BOTH)
def test_spans_with_the_same_sequence_id_have_the_order_of_their_times(
    adapter: Any, proxied: Make, reward: Make
) -> None:
    """0.3's proxy gives all spans of one call the same."""
    spans = [reward(0.5, at=(9, 9)), proxied("a", "1", ([1], [1]), at=(5, 6))]
    same = [each.model_copy(update={"sequence_id": 7}) for each in spans]
    assert [each.reward for each in adapter().adapt(same)] == [0.5]


def test_only_spans_of_one_process_are_put_into_each_other(span: Make) -> None:
    """The times of another host say nothing of where a span belongs."""
    root = span("root", at=(0, 100))
    agent = span("invoke_agent a", {"gen_ai.agent.name": "a"}, parent=root, at=(10, 50))
    here = span("openai.chat", parent=root, at=(20, 30))
    there = here.model_copy(update={"span_id": "b" * 16, "resource": PROXY})
    elsewhere = here.model_copy(update={"span_id": "c" * 16, "trace_id": "e" * 32})
    adapted = TracerTraceToTriplet(agent_match="a").examine([root, agent, here, there, elsewhere])
    assert [each.span_id for each in adapted.unusable] == [here.span_id]
    assert [each.span_id for each in adapted.set_aside] == [there.span_id, elsewhere.span_id]
