"""What was said in a model call, read from its span, as OpenAI's chat messages.

Three ways of writing it down are understood, the first that is there counts:

1. our proxy's: request and response as JSON (``LLMCallAttributes``);
2. OpenTelemetry's present conventions: ``gen_ai.input.messages``, ``gen_ai.output.messages``,
   ``gen_ai.system_instructions`` and ``gen_ai.tool.definitions`` as JSON, on the span or on an event of it
   (https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/);
3. the older ones of OpenLLMetry and AgentOps: ``gen_ai.prompt.0.role``, ``gen_ai.completion.0.content``,
   ``llm.request.functions.0.name`` or ``gen_ai.request.tools.0.name``.

Nothing raises: what cannot be read is not there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

from agentlightning.semconv import GenAIAttributes, LLMCallAttributes
from agentlightning.types import Span
from agentlightning.types.attributes import filter_and_unflatten_attributes

__all__ = ["Conversation", "Message", "group_genai_dict", "read_conversation", "read_json_object"]

Message: TypeAlias = dict[str, Any]
"""A message, a tool or a tool call of OpenAI's chat protocol."""

_SYSTEM_INSTRUCTIONS = "gen_ai.system_instructions"
_OLD_TOOLS = ("llm.request.functions", "gen_ai.request.tools", "gen_ai.request.functions")


@dataclass
class Conversation:
    """One model call."""

    messages: list[Message] = field(default_factory=list[Message])
    """What was asked. Of a text completion: one message of the user."""

    reply: Message | None = None
    """What was answered first. None: nothing is known of it."""

    tools: list[Message] | None = None
    """What the model could call."""


def read_conversation(span: Span) -> Conversation:
    """What a span says about its call. Empty if it says nothing."""
    attributes: Mapping[str, Any] = span.attributes
    if LLMCallAttributes.REQUEST.value in attributes:
        return _from_proxy(attributes)
    for source in (attributes, *(event.attributes for event in span.events)):
        if GenAIAttributes.INPUT_MESSAGES.value in source or GenAIAttributes.OUTPUT_MESSAGES.value in source:
            return _from_structured({**attributes, **source})
    return _from_flattened(attributes)


def group_genai_dict(data: Mapping[str, Any], prefix: str) -> dict[str, Any] | list[Any]:
    """What stands below ``prefix`` in flat attributes, nested again; keys 0, 1, 2 … make a list."""
    return filter_and_unflatten_attributes(data, prefix)


def read_json_object(text: Any) -> dict[str, Any]:
    """The JSON object in a text; empty if it is not one."""
    value = _json(text)
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


# --- Our proxy -------------------------------------------------------------------------------------


def _from_proxy(attributes: Mapping[str, Any]) -> Conversation:
    request = read_json_object(attributes.get(LLMCallAttributes.REQUEST.value))
    response = read_json_object(attributes.get(LLMCallAttributes.RESPONSE.value))
    messages = _objects(request.get("messages"))
    if not messages and "prompt" in request:
        messages = [{"role": "user", "content": request["prompt"]}]
    choice = (_objects(response.get("choices")) or [dict[str, Any]()])[0]
    reply = choice.get("message")
    if reply is None and "text" in choice:
        reply = {"role": "assistant", "content": choice["text"]}
    return Conversation(
        messages, cast("Message", reply) if isinstance(reply, dict) else None, _objects(request.get("tools")) or None
    )


# --- OpenTelemetry, present conventions ------------------------------------------------------------


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
    """One message of parts as OpenAI's: usually one, but one for each answer of a tool."""
    role = str(given.get("role", "user"))
    parts = _objects(given.get("parts"))
    answers = [part for part in parts if part.get("type") == "tool_call_response"]
    messages: list[Message] = [
        {
            "role": "tool",
            "tool_call_id": str(part.get("id") or ""),
            "content": _as_text(part.get("response", part.get("result"))),
        }
        for part in answers
    ]
    calls = [_tool_call(part.get("id"), part) for part in parts if part.get("type") == "tool_call"]
    others = [part for part in parts if part.get("type") not in ("tool_call", "tool_call_response")]
    if others or calls or not answers:
        message: Message = {"role": role, "content": _text_of_parts(others) if others else given.get("content")}
        if calls:
            message["tool_calls"] = calls
        messages.append(message)
    return messages


def _text_of_parts(parts: Sequence[Mapping[str, Any]]) -> str:
    """The texts of the parts. Thoughts are no part of what OpenAI's messages say."""
    return "".join(str(part["content"]) for part in parts if part.get("type") == "text" and "content" in part)


# --- Flattened, the older conventions --------------------------------------------------------------


def _from_flattened(attributes: Mapping[str, Any]) -> Conversation:
    messages = [_flat_message(given) for given in _in_order(group_genai_dict(attributes, "gen_ai.prompt"))]
    replies = [
        _flat_message(given, "assistant") for given in _in_order(group_genai_dict(attributes, "gen_ai.completion"))
    ]
    listed = [_in_order(group_genai_dict(attributes, prefix)) for prefix in _OLD_TOOLS]
    tools = [_tool(tool) for tool in next(filter(None, listed), list[Message]())]
    return Conversation(messages, replies[0] if replies else None, tools or None)


def _flat_message(given: Mapping[str, Any], role: str = "user") -> Message:
    message: Message = {"role": str(given.get("role", role)), "content": given.get("content")}
    calls = [_tool_call(call.get("id"), call) for call in _in_order(given.get("tool_calls"))]
    if calls:
        message["tool_calls"] = calls
    if "tool_call_id" in given:
        message["tool_call_id"] = str(given["tool_call_id"])
    return message


def _in_order(value: Any) -> list[dict[str, Any]]:
    """The objects of a list, also of one with gaps, whose items then stand under their positions."""
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value)
        value = [items[key] for key in sorted((key for key in items if key.isdecimal()), key=int)]
    return _objects(value)


# --- Pieces ----------------------------------------------------------------------------------------


def _tool_call(call_id: Any, given: Mapping[str, Any]) -> Message:
    function = given.get("function")
    named = cast("Mapping[str, Any]", function) if isinstance(function, dict) else given
    arguments = named.get("arguments")
    return {
        "id": str(call_id or ""),
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
        function["parameters"] = _json(parameters) if isinstance(parameters, str) else parameters
    return {"type": "function", "function": function}


def _objects(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        return []
    return [cast("dict[str, Any]", item) for item in cast("list[Any]", value) if isinstance(item, dict)]


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _json(value: Any) -> Any:
    """A value that was written as JSON; one that was not written so stays as it is, one that is broken is None."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None
