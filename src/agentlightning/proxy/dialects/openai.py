"""What OpenAI's two wires share: ``/chat/completions`` and ``/completions``.

The capture fields are vLLM's: ``return_token_ids`` in the request; ``prompt_token_ids`` and, per choice,
``token_ids`` in the reply (https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html). Errors have the
shape ``{"error": {"message", "type", "param", "code"}}``, which every OpenAI client turns into an exception of its
own (https://platform.openai.com/docs/guides/error-codes).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import msgspec
from typing_extensions import override

from agentlightning.proxy.capture import CaptureField
from agentlightning.proxy.dialects.base import BackendError, ModelRequest, RecordedReply, WireDialect
from agentlightning.proxy.dialects.replies import PartialChoice, ReplyAssembly, choices_of, read_whole_reply
from agentlightning.proxy.dialects.sse import data_of, event_of
from agentlightning.proxy.errors import ProxyError

_DONE = b"[DONE]"
"""The data of the event with which streams end."""
_CAPTURE_NAMES: Mapping[CaptureField, tuple[bytes, ...]] = {
    "token_ids": (b"return_token_ids",),
    "logprobs": (b"logprobs",),
    "usage": (b"stream_options", b"include_usage"),
}
"""What a backend's error message calls the capture fields."""
_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class OpenAIDialect(WireDialect):
    """A wire of OpenAI's. A subclass says how choices carry what the model wrote."""

    provider = "openai"
    reply_object: ClassVar[str]
    """The ``object`` of whole replies."""
    logprobs_request: ClassVar[bool | int]
    """The value of the request's ``logprobs`` that asks for those of the tokens that were chosen."""

    @abstractmethod
    def choice_content(self, choice: PartialChoice) -> dict[str, Any]:
        """Return what the model wrote in a choice that came in chunks, as a whole reply has it."""

    @abstractmethod
    def asks_for_logprobs(self, body: Mapping[str, Any]) -> bool:
        """Whether a request asks for log-probabilities itself."""

    # --- Requests ---

    @override
    def read_request(self, body: bytes, path_params: Mapping[str, str]) -> ModelRequest:
        try:
            fields = msgspec.json.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ProxyError(400, "invalid_json", f"The body is not valid JSON: {error}.") from error
        if not isinstance(fields, dict):
            raise ProxyError(400, "invalid_json", f"The body is a JSON {type(fields).__name__}; send an object.")
        known = cast("dict[str, Any]", fields)
        model = known.get("model")
        if not isinstance(model, str) or not model:
            raise ProxyError(
                400, "model_required", "The field 'model' is missing; name one of GET /v1/models.", param="model"
            )
        return ModelRequest(model, known.get("stream") is True, known)

    @override
    def missing_capture(self, body: Mapping[str, Any], wanted: Iterable[CaptureField]) -> frozenset[CaptureField]:
        missing = set(wanted)
        if body.get("return_token_ids"):
            missing.discard("token_ids")
        if self.asks_for_logprobs(body):
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

    # --- Replies ---

    @override
    def read_reply(self, body: bytes, hidden: frozenset[CaptureField]) -> RecordedReply | None:
        reply = _object_of(body)
        if reply is None:
            return None
        record = read_whole_reply(reply)
        record.body = body
        if hidden:
            remove_hidden(reply, hidden)
            record.body = msgspec.json.encode(reply)
        return record

    @override
    def open_stream(self, hidden: frozenset[CaptureField]) -> OpenAIStream:
        return OpenAIStream(ReplyAssembly(self.reply_object, self.choice_content, hidden), hidden)

    # --- Errors and lists ---

    @override
    def read_error(self, body: bytes, status: int) -> BackendError:
        return _error_in(_object_of(body) or {}, status)

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


class OpenAIStream:
    """A streamed reply of either wire; a ``ReplyStream``.

    Args:
        assembly: puts the chunks together.
        hidden: the fields that only the proxy asked for.
    """

    def __init__(self, assembly: ReplyAssembly, hidden: frozenset[CaptureField]) -> None:
        self._assembly = assembly
        self._hidden = hidden
        self.error: BackendError | None = None
        self.is_done = False

    @property
    def is_complete(self) -> bool:
        """Whether ``[DONE]`` came, or every choice has its finish reason: some backends send no ``[DONE]``."""
        return self.is_done or self._assembly.is_finished

    @property
    def kept_bytes(self) -> int:
        """About how many bytes of the reply are kept for the record."""
        return self._assembly.kept_bytes

    def feed(self, event: bytes) -> bytes:
        """Read one event; returns it without the hidden fields, or nothing if nothing else was in it."""
        data = data_of(event)
        if data == _DONE:
            self.is_done = True
        if not data or self.is_done:
            return event
        chunk = _object_of(data)
        if chunk is None:  # no chunk of this wire: the agent's client has to judge it
            return event
        if chunk.get("error"):
            self.error = _error_in(chunk, 200)
            self.is_done = True
            return event
        self._assembly.add(chunk)
        if not self._hidden:
            return event
        return event_of(msgspec.json.encode(chunk)) if remove_hidden(chunk, self._hidden) else b""

    def recorded(self) -> RecordedReply:
        """Return what is recorded of the reply as far as it came."""
        return self._assembly.recorded()


def remove_hidden(reply: dict[str, Any], hidden: frozenset[CaptureField]) -> bool:
    """Remove from a reply, or from a chunk of one, what only the proxy asked for.

    Returns:
        Whether anything is left for the agent. A chunk that carries only the usage would not have been sent.
    """
    choices = choices_of(reply)
    if "token_ids" in hidden:
        reply.pop("prompt_token_ids", None)
        for choice in choices:
            choice.pop("token_ids", None)
            choice.pop("prompt_token_ids", None)
    if "logprobs" in hidden:
        for choice in choices:
            if "logprobs" in choice:
                choice["logprobs"] = None
    if "usage" in hidden and "usage" in reply:
        usage = reply.pop("usage")
        return bool(choices) or usage is None or "error" in reply
    return True


def _error_in(reply: dict[str, Any], status: int) -> BackendError:
    error = reply.get("error")
    known = cast("dict[str, Any]", error) if isinstance(error, dict) else {"message": error}
    code = known.get("code") or known.get("type")
    message = known.get("message") or reply.get("message")
    return BackendError(
        code if isinstance(code, str) else str(status),
        message if isinstance(message, str) else f"the backend answered with HTTP status {status}",
    )


def _asks_for_usage(options: object) -> bool:
    """Whether ``stream_options`` asks for usage, or is invalid: then the backend has to refuse it, not the proxy."""
    if not isinstance(options, dict):
        return options is not None
    return bool(cast("dict[str, Any]", options).get("include_usage"))


def _object_of(body: bytes) -> dict[str, Any] | None:
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None
