"""What the proxy has to know of a wire: the ``WireDialect`` interface, and the values that cross it.

Everything else in the proxy handles calls of all wires alike. A dialect reads an agent's request into a
``ModelRequest``, which already has the form that the backend takes; turns the backend's reply into what the agent
reads and what is recorded; and gives errors and model lists the shape that the wire's clients parse. Dialects hold
no state of a call: one object serves all calls of a proxy at the same time.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias, get_args

from agentlightning.semconv import UnusableReason

CaptureField: TypeAlias = Literal["token_ids", "logprobs", "usage"]
"""What the proxy asks backends for beyond what agents ask, for the record only: token ids of prompt and reply,
log-probabilities of the reply's tokens, and usage of streams."""

CAPTURE_FIELDS = frozenset[CaptureField](get_args(CaptureField))


class ProxyError(Exception):
    """A request ends here, with this status and this error, in the shape that its ``WireDialect`` gives it.

    Args:
        status: HTTP status. Clients repeat a call by themselves after 429 and 5xx.
        code: what went wrong, for programs.
        message: what went wrong, and what to do about it.
        param: the field of the request that is wrong.
        retry_after_seconds: when a repeat may succeed.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_seconds = retry_after_seconds

    def headers(self) -> dict[str, str]:
        """Return ``Retry-After`` in whole seconds (RFC 9110), and in milliseconds, which OpenAI's clients prefer."""
        if self.retry_after_seconds is None:
            return {}
        return {
            "retry-after": str(max(1, math.ceil(self.retry_after_seconds))),
            "retry-after-ms": str(max(1, round(self.retry_after_seconds * 1000))),
        }


_REPLACEMENT = b"***"
_SECRET_HEADER = re.compile(r"auth|key|token|secret|cookie", re.IGNORECASE)
_MIN_SECRET_CHARS = 6
"""Shorter keys are placeholders such as ``EMPTY`` or ``none``; replacing those would garble what models write."""


class Scrubber:
    """Replaces a backend's secrets by ``***``, in what the agent, the log and the store get.

    A backend may repeat its key: in an error message, in a header, or in what the model writes.

    Args:
        api_key: the backend's key.
        headers: the backend's extra headers; the values of those that look like credentials are secrets too.
    """

    def __init__(self, api_key: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        found = {api_key or ""}
        for name, value in (headers or {}).items():
            if _SECRET_HEADER.search(name):
                found.update((value, value.rpartition(" ")[2]))  # also without the scheme before it
        found.update([secret.replace("/", r"\/") for secret in found])  # some JSON encoders escape slashes
        # The longest first, because one secret may be a part of another.
        longest_first = sorted(found, key=len, reverse=True)
        self._secrets = [secret.encode() for secret in longest_first if len(secret) >= _MIN_SECRET_CHARS]

    def bytes(self, data: bytes) -> bytes:
        """Return ``data`` without the secrets."""
        for secret in self._secrets:
            if secret in data:
                data = data.replace(secret, _REPLACEMENT)
        return data

    def text(self, text: str) -> str:
        """Return ``text`` without the secrets."""
        return self.bytes(text.encode("utf-8", "replace")).decode("utf-8", "replace") if self._secrets else text


class ModelRequest(NamedTuple):
    """An agent's request, in the form that the backend takes."""

    model: str
    """The name in the model list, not the backend's own."""
    is_streamed: bool
    body: dict[str, Any]
    recorded: bytes | None = None
    """The request as it is recorded, if that is not as the agent sent it: the wire is a translation."""
    asked: Mapping[str, Any] = MappingProxyType({})
    """What the agent sent, as far as the reply depends on it."""
    context: object = None
    """What else the dialect needs to write the reply."""
    notes: tuple[str, ...] = ()
    """What of the agent's request no backend gets, for the record."""


class BackendError(NamedTuple):
    """An error that the backend sent."""

    code: str
    """Its code or type, or else the HTTP status."""
    message: str


@dataclass(slots=True)
class RecordedChoice:
    """What is recorded of one choice of a reply. What the backend did not send is None."""

    finish_reason: str | None = None
    token_ids: Sequence[int] | None = None
    logprobs: Sequence[float] | None = None
    """One natural logarithm for each of its tokens."""
    prompt_token_ids: Sequence[int] | None = None
    """Of its prompt, if that is another than the reply's: a text completion may have several prompts."""


@dataclass(slots=True)
class RecordedReply:
    """What is recorded of a reply. What the backend did not send is None or empty."""

    body: bytes = b""
    """The reply as the agent got it, as JSON; of a stream, what the same call would have got without streaming. Of a
    translated wire: as a chat completion."""
    shown: bytes | None = None
    """What the agent gets, if that is not the body: the wire is a translation."""
    response_id: str | None = None
    model: str | None = None
    fingerprint: str | None = None
    """The backend's own name of its weights."""
    input_tokens: int | None = None
    output_tokens: int | None = None
    """Of all choices together."""
    prompt_token_ids: Sequence[int] | None = None
    """Of the first choice."""
    choices: list[RecordedChoice] = field(default_factory=list[RecordedChoice])
    error: BackendError | None = None
    """The error that the reply is, although its HTTP status says success."""
    unusable: UnusableReason | None = None
    """Why the reply is no example to learn from, although it is no error; None: it is one."""

    @property
    def finish_reasons(self) -> list[str]:
        """Those of the choices that have one."""
        return [choice.finish_reason for choice in self.choices if choice.finish_reason is not None]

    @property
    def token_ids(self) -> Sequence[int] | None:
        """Of the first choice."""
        return self.choices[0].token_ids if self.choices else None

    @property
    def logprobs(self) -> Sequence[float] | None:
        """Of the first choice."""
        return self.choices[0].logprobs if self.choices else None

    def scrub(self, scrubber: Scrubber) -> None:
        """Remove the backend's secrets from the body and from every text."""
        self.body = scrubber.bytes(self.body)
        self.shown = self.shown and scrubber.bytes(self.shown)
        self.response_id = self.response_id and scrubber.text(self.response_id)
        self.model = self.model and scrubber.text(self.model)
        self.fingerprint = self.fingerprint and scrubber.text(self.fingerprint)
        for choice in self.choices:
            choice.finish_reason = choice.finish_reason and scrubber.text(choice.finish_reason)


class Lookup(NamedTuple):
    """A request of a wire that asks for something that its dialect keeps, and calls no model."""

    method: str
    path: str
    """A regular expression, as those of ``WireDialect.paths``."""
    answer: Callable[[Mapping[str, str]], dict[str, Any]]
    """Takes the parameters of the path and ``rollout_id`` and ``attempt_id``, if the request names them. Raises
    ``ProxyError``."""


class ReplyStream(Protocol):
    """One streamed reply: the backend's events go in, the agent's events come out."""

    error: BackendError | None
    """The error that the backend sent inside of the stream."""
    is_done: bool
    """Whether the backend has sent its last word. What ``feed`` returns from that event on is held back until the
    call is recorded, because an agent that has seen the last word may end its attempt at once."""

    @property
    def is_complete(self) -> bool:
        """Whether the reply may end here: else the connection to the backend broke."""
        ...

    @property
    def is_finished(self) -> bool:
        """Whether the agent has got all that the model wrote, though perhaps not the last word."""
        ...

    @property
    def kept_bytes(self) -> int:
        """About how many bytes of the reply are kept for the record."""
        ...

    def feed(self, event: bytes) -> bytes:
        """Read one whole event of the backend, with its empty line; returns the events for the agent, if any."""
        ...

    def end(self) -> bytes:
        """Return the events that the agent gets after the backend's last one. Called once, when that has come."""
        ...

    def recorded(self) -> RecordedReply:
        """Return what is recorded of the reply as far as it came."""
        ...


class WireDialect(ABC):
    """One wire between agents and the proxy.

    Attributes:
        name: what logs call it, and what capture support is learned under.
        operation: OpenTelemetry's ``gen_ai.operation.name`` of its calls.
        provider: OpenTelemetry's ``gen_ai.provider.name`` of its calls.
        paths: regular expressions of the paths of its model calls, below ``/v1``. Their named groups are handed to
            ``read_request``, for wires that name the model in the URL.
        backend_path: where backends take its calls, below their ``api_base``.
        count_paths: those of requests that ask for the number of tokens; their bodies are read as requests.
        client_headers: headers that only its clients send. Requests that are no model calls, such as for the model
            list, are answered in its shapes if they have one.
    """

    name: ClassVar[str]
    operation: ClassVar[Literal["chat", "text_completion"]]
    provider: ClassVar[str]
    paths: ClassVar[tuple[str, ...]]
    backend_path: ClassVar[str]
    count_paths: ClassVar[tuple[str, ...]] = ()
    client_headers: ClassVar[tuple[str, ...]] = ()

    # --- Requests ---

    @abstractmethod
    def read_request(self, body: bytes, path_params: Mapping[str, str]) -> ModelRequest:
        """Read an agent's request.

        Args:
            path_params: the named groups of the path, the parameters of the query, and ``rollout_id`` and
                ``attempt_id`` if the call has them.

        Raises:
            ProxyError: it is no valid request of this wire (400).
        """

    @abstractmethod
    def missing_capture(self, body: Mapping[str, Any], wanted: Iterable[CaptureField]) -> frozenset[CaptureField]:
        """Return the ``wanted`` fields that the request does not ask for itself."""

    @abstractmethod
    def add_capture(self, body: dict[str, Any], fields: frozenset[CaptureField]) -> dict[str, Any]:
        """Return the request with ``fields`` asked for; ``body`` itself is not changed."""

    @abstractmethod
    def blamed_capture(self, error: bytes, fields: frozenset[CaptureField]) -> frozenset[CaptureField]:
        """Return which of ``fields`` an error of the backend names; all of them if it names none."""

    def capture_headers(self, fields: frozenset[CaptureField]) -> Mapping[str, str]:
        """Return headers that ask for ``fields``, which the body may not ask for. Most wires have none."""
        return {}

    # --- Replies ---

    @abstractmethod
    def read_reply(self, body: bytes, hidden: frozenset[CaptureField], request: ModelRequest) -> RecordedReply | None:
        """Read a whole reply.

        Args:
            hidden: the fields that only the proxy asked for. They are recorded, and removed from the reply's body,
                so that the agent sees what it would have got without the proxy.
            request: what it replies to.

        Returns:
            The record, whose ``shown`` or else ``body`` is what the agent gets; None if it is no reply of this wire.
        """

    @abstractmethod
    def open_stream(self, hidden: frozenset[CaptureField], request: ModelRequest) -> ReplyStream:
        """Begin to read a streamed reply. See ``read_reply`` for the arguments."""

    # --- Errors and lists ---

    @abstractmethod
    def read_error(self, body: bytes, status: int) -> BackendError:
        """Read the body of a backend's error reply."""

    def count_reply(self, count: int) -> dict[str, Any]:
        """Return the reply to a request of ``count_paths``."""
        return {"count": count}

    def model_name(self, path_params: Mapping[str, str]) -> str:
        """Return the model that a request for one model names."""
        return path_params["model"]

    def lookups(self) -> Sequence[Lookup]:
        """Return the requests beside model calls that the wire has. Most have none."""
        return ()

    def shown_error(self, body: bytes, status: int) -> bytes:
        """Return what the agent gets for a backend's error reply. Most wires are those of their backends."""
        return body

    @abstractmethod
    def error_body(self, error: ProxyError) -> bytes:
        """Return an error in the shape that the wire's clients parse."""

    @abstractmethod
    def error_event(self, error: ProxyError) -> bytes:
        """Return the event that ends a stream with an error."""

    @abstractmethod
    def model_list(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the reply to a request for the model list."""

    @abstractmethod
    def model(self, name: str) -> dict[str, Any]:
        """Return the reply to a request for one model."""


# --- Server-sent events, as far as model calls use them (https://html.spec.whatwg.org/multipage/server-sent-events.html)

_END = re.compile(rb"\r?\n\r?\n|\r\r\n?")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LONGEST_END_BYTES = 4
FIRST_OF_EVENTS = (b"data:", b"event:", b"id:", b"retry:", b":")
"""How a stream of server-sent events begins."""


class EventTooLarge(Exception):
    """An event is longer than the limit."""


class EventSplitter:
    """Cuts a stream of bytes into whole events.

    Args:
        max_event_bytes: how long an event may grow before it is given up.
    """

    def __init__(self, max_event_bytes: int) -> None:
        self._max_event_bytes = max_event_bytes
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Return the events that are complete now, each with its empty line. Raises ``EventTooLarge`` if the event
        that is not complete yet is longer than the limit."""
        # Only the end of the old bytes is searched again: an event may arrive in very many pieces, and searching
        # all of it for each piece would take quadratic time.
        search_from = max(0, len(self._rest) - _LONGEST_END_BYTES + 1)
        self._rest += data
        events: list[bytes] = []
        start = 0
        for end in _END.finditer(self._rest, search_from):
            events.append(bytes(self._rest[start : end.end()]))
            start = end.end()
        del self._rest[:start]
        if len(self._rest) > self._max_event_bytes:
            raise EventTooLarge(f"an event of the backend's stream is longer than {self._max_event_bytes:,} bytes")
        return events

    def rest(self) -> bytes:
        """Return what came after the last complete event."""
        return bytes(self._rest)


def data_of(event: bytes) -> bytes | None:
    """Return the data of an event; None if it has none, such as a comment."""
    event = event.removeprefix(_BYTE_ORDER_MARK)
    if event.startswith(b"data:") and event.count(b"\n") == 2:  # nearly all events: one line and the empty one
        return event[5:].strip()
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines).strip() if lines else None


def event_of(data: bytes) -> bytes:
    """Return an event with this data, which must not contain a line break."""
    return b"data: " + data + b"\n\n"


def with_data(event: bytes, data: bytes) -> bytes:
    """Return an event with other data, which must not contain a line break; its other lines stay."""
    event = event.removeprefix(_BYTE_ORDER_MARK)
    if event.startswith(b"data:") and event.count(b"\n") == 2:
        return event_of(data)
    others = [line for line in event.splitlines() if line and not line.startswith(b"data:")]
    return b"".join(line + b"\n" for line in others) + event_of(data)
