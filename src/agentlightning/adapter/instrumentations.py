"""How tracing libraries write model calls: one `Instrumentation` for each way.

Which spans are model calls is told by their attributes, because their names are free. The table is asked from the
top, those ways first that are one library's own: the first that knows says whether the span is a model call. What
the call said is taken from every way that finds something, again those at the top first, because libraries write
several at once and each of them with gaps.

`docs/capture.md` has what is recorded by which library, as its tests found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

from agentlightning.adapter.replies import Choice, ReadReply, choices_of, reply_message, reply_of
from agentlightning.adapter.shapes import (
    Message,
    decoded,
    first,
    messages_of,
    object_of,
    objects,
    system_message,
    tool_call,
    tools_of,
)
from agentlightning.semconv import GenAIAttributes, LightningSpanAttributes, LLMCallAttributes
from agentlightning.types import Span
from agentlightning.types.attributes import filter_and_unflatten_attributes

_CALLS = ("chat", "text_completion", "generate_content", "completion", "llm_call", "responses")
"""Values of `gen_ai.operation.name` for model calls; those of strands, Gemini CLI and OpenAI's Responses too."""
_OPERATION = GenAIAttributes.OPERATION_NAME.value
_INPUT, _OUTPUT = GenAIAttributes.INPUT_MESSAGES.value, GenAIAttributes.OUTPUT_MESSAGES.value
_SYSTEM = "gen_ai.system_instructions"
_OLD_TOOLS = ("llm.request.functions", "gen_ai.request.tools", "gen_ai.request.functions")
_FINISH = (
    GenAIAttributes.RESPONSE_FINISH_REASONS.value,
    "llm.finish_reason",
    "ai.response.finishReason",
    "langfuse.observation.metadata.finish_reason",
)
_MODELS = (
    GenAIAttributes.REQUEST_MODEL.value,
    GenAIAttributes.RESPONSE_MODEL.value,
    "llm.model_name",
    "ai.model.id",
    "langfuse.observation.model.name",
)
_COUNT = "gen_ai.request.choice.count"
_RESPONSE_IDS = (GenAIAttributes.RESPONSE_ID.value, "ai.response.id")
_JSON = (
    _INPUT,
    _OUTPUT,
    _SYSTEM,
    GenAIAttributes.TOOL_DEFINITIONS.value,
    "gen_ai.prompt",
    "gen_ai.completion",
    "mlflow.spanInputs",
    "mlflow.spanOutputs",
    "ai.prompt.messages",
    "ai.response.toolCalls",
    "request_data",
    "response_data",
)
"""What is always JSON."""
_EVENT_ROLES = {
    f"gen_ai.{role}.message": role for role in ("system", "user", "assistant", "tool")
}  # earlier conventions: one event for each message

PROXY = "agentlightning"
"""Name of the way that our own proxy writes."""


@dataclass(frozen=True)
class Told:
    """What a span says of a model call. What it does not say is None or empty."""

    messages: Sequence[Message] = ()
    choices: Sequence[Choice] = ()
    tools: list[Message] | None = None
    response_id: str | None = None
    model: str | None = None
    asked: int | None = None
    """How many choices were asked for."""

    @classmethod
    def of(cls, request: Any, reply: ReadReply, tools: Any = None) -> Told:
        """What the bodies of a request and of a reply say."""
        known = object_of(request)
        listed = tools_of(known.get("tools") if tools is None else tools)
        model = str(known["model"]) if known.get("model") else reply.model
        return cls(messages_of(request), reply.choices, listed, reply.response_id, model, _count(known.get("n")))

    def or_else(self, other: Told) -> Told:
        """This, and where it says nothing, the other."""
        mine = {name: value for name, value in vars(self).items() if value not in (None, ()) and value != []}
        return replace(other, **mine | {"choices": _filled(self.choices, other.choices)})


def _filled(mine: Sequence[Choice], others: Sequence[Choice]) -> Sequence[Choice]:
    """Some choices, with what others say where they say nothing: those of the same places, if there are as many."""
    if len(mine) != len(others):
        return mine if any(each.message is not None for each in mine) or not others else others
    return [
        Choice(one.message if one.message is not None else other.message, one.finish_reason or other.finish_reason)
        for one, other in zip(mine, others, strict=True)
    ]


Attributes = Mapping[str, Any]


class Instrumentation(NamedTuple):
    """One way of writing model calls."""

    name: str
    is_call: Callable[[Attributes], bool | None]
    """Whether a span is a model call; None if this way does not know it."""
    read: Callable[[Attributes, Span], Told]
    """What it says of the call; called for every model call, also for those that another way recognised."""


def instrumentation_of(span: Span) -> str | None:
    """Return the name of the way in which the attributes say that a span is a model call; None if they do not."""
    attributes: Attributes = span.attributes
    for each in INSTRUMENTATIONS:
        says = each.is_call(attributes)
        if says is not None:
            return each.name if says else None
    return None


def is_told_otherwise(span: Span) -> bool:
    """Whether the attributes say that a span is something else than a model call, whatever its name is."""
    says = (each.is_call(span.attributes) for each in INSTRUMENTATIONS)
    return next((said for said in says if said is not None), None) is False


def is_cut(span: Span) -> bool:
    """Whether something is missing: attributes, or the end of what should be JSON. Gemini CLI keeps 10,000 characters,
    OpenTelemetry 128 attributes, which is less than OpenInference writes of a long conversation."""
    if LightningSpanAttributes.CUT.value in span.attributes:
        return True
    known = [span.attributes, *(event.attributes for event in span.events)]
    return any(_is_beginning(attributes.get(name)) for attributes in known for name in _JSON)


def _is_beginning(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("{", "[", '"')) and decoded(value) is value


def read_told(span: Span) -> Told:
    """Return what a span says of its model call, in whichever ways."""
    attributes: Attributes = span.attributes
    told = Told()
    for each in INSTRUMENTATIONS:
        told = told.or_else(each.read(attributes, span))
    reasons = decoded(first(attributes, _FINISH))
    listed = cast("Sequence[Any]", reasons) if isinstance(reasons, list | tuple) else [reasons]
    return Told(
        choices=[Choice(None, each if isinstance(each, str) and each else None) for each in listed],
        response_id=_text(attributes, _RESPONSE_IDS),
        model=_text(attributes, _MODELS),
        asked=_count(attributes.get(_COUNT)),
    ).or_else(told)


# --- Our proxy: request and reply as JSON ----------------------------------------------------------


def _read_proxy(attributes: Attributes, span: Span) -> Told:
    """What the agent sent and got stays exactly as it was, if it is in the form of OpenAI's chat API already."""
    body = object_of(attributes.get(LLMCallAttributes.REQUEST.value))
    response = object_of(attributes.get(LLMCallAttributes.RESPONSE.value))
    told = Told.of(body, reply_of(response) if response else ReadReply())
    if response and "choices" not in response:  # another wire than OpenAI's
        return told
    messages, tools = objects(body.get("messages")), objects(body.get("tools"))
    if not messages and "prompt" in body:
        messages = [{"role": "user", "content": body["prompt"]}]
    given = [choice.get("message") for choice in objects(response.get("choices"))]
    choices = [
        each._replace(message=cast("Message", message) if isinstance(message, dict) else each.message)
        for each, message in zip(told.choices, given, strict=True)
    ]
    return replace(
        told,
        messages=messages or told.messages,
        choices=choices,
        tools=tools if "messages" in body and tools else told.tools,
    )


# --- OpenTelemetry's conventions -------------------------------------------------------------------


def _read_structured(attributes: Attributes, span: Span) -> Told:
    """The present ones: messages of parts, on the span, or, because of their size, on events of it, all at once
    or one by one."""
    known = dict(attributes)
    for event in span.events:
        known |= {
            name: value
            for name, value in event.attributes.items()
            if name in (_INPUT, _OUTPUT, _SYSTEM, GenAIAttributes.TOOL_DEFINITIONS.value)
        }
    outputs = objects(decoded(known.get(_OUTPUT)))
    inputs = decoded(known.get(_INPUT))
    return Told(
        [*system_message(known[_SYSTEM]), *messages_of(inputs)]
        if _SYSTEM in known
        else messages_of(inputs)
        if isinstance(inputs, list)
        else [],
        choices_of([Choice(reply_message(each), _reason(each)) for each in outputs], _count(known.get(_COUNT))),
        tools_of(known.get(GenAIAttributes.TOOL_DEFINITIONS.value)),
    )


def _read_events(attributes: Attributes, span: Span) -> Told:
    """The earlier ones of events: one for each message, and one for each choice."""
    messages: list[Message] = []
    choices: list[Choice] = []
    for event in span.events:
        body = {**event.attributes, **object_of(event.attributes.get("gen_ai.event.content"))}
        if event.name in _EVENT_ROLES:
            message = {"role": _EVENT_ROLES[event.name], **body, "content": decoded(body.get("content"))}
            messages += messages_of([message])
        elif event.name == "gen_ai.choice":
            said = object_of(body.get("message")) or {"content": decoded(body.get("message"))}
            choices.append(Choice(reply_message(said), _reason(body)))
    return Told(messages, choices)


def _read_flattened(attributes: Attributes, span: Span) -> Told:
    """The oldest ones: one attribute for each field of each message. A thought before a reply is a message, too."""
    replies = _listed(attributes, "gen_ai.completion")
    tool_lists = (_listed(attributes, prefix) for prefix in _OLD_TOOLS)
    return Told(
        [_flat_message(given) for given in _listed(attributes, "gen_ai.prompt")],
        choices_of([Choice(reply_message(_flat_message(given, "assistant")), _reason(given)) for given in replies]),
        tools_of(next(filter(None, tool_lists), None)),
    )


def _flat_message(given: Mapping[str, Any], role: str = "user") -> Message:
    message: Message = {"role": str(given.get("role", role)), "content": given.get("content")}
    calls = [tool_call(call) for call in _in_order(given.get("tool_calls"))]
    if calls:
        message["tool_calls"] = calls
    if "tool_call_id" in given:
        message["tool_call_id"] = str(given["tool_call_id"])
    return message


# --- Libraries with ways of their own --------------------------------------------------------------


def _read_openinference(attributes: Attributes, span: Span) -> Told:
    if attributes.get("openinference.span.kind") != "LLM":
        return Told()
    whole = (
        reply_of(attributes.get("output.value"))
        if attributes.get("output.mime_type") == "application/json"
        else ReadReply()
    )
    messages = [_of_openinference(given) for given in _listed(attributes, "llm.input_messages")]
    replies = [Choice(reply_message(_of_openinference(given))) for given in _listed(attributes, "llm.output_messages")]
    asked = _count(object_of(attributes.get("llm.invocation_parameters")).get("n"))
    choices = choices_of(replies, asked or len(whole.choices))
    tools = [_inner(given, "tool").get("json_schema") for given in _listed(attributes, "llm.tools")]
    return Told(messages_of(messages), _filled(choices, whole.choices), tools_of(tools), whole.response_id, asked=asked)


def _of_openinference(given: Mapping[str, Any]) -> Message:
    message = dict(_inner(given, "message"))
    calls = [_inner(call, "tool_call") for call in _in_order(message.get("tool_calls"))]
    parts = [_inner(part, "message_content") for part in _in_order(message.pop("contents", None))]
    if parts:
        message["content"] = [_openinference_part(part) for part in parts]
    return {**message, "tool_calls": calls} if calls else message


def _openinference_part(part: Mapping[str, Any]) -> Mapping[str, Any]:
    url = _inner(_inner(part, "image"), "image").get("url")
    return part if url is None else {"type": "image_url", "image_url": {"url": url}}


def _read_langsmith(attributes: Attributes, span: Span) -> Told:
    request, reply = attributes.get("gen_ai.prompt"), attributes.get("gen_ai.completion")
    if not isinstance(decoded(request), dict | list):
        return Told()
    return Told.of(request, reply_of(reply)).or_else(Told(asked=_count(attributes.get("langsmith.metadata.n"))))


def _read_mlflow(attributes: Attributes, span: Span) -> Told:
    request = attributes.get("mlflow.spanInputs")
    reply = reply_of(attributes.get("mlflow.spanOutputs"))
    return Told.of(request, reply, attributes.get("mlflow.chat.tools"))


def _read_langfuse(attributes: Attributes, span: Span) -> Told:
    request = attributes.get("langfuse.observation.input")
    asked = _count(object_of(attributes.get("langfuse.observation.model.parameters")).get("n"))
    told = Told.of(request, reply_of(attributes.get("langfuse.observation.output"), asked))
    return told.or_else(Told(asked=asked))


def _read_ai_sdk(attributes: Attributes, span: Span) -> Told:
    text, calls = first(attributes, ("ai.response.text", "ai.response.object")), attributes.get("ai.response.toolCalls")
    called = [tool_call(each) for each in objects(decoded(calls))]
    reply = {"role": "assistant", "content": text} | ({"tool_calls": called} if called else {})
    return Told(
        messages_of(decoded(attributes.get("ai.prompt.messages"))),
        [] if text is None and not called else [Choice(reply)],
        tools_of(attributes.get("ai.prompt.tools")),
    )


def _read_logfire(attributes: Attributes, span: Span) -> Told:
    """Logfire before its version 5; a streamed reply is told as a text."""
    if "response_data" not in attributes:
        return Told()
    response = object_of(attributes["response_data"])
    streamed = response.get("combined_chunk_content")
    said = reply_of(response) if streamed is None else ReadReply([Choice({"role": "assistant", "content": streamed})])
    return Told.of(attributes.get("request_data"), said)


# --- What says that a span is a model call ---------------------------------------------------------


def _kind(attribute: str, *calls: str) -> Callable[[Attributes], bool | None]:
    """A library's own kinds of spans; all other kinds are something else."""

    def is_call(attributes: Attributes) -> bool | None:
        kind = attributes.get(attribute)
        return None if kind is None else str(decoded(kind)).lower() in calls

    return is_call


def _is_ai_sdk(attributes: Attributes) -> bool | None:
    operation = attributes.get("ai.operationId")
    if operation is not None:  # of the spans around the call too
        return str(operation).endswith((".doGenerate", ".doStream"))
    return True if "ai.prompt.messages" in attributes else None


def _is_logfire(attributes: Attributes) -> bool | None:
    if attributes.get("logfire.span_type") == "pending_span":
        return False  # a copy of the span's beginning
    return True if "request_data" in attributes and "response_data" in attributes else None


def _is_structured(attributes: Attributes) -> bool | None:
    operation = attributes.get(_OPERATION)
    if operation is not None:
        return operation in _CALLS
    return True if _OUTPUT in attributes else None


def _is_flattened(attributes: Attributes) -> bool | None:
    kind = attributes.get("llm.request.type")
    if kind is not None:
        return kind in ("chat", "completion")
    return True if any(name.startswith("gen_ai.completion.0.") for name in attributes) else None


def _unknown(attributes: Attributes) -> bool | None:
    return None


def _is_proxy(attributes: Attributes) -> bool | None:
    return True if LLMCallAttributes.REQUEST.value in attributes else None


def _read_nothing(attributes: Attributes, span: Span) -> Told:
    return Told()


INSTRUMENTATIONS: tuple[Instrumentation, ...] = (
    Instrumentation(PROXY, _is_proxy, _read_proxy),
    Instrumentation("langsmith", _kind("langsmith.span.kind", "llm"), _read_langsmith),
    Instrumentation("mlflow", _kind("mlflow.spanType", "llm", "chat_model"), _read_mlflow),
    Instrumentation("langfuse", _kind("langfuse.observation.type", "generation"), _read_langfuse),
    Instrumentation("openinference", _kind("openinference.span.kind", "llm"), _read_openinference),
    Instrumentation("ai-sdk", _is_ai_sdk, _read_ai_sdk),
    Instrumentation("logfire", _is_logfire, _read_logfire),
    Instrumentation("traceloop", _kind("traceloop.span.kind", "llm"), _read_nothing),
    Instrumentation("gen_ai messages", _is_structured, _read_structured),
    Instrumentation("gen_ai events", _unknown, _read_events),
    Instrumentation("gen_ai fields", _is_flattened, _read_flattened),
)


# --- Pieces of all of them -------------------------------------------------------------------------


def _listed(attributes: Attributes, prefix: str) -> list[dict[str, Any]]:
    return _in_order(filter_and_unflatten_attributes(attributes, prefix))


def _in_order(value: Any) -> list[dict[str, Any]]:
    """Return the objects of a list. One with gaps has come back as an object with positions as its keys."""
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value)
        value = [items[key] for key in sorted((key for key in items if key.isdecimal()), key=int)]
    return objects(value)


def _inner(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return object_of(given.get(name))


def _text(attributes: Attributes, names: Sequence[str]) -> str | None:
    told = first(attributes, names)
    return str(told) if told else None


def _reason(given: Mapping[str, Any]) -> str | None:
    reason = given.get("finish_reason")
    return str(reason) if reason else None


def _count(value: Any) -> int | None:
    return value if type(value) is int else None
