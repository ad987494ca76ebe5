"""``LightningSpanProcessor``: assigns the spans of a process to the traces of attempts.

OpenTelemetry has one provider per process, and a runner has many rollouts at once. A span is assigned when it starts,
by the context of the code that starts it, because it may end elsewhere, as the spans of streamed replies do. A thread
that the agent started by itself has no such context. Then the span's parent decides, or else the open trace if
there is exactly one in the process.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from typing import TypeVar

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span as SdkSpan, SpanProcessor, TracerProvider

from agentlightning.store.base import LightningStore
from agentlightning.tracer.conversion import SpanConverter
from agentlightning.tracer.forked import ForkedSpans
from agentlightning.tracer.provider import OWN_SCOPE
from agentlightning.tracer.recording import Recording, current, last
from agentlightning.tracer.sender import SpanSender
from agentlightning.types import Span

OPEN_SPANS_LIMIT = 100_000
"""How many started spans are remembered. Beyond that, the oldest are dropped: most of them will never end."""
_logger = logging.getLogger(__name__)


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
        self.forked = ForkedSpans(lambda: self._traces.values())
        """The spans that end in forked children of this process."""
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
        recording.on_forked = self.forked.keep
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
        if self.forked.folder is not None:
            self.forked.collect()
        recording.closed_at = time.time()
        self._traces.pop(id(recording), None)
        if current.get() is recording:
            current.set(recording.outer)
        last.set(recording)

    def recording(self) -> Recording | None:
        """The trace of the running code: that of its context, or else the only open one.

        It has the spans by now that forked children of this process have made.

        Raises:
            RuntimeError: several are open, and the context names none.
        """
        if self.forked.folder is not None:
            self.forked.collect()
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
        recording = None if context is None else self._starting.pop(context.span_id, None)
        if recording is None:
            return
        try:
            recording.add(span)
        except Exception as error:  # only in a forked child, whose spans go into a file
            scope = span.instrumentation_scope
            if scope is not None and scope.name == OWN_SCOPE:  # whoever emits is told
                raise
            _logger.error("the span %r of a forked child is lost: %s", span.name, error)

    def shutdown(self) -> None:
        """Send the remaining spans, and end the thread that sends."""
        self.forked.collect()
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


_P = TypeVar("_P", bound=SpanProcessor)
_attached: list[tuple[weakref.ref[TracerProvider], LightningSpanProcessor]] = []
"""Not a mapping, because Logfire's provider has no hash."""
_lock = threading.Lock()


def attach_processor(provider: TracerProvider) -> LightningSpanProcessor:
    """Our processor on this provider, added on the first call. OpenTelemetry cannot remove a processor again."""
    with _lock:
        processor = _processor_of(provider)
        if processor is None:
            processor = LightningSpanProcessor()
            _attached.append((weakref.ref(provider), processor))
            provider.add_span_processor(processor)
        return processor


def get_span_processors(tracer_provider: TracerProvider, expected_type: type[_P]) -> list[_P]:
    """The processors of this class that ``attach_processor`` put on the provider."""
    with _lock:
        processor = _processor_of(tracer_provider)
    return [processor] if isinstance(processor, expected_type) else []


def _processor_of(provider: TracerProvider) -> LightningSpanProcessor | None:
    _attached[:] = [each for each in _attached if each[0]() is not None]
    return next((processor for known, processor in _attached if known() is provider), None)
