"""Calls that several spans tell of together are put together, or marked."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agentlightning import LlmProxyTraceToTriplet, Span, TraceToMessages
from agentlightning.semconv import LLMCallAttributes as Call
from agentlightning.types.recorded_calls import whole_calls

MESSAGES = [{"role": "user", "content": text} for text in "abc"]


def call(span_id: str, **attributes: Any) -> Span:
    """A span of the proxy's. Attributes are below ``agentlightning.llm``, with ``__`` for a point."""
    named = {f"agentlightning.llm.{name.replace('__', '.')}": value for name, value in attributes.items()}
    return Span.from_attributes(
        rollout_id="ro-1", attempt_id="at-1", sequence_id=int(span_id, 16), span_id=span_id, name="chat m",
        attributes={"gen_ai.operation.name": "chat", **named},
    )  # fmt: skip


def reply(*texts: str) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}} for text in texts]})


FIRST = call(
    "01",
    request=json.dumps({"model": "m", "tools": [{"x": 1}], "messages": MESSAGES[:1]}),
    response=reply("A"),
    prompt_token_ids=[1, 2, 3],
    response_token_ids=[4, 5],
)
SECOND = call(
    "02",
    prefix__span_id="01", prefix__tokens=4, prefix__messages=1, prefix__fields=["tools"],
    request__rest=json.dumps({"model": "m", "messages": MESSAGES[1:2]}), response=reply("B"),
    prompt_token_ids__rest=[6], response_token_ids=[7],
)  # fmt: skip
THIRD = call(
    "03",
    prefix__span_id="02", prefix__tokens=6, prefix__messages=2,
    request__rest=json.dumps({"messages": MESSAGES[2:]}), response=reply("C"),
    prompt_token_ids__rest=[8], response_token_ids=[9],
)  # fmt: skip


def test_a_chain_of_calls_is_put_together() -> None:
    made = LlmProxyTraceToTriplet().adapt([THIRD, FIRST, SECOND])
    assert [each.prompt["token_ids"] for each in made] == [[1, 2, 3], [1, 2, 3, 4, 6], [1, 2, 3, 4, 6, 7, 8]]
    assert [each.prompt["messages"] for each in made] == [MESSAGES[:1], MESSAGES[:2], MESSAGES]
    assert [each.prompt["tools"] for each in made] == [[{"x": 1}], [{"x": 1}], None]
    assert whole_calls([FIRST]) == [FIRST]
    assert not [name for span in whole_calls([FIRST, SECOND]) for name in span.attributes if "prefix" in name]


@pytest.mark.parametrize(
    "earlier", [[], [FIRST.model_copy(update={"attributes": {}})], [call("01", prompt_token_ids=[1])]]
)
def test_a_call_whose_beginning_is_missing_is_marked_and_so_are_those_after_it(earlier: list[Span]) -> None:
    examined = LlmProxyTraceToTriplet().examine([*earlier, SECOND, THIRD])
    assert examined.made == []
    assert [each.reason for each in examined.unusable if each.span_id != "01"] == ["prefix_missing"] * 2


def test_a_circle_of_references_ends() -> None:
    one, two = (call(mine, prefix__span_id=other, request__rest="{}") for mine, other in (("01", "02"), ("02", "01")))
    assert [span.attributes[Call.UNUSABLE.value] for span in whole_calls([one, two])] == ["prefix_missing"] * 2


def test_lists_in_parts_are_put_together() -> None:
    name = Call.PROMPT_TOKEN_IDS.value
    parts = [
        call(span_id, part__of=name, part__values=values).model_copy(update={"name": "part"})
        for span_id, values in (("01", [1, 2]), ("02", [3]))
    ]
    main = call("03", parts=["01", "02"], request="{}", response=reply("A"), response_token_ids=[4])
    (made,) = LlmProxyTraceToTriplet().examine([*parts, main]).made
    assert (made.prompt["token_ids"], made.response["token_ids"]) == ([1, 2, 3], [4])
    (unusable,) = LlmProxyTraceToTriplet().examine([parts[0], main]).unusable
    assert unusable.reason == "prefix_missing"


def test_every_choice_is_an_example_of_its_own() -> None:
    span = call(
        "01", request=json.dumps({"messages": MESSAGES[:1]}), response=reply("A", "B"),
        prompt_token_ids=[1], response_token_ids=[2], response_logprobs=[-0.5],
        choices__1__response_token_ids=[3, 4], choices__1__prompt_token_ids=[9],
    )  # fmt: skip
    span.attributes["gen_ai.response.finish_reasons"] = ["stop", "length"]
    made = LlmProxyTraceToTriplet().adapt([span])
    assert [(each.prompt["token_ids"], each.response["token_ids"]) for each in made] == [([1], [2]), ([9], [3, 4])]
    assert [each.metadata["logprobs"] for each in made] == [[-0.5], None]
    assert [each.metadata["finish_reason"] for each in made] == ["stop", "length"]
    assert [each.response["message"]["content"] for each in made] == ["A", "B"]
    assert [each["messages"][-1]["content"] for each in TraceToMessages().adapt([span])] == ["A", "B"]


@pytest.mark.parametrize("reasons", [None, ["stop"]])
@pytest.mark.parametrize("is_readable", [True, False])
def test_no_choice_is_lost_whatever_is_missing(reasons: Any, is_readable: bool) -> None:
    """One has no finish reason, or the reply was too large to be kept."""
    span = call(
        "01", request=json.dumps({"messages": MESSAGES[:1]}), response=reply("A", "B") if is_readable else "{…",
        prompt_token_ids=[1], response_token_ids=[2], choices__1__response_token_ids=[3, 4],
    )  # fmt: skip
    if reasons:
        span.attributes["gen_ai.response.finish_reasons"] = reasons
    made = LlmProxyTraceToTriplet().adapt([span])
    assert [each.response["token_ids"] for each in made] == [[2], [3, 4]]
    assert [each.metadata["finish_reason"] for each in made] == [None, None]


def test_shortened_texts_are_no_conversation() -> None:
    span = call("01", request=json.dumps({"messages": MESSAGES}), response=reply("A"), shortened=["request"])
    assert TraceToMessages().examine([span]).made == []
