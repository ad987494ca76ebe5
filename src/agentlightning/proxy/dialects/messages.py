"""Anthropic's wire, ``POST /v1/messages``, as its SDKs and Claude Code speak it.

Requests, replies, events and errors have the shapes of https://docs.anthropic.com/en/api/messages; the names of the
events and their order are those that the package ``anthropic`` (2.14.0) parses.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import msgspec
from typing_extensions import override

from agentlightning.proxy.dialects.base import ModelRequest, ProxyError
from agentlightning.proxy.dialects.lenient import write_json
from agentlightning.proxy.dialects.pieces import Piece, PieceReader
from agentlightning.proxy.dialects.replies import object_of
from agentlightning.proxy.dialects.translated import (
    ChatRequest,
    ToolCall,
    TranslatedDialect,
    Untranslatable,
    Usage,
    content_of,
    data_url,
    first_choice,
    image_part,
    reasoning_of,
    sse,
    text_in,
    text_part,
    tool_call,
    tool_calls_of,
    usage_of,
)

_SAME = {
    "max_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "stop_sequences": "stop",
}
_LEFT_OUT = ("thinking", "mcp_servers", "container", "context_management", "service_tier", "speed")
_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_INVALID_JSON = "INVALID_JSON"
"""The field of a tool's input that holds arguments which are no JSON object, as the vendor's documents advise."""


class Messages(TranslatedDialect):
    """``POST /v1/messages``."""

    name = "messages"
    provider = "anthropic"
    paths = ("/messages",)
    count_paths = ("/messages/count_tokens",)
    client_headers = ("anthropic-version",)

    # --- Requests ---

    @override
    def translate(self, asked: Mapping[str, Any], path_params: Mapping[str, str], chat: ChatRequest) -> bool:
        if parts := _blocks(asked.get("system"), "system"):
            chat.say("system", "\n".join(str(part.get("text", "")) for part in parts))
        messages = asked.get("messages")
        if not isinstance(messages, list) or not messages:
            raise Untranslatable("The field 'messages' is missing or empty.", "messages")
        for number, message in enumerate(cast("list[Any]", messages)):
            _add_message(object_of(message), f"messages.{number}", chat)
        chat.copy(asked, _SAME)
        chat.leave_out(asked, _LEFT_OUT)
        for number, tool in enumerate(asked.get("tools") or ()):
            _add_tool(object_of(tool), f"tools.{number}", chat)
        _add_choice(object_of(asked.get("tool_choice")), chat)
        output = object_of(object_of(asked.get("output_config")).get("format") or asked.get("output_format"))
        if output.get("type") == "json_schema":
            schema = {"name": "reply", "schema": output.get("schema"), "strict": True}
            chat.body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if effort := object_of(asked.get("output_config")).get("effort"):
            chat.notes.append(f"output_config.effort {effort!r} is left out")
        return asked.get("stream") is True

    @override
    def count_reply(self, count: int) -> dict[str, Any]:
        return {"input_tokens": count}

    # --- Replies ---

    @override
    def write_reply(self, reply: Mapping[str, Any], request: ModelRequest) -> dict[str, Any]:
        choice = first_choice(reply)
        message = object_of(choice.get("message"))
        calls = tool_calls_of(message)
        content: list[dict[str, Any]] = []
        if thinking := reasoning_of(message):
            content.append({"type": "thinking", "thinking": thinking, "signature": ""})
        if text := text_in(message):
            content.append({"type": "text", "text": text})
        content += [_tool_use(call) for call in calls]
        stop = choice.get("stop_reason")
        reason, sequence = _stop_reason(choice.get("finish_reason"), stop, has_calls=bool(calls))
        return _message(request.model, content, reason, sequence, usage_of(reply))

    @override
    def open_writer(self, request: ModelRequest) -> _MessageWriter:
        return _MessageWriter(request.model)

    # --- Errors and lists ---

    @override
    def error_body(self, error: ProxyError) -> bytes:
        return msgspec.json.encode(self._error(error))

    @override
    def error_event(self, error: ProxyError) -> bytes:
        return sse("error", self._error(error))

    def _error(self, error: ProxyError) -> dict[str, Any]:
        kind = _ERROR_TYPES.get(error.status) or ("invalid_request_error" if error.status < 500 else "api_error")
        where = f"{error.param}: " if error.param else ""
        return {"type": "error", "error": {"type": kind, "message": f"{where}{error.message}"}, "request_id": None}

    @override
    def model_list(self, names: Sequence[str]) -> dict[str, Any]:
        first, last = (names[0], names[-1]) if names else (None, None)
        return {"data": [*map(self.model, names)], "has_more": False, "first_id": first, "last_id": last}

    @override
    def model(self, name: str) -> dict[str, Any]:
        return {"type": "model", "id": name, "display_name": name, "created_at": "1970-01-01T00:00:00Z"}


# --- Requests ---


def _blocks(content: object, where: str) -> list[dict[str, Any]]:
    """Return the blocks of a content, which may be a text."""
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    if not isinstance(content, list):
        raise Untranslatable(f"{where} is neither a text nor a list of blocks.", where)
    return [object_of(block) for block in cast("list[Any]", content)]


def _add_message(message: dict[str, Any], where: str, chat: ChatRequest) -> None:
    role = message.get("role")
    blocks = _blocks(message.get("content"), f"{where}.content")
    if role == "assistant":
        chat.messages.append(_assistant(blocks, where, chat))
    elif role == "user":
        _add_user(blocks, where, chat)
    elif role == "system":  # Claude Code sends some for models that it does not know
        chat.say("system", "\n".join(str(block.get("text", "")) for block in blocks))
    else:
        raise Untranslatable(f"The role is {role!r}; it must be user, assistant or system.", f"{where}.role")


def _assistant(blocks: Sequence[dict[str, Any]], where: str, chat: ChatRequest) -> dict[str, Any]:
    texts: list[str] = []
    thinking: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in blocks:
        kind = block.get("type")
        if kind == "text":
            texts.append(str(block.get("text", "")))
        elif kind == "thinking":
            thinking.append(str(block.get("thinking", "")))
        elif kind == "tool_use":
            calls.append(tool_call(str(block.get("id")), str(block.get("name")), _arguments(block.get("input"))))
        elif kind == "redacted_thinking":
            chat.notes.append("redacted_thinking is left out")
        else:
            raise _unknown_block(kind, where)
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts) if texts else None}
    if thinking:
        message["reasoning_content"] = "\n".join(thinking)
    if calls:
        message["tool_calls"] = calls
    return message


def _arguments(given: object) -> str:
    known = object_of(given)
    if known.keys() == {_INVALID_JSON}:
        return str(known[_INVALID_JSON])
    return write_json(given if given is not None else {}).decode()


def _add_user(blocks: Sequence[dict[str, Any]], where: str, chat: ChatRequest) -> None:
    parts: list[dict[str, Any]] = []
    for block in blocks:
        if block.get("type") == "tool_result":
            found = [_part(each, where) for each in _blocks(block.get("content"), where)]
            texts = [part for part in found if part["type"] == "text"]
            if block.get("is_error"):
                chat.notes.append("tool_result.is_error is left out")
            call_id = str(block.get("tool_use_id"))
            chat.messages.append({"role": "tool", "tool_call_id": call_id, "content": content_of(texts)})
            parts += [part for part in found if part["type"] != "text"]  # a tool's chat message is text alone
        else:
            parts.append(_part(block, where))
    chat.add_user_parts(parts)


def _part(block: dict[str, Any], where: str) -> dict[str, Any]:
    read = _PARTS.get(str(block.get("type")))
    if read is None:
        raise _unknown_block(block.get("type"), where)
    return read(block, where)


def _image(block: dict[str, Any], where: str) -> dict[str, Any]:
    source = object_of(block.get("source"))
    if source.get("type") == "url":
        return image_part(str(source.get("url")))
    if source.get("type") == "base64":
        return image_part(data_url(str(source.get("media_type")), str(source.get("data"))))
    raise _unknown_block(f"image with a source of type {source.get('type')}", where)


def _document(block: dict[str, Any], where: str) -> dict[str, Any]:
    source = object_of(block.get("source"))
    kind = source.get("type")
    if kind == "text":
        return text_part(str(source.get("data", "")))
    if kind == "content":
        return text_part(str(content_of([_part(each, where) for each in _blocks(source.get("content"), where)])))
    if kind == "base64":
        file = {
            "filename": str(block.get("title") or "document.pdf"),
            "file_data": data_url(str(source.get("media_type")), str(source.get("data"))),
        }
        return {"type": "file", "file": file}
    raise _unknown_block(f"document with a source of type {kind}", where)


def _search_result(block: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a search result as text: its title, its source, what it says."""
    said = content_of([_part(each, where) for each in _blocks(block.get("content"), where)])
    return text_part(f"{block.get('title', '')}\n{block.get('source', '')}\n{said}")


_PARTS: Mapping[str, Callable[[dict[str, Any], str], dict[str, Any]]] = {
    "text": lambda block, where: text_part(str(block.get("text", ""))),
    "image": _image,
    "document": _document,
    "search_result": _search_result,
    "tool_reference": lambda block, where: text_part(str(block.get("tool_name", ""))),
}


def _unknown_block(kind: object, where: str) -> Untranslatable:
    return Untranslatable(f"A content block of the type {kind!r} cannot be given to this model.", where)


def _add_tool(tool: dict[str, Any], where: str, chat: ChatRequest) -> None:
    name = tool.get("name")
    if not isinstance(name, str) or not name:
        raise Untranslatable("The tool has no name.", where)
    if tool.get("type") in (None, "custom"):
        strict = tool.get("strict")
        strict = strict if isinstance(strict, bool) else None
        chat.add_function(name, tool.get("description"), tool.get("input_schema"), strict=strict)
    else:
        chat.notes.append(f"tool {name} of the type {tool['type']} is left out: only its vendor has it")


def _add_choice(choice: dict[str, Any], chat: ChatRequest) -> None:
    if not choice or "tools" not in chat.body:
        return
    kind = choice.get("type")
    if kind == "tool":
        chat.body["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    elif kind in _TOOL_CHOICES:
        chat.body["tool_choice"] = _TOOL_CHOICES[str(kind)]
    else:
        raise Untranslatable(f"The type is {kind!r}; it must be auto, any, tool or none.", "tool_choice.type")
    if choice.get("disable_parallel_tool_use"):
        chat.body["parallel_tool_calls"] = False


# --- Replies ---


def _message(
    model: str,
    content: list[dict[str, Any]],
    reason: str | None,
    sequence: str | None,
    usage: Usage,
) -> dict[str, Any]:
    return {
        "id": f"msg_{secrets.token_hex(12)}",  # some backends repeat their ids
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": reason,
        "stop_sequence": sequence,
        "usage": _usage(usage),
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": max(0, usage.input - usage.cached),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.output,
    }


def _tool_use(call: ToolCall) -> dict[str, Any]:
    try:
        given = msgspec.json.decode(call.arguments or "{}")
    except (msgspec.MsgspecError, UnicodeEncodeError):
        given = None
    found = cast("dict[str, Any]", given) if isinstance(given, dict) else {_INVALID_JSON: call.arguments}
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": found}


def _stop_reason(reason: object, stop: object, *, has_calls: bool) -> tuple[str | None, str | None]:
    """Return the reason in the wire's words, and the stop text that the reply ended with."""
    if not isinstance(reason, str):
        return None, None
    if reason == "stop" and isinstance(stop, str):
        return "stop_sequence", stop
    if reason == "stop" and has_calls:
        return "tool_use", None
    return _STOP_REASONS.get(reason, "end_turn"), None


class _MessageWriter:
    """Writes the events of a streamed message."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._pieces = PieceReader()
        self._has_begun = False
        self._open_place = -1

    def write(self, chunk: dict[str, Any]) -> bytes:
        """Return the events that a chunk means."""
        begin = b""
        if not self._has_begun:
            self._has_begun = True
            message = _message(self._model, [], None, None, usage_of(chunk))
            begin = sse("message_start", {"type": "message_start", "message": message})
        return begin + self._events(self._pieces.read(chunk))

    def _events(self, pieces: Sequence[Piece]) -> bytes:
        events: list[bytes] = []
        for piece in pieces:
            if piece.place != self._open_place:
                events += [self._stop(), self._start(piece)]
                self._open_place = piece.place
            if piece.text:
                delta = {"type": "content_block_delta", "index": piece.place, "delta": _delta(piece)}
                events.append(sse("content_block_delta", delta))
        return b"".join(events)

    def _start(self, piece: Piece) -> bytes:
        blocks: Mapping[str, dict[str, Any]] = {
            "text": {"type": "text", "text": ""},
            "reasoning": {"type": "thinking", "thinking": "", "signature": ""},
            "call": {"type": "tool_use", "id": piece.call_id, "name": piece.name, "input": {}},
        }
        start = {"type": "content_block_start", "index": piece.place, "content_block": blocks[piece.kind]}
        return sse("content_block_start", start)

    def _stop(self) -> bytes:
        if self._open_place < 0:
            return b""
        return sse("content_block_stop", {"type": "content_block_stop", "index": self._open_place})

    def end(self) -> bytes:
        """Return the events that end the message."""
        pieces = self._pieces
        ending = self._events(pieces.rest()) + self._stop()
        reason, sequence = _stop_reason(pieces.finish_reason, pieces.stop_text, has_calls=pieces.has_calls)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        ending += sse("message_delta", {"type": "message_delta", "delta": delta, "usage": _usage(pieces.usage)})
        return ending + sse("message_stop", {"type": "message_stop"})


def _delta(piece: Piece) -> dict[str, Any]:
    if piece.kind == "text":
        return {"type": "text_delta", "text": piece.text}
    if piece.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": piece.text}
    return {"type": "input_json_delta", "partial_json": piece.text}
