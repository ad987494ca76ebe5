"""Spans to OpenAI's messages, from each convention that model calls are recorded by."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from agentlightning import TraceToMessages
from agentlightning.adapter.adapters import convert_to_openai_messages, group_genai_dict
from agentlightning.types import Event, Span

Make = Callable[..., Span]

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells the weather", "parameters": SCHEMA},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
EXPECTED = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Ulm?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ],
    "tools": [TOOL],
}
"""One conversation, which all of the ways below write down."""


def by_proxy() -> dict[str, Any]:
    request = {"model": "m", "messages": EXPECTED["messages"][:-1], "tools": [TOOL]}
    response = {"choices": [{"index": 0, "message": EXPECTED["messages"][-1], "finish_reason": "stop"}]}
    return {"agentlightning.llm.request": json.dumps(request), "agentlightning.llm.response": json.dumps(response)}


def by_present_conventions() -> dict[str, Any]:
    asked = [
        {"role": "user", "parts": [{"type": "text", "content": "Weather in Ulm?"}]},
        {
            "role": "assistant",
            "parts": [
                {"type": "reasoning", "content": "I should ask."},
                {"type": "tool_call", "id": "c1", "name": "weather", "arguments": {"city": "Ulm"}},
            ],
        },
        {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c1", "response": "rain"}]},
    ]
    said = [{"role": "assistant", "parts": [{"type": "text", "content": "It rains."}], "finish_reason": "stop"}]
    tool = {"type": "function", "name": "weather", "description": "Tells the weather", "parameters": SCHEMA}
    return {
        "gen_ai.system_instructions": json.dumps([{"type": "text", "content": "Be brief."}]),
        "gen_ai.input.messages": json.dumps(asked),
        "gen_ai.output.messages": json.dumps(said),
        "gen_ai.tool.definitions": json.dumps([tool]),
    }


def by_older_conventions() -> dict[str, Any]:
    return {
        "gen_ai.prompt.0.role": "system",
        "gen_ai.prompt.0.content": "Be brief.",
        "gen_ai.prompt.1.role": "user",
        "gen_ai.prompt.1.content": "Weather in Ulm?",
        "gen_ai.prompt.2.role": "assistant",
        "gen_ai.prompt.2.tool_calls.0.id": "c1",
        "gen_ai.prompt.2.tool_calls.0.name": "weather",
        "gen_ai.prompt.2.tool_calls.0.arguments": '{"city": "Ulm"}',
        "gen_ai.prompt.3.role": "tool",
        "gen_ai.prompt.3.content": "rain",
        "gen_ai.prompt.3.tool_call_id": "c1",
        "gen_ai.completion.0.role": "assistant",
        "gen_ai.completion.0.content": "It rains.",
        "gen_ai.completion.0.finish_reason": "stop",
        "llm.request.functions.0.name": "weather",
        "llm.request.functions.0.description": "Tells the weather",
        "llm.request.functions.0.parameters": json.dumps(SCHEMA),
    }


def plain(conversation: Any) -> Any:
    """Without the content of messages that only call tools, which some conventions write as an empty text."""
    messages = [
        {**message, "content": message.get("content") or None} if "tool_calls" in message else message
        for message in conversation["messages"]
    ]
    return {"messages": messages, "tools": conversation["tools"]}


@pytest.mark.parametrize("written", [by_proxy, by_present_conventions, by_older_conventions])
def test_a_conversation_with_a_tool(written: Callable[[], dict[str, Any]], span: Make) -> None:
    (conversation,) = TraceToMessages().adapt([span("agent"), span("chat m", written())])
    expected = json.loads(json.dumps(EXPECTED))
    assert plain(conversation) == plain(expected)


def test_messages_on_an_event_of_the_span(span: Make) -> None:
    call = span("chat m")
    attributes = by_present_conventions()
    call.events.append(Event(name="gen_ai.client.inference.operation.details", attributes=attributes))
    (conversation,) = TraceToMessages().adapt([call])
    assert conversation["messages"][-1]["content"] == "It rains."


def test_a_text_completion_is_one_question_and_one_answer(span: Make) -> None:
    call = span(
        "text_completion m",
        {
            "agentlightning.llm.request": '{"prompt": "1, 2,"}',
            "agentlightning.llm.response": '{"choices": [{"text": " 3"}]}',
        },
    )
    assert TraceToMessages().adapt([call]) == [
        {
            "messages": [{"role": "user", "content": "1, 2,"}, {"role": "assistant", "content": " 3"}],
            "tools": None,
        }
    ]


def test_tools_that_only_their_own_spans_tell_of(span: Make) -> None:
    call = span("openai.chat.completion", {"gen_ai.prompt.0.content": "hi", "gen_ai.completion.0.content": ""})
    ours = {"gen_ai.tool.name": "look", "gen_ai.tool.call.id": "c7", "gen_ai.tool.call.arguments": '{"at": 1}'}
    theirs = {"tool.name": "add", "tool.parameters": '{"x": 2}'}
    spans = [
        call,
        span("execute_tool look", ours, parent=call),
        span("tool", theirs, parent=call),
        span("tool", theirs),
    ]
    (conversation,) = TraceToMessages().adapt(spans)
    calls = conversation["messages"][-1]["tool_calls"]
    assert [each["function"] for each in calls] == [
        {"name": "look", "arguments": '{"at": 1}'},
        {"name": "add", "arguments": '{"x": 2}'},
    ]
    assert calls[0]["id"] == "c7"
    assert list(TraceToMessages().get_tool_calls(call, spans)) == calls


def test_holes_in_old_attributes_lose_what_is_missing_and_no_more(span: Make) -> None:
    attributes = {
        "gen_ai.prompt.0.content": "first",
        "gen_ai.prompt.10.content": "eleventh",
        "gen_ai.prompt.2.content": "third",
        "gen_ai.prompt": "something else",
        "gen_ai.completion.1.content": "only the second",
    }
    (conversation,) = TraceToMessages().adapt([span("openai.chat", attributes)])
    assert [message["content"] for message in conversation["messages"]] == [
        "first",
        "third",
        "eleventh",
        "only the second",
    ]


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"gen_ai.input.messages": "5", "gen_ai.output.messages": "5"},
        {"gen_ai.input.messages": '["no object"]'},
        {"agentlightning.llm.request": "[]", "agentlightning.llm.response": '{"choices": [null]}'},
        {"agentlightning.llm.request": '{"messages": [{"role": "user", "content": "a"}]}'},
        {"gen_ai.prompt.0.content": "asked, never answered"},
        {"gen_ai.completion.0.content": "answered, never asked"},
    ],
)
def test_what_was_not_written_down_is_unusable_and_says_so(attributes: dict[str, Any], span: Make) -> None:
    call = span("chat m", attributes)
    adapted = TraceToMessages().examine([call])
    assert adapted.made == []
    assert [(each.span_id, each.reason) for each in adapted.unusable] == [(call.span_id, "no messages were recorded")]


def test_a_call_that_failed_says_why(span: Make) -> None:
    adapted = TraceToMessages().examine([span("chat m", error="boom")])
    assert adapted.unusable[0].reason == "the call failed: boom"
    assert TraceToMessages().examine([]).unusable == []


def test_the_pieces_of_the_old_interface() -> None:
    assert group_genai_dict({"p.0.a": 1, "p.1.b.c": 2, "q": 3}, "p") == [{"a": 1}, {"b": {"c": 2}}]
    assert list(convert_to_openai_messages([])) == []
