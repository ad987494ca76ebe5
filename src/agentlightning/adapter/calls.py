"""`ModelCall`: what training needs of one model call, read from its span.

Spans of model calls are written in four ways: by our proxy (request and reply as JSON), by OpenTelemetry's present
conventions (messages of parts, as JSON), by its older ones (one attribute for each field of each message), and by
instrumentations of vLLM (token ids under names of their own). All are read here, and nothing that is missing or
malformed raises: it stays None or empty.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

from agentlightning.semconv import GenAIAttributes, LLMCallAttributes
from agentlightning.types import Span, Triplet
from agentlightning.types.attributes import filter_and_unflatten_attributes

Message: TypeAlias = dict[str, Any]
"""A message, a tool or a tool call of OpenAI's chat API."""

_SYSTEM_INSTRUCTIONS = "gen_ai.system_instructions"
_OLD_TOOLS = ("llm.request.functions", "gen_ai.request.tools", "gen_ai.request.functions")
_PROMPT_IDS = (LLMCallAttributes.PROMPT_TOKEN_IDS.value, "prompt_token_ids")
_RESPONSE_IDS = (LLMCallAttributes.RESPONSE_TOKEN_IDS.value, "response_token_ids")
_LOGPROBS = (LLMCallAttributes.RESPONSE_LOGPROBS.value, "response_logprobs")
"""Each: the name that our proxy writes, and the one that instrumentations of vLLM write."""


@dataclass
class Conversation:
    """The messages of one model call."""

    messages: list[Message] = field(default_factory=list[Message])
    """The request. A text completion's prompt is one message of the user."""

    reply: Message | None = None
    """The first choice of the reply; None if it was not recorded."""

    tools: list[Message] | None = None
    """The tools that the model could call."""


@dataclass(frozen=True)
class ModelCall:
    """One model call. What its span does not say is None or empty."""

    span: Span
    conversation: Conversation
    model: str | None
    model_version: str | None
    response_id: str | None
    finish_reason: str | None
    prompt_token_ids: list[int]
    response_token_ids: list[int]
    logprobs: list[float] | None
    """Natural logarithms of probabilities, one for each of `response_token_ids`."""

    @property
    def problem(self) -> str | None:
        """Why the call cannot be used for training; None if it can."""
        if self.span.status.status_code == "ERROR":
            return f"the call failed: {self.span.status.description or 'no description'}"
        if LLMCallAttributes.UNUSABLE.value in self.span.attributes:
            return str(self.span.attributes[LLMCallAttributes.UNUSABLE.value])
        if self.response_token_ids and self.prompt_token_ids:
            return None
        if self.conversation.messages and self.conversation.reply is not None:
            return None
        return "neither token ids nor messages were recorded"

    def triplet(self, agent_name: str, reward: float | None) -> Triplet:
        """Return the call as a training example.

        ``prompt`` has ``token_ids``, ``messages`` and ``tools``; ``response`` has ``token_ids`` and ``message``.
        """
        return Triplet(
            prompt={
                "token_ids": self.prompt_token_ids,
                "messages": self.conversation.messages,
                "tools": self.conversation.tools,
            },
            response={"token_ids": self.response_token_ids, "message": self.conversation.reply},
            reward=reward,
            metadata={
                "logprobs": self.logprobs,
                "model": self.model,
                "model_version": self.model_version,
                "response_id": self.response_id,
                "finish_reason": self.finish_reason,
                "agent_name": agent_name,
                "span_id": self.span.span_id,
                "sequence_id": self.span.sequence_id,
            },
        )


def read_model_call(span: Span) -> ModelCall:
    """Read the span of a model call."""
    attributes: Mapping[str, Any] = span.attributes
    reply_body = _json_object(attributes.get(LLMCallAttributes.RESPONSE.value))
    choice = next(iter(_objects(reply_body.get("choices"))), dict[str, Any]())
    prompt_ids = _first(attributes, _PROMPT_IDS) or reply_body.get("prompt_token_ids") or choice.get("prompt_token_ids")
    response_ids = _integers(_first(attributes, _RESPONSE_IDS) or choice.get("token_ids"))
    finish_reasons = attributes.get(GenAIAttributes.RESPONSE_FINISH_REASONS.value)
    return ModelCall(
        span=span,
        conversation=_read_conversation(span, choice),
        model=_text(attributes, GenAIAttributes.REQUEST_MODEL, GenAIAttributes.RESPONSE_MODEL),
        model_version=_text(attributes, LLMCallAttributes.MODEL_VERSION),
        response_id=response_id_of(span),
        finish_reason=str(finish_reasons[0]) if isinstance(finish_reasons, list | tuple) and finish_reasons else None,
        prompt_token_ids=_integers(prompt_ids),
        response_token_ids=response_ids,
        logprobs=_logprobs(_first(attributes, _LOGPROBS), len(response_ids)),
    )


def response_id_of(span: Span) -> str | None:
    """Return the id that the backend gave its reply."""
    value = span.attributes.get(GenAIAttributes.RESPONSE_ID.value)
    return str(value) if value else None


def has_token_ids(span: Span) -> bool:
    """Whether the token ids of prompt and reply were recorded."""
    attributes = span.attributes
    return bool(_first(attributes, _PROMPT_IDS)) and bool(_first(attributes, _RESPONSE_IDS))


def _read_conversation(span: Span, choice: Mapping[str, Any]) -> Conversation:
    attributes: Mapping[str, Any] = span.attributes
    if LLMCallAttributes.REQUEST.value in attributes:
        return _from_proxy(_json_object(attributes[LLMCallAttributes.REQUEST.value]), choice)
    # The present conventions allow the messages on the span, or on an event of it because of their size.
    for source in (attributes, *(event.attributes for event in span.events)):
        if GenAIAttributes.INPUT_MESSAGES.value in source or GenAIAttributes.OUTPUT_MESSAGES.value in source:
            return _from_structured({**attributes, **source})
    return _from_flattened(attributes)


# --- Our proxy: request and reply as JSON ----------------------------------------------------------


def _from_proxy(request: Mapping[str, Any], choice: Mapping[str, Any]) -> Conversation:
    messages = _objects(request.get("messages"))
    if not messages and "prompt" in request:
        messages = [{"role": "user", "content": request["prompt"]}]
    reply = choice.get("message")
    if reply is None and "text" in choice:
        reply = {"role": "assistant", "content": choice["text"]}
    known = cast("Message", reply) if isinstance(reply, dict) else None
    return Conversation(messages, known, _objects(request.get("tools")) or None)


# --- OpenTelemetry's present conventions: messages of parts, as JSON -------------------------------


def _from_structured(attributes: Mapping[str, Any]) -> Conversation:
    messages: list[Message] = []
    instructions = _objects(_json(attributes.get(_SYSTEM_INSTRUCTIONS)))
    if instructions:
        messages.append({"role": "system", "content": _text_of_parts(instructions)})
    for given in _objects(_json(attributes.get(GenAIAttributes.INPUT_MESSAGES.value))):
        messages.extend(_messages_of_parts(given))
    replies = _objects(_json(attributes.get(GenAIAttributes.OUTPUT_MESSAGES.value)))
    reply = next((message for given in replies for message in _messages_of_parts(given)), None)
    tools = [_tool(given) for given in _objects(_json(attributes.get(GenAIAttributes.TOOL_DEFINITIONS.value)))]
    return Conversation(messages, reply, tools or None)


def _messages_of_parts(given: Mapping[str, Any]) -> list[Message]:
    """Return a message of parts as OpenAI's messages: one for each result of a tool, one for everything else."""
    parts = _objects(given.get("parts"))
    results = [part for part in parts if part.get("type") == "tool_call_response"]
    messages: list[Message] = [
        {
            "role": "tool",
            "tool_call_id": str(part.get("id") or ""),
            "content": _as_text(part.get("response", part.get("result"))),
        }
        for part in results
    ]
    calls = [_tool_call(part) for part in parts if part.get("type") == "tool_call"]
    others = [part for part in parts if part.get("type") not in ("tool_call", "tool_call_response")]
    if others or calls or not results:
        content = _text_of_parts(others) if others else given.get("content")
        message: Message = {"role": str(given.get("role", "user")), "content": content}
        if calls:
            message["tool_calls"] = calls
        messages.append(message)
    return messages


def _text_of_parts(parts: Sequence[Mapping[str, Any]]) -> str:
    # Reasoning is a part too, but OpenAI's messages have no place for it.
    return "".join(str(part["content"]) for part in parts if part.get("type") == "text" and "content" in part)


# --- The older conventions: one attribute for each field -------------------------------------------


def _from_flattened(attributes: Mapping[str, Any]) -> Conversation:
    messages = [_flat_message(given) for given in _listed(attributes, "gen_ai.prompt")]
    replies = [_flat_message(given, "assistant") for given in _listed(attributes, "gen_ai.completion")]
    tool_lists = (_listed(attributes, prefix) for prefix in _OLD_TOOLS)
    tools = [_tool(tool) for tool in next(filter(None, tool_lists), list[Message]())]
    return Conversation(messages, replies[0] if replies else None, tools or None)


def _listed(attributes: Mapping[str, Any], prefix: str) -> list[dict[str, Any]]:
    return _in_order(filter_and_unflatten_attributes(attributes, prefix))


def _flat_message(given: Mapping[str, Any], role: str = "user") -> Message:
    message: Message = {"role": str(given.get("role", role)), "content": given.get("content")}
    calls = [_tool_call(call) for call in _in_order(given.get("tool_calls"))]
    if calls:
        message["tool_calls"] = calls
    if "tool_call_id" in given:
        message["tool_call_id"] = str(given["tool_call_id"])
    return message


def _in_order(value: Any) -> list[dict[str, Any]]:
    """Return the objects of a list. One with gaps has come back as an object with positions as its keys."""
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value)
        value = [items[key] for key in sorted((key for key in items if key.isdecimal()), key=int)]
    return _objects(value)


# --- Pieces of all of them -------------------------------------------------------------------------


def _tool_call(given: Mapping[str, Any]) -> Message:
    function = given.get("function")
    named = cast("Mapping[str, Any]", function) if isinstance(function, dict) else given
    arguments = named.get("arguments")
    return {
        "id": str(given.get("id") or ""),
        "type": "function",
        "function": {"name": str(named.get("name", "")), "arguments": _as_text({} if arguments is None else arguments)},
    }


def _tool(given: Mapping[str, Any]) -> Message:
    if isinstance(given.get("function"), dict):
        return {"type": "function", **given}
    function: Message = {"name": str(given.get("name", ""))}
    if given.get("description"):
        function["description"] = given["description"]
    parameters = given.get("parameters")
    if parameters is not None:
        function["parameters"] = _json(parameters)
    return {"type": "function", "function": function}


def _objects(value: Any) -> list[dict[str, Any]]:
    """Return the items of a list that are objects."""
    if not isinstance(value, list):
        return []
    return [cast("dict[str, Any]", item) for item in cast("list[Any]", value) if isinstance(item, dict)]


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _json(value: Any) -> Any:
    """Decode a text of JSON; None if it is malformed. A value that is no text is returned as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def _json_object(text: Any) -> dict[str, Any]:
    value = _json(text)
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _first(attributes: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((attributes[name] for name in names if name in attributes), None)


def _text(attributes: Mapping[str, Any], *names: GenAIAttributes | LLMCallAttributes) -> str | None:
    return next((str(attributes[name.value]) for name in names if name.value in attributes), None)


def _integers(value: Any) -> list[int]:
    items = list(cast("Sequence[Any]", value)) if isinstance(value, list | tuple) else []
    return items if all(type(item) is int for item in items) else []


def _logprobs(value: Any, count: int) -> list[float] | None:
    """Return log-probabilities only if there is a finite one for each token; others would train on wrong ratios."""
    if not isinstance(value, list | tuple) or len(cast("Sequence[Any]", value)) != count:
        return None
    numbers = [float(item) for item in cast("Sequence[Any]", value) if isinstance(item, int | float)]
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None
