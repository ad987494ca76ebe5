"""What tracing libraries write is recognised by its attributes, and read right: from spans that they wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from agentlightning import LlmProxyTraceToTriplet, TracerTraceToTriplet, TraceToMessages
from agentlightning.types import Event, Span
from recorded_spans import CONVERSATIONS, FINISH_REASONS, names, recorded

Make = Callable[..., Span]

NO_TOOLS = {"openai-v2", "langsmith", "strands"}
"""Those that do not write the tools, as far as we have seen."""
NO_REASONS = {"langfuse"}


def essence(conversation: Any) -> Any:
    """Without the form of arguments: some libraries write JSON anew, or add to a schema."""
    text = json.loads(json.dumps(conversation))
    for message in text["messages"]:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        message["content"] = message["content"] or None
        if message["role"] == "tool" and message["content"] == '{"output": "rain"}':  # Gemini has no plain results
            message["content"] = "rain"
    for tool in text["tools"] or []:
        tool["function"]["parameters"].pop("additionalProperties", None)
    return text


@pytest.mark.parametrize("name", names())
def test_the_conversations_of_an_agent(name: str) -> None:
    spans = recorded(name).spans
    adapted = TraceToMessages(call_filter=None).examine(spans)
    expected = [{**each, "tools": None} if name in NO_TOOLS else each for each in CONVERSATIONS]
    assert [essence(each) for each in adapted.made] == [essence(each) for each in expected]
    assert adapted.unusable == []
    triplets = TracerTraceToTriplet(call_filter=None).examine(spans)
    reasons = [each.metadata["finish_reason"] for each in triplets.made]
    assert reasons == ([None] * 3 if name in NO_REASONS else FINISH_REASONS)
    assert [each.metadata["model"] for each in triplets.made] == ["policy"] * 3
    assert (triplets.unusable, LlmProxyTraceToTriplet().examine(spans).made) == ([], [])


def test_the_two_spans_of_a_streamed_call_are_one_call() -> None:
    """Logfire writes one when the stream begins, without a reply, and one with it when it has ended."""
    spans = recorded("logfire").spans
    assert len(spans) == 4
    adapted = TracerTraceToTriplet(call_filter=None).examine(spans)
    assert [each.span_id for each in adapted.set_aside] == [spans[2].span_id]


def test_agents_of_pydantic_ai() -> None:
    triplets = TracerTraceToTriplet(call_filter=None).adapt(recorded("pydantic-ai").spans)
    assert [each.metadata["agent_name"] for each in triplets] == ["forecaster", "forecaster", "talker"]


@pytest.mark.parametrize(
    "attributes",
    [
        {"gen_ai.operation.name": "chat"},
        {"gen_ai.operation.name": "text_completion"},
        {"gen_ai.operation.name": "generate_content"},
        {"gen_ai.output.messages": "[]"},
        {"openinference.span.kind": "LLM"},
        {"langsmith.span.kind": "llm"},
        {"mlflow.spanType": '"CHAT_MODEL"'},
        {"mlflow.spanType": "LLM"},
        {"langfuse.observation.type": "generation"},
        {"ai.operationId": "ai.streamObject.doStream"},
        {"llm.request.type": "chat"},
        {"gen_ai.completion.0.role": "assistant"},
    ],
)
def test_what_looks_like_a_call_and_says_nothing_is_unusable(attributes: dict[str, Any], span: Make) -> None:
    call = span("any name", attributes)
    for adapter in (TracerTraceToTriplet(call_filter=None), TraceToMessages(call_filter=None)):
        adapted = adapter.examine([call])
        assert adapted.made == []
        assert [each.span_id for each in adapted.unusable] == [call.span_id]
        assert "recorded" in adapted.unusable[0].reason


@pytest.mark.parametrize(
    "attributes",
    [
        {"gen_ai.operation.name": "embeddings"},
        {"gen_ai.operation.name": "invoke_agent", "gen_ai.output.messages": "[]"},
        {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": "x"},
        {"openinference.span.kind": "CHAIN", "llm.output_messages.0.message.content": "x"},
        {"langsmith.span.kind": "chain", "gen_ai.prompt": "{}", "gen_ai.completion": "{}"},
        {"mlflow.spanType": '"AGENT"'},
        {"langfuse.observation.type": "span"},
        {"ai.operationId": "ai.generateText", "ai.response.text": "x"},
        {"traceloop.span.kind": "workflow"},
        {"llm.request.type": "rerank"},
        {"logfire.span_type": "pending_span", "gen_ai.operation.name": "chat"},
    ],
)
def test_what_is_something_else_is_no_call_whatever_its_name_is(attributes: dict[str, Any], span: Make) -> None:
    for adapter in (TracerTraceToTriplet(call_filter=None), TraceToMessages(call_filter=None)):
        adapted = adapter.examine([span("chat policy", attributes)])
        assert (adapted.made, adapted.unusable) == ([], [])


def test_a_name_that_was_asked_for_is_all_that_counts(span: Make) -> None:
    said = {
        "gen_ai.input.messages": '[{"role": "user", "content": "a"}]',
        "gen_ai.output.messages": '[{"content": "b"}]',
    }
    spans = [span("my call", {**said, "gen_ai.operation.name": "invoke_agent"}), span("chat policy", said)]
    (triplet,) = TracerTraceToTriplet(llm_call_match="^my").adapt(spans)
    assert triplet.metadata["span_id"] == spans[0].span_id


@pytest.mark.parametrize(
    ("written", "calls_tools", "reason"),
    [
        (["tool_call"], True, "tool_calls"),
        (["tool_calls"], True, "tool_calls"),
        (["stop"], True, "tool_calls"),
        (["STOP"], False, "stop"),
        (["end_turn"], False, "stop"),
        (["tool_use"], True, "tool_calls"),
        ('["length"]', False, "length"),
        (["MAX_TOKENS"], True, "length"),
        ("stop", False, "stop"),
        (["something new"], True, "something new"),
        ([], False, None),
    ],
)
def test_reasons_have_one_word_each(written: Any, calls_tools: bool, reason: str | None, span: Make) -> None:
    parts: list[Any] = [{"type": "text", "content": "x"}]
    if calls_tools:
        parts.append({"type": "tool_call", "id": "1", "name": "f", "arguments": {}})
    attributes = {
        "gen_ai.operation.name": "chat",
        "gen_ai.input.messages": '[{"role": "user", "content": "a"}]',
        "gen_ai.output.messages": json.dumps([{"role": "assistant", "parts": parts}]),
        "gen_ai.response.finish_reasons": written,
    }
    (triplet,) = TracerTraceToTriplet(call_filter=None).adapt([span("x", attributes)])
    assert triplet.metadata["finish_reason"] == reason


SCHEMA = {"type": "object", "properties": {"a": {"type": "number"}}}


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "function", "function": {"name": "mul", "parameters": SCHEMA}},
        {"type": "function", "name": "mul", "parameters": SCHEMA},
        {"type": "function", "name": "mul", "inputSchema": SCHEMA},
        {"name": "mul", "input_schema": SCHEMA},
        {"name": "mul", "parameters": json.dumps(SCHEMA)},
        {"toolSpec": {"name": "mul", "inputSchema": {"json": SCHEMA}}},
        {"functionDeclarations": [{"name": "mul", "parametersJsonSchema": SCHEMA}]},
    ],
)
def test_schemas_of_tools_are_kept(tool: dict[str, Any], span: Make) -> None:
    attributes = {
        "gen_ai.input.messages": '[{"role": "user", "content": "a"}]',
        "gen_ai.output.messages": '[{"role": "assistant", "content": "b"}]',
        "gen_ai.tool.definitions": json.dumps([tool]),
    }
    (conversation,) = TraceToMessages(call_filter=None).adapt([span("chat", attributes)])
    assert conversation["tools"] == [{"type": "function", "function": {"name": "mul", "parameters": SCHEMA}}]


def test_what_is_not_text_stays_in_its_message(span: Make) -> None:
    picture = {"type": "blob", "mime_type": "image/png", "content": "AAAA"}
    asked = [{"role": "user", "parts": [{"type": "text", "content": "What is it?"}, picture]}]
    attributes = {"gen_ai.input.messages": json.dumps(asked), "gen_ai.output.messages": '[{"content": "A dot."}]'}
    (conversation,) = TraceToMessages(call_filter=None).adapt([span("chat", attributes)])
    assert conversation["messages"][0]["content"] == [{"type": "text", "text": "What is it?"}, picture]


@pytest.mark.parametrize("said", ['{"answer": 42}', "[1, 2]", '"yes"', "[{]"])
def test_a_reply_that_is_json_itself_stays_a_text(said: str, span: Make) -> None:
    written: list[dict[str, Any]] = [
        {"ai.prompt.messages": '[{"role": "user", "content": "a"}]', "ai.response.text": said},
        {
            "mlflow.spanType": "LLM",
            "mlflow.spanInputs": '{"messages": [{"role": "user", "content": "a"}]}',
            "mlflow.spanOutputs": json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}),
        },
        {
            "agentlightning.llm.request": '{"prompt": "a"}',
            "agentlightning.llm.response": json.dumps({"choices": [{"text": said}]}),
        },
        {"gen_ai.prompt.0.content": "a", "gen_ai.completion.0.content": said},
    ]
    for attributes in written:
        (conversation,) = TraceToMessages(call_filter=None).adapt([span("x", attributes)])
        assert conversation["messages"] == [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}]


def test_other_wires_that_the_proxy_recorded(span: Make) -> None:
    responses = {
        "agentlightning.llm.request": json.dumps({"instructions": "Be brief.", "input": "hi", "tools": []}),
        "agentlightning.llm.response": json.dumps(
            {
                "id": "r1",
                "status": "completed",
                "output": [
                    {"type": "reasoning", "summary": []},
                    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello."}]},
                    {"type": "function_call", "id": "fc", "call_id": "c1", "name": "f", "arguments": "{}"},
                ],
            }
        ),
    }
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    (conversation,) = TraceToMessages(call_filter=None).adapt([span("x", responses)])
    assert conversation["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello.", "tool_calls": [call]},
    ]
    messages = {
        "agentlightning.llm.request": json.dumps(
            {"system": "Be brief.", "messages": [{"role": "user", "content": "hi"}]}
        ),
        "agentlightning.llm.response": json.dumps(
            {"role": "assistant", "content": [{"type": "text", "text": "Hello."}], "stop_reason": "end_turn"}
        ),
    }
    (triplet,) = TracerTraceToTriplet(call_filter=None).adapt([span("x", messages)])
    assert [each["role"] for each in triplet.prompt["messages"]] == ["system", "user"]
    assert triplet.response["message"] == {"role": "assistant", "content": "Hello."}
    assert triplet.metadata["finish_reason"] == "stop"


def test_earlier_events_of_one_span_are_one_conversation(span: Make) -> None:
    """As Azure's library writes them: the body of each message as JSON."""
    call = span("chat", {"gen_ai.operation.name": "chat"})
    for name, body in [
        ("gen_ai.user.message", {"role": "user", "content": "hi"}),
        ("gen_ai.choice", {"finish_reason": "stop", "index": 0, "message": {"role": "assistant", "content": "42"}}),
    ]:
        call.events.append(Event(name=name, attributes={"gen_ai.event.content": json.dumps(body)}))
    (triplet,) = TracerTraceToTriplet(call_filter=None).adapt([call])
    assert triplet.prompt["messages"] == [{"role": "user", "content": "hi"}]
    assert triplet.response["message"] == {"role": "assistant", "content": "42"}
    assert triplet.metadata["finish_reason"] == "stop"
