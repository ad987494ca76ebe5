"""What is known of one model call while it goes on."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import msgspec

from agentlightning.proxy.answers import Answer
from agentlightning.proxy.asks import CallKind
from agentlightning.proxy.refusals import Refused

__all__ = ["CallRecord", "Caller", "Question", "read_question"]


class Caller(NamedTuple):
    """For which attempt an agent calls, and which of its spans the call belongs to."""

    rollout_id: str
    attempt_id: str
    trace_id: str | None = None
    parent_span_id: str | None = None


class Question(NamedTuple):
    """The request of an agent, read."""

    model: str
    is_streamed: bool
    body: dict[str, Any]


@dataclass(slots=True)
class CallRecord:
    """One call: filled in as it goes on, and made a span at its end."""

    kind: CallKind
    caller: Caller | None
    start_time: float = field(default_factory=time.time)
    started: float = field(default_factory=time.perf_counter)
    request: bytes = b""
    question: Question | None = None
    backend: str | None = None
    model_version: str | None = None
    retries: int = 0
    first_byte: float | None = None
    """When the backend's first byte of the reply came, on the clock of ``started``."""
    ended: float | None = None
    status: int | None = None
    """The HTTP status that the agent got."""
    answer: Answer = field(default_factory=Answer)
    error_type: str | None = None
    error_message: str | None = None

    def fail(self, error_type: str, message: str, status: int | None = None) -> None:
        """The call did not work out."""
        self.error_type, self.error_message = error_type, message
        self.status = status if status is not None else self.status

    def refuse(self, refused: Refused) -> None:
        """The call ends with an error of the proxy's own."""
        self.fail(refused.code, refused.message, refused.status)
        self.answer.body = refused.body()


def read_question(body: bytes) -> Question:
    """The request of an agent.

    Raises:
        Refused: it is no JSON object, or names no model.
    """
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(400, "invalid_json", f"The body is not valid JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise Refused(400, "invalid_json", f"The body is a JSON {type(fields).__name__}; send an object.")
    known = cast("dict[str, Any]", fields)
    model = known.get("model")
    if not isinstance(model, str) or not model:
        raise Refused(400, "model_required", "The field 'model' is missing; name one of GET /v1/models.", param="model")
    return Question(model, known.get("stream") is True, known)
