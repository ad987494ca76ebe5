"""Google's wire, ``POST /v1beta/models/MODEL:generateContent``, as its SDKs and Gemini CLI speak it.

Requests, replies and errors have the shapes of https://ai.google.dev/api/generate-content, as the package
``google-genai`` (3.6.1) parses them. Field names are read in both of protobuf's JSON forms (``topP``, ``top_p``).
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import msgspec
from typing_extensions import override

from agentlightning.proxy.dialects.base import ModelRequest, ProxyError, event_of
from agentlightning.proxy.dialects.generate_content_input import ContentReader, add_config, add_tools, field_of
from agentlightning.proxy.dialects.lenient import write_json
from agentlightning.proxy.dialects.pieces import Piece, PieceReader
from agentlightning.proxy.dialects.replies import object_of
from agentlightning.proxy.dialects.translated import (
    ChatRequest,
    ToolCall,
    TranslatedDialect,
    Untranslatable,
    Usage,
    first_choice,
    reasoning_of,
    text_in,
    tool_calls_of,
    usage_of,
)

_FINISH_REASONS = {"length": "MAX_TOKENS", "content_filter": "SAFETY"}
_ERROR_STATUSES = {
    401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND", 409: "ABORTED", 429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL", 501: "UNIMPLEMENTED", 503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED",
}  # fmt: skip
_MODEL = "/models/(?P<model>.+)"
_PREFIX = re.compile("(?:.*/)?models/")


class GenerateContent(TranslatedDialect):
    """``POST /v1beta/models/MODEL:generateContent``, ``:streamGenerateContent`` and ``:countTokens``."""

    name = "generate_content"
    provider = "gcp.gemini"
    paths = (f"{_MODEL}:(?P<action>generateContent|streamGenerateContent)",)
    count_paths = (f"{_MODEL}:(?P<action>countTokens)",)
    client_headers = ("x-goog-api-client", "x-goog-api-key")

    # --- Requests ---

    @override
    def translate(self, asked: Mapping[str, Any], path_params: Mapping[str, str], chat: ChatRequest) -> bool:
        whole = object_of(field_of(asked, "generateContentRequest")) or asked  # which countTokens may have
        is_streamed = path_params.get("action") == "streamGenerateContent"
        if is_streamed and path_params.get("alt", "json") != "sse":
            raise Untranslatable("Streams are sent as server-sent events only; add alt=sse to the URL.", "alt")
        if field_of(whole, "cachedContent"):
            raise Untranslatable("The field 'cachedContent' needs the vendor's servers.", "cachedContent")
        reader = ContentReader(chat)
        reader.read_system(field_of(whole, "systemInstruction"))
        reader.read(whole.get("contents"))
        add_config(object_of(field_of(whole, "generationConfig")), chat)
        add_tools(whole.get("tools") or (), object_of(field_of(whole, "toolConfig")), chat)
        if field_of(whole, "safetySettings"):
            chat.notes.append("safetySettings is left out")
        return is_streamed

    @override
    def count_reply(self, count: int) -> dict[str, Any]:
        return {"totalTokens": count}

    # --- Replies ---

    @override
    def write_reply(self, reply: Mapping[str, Any], request: ModelRequest) -> dict[str, Any]:
        choice = first_choice(reply)
        message = object_of(choice.get("message"))
        parts: list[dict[str, Any]] = []
        if thought := reasoning_of(message):
            parts.append({"text": thought, "thought": True})
        calls = tool_calls_of(message)
        if (text := text_in(message)) or not calls:
            parts.append({"text": text})
        made, broken = _call_parts(calls)
        head = _head(request.model)
        return _reply(head, parts + made, _finish_reason(choice.get("finish_reason"), broken), broken, usage_of(reply))

    @override
    def open_writer(self, request: ModelRequest) -> _ContentWriter:
        return _ContentWriter(request.model)

    # --- Errors and lists ---

    @override
    def error_body(self, error: ProxyError) -> bytes:
        status = _ERROR_STATUSES.get(error.status) or ("INVALID_ARGUMENT" if error.status < 500 else "INTERNAL")
        shown: dict[str, Any] = {"code": error.status, "message": error.message, "status": status}
        if error.retry_after_seconds is not None:
            kind = "type.googleapis.com/google.rpc.RetryInfo"
            shown["details"] = [{"@type": kind, "retryDelay": f"{error.retry_after_seconds:g}s"}]
        return msgspec.json.encode({"error": shown})

    @override
    def model_list(self, names: Sequence[str]) -> dict[str, Any]:
        return {"models": [*map(self.model, names)]}

    @override
    def model(self, name: str) -> dict[str, Any]:
        methods = ["generateContent", "streamGenerateContent", "countTokens"]
        known = {"name": f"models/{name}", "displayName": name, "version": "1", "supportedGenerationMethods": methods}
        # Clients refuse to begin without limits; these are the wire's own, and no backend's.
        return known | {"inputTokenLimit": 1_048_576, "outputTokenLimit": 65_536}

    @override
    def model_name(self, path_params: Mapping[str, str]) -> str:
        return _PREFIX.sub("", path_params["model"])


# --- Replies ---


def _head(model: str) -> dict[str, Any]:
    return {"modelVersion": model, "responseId": secrets.token_urlsafe(16)}


def _reply(
    head: Mapping[str, Any],
    parts: list[dict[str, Any]],
    reason: str | None = None,
    broken: str | None = None,
    usage: Usage | None = None,
) -> dict[str, Any]:
    candidate: dict[str, Any] = {"content": {"role": "model", "parts": parts}, "index": 0}
    if reason is not None:
        candidate["finishReason"] = reason
    if broken is not None:
        candidate["finishMessage"] = f"Malformed function call: {broken}"
    reply: dict[str, Any] = {"candidates": [candidate], **head}
    if usage is not None:
        counts = {
            "promptTokenCount": usage.input,
            "candidatesTokenCount": max(0, usage.output - usage.reasoning),
            "totalTokenCount": usage.input + usage.output,
            "cachedContentTokenCount": usage.cached,
            "thoughtsTokenCount": usage.reasoning,
        }
        reply["usageMetadata"] = {name: count for name, count in counts.items() if count or "cached" not in name}
    return reply


def _finish_reason(reason: object, broken: str | None) -> str | None:
    if broken is not None:
        return "MALFORMED_FUNCTION_CALL"
    return _FINISH_REASONS.get(reason, "STOP") if isinstance(reason, str) else None


def _call_parts(calls: Iterable[ToolCall]) -> tuple[list[dict[str, Any]], str | None]:
    """Return the parts of calls, and one whose arguments are no JSON object, which the wire cannot say."""
    parts: list[dict[str, Any]] = []
    broken: str | None = None
    for call in calls:
        try:
            arguments = msgspec.json.decode(call.arguments or "{}")
        except (msgspec.MsgspecError, UnicodeEncodeError):
            arguments = None
        if isinstance(arguments, dict):
            found = cast("dict[str, Any]", arguments)
            parts.append({"functionCall": {"id": call.id, "name": call.name, "args": found}})
        else:
            broken = f"{call.name}({call.arguments})"
    return parts, broken


class _ContentWriter:
    """Writes the chunks of a streamed reply. A call of a tool is sent when it is whole."""

    def __init__(self, model: str) -> None:
        self._head = _head(model)
        self._pieces = PieceReader()
        self._calls: dict[int, ToolCall] = {}
        self._sent = 0

    def write(self, chunk: dict[str, Any]) -> bytes:
        """Return the chunks that a chunk of the backend means."""
        return self._chunks(self._pieces.read(chunk))

    def _chunks(self, pieces: Sequence[Piece]) -> bytes:
        events: list[bytes] = []
        for piece in pieces:
            if piece.kind == "call":
                known = self._calls.setdefault(piece.place, ToolCall(piece.call_id, piece.name, ""))
                known.arguments += piece.text
            elif piece.text:
                part: dict[str, Any] = {"text": piece.text}
                events.append(self._event([part if piece.kind == "text" else {**part, "thought": True}]))
        return b"".join(events)

    def _event(self, parts: list[dict[str, Any]]) -> bytes:
        return event_of(write_json(_reply(self._head, parts)))

    def end(self) -> bytes:
        """Return the last chunks: calls of tools, and one with the reason and the usage."""
        pieces = self._pieces
        text = self._chunks(pieces.rest())
        parts, broken = _call_parts(self._calls.values())
        reason = _finish_reason(pieces.finish_reason, broken)
        return text + event_of(write_json(_reply(self._head, parts or [{"text": ""}], reason, broken, pieces.usage)))
