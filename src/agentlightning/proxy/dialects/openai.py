"""OpenAI's two wires: ``/chat/completions`` and ``/completions``.

The capture fields are vLLM's: ``return_token_ids`` in the request; ``prompt_token_ids`` and, per choice,
``token_ids`` in the reply (https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html). Errors have the
shape ``{"error": {"message", "type", "param", "code"}}``, which every OpenAI client turns into an exception of its
own (https://platform.openai.com/docs/guides/error-codes).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import msgspec
from typing_extensions import override

from agentlightning.proxy.dialects.base import (
    BackendError,
    CaptureField,
    ModelRequest,
    ProxyError,
    RecordedReply,
    WireDialect,
    event_of,
)
from agentlightning.proxy.dialects.lenient import read_object, read_request_json, write_json
from agentlightning.proxy.dialects.replies import is_no_reply, read_error_in, read_whole_reply, remove_hidden
from agentlightning.proxy.dialects.streams import OpenAIStream

_CAPTURE_NAMES: Mapping[CaptureField, tuple[bytes, ...]] = {
    "token_ids": (b"return_token_ids",),
    "logprobs": (b"logprobs",),
    "usage": (b"stream_options", b"include_usage"),
}
"""What a backend's error message calls the capture fields."""
_SGLANG_HEADERS: Mapping[str, str] = {"x-sglext-return-input-ids": "true", "x-sglext-return-output-ids": "true"}
"""SGLang refuses ``return_token_ids`` in streams, but says the ids at their end if these headers ask for it
(https://github.com/sgl-project/sglang/pull/34488)."""
_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class OpenAIDialect(WireDialect):
    """A wire of OpenAI's."""

    provider = "openai"
    reply_object: ClassVar[str]
    """The ``object`` of whole replies."""
    content: ClassVar[Literal["message", "text"]]
    """The field of a choice that holds what the model wrote."""
    logprobs_request: ClassVar[bool | int]
    """The value of the request's ``logprobs`` that asks for those of the tokens that were chosen."""

    # --- Requests ---

    @override
    def read_request(self, body: bytes, path_params: Mapping[str, str]) -> ModelRequest:
        fields = read_request_object(body)
        return ModelRequest(model_of(fields), fields.get("stream") is True, fields)

    @override
    def missing_capture(self, body: Mapping[str, Any], wanted: Iterable[CaptureField]) -> frozenset[CaptureField]:
        missing = set(wanted)
        logprobs = body.get("logprobs")
        if body.get("return_token_ids"):
            missing.discard("token_ids")
        # Where the field is a number of alternatives, 0 of them still asks for the tokens that were chosen.
        if logprobs or type(logprobs) is type(self.logprobs_request) is int:
            missing.discard("logprobs")
        if not body.get("stream") or _asks_for_usage(body.get("stream_options")):
            missing.discard("usage")  # whole replies always have it
        return frozenset(missing)

    @override
    def add_capture(self, body: dict[str, Any], fields: frozenset[CaptureField]) -> dict[str, Any]:
        added: dict[str, Any] = {}
        if "token_ids" in fields:
            added["return_token_ids"] = True
        if "logprobs" in fields:
            added["logprobs"] = self.logprobs_request
        if "usage" in fields:
            added["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
        return {**body, **added}

    @override
    def blamed_capture(self, error: bytes, fields: frozenset[CaptureField]) -> frozenset[CaptureField]:
        named = frozenset[CaptureField](each for each in fields if any(name in error for name in _CAPTURE_NAMES[each]))
        return named or fields

    @override
    def capture_headers(self, fields: frozenset[CaptureField]) -> Mapping[str, str]:
        return _SGLANG_HEADERS if "token_ids" in fields else {}

    # --- Replies ---

    @override
    def read_reply(self, body: bytes, hidden: frozenset[CaptureField], request: ModelRequest) -> RecordedReply | None:
        reply = read_object(body)
        return None if reply is None else self.record_of(reply, body, hidden)

    def record_of(self, reply: dict[str, Any], body: bytes, hidden: frozenset[CaptureField]) -> RecordedReply:
        """Return the record of a whole reply, from which the hidden fields are removed; ``body`` is its JSON."""
        record = read_whole_reply(reply)
        record.body = body
        if is_no_reply(reply):
            record.error = read_error_in(reply, 200)
        elif hidden:
            remove_hidden(reply, hidden)
            record.body = write_json(reply)
        return record

    @override
    def open_stream(self, hidden: frozenset[CaptureField], request: ModelRequest) -> OpenAIStream:
        return OpenAIStream(self.reply_object, self.content, hidden)

    # --- Errors and lists ---

    @override
    def read_error(self, body: bytes, status: int) -> BackendError:
        return read_error_in(read_object(body) or {}, status)

    @override
    def error_body(self, error: ProxyError) -> bytes:
        kind = _ERROR_TYPES.get(error.status) or ("invalid_request_error" if error.status < 429 else "proxy_error")
        shown = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
        return msgspec.json.encode({"error": shown})

    @override
    def error_event(self, error: ProxyError) -> bytes:
        return event_of(self.error_body(error))

    @override
    def model_list(self, names: Sequence[str]) -> dict[str, Any]:
        return {"object": "list", "data": [self.model(name) for name in names]}

    @override
    def model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "agentlightning"}


class ChatCompletions(OpenAIDialect):
    """``POST /v1/chat/completions``: messages in, messages out."""

    name = "chat_completions"
    operation = "chat"
    paths = ("/chat/completions",)
    backend_path = "/chat/completions"
    reply_object = "chat.completion"
    content = "message"
    logprobs_request = True


class Completions(OpenAIDialect):
    """``POST /v1/completions``: a prompt in, text out."""

    name = "completions"
    operation = "text_completion"
    paths = ("/completions",)
    backend_path = "/completions"
    reply_object = "text_completion"
    content = "text"
    logprobs_request = 1
    """How many alternatives of each token are reported besides the one that was chosen; 0 is valid too."""


def read_request_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object that an agent sent. Raises ``ProxyError`` if it is none (400)."""
    try:
        fields = read_request_json(body)
    except (ValueError, RecursionError) as error:
        raise ProxyError(400, "invalid_json", f"The body is not valid JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise ProxyError(400, "invalid_json", f"The body is a JSON {type(fields).__name__}; send an object.")
    return cast("dict[str, Any]", fields)


def model_of(fields: Mapping[str, Any]) -> str:
    """Return the model that a request names. Raises ``ProxyError`` if it names none (400)."""
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise ProxyError(
            400, "model_required", "The field 'model' is missing; name one of GET /v1/models.", param="model"
        )
    return model


def _asks_for_usage(options: object) -> bool:
    """Whether ``stream_options`` asks for usage, or is invalid: then the backend has to refuse it, not the proxy."""
    if not isinstance(options, dict):
        return options is not None
    return bool(cast("dict[str, Any]", options).get("include_usage"))
