"""What the proxy has to know of a wire: the ``WireDialect`` interface, and the values that cross it.

Everything else in the proxy handles calls of all wires alike. A dialect reads an agent's request into a
``ModelRequest``, which already has the form that the backend takes; turns the backend's reply into what the agent
reads and what is recorded; and gives errors and model lists the shape that the wire's clients parse. Dialects hold
no state of a call: one object serves all calls at the same time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from agentlightning.proxy.capture import CaptureField
from agentlightning.proxy.errors import ProxyError, Scrubber


class ModelRequest(NamedTuple):
    """An agent's request, in the form that the backend takes."""

    model: str
    """The name in the model list, not the backend's own."""
    is_streamed: bool
    body: dict[str, Any]


@dataclass(slots=True)
class RecordedReply:
    """What is recorded of a reply. What the backend did not send is None or empty."""

    body: bytes = b""
    """The reply as the agent got it, as JSON; of a stream, what the same call would have got without streaming."""
    response_id: str | None = None
    model: str | None = None
    fingerprint: str | None = None
    """The backend's own name of its weights."""
    finish_reasons: list[str] = field(default_factory=list[str])
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt_token_ids: Sequence[int] | None = None
    token_ids: Sequence[int] | None = None
    """Of the first choice."""
    logprobs: Sequence[float] | None = None
    """Of the first choice: one natural logarithm for each of its tokens."""

    def scrub(self, scrubber: Scrubber) -> None:
        """Remove the backend's secrets from the body and from every text."""
        self.body = scrubber.bytes(self.body)
        self.response_id = self.response_id and scrubber.text(self.response_id)
        self.model = self.model and scrubber.text(self.model)
        self.fingerprint = self.fingerprint and scrubber.text(self.fingerprint)
        self.finish_reasons = [scrubber.text(reason) for reason in self.finish_reasons]


class BackendError(NamedTuple):
    """An error that the backend sent."""

    code: str
    """Its code or type, or else the HTTP status."""
    message: str


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
    def kept_bytes(self) -> int:
        """About how many bytes of the reply are kept for the record."""
        ...

    def feed(self, event: bytes) -> bytes:
        """Read one whole event of the backend, with its empty line; returns the events for the agent, if any."""
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
    """

    name: ClassVar[str]
    operation: ClassVar[Literal["chat", "text_completion"]]
    provider: ClassVar[str]
    paths: ClassVar[tuple[str, ...]]
    backend_path: ClassVar[str]

    # --- Requests ---

    @abstractmethod
    def read_request(self, body: bytes, path_params: Mapping[str, str]) -> ModelRequest:
        """Read an agent's request.

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

    # --- Replies ---

    @abstractmethod
    def read_reply(self, body: bytes, hidden: frozenset[CaptureField]) -> RecordedReply | None:
        """Read a whole reply.

        Args:
            hidden: the fields that only the proxy asked for. They are recorded, and removed from the reply's body,
                so that the agent sees what it would have got without the proxy.

        Returns:
            The record, whose ``body`` is what the agent gets; None if it is no reply of this wire.
        """

    @abstractmethod
    def open_stream(self, hidden: frozenset[CaptureField]) -> ReplyStream:
        """Begin to read a streamed reply. See ``read_reply`` for ``hidden``."""

    # --- Errors and lists ---

    @abstractmethod
    def read_error(self, body: bytes, status: int) -> BackendError:
        """Read the body of a backend's error reply."""

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
