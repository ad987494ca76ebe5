"""One span for each model call, named as ``semconv`` says."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import msgspec

from agentlightning.errors import (
    AgentLightningError,
    Conflict,
    InvalidValue,
    NotFound,
    StoreClosed,
    StoreForked,
    StoreStopped,
)
from agentlightning.proxy.capture import CallKind
from agentlightning.proxy.errors import Refused
from agentlightning.proxy.replies import Answer
from agentlightning.semconv import GenAIAttributes, LLMCallAttributes
from agentlightning.store.base import LightningStore
from agentlightning.types import Attributes, AttributeValue, OtelResource, Span, SpanContext, TraceStatus

# --- What is known of one model call while it goes on ---


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


# ---

_MAX_BODY_CHARS = 1_500_000
"""A request or a reply longer than this is shortened: the store takes spans up to 4 MiB."""
_LONG_TEXT_CHARS = 2_000
_RESOURCE: Attributes = {"service.name": "agentlightning-proxy"}
_REQUEST_NUMBERS: Mapping[str, GenAIAttributes] = {
    "temperature": GenAIAttributes.REQUEST_TEMPERATURE,
    "top_p": GenAIAttributes.REQUEST_TOP_P,
    "max_tokens": GenAIAttributes.REQUEST_MAX_TOKENS,
    "max_completion_tokens": GenAIAttributes.REQUEST_MAX_TOKENS,
    "seed": GenAIAttributes.REQUEST_SEED,
}


def span_of(record: CallRecord) -> Span:
    """The span of a call that has ended, without a sequence id: the store issues it.

    Raises:
        ValueError: the call belongs to no attempt.
    """
    if record.caller is None:
        raise ValueError("a call that belongs to no attempt has no span")
    ended = record.ended if record.ended is not None else record.started
    trace_id = record.caller.trace_id or secrets.token_hex(16)
    span_id = secrets.token_hex(8)
    model = record.question.model if record.question else "unknown"
    # Nothing here comes from outside unchecked, and validating thousands of token ids takes longer than the call.
    return Span.model_construct(
        rollout_id=record.caller.rollout_id,
        attempt_id=record.caller.attempt_id,
        sequence_id=0,
        trace_id=trace_id,
        span_id=span_id,
        parent_id=record.caller.parent_span_id,
        name=_mended(f"{record.kind} {model}"),
        status=_status_of(record),
        attributes=_attributes_of(record, ended),
        events=[],
        links=[],
        start_time=record.start_time,
        end_time=record.start_time + (ended - record.started),
        context=SpanContext(trace_id=trace_id, span_id=span_id, is_remote=False, trace_state={}),
        parent=None,
        resource=OtelResource(attributes=dict(_RESOURCE), schema_url=""),
    )


def _status_of(record: CallRecord) -> TraceStatus:
    if record.error_type is None:
        return TraceStatus(status_code="OK")
    return TraceStatus(status_code="ERROR", description=_mended(record.error_message or record.error_type))


def _attributes_of(record: CallRecord, ended: float) -> Attributes:
    answer = record.answer
    found: dict[GenAIAttributes | LLMCallAttributes, AttributeValue | None] = {
        GenAIAttributes.OPERATION_NAME: record.kind,
        GenAIAttributes.PROVIDER_NAME: "openai",
        **_request_attributes(record),
        LLMCallAttributes.BACKEND: record.backend,
        LLMCallAttributes.MODEL_VERSION: record.model_version or answer.fingerprint,
        GenAIAttributes.RESPONSE_ID: answer.response_id,
        GenAIAttributes.RESPONSE_MODEL: answer.model,
        GenAIAttributes.RESPONSE_FINISH_REASONS: answer.finish_reasons or None,
        GenAIAttributes.USAGE_INPUT_TOKENS: answer.input_tokens,
        GenAIAttributes.USAGE_OUTPUT_TOKENS: answer.output_tokens,
        LLMCallAttributes.RESPONSE: _body_text(answer.body) if answer.body else None,
        **_token_attributes(record),
        GenAIAttributes.HTTP_STATUS_CODE: record.status,
        GenAIAttributes.ERROR_TYPE: None if record.error_type is None else _mended(record.error_type),
        LLMCallAttributes.LATENCY_SECONDS: ended - record.started,
        LLMCallAttributes.RETRIES: record.retries,
        LLMCallAttributes.STREAMED: bool(record.question and record.question.is_streamed),
    }
    if record.first_byte is not None:
        found[LLMCallAttributes.FIRST_BYTE_SECONDS] = record.first_byte - record.started
    return {
        name.value: _mended(value) if isinstance(value, str) else value
        for name, value in found.items()
        if value is not None
    }


def _request_attributes(record: CallRecord) -> dict[GenAIAttributes | LLMCallAttributes, AttributeValue | None]:
    found: dict[GenAIAttributes | LLMCallAttributes, AttributeValue | None] = {
        LLMCallAttributes.REQUEST: _body_text(record.request) if record.request else None,
    }
    if record.question is not None:
        found[GenAIAttributes.REQUEST_MODEL] = record.question.model
        for name, attribute in _REQUEST_NUMBERS.items():
            value = record.question.body.get(name)
            if type(value) in (int, float) and -(2**63) <= value < 2**63:
                found[attribute] = value
    return found


def _token_attributes(record: CallRecord) -> dict[GenAIAttributes | LLMCallAttributes, AttributeValue | None]:
    """Token ids and log-probabilities: the latter only where each stands beside its token."""
    answer = record.answer
    logprobs = answer.logprobs
    if logprobs is not None and answer.token_ids is not None and len(logprobs) != len(answer.token_ids):
        logprobs = None
    return {
        LLMCallAttributes.PROMPT_TOKEN_IDS: None if answer.prompt_token_ids is None else list(answer.prompt_token_ids),
        LLMCallAttributes.RESPONSE_TOKEN_IDS: None if answer.token_ids is None else list(answer.token_ids),
        LLMCallAttributes.RESPONSE_LOGPROBS: None if logprobs is None else list(logprobs),
    }


def _mended(text: str) -> str:
    """``text`` as any store takes it: without NUL."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}") if "\0" in text else text


def _body_text(body: bytes) -> str:
    """A body as text; one that is too long for the store is shortened, and stays JSON."""
    if len(body) <= _MAX_BODY_CHARS:
        return body.decode("utf-8", "replace")
    try:
        shortened = msgspec.json.encode(_shortened(msgspec.json.decode(body)))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        shortened = None
    if shortened is None or len(shortened) > _MAX_BODY_CHARS:
        shortened = msgspec.json.encode({"agentlightning.shortened": f"{len(body)} bytes, too large for a span"})
    return shortened.decode()


def _shortened(value: Any) -> Any:
    """``value`` with long texts cut, which say how long they were: images are sent as texts of megabytes."""
    if isinstance(value, str):
        if len(value) <= _LONG_TEXT_CHARS:
            return value
        return f"{value[:_LONG_TEXT_CHARS]}… (shortened: {len(value)} characters)"
    if isinstance(value, list):
        return [_shortened(each) for each in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {name: _shortened(each) for name, each in cast("dict[str, Any]", value).items()}
    return value


# --- Brings the spans of model calls to the store, in bulk, beside the calls ---

_logger = logging.getLogger(__name__)

_MAX_BATCH_SPANS = 500
_MAX_BATCH_BYTES = 4 * 1024 * 1024
_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 5.0
_REFUSED_FOR_GOOD = (InvalidValue, NotFound, Conflict)
_GONE_FOR_GOOD = (StoreClosed, StoreForked, StoreStopped)


class _Parcel(NamedTuple):
    span: Span
    size: int
    accepted: asyncio.Future[bool]


class SpanDelivery:
    """A queue of spans and the task that empties it. To be used from one event loop.

    Args:
        store: where the spans go, asked before each batch.
        max_waiting_bytes: how much may wait.
    """

    def __init__(self, store: Callable[[], LightningStore | None], *, max_waiting_bytes: int) -> None:
        self._store = store
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting: deque[_Parcel] = deque()
        self._waiting_bytes = 0
        self._news = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._task: asyncio.Task[None] | None = None
        self.lost = 0
        """Spans that the store refused for good, or that were left over at the end."""

    def start(self) -> None:
        """Begin to bring spans to the store."""
        if self._task is None:
            self._task = asyncio.create_task(self._work(), name="agl-proxy-spans")

    @property
    def waiting(self) -> int:
        """How many spans the store has not accepted yet."""
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether no more should be put in."""
        return self._waiting_bytes >= self._max_waiting_bytes

    def put(self, span: Span, size: int) -> asyncio.Future[bool]:
        """Take in one span of about ``size`` bytes.

        Returns:
            True once the store has accepted it, False if it never will. Need not be awaited.
        """
        accepted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Parcel(span, size, accepted))
        self._waiting_bytes += size
        self._empty.clear()
        self._news.set()
        return accepted

    async def close(self, timeout_seconds: float) -> int:
        """Bring what waits to the store, for at most so long, and end. Returns how many spans are lost in all."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._empty.wait()
        except TimeoutError:
            _logger.error(
                "%d spans of model calls are lost: the store did not take them within %g s of the proxy's end",
                len(self._waiting),
                timeout_seconds,
            )
            self._drop(list(self._waiting))
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        return self.lost

    async def _work(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            await self._news.wait()
            self._news.clear()
            while self._waiting:
                batch = self._next_batch()
                try:
                    await self._deliver(batch)
                except Exception as error:  # noqa: BLE001 - whatever is wrong with the store, the spans are kept
                    self._report(error, len(self._waiting), pause)
                    await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                    pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)
                else:
                    pause = _FIRST_PAUSE_SECONDS
            self._empty.set()

    def _next_batch(self) -> list[_Parcel]:
        batch: list[_Parcel] = []
        size = 0
        for parcel in self._waiting:
            size += parcel.size
            if batch and (size > _MAX_BATCH_BYTES or len(batch) >= _MAX_BATCH_SPANS):
                break
            batch.append(parcel)
        return batch

    async def _deliver(self, batch: list[_Parcel]) -> None:
        """Hand the first parcels of the queue over. What the store refuses is looked for by halves."""
        store = self._store()
        if store is None:
            raise StoreClosed("the proxy has no store")
        try:
            await store.add_many_spans([parcel.span for parcel in batch])
        except _REFUSED_FOR_GOOD as error:
            if len(batch) > 1:
                await self._deliver(batch[: len(batch) // 2])
                await self._deliver(batch[len(batch) // 2 :])
                return
            span = batch[0].span
            _logger.error(
                "the store does not take the span of a model call of rollout %s, attempt %s; it is lost: %s",
                span.rollout_id,
                span.attempt_id,
                error,
            )
            self._drop(batch)
        else:
            self._remove(batch, accepted=True)

    def _drop(self, parcels: list[_Parcel]) -> None:
        self.lost += len(parcels)
        self._remove(parcels, accepted=False)

    def _remove(self, parcels: list[_Parcel], *, accepted: bool) -> None:
        for parcel in parcels:
            self._waiting.popleft()
            self._waiting_bytes -= parcel.size
            if not parcel.accepted.done():
                parcel.accepted.set_result(accepted)

    @staticmethod
    def _report(error: Exception, waiting: int, pause: float) -> None:
        known = isinstance(error, (AgentLightningError, OSError))
        level = logging.ERROR if isinstance(error, _GONE_FOR_GOOD) or not known else logging.WARNING
        _logger.log(
            level,
            "the store does not take spans of model calls; %d wait, next try in about %g s: %s",
            waiting,
            pause,
            error,
            exc_info=None if known else error,
        )
