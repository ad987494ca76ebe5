"""`ModelCall`: what training needs of one model call, read from its span."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar, cast

from agentlightning.semconv import GenAIAttributes, LLMCallAttributes
from agentlightning.types import Span, Triplet
from agentlightning.types.attributes import filter_and_unflatten_attributes

# --- What was said in a model call, read from its span, as OpenAI's chat messages ---

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


# ---

_PROMPT_IDS = (LLMCallAttributes.PROMPT_TOKEN_IDS.value, "prompt_token_ids")
_RESPONSE_IDS = (LLMCallAttributes.RESPONSE_TOKEN_IDS.value, "response_token_ids")
_LOGPROBS = (LLMCallAttributes.RESPONSE_LOGPROBS.value, "response_logprobs")
"""Ours, and what other instrumentations of vLLM write."""


@dataclass(frozen=True)
class ModelCall:
    """One call. What its span does not say is None or empty."""

    span: Span
    conversation: Conversation
    model: str | None
    model_version: str | None
    response_id: str | None
    finish_reason: str | None
    prompt_token_ids: list[int]
    response_token_ids: list[int]
    logprobs: list[float] | None
    """One for each of `response_token_ids`."""

    @property
    def problem(self) -> str | None:
        """Why nothing can be learned from it; None if something can."""
        if self.span.status.status_code == "ERROR":
            return f"the call failed: {self.span.status.description or 'no description'}"
        if self.response_token_ids and self.prompt_token_ids:
            return None
        if self.conversation.messages and self.conversation.reply is not None:
            return None
        return "neither token ids nor messages were recorded"

    def triplet(self, agent_name: str, reward: float | None) -> Triplet:
        """The call as a training example.

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


def response_id_of(span: Span) -> str | None:
    """The id that the backend gave its reply."""
    value = span.attributes.get(GenAIAttributes.RESPONSE_ID.value)
    return str(value) if value else None


def has_token_ids(span: Span) -> bool:
    """Whether the tokens of prompt and response were recorded."""
    attributes = span.attributes
    return bool(_first(attributes, _PROMPT_IDS)) and bool(_first(attributes, _RESPONSE_IDS))


def read_model_call(span: Span) -> ModelCall:
    """What the span of a model call says. Nothing raises: holes stay holes."""
    attributes: Mapping[str, Any] = span.attributes
    reply_body = read_json_object(attributes.get(LLMCallAttributes.RESPONSE.value))
    choices = reply_body.get("choices")
    choice = _object(cast("list[Any]", choices)[0]) if isinstance(choices, list) and choices else {}
    response_ids = _integers(_first(attributes, _RESPONSE_IDS) or choice.get("token_ids"))
    prompt_ids = _integers(
        _first(attributes, _PROMPT_IDS) or reply_body.get("prompt_token_ids") or choice.get("prompt_token_ids")
    )
    finish_reasons = attributes.get(GenAIAttributes.RESPONSE_FINISH_REASONS.value)
    return ModelCall(
        span=span,
        conversation=read_conversation(span),
        model=_text(attributes, GenAIAttributes.REQUEST_MODEL, GenAIAttributes.RESPONSE_MODEL),
        model_version=_text(attributes, LLMCallAttributes.MODEL_VERSION),
        response_id=response_id_of(span),
        finish_reason=str(finish_reasons[0]) if isinstance(finish_reasons, list | tuple) and finish_reasons else None,
        prompt_token_ids=prompt_ids,
        response_token_ids=response_ids,
        logprobs=_logprobs(_first(attributes, _LOGPROBS), len(response_ids)),
    )


def _first(attributes: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((attributes[name] for name in names if name in attributes), None)


def _text(attributes: Mapping[str, Any], *names: GenAIAttributes | LLMCallAttributes) -> str | None:
    return next((str(attributes[name.value]) for name in names if name.value in attributes), None)


def _integers(value: Any) -> list[int]:
    items = list(cast("Sequence[Any]", value)) if isinstance(value, list | tuple) else []
    return items if all(type(item) is int for item in items) else []


def _logprobs(value: Any, count: int) -> list[float] | None:
    """Log-probabilities only where there is one for each token."""
    if not isinstance(value, list | tuple) or len(cast("Sequence[Any]", value)) != count:
        return None
    numbers = [float(item) for item in cast("Sequence[Any]", value) if isinstance(item, int | float)]
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _object(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


# --- Which of several spans of the same model call is kept ---

N = TypeVar("N")


@dataclass(frozen=True)
class FoundCall(Generic[N]):
    """A span of a model call, found in a tree."""

    node: N
    """Where in the tree it is."""

    span: Span
    agent: str
    outer: FoundCall[N] | None
    """The call that it lies in."""


def one_of_each_nest(calls: Sequence[FoundCall[N]]) -> list[FoundCall[N]]:
    """Of calls inside of each other the outermost, or those with token ids if it has none."""
    nests: dict[str, list[FoundCall[N]]] = {}
    for call in calls:
        outermost = call
        while outermost.outer is not None:
            outermost = outermost.outer
        nests.setdefault(outermost.span.span_id, []).append(call)
    return [call for nest in nests.values() for call in _kept_of(nest)]


def one_for_each_reply(calls: Sequence[FoundCall[N]], seen: set[str]) -> list[FoundCall[N]]:
    """Of calls with the same response id one, rather one with token ids; none of those in ``seen``, which grows."""
    kept: list[FoundCall[N]] = []
    for call in sorted(calls, key=lambda call: not has_token_ids(call.span)):
        reply = response_id_of(call.span)
        if reply is None or reply not in seen:
            kept.append(call)
        if reply is not None:
            seen.add(reply)
    return kept


def _kept_of(nest: Sequence[FoundCall[N]]) -> Iterator[FoundCall[N]]:
    recorded = [call for call in nest if has_token_ids(call.span)]
    if recorded and all(call.outer is not None for call in recorded):
        yield from recorded
    else:
        yield next(call for call in nest if call.outer is None)
