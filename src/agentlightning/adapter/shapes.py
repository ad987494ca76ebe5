"""Messages and tools as the wires and tracing libraries write them, turned into those of OpenAI's chat API.

What a value is, is seen from the value: no caller has to say which library wrote it. Nothing raises: what is
malformed is left out, and what is not text stays in a message as the part that it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

Message: TypeAlias = dict[str, Any]
"""A message, a tool or a tool call of OpenAI's chat API."""

_ROLES = {"human": "user", "ai": "assistant", "model": "assistant", "AIMessageChunk": "assistant"}
_SCHEMAS = ("parameters", "inputSchema", "input_schema", "parametersJsonSchema", "parameters_json_schema", "schema")
_FUNCTION_FIELDS = ("name", "description", "strict")
_TEXTS = ("text", "input_text", "output_text")
THOUGHTS = ("reasoning", "thinking", "redacted_thinking", "reasoningContent", "thought", "summary_text")
"""What a model thought, which OpenAI's messages have no place for."""
_CALLS = ("tool_call", "tool_use", "tool-call", "function_call", "functionCall", "toolUse", "tool_calls")
_RESULTS = (
    "tool_call_response",
    "tool_result",
    "tool-result",
    "function_call_output",
    "functionResponse",
    "toolResult",
)
_IDS = ("call_id", "tool_call_id", "tool_use_id", "toolCallId", "toolUseId", "id")
_ARGUMENTS = ("arguments", "args", "input", "parameters")
_OUTPUTS = ("response", "result", "output", "content")


@dataclass
class _Pieces:
    """What the parts of one message are."""

    content: list[Any] = field(default_factory=list[Any])
    """Texts as strings, and what is neither text nor one of the others as it was written."""
    calls: list[Message] = field(default_factory=list[Message])
    results: list[Message] = field(default_factory=list[Message])

    def text(self) -> Any:
        """The content of a message: a text, or parts if there is more than text; None without any."""
        if all(isinstance(each, str) for each in self.content):
            return "".join(self.content) if self.content else None
        return [{"type": "text", "text": each} if isinstance(each, str) else each for each in self.content]


# --- Messages --------------------------------------------------------------------------------------


def messages_of(value: Any) -> list[Message]:
    """Return the messages of a request: of its body, of a list of messages, or of a text, each also as JSON."""
    value = decoded(value)
    if isinstance(value, str):
        return [{"role": "user", "content": value}] if value else []
    if isinstance(value, list):
        items = cast("list[Any]", value)
        if len(items) == 1 and isinstance(items[0], list):  # LangChain: a batch of one conversation
            return messages_of(items[0])
        return [message for item in items for message in one_message(item)]
    if not isinstance(value, dict):
        return []
    body = cast("Mapping[str, Any]", value)
    told = first(body, ("messages", "contents", "input", "prompt"))
    if told is None:
        return one_message(body) if {"role", "content", "parts", "kwargs"} & body.keys() else []
    system = first(body, ("system", "instructions", "systemInstruction"))
    return [*([] if system is None else system_message(system)), *messages_of(told)]


def system_message(value: Any) -> list[Message]:
    """Return the instructions of a request as a message: a text, parts, or a message."""
    value = decoded(value)
    pieces = _Pieces()
    _sort_in(cast("Any", value).get("parts", value) if isinstance(value, dict) else value, pieces)
    return [] if pieces.text() is None else [{"role": "system", "content": pieces.text()}]


def one_message(given: Any, role: str = "user") -> list[Message]:
    """Return one message as OpenAI's messages: one for each result of a tool, and one for everything else."""
    if isinstance(given, str):
        return [{"role": role, "content": given}]
    if isinstance(given, list) and len(cast("list[Any]", given)) == 2 and all(isinstance(x, str) for x in given):  # pyright: ignore[reportUnknownVariableType]
        return [{"role": _role(given[0]), "content": given[1]}]
    if not isinstance(given, dict):
        return []
    message = cast("Mapping[str, Any]", given)
    inner = message.get("kwargs", message.get("data"))  # LangChain's, serialised
    if isinstance(inner, dict) and "content" in inner:
        kind = cast("list[Any]", message.get("id") or [""])[-1]
        inner = cast("Mapping[str, Any]", inner)
        message = {"type": message.get("type") if "data" in message else _kind(kind), **inner}
    return _openai_messages(message, role)


def _openai_messages(message: Mapping[str, Any], role: str) -> list[Message]:
    pieces = _Pieces()
    kind = message.get("type")
    if kind in (*_CALLS, *_RESULTS):  # an item of the Responses API, which is a message of its own
        _sort_in([message], pieces)
        role = "assistant" if kind in _CALLS else "tool"
    else:
        role = _role(message.get("role") or (kind if kind not in (None, "message") else role))
        _sort_in(message.get("parts", message.get("content")), pieces)
    pieces.calls += [tool_call(each) for each in objects(decoded(message.get("tool_calls")))]
    call_id = first(message, ("tool_call_id", "toolCallId"))
    if role == "tool" and not pieces.results:
        found: Message = {"role": "tool", "tool_call_id": str(call_id or message.get("id") or "")}
        return [{**found, "content": pieces.text()}]
    if pieces.results and pieces.text() is None and not pieces.calls:
        return pieces.results
    said: Message = {"role": role, "content": pieces.text()}
    if pieces.calls:
        said["tool_calls"] = pieces.calls
    return [*pieces.results, said]


def _sort_in(content: Any, pieces: _Pieces) -> None:
    """Sort what a message says into texts, calls of tools, results of tools, and the rest."""
    parts = cast("list[Any]", content) if isinstance(content, list) else [content]
    for part in parts:
        _sort_part(part, pieces)


def _sort_part(part: Any, pieces: _Pieces) -> None:
    if not isinstance(part, dict):
        if isinstance(part, str):
            pieces.content.append(part)
        return
    given = cast("Mapping[str, Any]", part)
    kind = given.get("type") or next((key for key in (*_CALLS, *_RESULTS, *THOUGHTS) if key in given), "text")
    wrapped = given.get(str(kind))
    body = cast("Mapping[str, Any]", wrapped) if isinstance(wrapped, dict) else given
    if kind in _CALLS:
        pieces.calls.append(tool_call(body))
    elif kind in _RESULTS:
        pieces.results.append(_tool_result(body))
    elif kind in THOUGHTS or given.get("thought") is True:
        pass  # OpenAI's messages have no place for it
    elif kind in _TEXTS and isinstance(first(given, ("text", "content")), str):
        pieces.content.append(first(given, ("text", "content")))
    else:
        pieces.content.append(dict(given))


def _tool_result(given: Mapping[str, Any]) -> Message:
    output = first(given, _OUTPUTS)
    inner = _Pieces()
    if isinstance(output, list) and all(isinstance(each, dict) for each in cast("list[Any]", output)):
        _sort_in(output, inner)
    text = inner.text()
    if isinstance(output, dict) and {"type", "value"} <= output.keys():  # ai-sdk
        output = cast("Mapping[str, Any]", output)["value"]
    content = text if isinstance(text, str) else as_text(output)
    return {"role": "tool", "tool_call_id": str(first(given, _IDS) or ""), "content": content}


def tool_call(given: Mapping[str, Any]) -> Message:
    """Return a call of a tool as OpenAI's. Arguments that are no text become JSON."""
    function = given.get("function")
    named = cast("Mapping[str, Any]", function) if isinstance(function, dict) else given
    arguments = first(named, _ARGUMENTS)
    return {
        "id": str(first(given, _IDS) or ""),
        "type": "function",
        "function": {
            "name": str(first(named, ("name", "toolName")) or ""),
            "arguments": as_text({} if arguments is None else arguments),
        },
    }


def _role(name: Any) -> str:
    return _ROLES.get(str(name), str(name))


def _kind(class_name: Any) -> str:
    """The role of a message of LangChain, by the name of its class."""
    name = str(class_name).removesuffix("Chunk").removesuffix("Message").lower()
    return name or "user"


# --- Tools -----------------------------------------------------------------------------------------


def tools_of(value: Any) -> list[Message] | None:
    """Return the tools of a request as OpenAI's, from a list of them, each also as JSON; None without any."""
    value = decoded(value)
    given = [decoded(each) for each in cast("list[Any]", value)] if isinstance(value, list | tuple) else []
    found: list[Message] = []
    for each in objects(given):
        declared = first(each, ("functionDeclarations", "function_declarations"))
        found += [_tool(each)] if declared is None else [_tool(tool) for tool in objects(declared)]
    return found or None


def _tool(given: Mapping[str, Any]) -> Message:
    if isinstance(given.get("function"), dict):
        return {"type": "function", **given}
    inner = given.get("toolSpec")  # Bedrock
    named = cast("Mapping[str, Any]", inner) if isinstance(inner, dict) else given
    if not named.get("name"):
        return dict(given)  # a tool of the server
    function: Message = {name: named[name] for name in _FUNCTION_FIELDS if named.get(name) is not None}
    schema = decoded(first(named, _SCHEMAS))
    if isinstance(schema, dict) and cast("Mapping[str, Any]", schema).keys() <= {"json", "jsonSchema"} and schema:
        schema = next(iter(cast("Mapping[str, Any]", schema).values()))
    if schema is not None:
        function["parameters"] = schema
    return {"type": "function", "function": function}


# --- Pieces of all of them -------------------------------------------------------------------------


def objects(value: Any) -> list[dict[str, Any]]:
    """Return the items of a list that are objects."""
    if not isinstance(value, list):
        return []
    return [cast("dict[str, Any]", item) for item in cast("list[Any]", value) if isinstance(item, dict)]


def object_of(value: Any) -> dict[str, Any]:
    """Return an object, also from its JSON; an empty one for everything else."""
    told = decoded(value)
    return cast("dict[str, Any]", told) if isinstance(told, dict) else {}


def first(values: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Return the value of the first name that has one; None without any."""
    return next((values[name] for name in names if values.get(name) is not None), None)


def as_text(value: Any) -> str:
    """Return a text as it is, and everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def decoded(value: Any) -> Any:
    """Return what a text of a JSON object, list or string says. Everything else is returned as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[", '"')):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
