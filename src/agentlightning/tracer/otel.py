"""``OtelTracer``: traces agents by OpenTelemetry (see ``LightningSpanProcessor``)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

from opentelemetry import context as otel_context, trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan

from agentlightning.errors import InvalidValue, StoreUnavailable
from agentlightning.store.base import LightningStore
from agentlightning.tracer.base import Tracer, activated, recorded
from agentlightning.tracer.processor import LightningSpanProcessor, attach_processor
from agentlightning.tracer.provider import get_tracer_provider, own_tracer
from agentlightning.tracer.recording import Recording
from agentlightning.tracer.sender import DeferredTrace, SpanSender
from agentlightning.types import Attributes, Span, SpanCoreFields, StatusCode, TraceStatus
from agentlightning.types.attributes import convert_attributes, convert_timestamp

_REWARD = "agentlightning.reward"
_REWARD_SECONDS = 2.0
"""How long a reward may hold up a plain function, while the store does not answer."""
_logger = logging.getLogger(__name__)


def to_otel_status_code(status_code: StatusCode) -> trace.StatusCode:
    """OpenTelemetry's value for our status code."""
    return trace.StatusCode[status_code]


class OtelTracer(Tracer):
    """Records every span that ends in a trace, whether an emitter, the agent or a library made it.

    A thread sends spans to the store in bulk while the agent works; the end of a trace waits until the store has all
    of them. May be pickled, and used in several processes.

    Args:
        interval_seconds: how often spans are sent while a trace is open.
        patience_seconds: how long the end of a trace waits for an unreachable store.
    """

    def __init__(self, *, interval_seconds: float = 0.5, patience_seconds: float = 120.0) -> None:
        super().__init__()
        self._times = (interval_seconds, patience_seconds)
        self._sender: SpanSender | None = None
        self._wired: tuple[LightningSpanProcessor, trace.Tracer] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out sender, provider and store, which belong to this process."""
        return self.__dict__ | {"_sender": None, "_wired": None, "_store": None, "worker_id": None}

    def init_worker(self, worker_id: int, store: LightningStore | None = None) -> None:
        """Add our processor to the process's OpenTelemetry provider, and start the thread that sends spans."""
        super().init_worker(worker_id, store)
        self._wiring()
        self._sending().start()

    def teardown_worker(self, worker_id: int) -> None:
        """Send the remaining spans, and end the thread that sends."""
        if self._wired is not None:
            self._wired[0].forked.collect()
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.stop()
        super().teardown_worker(worker_id)

    def trace_context(
        self,
        name: str | None = None,
        *,
        store: LightningStore | None = None,
        rollout_id: str | None = None,
        attempt_id: str | None = None,
    ) -> DeferredTrace:
        """See ``Tracer.trace_context``. The block gets an OpenTelemetry tracer; spans of any other are kept as well.

        Raises:
            InvalidValue: one id is given without the other, or both without a store.
        """
        scope = self._scope(name, store or self._store, rollout_id, attempt_id)
        return DeferredTrace(scope, self._wiring()[1], self._sending())

    def trace_run(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a plain function in a trace without a rollout; ``get_last_trace`` returns its spans afterwards."""
        with self._scope(getattr(func, "__name__", None), None, None, None):
            return func(*args, **kwargs)

    def get_last_trace(self) -> list[Span]:
        """The spans of this context's open trace, or else of its last one, in the order in which they ended."""
        return self._wiring()[0].spans()

    def create_span(
        self,
        name: str,
        attributes: Attributes | None = None,
        timestamp: float | None = None,
        status: TraceStatus | None = None,
    ) -> SpanCoreFields:
        """Record an event of no duration, as a child of the span that is open here.

        Raises:
            RuntimeError: several rollouts run, and this thread has no context that says which one it works for.
        """
        processor, tracer = self._wiring()
        recording = processor.recording()
        at = time.time() if timestamp is None else timestamp
        nanoseconds = int(at * 1e9)
        status = status or TraceStatus(status_code="OK")
        span = tracer.start_span(name, attributes=attributes, start_time=nanoseconds)
        span.set_status(to_otel_status_code(status.status_code), status.description)
        span.end(nanoseconds)
        if recording is not None and any(key.startswith(_REWARD) for key in attributes or ()):
            self._send_reward(recording)
        return SpanCoreFields(name=name, status=status, attributes=dict(attributes or {}), start_time=at, end_time=at)

    @contextmanager
    def operation_context(
        self,
        name: str,
        attributes: Attributes | None = None,
        start_time: float | None = None,
        end_time: float | None = None,
    ) -> Generator[OtelSpanRecordingContext]:
        """Record the block as one span, the parent of all spans made inside it.

        Raises:
            RuntimeError: several rollouts run, and this thread has no context that says which one it works for.
        """
        processor, tracer = self._wiring()
        processor.recording()
        span = tracer.start_span(name, attributes=attributes, start_time=_nanoseconds(start_time))
        recording = OtelSpanRecordingContext(span)
        open_here = trace.use_span(span, record_exception=False, set_status_on_exception=False)
        with recorded(recording, partial(recording.finish, end_time)), open_here:
            yield recording

    def _send_reward(self, recording: Recording) -> None:
        """Send a reward before the agent goes on, so that the store gets it before the agent's next model call.

        The proxy stores calls as they end, and rewards belong to calls by the order in which the store got them. A
        coroutine is not held up; its reward is on its way at once.
        """
        if recording.store is None or recording.is_ending or recording.closed or not recording.is_here:
            return
        sender = self._sending()
        was_failing = sender.is_failing
        sent = sender.flush(recording)
        if was_failing or _is_in_loop():  # a store that is away holds up one reward, not each of them
            return
        try:
            sent.result(_REWARD_SECONDS)
        except (TimeoutError, StoreUnavailable):
            _logger.warning("a reward of %s is not in the store yet; the agent goes on", recording.name)

    def _wiring(self) -> tuple[LightningSpanProcessor, trace.Tracer]:
        """Our processor and the OpenTelemetry tracer of this process; set up on first use."""
        if self._wired is None:
            provider = get_tracer_provider()
            processor = attach_processor(provider)
            self._wired = (processor, own_tracer(provider, processor))
        return self._wired

    def _sending(self) -> SpanSender:
        if self._sender is None:
            self._sender = SpanSender(*self._times)
        return self._sender

    @contextmanager
    def _scope(
        self, name: str | None, store: LightningStore | None, rollout_id: str | None, attempt_id: str | None
    ) -> Generator[Recording]:
        """Open a trace for the block. Its spans are not sent yet when the block ends."""
        if (rollout_id is None) is not (attempt_id is None):
            raise InvalidValue(f"rollout_id is {rollout_id!r} and attempt_id {attempt_id!r}; give both, or neither")
        if rollout_id is not None and store is None:
            raise InvalidValue(f"the spans of {rollout_id!r} have no store to go to; give store=, or call init_worker")
        processor = self._wiring()[0]
        outside = otel_context.attach(Context())  # a span around the runner is not the parent of the rollout's spans
        recording = processor.begin(store, rollout_id, attempt_id, name, self._sending())
        try:
            with activated(self):
                yield recording
        finally:
            processor.end(recording)
            otel_context.detach(outside)


class OtelSpanRecordingContext:
    """An open OpenTelemetry span."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        self._failed = False

    def record_exception(self, exception: BaseException) -> None:
        """Add the exception as an event, and set the status to ``ERROR``."""
        self._span.record_exception(exception)
        self.record_status("ERROR", f"{type(exception).__name__}: {exception}")

    def record_attributes(self, attributes: Attributes) -> None:
        """Add attributes; an attribute of the same name is replaced."""
        self._span.set_attributes(attributes)

    def record_status(self, status_code: StatusCode, description: str | None = None) -> None:
        """Set how the work ended. An ``OK`` is final in OpenTelemetry."""
        self._failed = self._failed or status_code == "ERROR"
        self._span.set_status(to_otel_status_code(status_code), description if status_code == "ERROR" else None)

    def finish(self, end_time: float | None = None) -> None:
        """End the span (Unix seconds; default: now). Its status is ``OK`` unless an error was recorded."""
        if not self._failed:
            self._span.set_status(trace.StatusCode.OK)
        self._span.end(_nanoseconds(end_time))

    def get_recorded_span(self) -> SpanCoreFields:
        """Return what was recorded so far."""
        span = self._span
        if not isinstance(span, ReadableSpan):  # a sampler dropped it
            return SpanCoreFields(
                name="", status=TraceStatus(status_code="UNSET"), attributes={}, start_time=None, end_time=None
            )
        return SpanCoreFields(
            name=span.name,
            status=TraceStatus.from_opentelemetry(span.status),
            attributes=convert_attributes(span.attributes),
            start_time=convert_timestamp(span.start_time),
            end_time=convert_timestamp(span.end_time),
        )


def _is_in_loop() -> bool:
    """Whether the running code belongs to a coroutine, which nothing may hold up."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _nanoseconds(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1e9)
