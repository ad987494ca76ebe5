"""What tracing libraries write is recognised by its attributes, and read right: from spans that they wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agentlightning import LlmProxyTraceToTriplet, TracerTraceToTriplet, TraceToMessages
from agentlightning.types import Event, Span
from recorded_spans import CHOICES, FINISH_REASONS, ITEMS, conversations, names, recorded

Make = Callable[..., Span]

NO_TOOLS = {"openai-v2", "strands", "strands-latest"}
"""Those that do not write the tools of a call."""
REASONS = {"langfuse": [None, None, "stop"], "gemini-cli": [None, None, None]}
"""Of those that do not write why a reply ended."""
MERGED = {"langchain", "langfuse", "mlflow"}
"""Those that write the choices of a stream as one text."""


def essence(conversation: Any) -> Any:
    """Without the form of arguments: some libraries write JSON anew, or add to a schema."""
    text = json.loads(json.dumps(conversation))
    for message in text["messages"]:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
            if call["function"]["name"] == "list_directory":
                call.pop("id")  # Gemini CLI changes it
        message["content"] = message["content"] or None
        if message["role"] == "tool" and message["content"].startswith("{"):
            message |= {"content": json.loads(message["content"]), "tool_call_id": None}
    for tool in text["tools"] or []:
        for added in ("additionalProperties", "$schema"):
            tool["function"]["parameters"].pop(added, None)
        for parameter in tool["function"]["parameters"]["properties"].values():
            parameter.pop("description", None)
        if tool["function"]["name"] == "list_directory":  # its own, and long
            tool["function"] = {"name": "list_directory"}
    return text


@pytest.mark.parametrize("name", names())
def test_the_conversations_of_an_agent(name: str) -> None:
    spans = recorded(name).spans
    adapted = TraceToMessages(call_filter=None).examine(spans)
    expected = [{**each, "tools": None} if name in NO_TOOLS else each for each in conversations(name)]
    assert [essence(each) for each in adapted.made] == [essence(each) for each in expected]
    assert adapted.unusable == []
    triplets = TracerTraceToTriplet(call_filter=None).examine(spans)
    reasons = [each.metadata["finish_reason"] for each in triplets.made]
    assert reasons == REASONS.get(name, FINISH_REASONS)
    assert [each.metadata["model"] for each in triplets.made] == ["policy"] * 3
    assert (triplets.unusable, LlmProxyTraceToTriplet().examine(spans).made) == ([], [])


@pytest.mark.parametrize("name", names("choices"))
def test_every_choice_is_a_sample_or_counted(name: str) -> None:
    spans = recorded(name, "choices").spans
    texts = [text for text, _ in CHOICES] * (1 if name in MERGED else 2)
    reasons = [reason for _, reason in CHOICES] * (1 if name in MERGED else 2)
    triplets = TracerTraceToTriplet(call_filter=None).examine(spans)
    assert [each.response["message"]["content"] for each in triplets.made] == texts
    assert [each.metadata["finish_reason"] for each in triplets.made] == ([None] * 2 if name == "langfuse" else reasons)
    messages = TraceToMessages(call_filter=None).examine(spans)
    assert [each["messages"][-1]["content"] for each in messages.made] == texts
    assert [each["messages"][-1]["role"] for each in messages.made] == ["assistant"] * len(texts)
    for unusable in (triplets.unusable, messages.unusable):
        expected = ["2 choices were asked for and 1 recorded, which may be several as one text"]
        assert [each.reason for each in unusable] == (expected if name in MERGED else [])


@pytest.mark.parametrize("name", sorted(MERGED))
def test_without_the_number_that_was_asked_for_a_merged_reply_would_be_a_sample(name: str) -> None:
    """The guard is what keeps it out: the recorded text is that of no choice."""
    spans = recorded(name, "choices").spans
    for span in spans:
        for attribute in ("langfuse.observation.model.parameters", "langsmith.metadata.n"):
            span.attributes.pop(attribute, None)
        asked = span.attributes.get("mlflow.spanInputs")
        if asked is not None:
            span.attributes["mlflow.spanInputs"] = str(asked).replace('"n": 2', '"n": 1')
    made = TracerTraceToTriplet(call_filter=None).adapt(spans)
    assert made[-1].response["message"]["content"] == "a0 a1 b0 b1 "


@pytest.mark.parametrize("name", names("items"))
def test_the_items_of_one_reply_are_one_message(name: str) -> None:
    """OpenAI's Responses API: a thought, a text, and two calls of a tool. They are not choices."""
    spans = recorded(name, "items").spans
    (conversation,) = TraceToMessages(call_filter=None).adapt(spans)
    message = conversation["messages"][-1]
    ids = [call.pop("id") for call in message["tool_calls"]]
    assert ids in ([each["id"] for each in ITEMS["tool_calls"]], ["fc_0", "fc_1"])
    expected = [{**call, "id": None} for call in ITEMS["tool_calls"]]
    assert essence(
        {
            "messages": [{**message, "tool_calls": [{**each, "id": None} for each in message["tool_calls"]]}],
            "tools": None,
        }
    ) == essence({"messages": [{**ITEMS, "tool_calls": expected}], "tools": None})


def test_a_thought_before_a_reply_is_no_choice(span: Make) -> None:
    """As opentelemetry-instrumentation-anthropic 0.40.14 writes it."""
    call = {"id": "call-1", "name": "weather", "arguments": "{}"}
    attributes: dict[str, Any] = {
        "llm.request.type": "completion",
        "gen_ai.prompt.0.role": "user",
        "gen_ai.prompt.0.content": "Weather?",
        "gen_ai.completion.0.finish_reason": "tool_use",
        "gen_ai.completion.0.role": "thinking",
        "gen_ai.completion.0.content": "Which city?",
        "gen_ai.completion.1.role": "assistant",
        "gen_ai.completion.1.content": "Let me look.",
    } | {f"gen_ai.completion.1.tool_calls.0.{name}": value for name, value in call.items()}
    (triplet,) = TracerTraceToTriplet(call_filter=None).adapt([span("anthropic.chat", attributes)])
    assert triplet.response["message"]["content"] == "Let me look."
    assert triplet.response["message"]["tool_calls"][0]["function"]["name"] == "weather"
    assert triplet.metadata["finish_reason"] == "tool_calls"


def test_the_pieces_of_a_stream_are_one_message(span: Make) -> None:
    """Gemini CLI writes one message for each piece, and calls the list the messages of the output."""
    answered = recorded("gemini-cli").spans[-1]
    assert str(answered.attributes["gen_ai.output.messages"]).count("role") == 4
    (triplet,) = TracerTraceToTriplet(call_filter=None).adapt([answered])
    assert triplet.response["message"] == {"role": "assistant", "content": "word0 word1 word2 word3 "}


def test_a_role_that_a_stream_repeated_is_one_role(span: Make) -> None:
    """Logfire 5.4.0 writes the role as often as the chunks of a stream said it."""
    said = [{"role": "assistantassistant", "parts": [{"type": "text", "content": "b"}], "finish_reason": "stop"}]
    attributes = {
        "gen_ai.input.messages": '[{"role": "user", "content": "a"}]',
        "gen_ai.output.messages": json.dumps(said),
    }
    (conversation,) = TraceToMessages(call_filter=None).adapt([span("chat", attributes)])
    assert conversation["messages"][-1] == {"role": "assistant", "content": "b"}


@pytest.mark.parametrize("name", ["gen_ai.input.messages", "gen_ai.output.messages", "gen_ai.tool.definitions"])
def test_a_text_that_was_cut_is_unusable(name: str, span: Make) -> None:
    """Gemini CLI 0.61.0 keeps 10,000 characters of messages; OpenTelemetry's limit for attributes keeps fewer."""
    attributes = {
        "gen_ai.operation.name": "chat",
        "gen_ai.system_instructions": '[{"type": "text", "content": "Be brief."}]',
        "gen_ai.input.messages": '[{"role": "user", "content": "a"}]',
        "gen_ai.output.messages": '[{"role": "assistant", "content": "b"}]',
        "gen_ai.tool.definitions": '[{"type": "function", "name": "f"}]',
    }
    for ending in ("", "...[TRUNCATED: original length 15526]"):
        cut = {**attributes, name: attributes[name][:-2] + ending}
        for adapter in (TracerTraceToTriplet(call_filter=None), TraceToMessages(call_filter=None)):
            adapted = adapter.examine([span("chat", cut)])
            assert adapted.made == []
            assert ["were cut" in each.reason for each in adapted.unusable] == [True]
    assert TracerTraceToTriplet(call_filter=None).examine([span("chat", attributes)]).unusable == []


@pytest.mark.parametrize("limits", [SpanLimits(), SpanLimits(*[SpanLimits.UNSET] * 8)], ids=["default", "none"])
def test_a_long_conversation_that_a_limit_cut_is_unusable(limits: SpanLimits) -> None:
    """OpenInference writes two attributes for each message; by default OpenTelemetry keeps the last 128 of a span."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(span_limits=limits, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with provider.get_tracer("openinference").start_as_current_span("ChatCompletion") as written:
        written.set_attribute("openinference.span.kind", "LLM")
        for place in range(140):
            written.set_attribute(f"llm.input_messages.{place}.message.role", ("user", "assistant")[place % 2])
            written.set_attribute(f"llm.input_messages.{place}.message.content", f"text {place}")
        written.set_attribute("llm.output_messages.0.message.role", "assistant")
        written.set_attribute("llm.output_messages.0.message.content", "answer")
        written.set_attribute("openinference.span.kind", "LLM")
    spans = [Span.from_opentelemetry(each, "ro-1", "at-1", 1) for each in exporter.get_finished_spans()]
    for adapter in (TracerTraceToTriplet(call_filter=None), TraceToMessages(call_filter=None)):
        adapted = adapter.examine(spans)
        is_cut = limits.max_span_attributes is not None
        assert (len(adapted.made), len(adapted.unusable)) == ((0, 1) if is_cut else (1, 0))
        assert all("were cut" in each.reason for each in adapted.unusable)


def test_ids_beside_several_choices_are_those_of_none(span: Make) -> None:
    """It is not known of which choice they are."""
    choices = [{"role": "assistant", "content": text, "finish_reason": "stop"} for text in ("b", "c")]
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.input.messages": '[{"role": "user", "content": "a"}]',
        "gen_ai.output.messages": json.dumps(choices),
        "prompt_token_ids": [1, 2],
        "response_token_ids": [3],
    }
    adapted = TracerTraceToTriplet(call_filter=None).examine([span("chat", attributes)])
    assert [(each.response["message"]["content"], each.response["token_ids"]) for each in adapted.made] == [
        ("b", []),
        ("c", []),
    ]
    wants_ids = TracerTraceToTriplet(call_filter=None, _skip_empty_token_spans=True).examine([span("chat", attributes)])
    assert (wants_ids.made, len(wants_ids.unusable)) == ([], 2)


def test_tools_of_which_there_are_none_are_no_tools(span: Make) -> None:
    """As Gemini CLI writes them."""
    attributes = {
        "gen_ai.input.messages": '[{"role": "user", "content": "a"}]',
        "gen_ai.output.messages": '[{"role": "assistant", "content": "b"}]',
        "gen_ai.tool.definitions": '[{"functionDeclarations":[]}]',
    }
    (conversation,) = TraceToMessages(call_filter=None).adapt([span("chat", attributes)])
    assert conversation["tools"] is None


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
