"""An attempt as a transcript: everything that was said, once, in its order, whoever recorded it."""

from __future__ import annotations

from typing import Any

import pytest

from agentlightning.cli.transcript import TranscriptEntry, transcript_of
from agentlightning.types import Event, Span, TraceStatus
from recorded_spans import AGAIN, ANSWER, CHOICES, QUESTION, RESULT, SYSTEM, names, recorded


def span(number: int, name: str, attributes: dict[str, Any] | None = None, **more: Any) -> Span:
    """A span of one attempt; numbers are their order in the store."""
    made = Span.from_attributes(
        rollout_id="ro-1",
        attempt_id="at-1",
        attributes=attributes or {},
        name=name,
        span_id=f"{number:016x}",
        sequence_id=number,
    )
    return made.model_copy(update={"start_time": 100.0 + number, "end_time": 100.5 + number} | more)


def call(number: int, messages: list[Any], reply: Any, **attributes: Any) -> Span:
    """A model call, as OpenTelemetry's conventions have it."""

    def parts(message: dict[str, Any]) -> dict[str, Any]:
        return {"role": message["role"], "parts": [{"type": "text", "content": message["content"]}]}

    told = {"gen_ai.operation.name": "chat", "gen_ai.request.model": "policy"}
    told["gen_ai.input.messages"] = str([*map(parts, messages)]).replace("'", '"')
    if reply is not None:
        told["gen_ai.output.messages"] = str([parts(reply)]).replace("'", '"')
    return span(number, "chat policy", told | attributes)


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def shown(*spans: Span) -> list[tuple[str, str]]:
    return [(each.role, each.text) for each in transcript_of(spans)]


@pytest.mark.parametrize("library", names())
def test_a_conversation_reads_the_same_whichever_library_recorded_it(library: str) -> None:
    entries = transcript_of(recorded(library).spans)
    roles = ["system", "user", "assistant", "tool", "assistant", "user", "assistant"]
    assert [each.role for each in entries] == roles
    if library == "gemini-cli":  # a program with tools and texts of its own
        return
    rain = '"rain"' if entries[3].text == '"rain"' else RESULT
    assert [(each.role, each.text) for each in entries] == [
        ("system", SYSTEM),
        ("user", QUESTION),
        ("assistant", ""),
        ("tool", rain),
        ("assistant", ANSWER),
        ("user", AGAIN),
        ("assistant", ANSWER),
    ]
    (asked,) = entries[2].tool_calls
    assert (asked["name"], asked["arguments"].replace(" ", "")) == ("weather", '{"city":"Paris"}')
    assert entries[3].tool_call_id == "call-1"
    assert {each.model for each in entries if each.kind == "reply"} == {"policy"}
    sides = [each.side for each in entries]
    assert sides[:5] == [None] * 5
    assert library in ("langsmith", "openai-v2", "strands", "strands-latest") or sides[5:] == ["side call"] * 2, (
        "these name no tools"
    )


def test_only_what_is_new_of_a_conversation_is_shown_also_where_it_forks() -> None:
    begin, first, second = said("user", "a"), said("assistant", "b"), said("user", "c")
    spans = [
        call(1, [begin], first),
        call(2, [begin, first, second], said("assistant", "d")),
        call(3, [begin, first, said("user", "other")], said("assistant", "e")),
        call(4, [said("user", "a much later beginning")], said("assistant", "b")),
    ]
    assert shown(*spans) == [
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
        ("user", "other"),
        ("assistant", "e"),
        ("user", "a much later beginning"),
        ("assistant", "b"),
    ]


def test_the_order_is_that_of_the_store_and_not_of_clocks() -> None:
    late = call(1, [said("user", "a")], said("assistant", "b")).model_copy(update={"start_time": 900.0})
    reward = span(2, "agentlightning.annotation", {"agentlightning.reward.0.value": 0.5})
    assert shown(reward, late) == [("user", "a"), ("assistant", "b"), ("reward", "0.5")]


def test_what_is_told_of_a_reply() -> None:
    usage = {"gen_ai.usage.input_tokens": 12, "gen_ai.usage.output_tokens": 0}
    more: dict[str, Any] = {"gen_ai.response.finish_reasons": ["length"], **usage}
    (_, reply) = transcript_of([call(1, [said("user", "a")], said("assistant", "b"), **more)])
    assert (reply.model, reply.finish_reason, reply.input_tokens, reply.output_tokens) == ("policy", "length", 12, 0)
    assert (reply.seconds, reply.problem) == (0.5, None)


def test_a_call_that_failed_says_why() -> None:
    failed = call(1, [said("user", "a")], None).model_copy(
        update={"status": TraceStatus(status_code="ERROR", description="503: overloaded")}
    )
    (asked, reply) = transcript_of([failed])
    assert (asked.text, reply.text, reply.problem) == ("a", "", "the call failed: 503: overloaded")


def test_a_call_without_messages_says_that_they_were_not_recorded() -> None:
    (reply,) = transcript_of(
        [span(1, "chat policy", {"gen_ai.operation.name": "chat", "gen_ai.usage.input_tokens": 3})]
    )
    assert "not recorded" in reply.text
    assert reply.input_tokens == 3


def test_a_call_of_a_reward_function_is_marked() -> None:
    judge = span(2, "agentlightning.annotation", {"agentlightning.reward.0.value": 1.0})
    asked = call(1, [said("user", "is it good?")], said("assistant", "yes")).model_copy(
        update={"parent_id": judge.span_id}
    )
    assert [each.side for each in transcript_of([asked, judge])] == ["a reward function made the call"] * 2 + [None]


def test_rewards_of_several_dimensions_and_what_the_agent_emitted() -> None:
    two = {f"agentlightning.reward.{n}.{k}": v for n, (k, v) in enumerate([("value", 0.5)])}
    two |= {"agentlightning.reward.0.name": "primary", "agentlightning.reward.1.name": "style"}
    two["agentlightning.reward.1.value"] = 0.25
    spans = [
        span(1, "agentlightning.message", {"agentlightning.message.body": "a note"}),
        span(2, "agentlightning.object", {"agentlightning.object.json": '{"x": [1]}'}),
        span(3, "agentlightning.annotation", two),
    ]
    assert shown(*spans) == [
        ("message", "a note"),
        ("object", '{"x": [1]}'),
        ("reward", "0.5"),
        ("reward style", "0.25"),
    ]


def tool(number: int, result: str) -> Span:
    told = {"gen_ai.tool.name": "search", "gen_ai.tool.call.arguments": '{"q": 1}', "gen_ai.tool.call.result": result}
    return span(number, "execute_tool search", told)


def test_a_tool_is_shown_where_no_message_has_its_result() -> None:
    first, told = said("assistant", "b"), said("tool", "found")
    spans = [call(1, [said("user", "a")], first), tool(2, "found"), tool(3, "lost")]
    spans.append(call(4, [said("user", "a"), first, told], said("assistant", "c")))
    entries = transcript_of(spans)
    assert [(each.kind, each.text) for each in entries] == [
        ("message", "a"),
        ("reply", "b"),
        ("tool", "lost"),
        ("message", "found"),
        ("reply", "c"),
    ]
    assert entries[2].tool_calls == [{"id": "", "name": "search", "arguments": '{"q": 1}'}]


def test_an_operation_of_the_agent_is_a_tool() -> None:
    told = {"agentlightning.operation.name": "look", "agentlightning.operation.input.place": "here"}
    (entry,) = transcript_of([span(1, "agentlightning.operation", told | {"agentlightning.operation.output": "seen"})])
    assert (entry.kind, entry.role, entry.text) == ("tool", "look", "seen")
    assert entry.tool_calls[0]["arguments"] == '{"place": "here"}'


def test_an_exception_is_shown_once_though_it_passes_through_spans() -> None:
    raised = Event(name="exception", attributes={"exception.type": "ValueError", "exception.message": "boom"})
    spans = [
        span(1, "inner", events=[raised]),
        span(2, "outer", events=[raised]),
        span(3, "agentlightning.exception", {"exception.type": "KeyError", "exception.message": "x"}),
        span(4, "broken", status=TraceStatus(status_code="ERROR", description="no reply")),
        span(5, "fine"),
    ]
    assert shown(*spans) == [("error", "ValueError: boom"), ("error", "KeyError: x"), ("error", "no reply")]


def test_parts_that_are_no_text_are_named() -> None:
    request = '[{"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {}}]}]'
    body = f'{{"model": "policy", "messages": {request}}}'
    reply = '{"choices": [{"message": {"role": "assistant", "content": "a cat"}}]}'
    given = {"agentlightning.llm.request": body, "agentlightning.llm.response": reply}
    (asked, _) = transcript_of([span(1, "chat policy", given)])
    assert asked.text == "see\n[image_url]"


def test_each_choice_of_a_reply_is_shown() -> None:
    choices = [{"index": n, "message": {"role": "assistant", "content": text}} for n, text in enumerate("xy")]
    body = '{"model": "policy", "messages": [{"role": "user", "content": "a"}], "n": 2}'
    reply = str({"choices": choices}).replace("'", '"')
    given = {"agentlightning.llm.request": body, "agentlightning.llm.response": reply}
    assert shown(span(1, "chat policy", given)) == [("user", "a"), ("assistant", "x"), ("assistant choice 2", "y")]


def test_each_choice_that_a_library_wrote_is_shown() -> None:
    entries = transcript_of(recorded("traceloop", "choices").spans[:1])
    told = [(each.role, each.text, each.finish_reason) for each in entries[-2:]]
    assert told == [(f"assistant{which}", *choice) for which, choice in zip(("", " choice 2"), CHOICES, strict=True)]


def test_nothing_is_no_transcript() -> None:
    assert transcript_of([]) == []
    assert all(isinstance(each, TranscriptEntry) for each in transcript_of([span(1, "agent")]))
