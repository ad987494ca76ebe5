"""``OtelTracer``: traces agents by OpenTelemetry, whose spans it assigns to the traces of attempts.

OpenTelemetry has one provider per process, and a runner has many rollouts at once. A span is assigned when it starts,
by the context of the code that starts it, because it may end elsewhere, as the spans of streamed replies do. A thread
that the agent started by itself has no such context. Then the span's parent decides, or else the open trace if
there is exactly one in the process.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from opentelemetry import context as otel_context, trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span as SdkSpan, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from agentlightning.errors import InvalidValue
from agentlightning.store.base import LightningStore
from agentlightning.tracer.base import Tracer, activated, recorded
from agentlightning.tracer.conversion import SpanConverter
from agentlightning.tracer.sender import DeferredTrace, Recording, SpanSender, current, last
from agentlightning.types import Attributes, Span, SpanCoreFields, StatusCode, TraceStatus
from agentlightning.types.attributes import convert_attributes, convert_timestamp

OPEN_SPANS_LIMIT = 100_000
"""How many started spans are remembered. Beyond that, the oldest are dropped: most of them will never end."""
_TRACER_NAME = "agentlightning"
_logger = logging.getLogger(__name__)


def to_otel_status_code(status_code: StatusCode) -> trace.StatusCode:
    """OpenTelemetry's value for our status code."""
    return trace.StatusCode[status_code]


class LightningSpanProcessor(SpanProcessor):
    """Records the spans of each trace, and passes them to the sender of its store.

    Args:
        disable_store_submission: keep spans in memory only.
    """

    def __init__(self, disable_store_submission: bool = False) -> None:
        self.disable_store_submission = disable_store_submission
        """Whether the spans of traces that are opened from now on are kept in memory only."""
        self._converter = SpanConverter()
        self._sender = SpanSender()
        self._starting = OrderedDict[int, Recording]()
        self._traces: dict[int, Recording] = {}
        self._warned = False

    def begin(
        self,
        store: LightningStore | None,
        rollout_id: str | None,
        attempt_id: str | None,
        name: str | None = None,
        sender: SpanSender | None = None,
    ) -> Recording:
        """Open a trace, for the running context and those that are copied from it.

        Args:
            store: where the spans go; None, or a missing id: nowhere.
            rollout_id, attempt_id: the attempt that the spans belong to.
            name: name of the trace in logs and errors.
            sender: sends the spans; default: the processor's own.
        """
        if self.disable_store_submission or not rollout_id or not attempt_id:
            store = None
        recording = Recording(self._converter.convert, store, rollout_id or "", attempt_id or "", name)
        if recording.store is not None:
            sender = sender or self._sender
            sender.start()
            sender.open(recording)
        self._traces[id(recording)] = recording
        recording.outer = current.get()
        current.set(recording)
        return recording

    def end(self, recording: Recording) -> None:
        """Close a trace. Its spans that end later are still sent."""
        recording.closed = True
        self._traces.pop(id(recording), None)
        if current.get() is recording:
            current.set(recording.outer)
        last.set(recording)

    def recording(self) -> Recording | None:
        """The trace of the running code: that of its context, or else the only open one.

        Raises:
            RuntimeError: several are open, and the context names none.
        """
        recording = current.get()
        traces = list(self._traces.values())
        if recording is not None or not traces:
            return recording
        if len(traces) > 1:
            raise RuntimeError(
                f"this thread has no context that says which of {len(traces)} running rollouts it works for; start it "
                "with asyncio.to_thread, or run its function by contextvars.copy_context().run(function)"
            )
        return traces[0]

    # --- Properties of 0.3 -----------------------------------------------------------------------

    @property
    def store(self) -> LightningStore | None:
        """The store that gets the spans of the running code."""
        recording = current.get()
        return None if recording is None else recording.store

    @property
    def rollout_id(self) -> str | None:
        """The rollout that the running code works on."""
        recording = current.get()
        return None if recording is None else recording.rollout_id or None

    @property
    def attempt_id(self) -> str | None:
        """The attempt that the running code works on."""
        recording = current.get()
        return None if recording is None else recording.attempt_id or None

    def spans(self) -> list[Span]:
        """The spans of the running code's open trace, or else of its last one."""
        recording = current.get() or last.get()
        return [] if recording is None else recording.spans()

    @contextmanager
    def with_context(
        self, store: LightningStore, rollout_id: str, attempt_id: str
    ) -> Generator[LightningSpanProcessor]:
        """Trace the block for an attempt. Its spans are in the store afterwards.

        The end of the block blocks until the store has answered; in a coroutine use ``OtelTracer.trace_context``.

        Raises:
            StoreUnavailable: at the end of the block, when the store did not accept the spans.
        """
        recording = self.begin(store, rollout_id, attempt_id)
        try:
            yield self
        finally:
            self.end(recording)
            if recording.store is not None:
                self._sender.flush(recording).result()

    # --- Called by OpenTelemetry -----------------------------------------------------------------

    def on_start(self, span: SdkSpan, parent_context: Context | None = None) -> None:
        """Assign a span to a trace."""
        starting = self._starting
        recording = current.get()
        if recording is None and span.parent is not None:
            recording = starting.get(span.parent.span_id)
        if recording is None:
            recording = self._only_one()
        context = span.context
        if recording is not None and context is not None:
            starting[context.span_id] = recording
            while len(starting) > OPEN_SPANS_LIMIT:
                starting.popitem(last=False)  # of a plain dict it would cost a pass over those taken out before

    def on_end(self, span: ReadableSpan) -> None:
        """Add an ended span to its trace; a span without a trace is dropped."""
        context = span.context
        if context is not None:
            recording = self._starting.pop(context.span_id, None)
            if recording is not None:
                recording.add(span)

    def shutdown(self) -> None:
        """Send the remaining spans, and end the thread that sends."""
        self._sender.stop()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Send all present spans; returns whether their stores have them within the time (milliseconds)."""
        waiting = [self._sender.flush(each) for each in list(self._traces.values()) if each.store is not None]
        try:
            for done in waiting:
                done.result(timeout_millis / 1000)
        except Exception as error:  # noqa: BLE001 - OpenTelemetry expects False, not an exception
            _logger.warning("flush failed: %s: %s", type(error).__name__, error)
            return False
        return True

    def _only_one(self) -> Recording | None:
        traces = list(self._traces.values())
        if len(traces) > 1 and not self._warned:
            self._warned = True
            _logger.warning(
                "a span is dropped, because its thread has no context that says which of %d running rollouts it works "
                "for; start such threads with asyncio.to_thread or contextvars.copy_context().run",
                len(traces),
            )
        return traces[0] if len(traces) == 1 else None


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
        processor.recording()
        at = time.time() if timestamp is None else timestamp
        nanoseconds = int(at * 1e9)
        status = status or TraceStatus(status_code="OK")
        span = tracer.start_span(name, attributes=attributes, start_time=nanoseconds)
        span.set_status(to_otel_status_code(status.status_code), status.description)
        span.end(nanoseconds)
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

    def _wiring(self) -> tuple[LightningSpanProcessor, trace.Tracer]:
        """Our processor and the OpenTelemetry tracer of this process; set up on first use."""
        if self._wired is None:
            provider = get_tracer_provider()
            self._wired = (attach_processor(provider), provider.get_tracer(_TRACER_NAME))
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


def _nanoseconds(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1e9)


_P = TypeVar("_P", bound=SpanProcessor)
_attached: WeakKeyDictionary[TracerProvider, LightningSpanProcessor] = WeakKeyDictionary()
_lock = threading.Lock()


def get_tracer_provider() -> TracerProvider:
    """The global OpenTelemetry provider; made if there is none.

    A global provider that is not of the OpenTelemetry SDK takes no span processor. Then a private provider is made,
    which records the spans of our emitters but not those of libraries, and a warning says so.
    """
    known = trace.get_tracer_provider()
    if isinstance(known, TracerProvider):
        return known
    made = TracerProvider(
        sampler=ALWAYS_ON,
        resource=Resource.create({"service.name": "agentlightning"}),
        span_limits=SpanLimits(*[SpanLimits.UNSET] * 8),  # none
        shutdown_on_exit=False,
    )
    if isinstance(known, trace.ProxyTracerProvider):
        trace.set_tracer_provider(made)
        current = trace.get_tracer_provider()  # another thread may have set one first
        return current if isinstance(current, TracerProvider) else made
    _logger.warning(
        "the global OpenTelemetry provider is a %s, which takes no span processor: spans of instrumented libraries "
        "are not recorded, only those of agentlightning's emitters",
        type(known).__name__,
    )
    return made


def attach_processor(provider: TracerProvider) -> LightningSpanProcessor:
    """Our processor on this provider, added on the first call. OpenTelemetry cannot remove a processor again."""
    with _lock:
        processor = _attached.get(provider)
        if processor is None:
            processor = _attached[provider] = LightningSpanProcessor()
            provider.add_span_processor(processor)
        return processor


def get_span_processors(tracer_provider: TracerProvider, expected_type: type[_P]) -> list[_P]:
    """The processors of this class that ``attach_processor`` put on the provider."""
    with _lock:
        processor = _attached.get(tracer_provider)
    return [processor] if isinstance(processor, expected_type) else []
