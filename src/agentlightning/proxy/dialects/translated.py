"""Wires of other vendors, translated to chat completions and back.

Servers that say token ids say them on ``/chat/completions`` alone. A call of another wire is therefore made, and
recorded, as a chat completion: its span has the chat request that the backend got and the chat reply that it gave, so
that whoever learns from it need not know the wire. The agent sees its own wire in both directions.

A subclass reads a request of its wire, writes a whole reply, and has a ``ReplyWriter`` that writes the events of a
streamed one. What a request asks for and no backend can do is left out, and noted in the span.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import msgspec
from typing_extensions import override

from agentlightning.proxy.dialects.base import CaptureField, ModelRequest, ProxyError, RecordedReply
from agentlightning.proxy.dialects.lenient import read_object, write_json
from agentlightning.proxy.dialects.openai import ChatCompletions, model_of, read_request_object
from agentlightning.proxy.dialects.replies import choices_of, object_of, read_error_in
from agentlightning.proxy.dialects.streams import OpenAIStream


class ReplyWriter(Protocol):
    """Writes the events of one streamed reply, in the agent's wire, from what the backend's chunks say."""

    def write(self, chunk: dict[str, Any]) -> bytes:
        """Return the events that a chunk of the backend means to the agent."""
        ...

    def end(self) -> bytes:
        """Return the events that end the reply."""
        ...


class TranslatedStream(OpenAIStream):
    """A streamed reply whose chunks are read for the record, and written anew for the agent; a ``ReplyStream``."""

    def __init__(self, hidden: frozenset[CaptureField], dialect: TranslatedDialect, writer: ReplyWriter) -> None:
        super().__init__("chat.completion", "message", hidden)
        self._dialect = dialect
        self._writer = writer

    @override
    def feed(self, event: bytes) -> bytes:
        """Read one event of the backend; returns what it means to the agent."""
        chunk = self.read(event)
        if self.error is not None:
            return self._dialect.error_event(ProxyError(502, self.error.code, self.error.message))
        return b"" if chunk is None else self._writer.write(chunk)

    @override
    def end(self) -> bytes:
        """Return the events that end the reply, unless it ended with an error."""
        return b"" if self.error is not None else self._writer.end()


class TranslatedDialect(ChatCompletions):
    """A wire whose calls are made as chat completions."""

    @override
    def read_request(self, body: bytes, path_params: Mapping[str, str]) -> ModelRequest:
        asked = read_request_object(body)
        chat = ChatRequest(model=self.model_name(path_params) if "model" in path_params else model_of(asked))
        try:
            chat.is_streamed = self.translate(asked, path_params, chat)
        except Untranslatable as error:
            raise ProxyError(400, "invalid_request", str(error), param=error.field) from None
        if chat.is_streamed:
            # The agent's wire tells the usage of streams always.
            chat.body |= {"stream": True, "stream_options": {"include_usage": True}}
        sent = {"model": chat.model, "messages": chat.messages, **chat.body}
        notes = tuple(dict.fromkeys(chat.notes))
        return ModelRequest(chat.model, chat.is_streamed, sent, write_json(sent), asked, chat.context, notes)

    @override
    def read_reply(self, body: bytes, hidden: frozenset[CaptureField], request: ModelRequest) -> RecordedReply | None:
        reply = read_object(body)
        if reply is None:
            return None
        record = self.record_of(reply, body, hidden)
        if record.error is not None:
            record.shown = self.error_body(ProxyError(502, record.error.code, record.error.message))
        else:
            record.shown = write_json(self.write_reply(reply, request))
        return record

    @override
    def open_stream(self, hidden: frozenset[CaptureField], request: ModelRequest) -> TranslatedStream:
        return TranslatedStream(hidden, self, self.open_writer(request))

    @override
    def shown_error(self, body: bytes, status: int) -> bytes:
        error = read_error_in(read_object(body) or {}, status)
        return self.error_body(ProxyError(status, error.code, error.message))

    # --- What each wire has of its own ---

    @abstractmethod
    def translate(self, asked: Mapping[str, Any], path_params: Mapping[str, str], chat: ChatRequest) -> bool:
        """Fill ``chat`` with what an agent asks for. Returns whether it wants a stream. Raises ``Untranslatable``."""

    @abstractmethod
    def write_reply(self, reply: Mapping[str, Any], request: ModelRequest) -> dict[str, Any]:
        """Return a whole reply of the backend in the agent's wire."""

    @abstractmethod
    def open_writer(self, request: ModelRequest) -> ReplyWriter:
        """Begin to write the events of a streamed reply."""


class Untranslatable(Exception):
    """A request has a part that is not valid, or that no chat completion can say.

    Args:
        why: what it is, and what to do about it.
        field: where it is.
    """

    def __init__(self, why: str, field: str | None = None) -> None:
        super().__init__(why)
        self.field = field


@dataclass
class ChatRequest:
    """A chat completion that is being put together."""

    model: str
    messages: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    body: dict[str, Any] = field(default_factory=dict[str, Any])
    """Everything beside model, messages and streaming."""
    notes: list[str] = field(default_factory=list[str])
    """What is left out, and why."""
    is_streamed: bool = False
    context: object = None
    """See ``ModelRequest``."""

    def copy(self, asked: Mapping[str, Any], names: Mapping[str, str]) -> None:
        """Take over fields that mean the same, by their names there and here. Absent and null are left out."""
        self.body |= {here: asked[there] for there, here in names.items() if asked.get(there) is not None}

    def leave_out(self, asked: Mapping[str, Any], names: Iterable[str]) -> None:
        """Note that fields have no meaning for a backend."""
        self.notes += [f"{name} is left out" for name in names if asked.get(name)]

    def say(self, role: str, text: str) -> None:
        """Add a message of text alone."""
        self.messages.append({"role": role, "content": text})

    def add_user_parts(self, parts: Sequence[dict[str, Any]]) -> None:
        """Add a user's message of these parts, if there are any."""
        if parts:
            self.messages.append({"role": "user", "content": content_of(parts)})

    def add_function(self, name: str, description: str | None, parameters: Any, *, strict: bool | None = None) -> None:
        """Add a tool."""
        function: dict[str, Any] = {"name": name}
        if description:
            function["description"] = description
        function["parameters"] = parameters if isinstance(parameters, dict) else {"type": "object", "properties": {}}
        if strict is not None:
            function["strict"] = strict
        self.body.setdefault("tools", []).append({"type": "function", "function": function})


def text_part(text: str) -> dict[str, Any]:
    """Return a part of a chat message's content that is text."""
    return {"type": "text", "text": text}


def image_part(url: str, detail: str | None = None) -> dict[str, Any]:
    """Return a part of a chat message's content that is an image, by a URL or a ``data:`` URL."""
    return {"type": "image_url", "image_url": {"url": url} | ({} if detail is None else {"detail": detail})}


def data_url(media_type: str, base64_data: str) -> str:
    """Return the ``data:`` URL (RFC 2397) of data in base64."""
    return f"data:{media_type};base64,{base64_data}"


def content_of(parts: Sequence[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Return a chat message's content: one text if all parts are texts, which every backend takes, as vLLM joins them
    itself; else the parts."""
    if all(part.get("type") == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return list(parts)


def tool_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """Return a call of a tool, as an assistant's chat message has it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def sse(name: str, data: Mapping[str, Any]) -> bytes:
    """Return a server-sent event with a name."""
    return b"event: " + name.encode() + b"\ndata: " + write_json(data) + b"\n\n"


# --- What a backend's reply says ---


def first_choice(reply: Mapping[str, Any]) -> dict[str, Any]:
    """Return the choice 0 of a chat reply, or what a chunk has of it; empty if there is none."""
    choices = choices_of(cast("dict[str, Any]", reply))
    return next((choice for choice in choices if choice.get("index") in (None, 0)), dict[str, Any]())


def reasoning_of(message: Mapping[str, Any]) -> str:
    """Return what a message, or a piece of one, says of the model's reasoning: vLLM and others call it differently."""
    for name in ("reasoning_content", "reasoning"):
        if isinstance(text := message.get(name), str) and text:
            return text
    return ""


def text_in(message: Mapping[str, Any]) -> str:
    """Return the text of a message, or of a piece of one; a refusal is one, too."""
    content, refusal = message.get("content"), message.get("refusal")
    if isinstance(content, list):
        content = "".join(str(object_of(part).get("text") or "") for part in cast("list[Any]", content))
    return (content if isinstance(content, str) else "") + (refusal if isinstance(refusal, str) else "")


class ToolCall(msgspec.Struct):
    """A tool call of a reply."""

    id: str
    name: str
    arguments: str


def tool_calls_of(message: Mapping[str, Any]) -> list[ToolCall]:
    """Return the tool calls of a whole message."""
    found: list[ToolCall] = []
    calls = message.get("tool_calls")
    for given in cast("list[Any]", calls) if isinstance(calls, list) else []:
        call = object_of(given)
        function = object_of(call.get("function"))
        arguments = function.get("arguments")
        text = arguments if isinstance(arguments, str) else write_json(arguments or {}).decode()
        found.append(ToolCall(str(call.get("id") or f"call_{len(found)}"), str(function.get("name") or ""), text))
    return found


class Usage(msgspec.Struct):
    """Token counts of a reply."""

    input: int = 0
    output: int = 0
    cached: int = 0
    reasoning: int = 0


def usage_of(reply: Mapping[str, Any]) -> Usage:
    """Return the token counts of a reply or chunk; 0 for what it does not say."""
    usage = object_of(reply.get("usage"))
    details = object_of(usage.get("prompt_tokens_details"))
    output_details = object_of(usage.get("completion_tokens_details"))
    counts = (
        usage.get("prompt_tokens"),
        usage.get("completion_tokens"),
        details.get("cached_tokens"),
        output_details.get("reasoning_tokens"),
    )
    return Usage(*(count if type(count) is int and count >= 0 else 0 for count in counts))
