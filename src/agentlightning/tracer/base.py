"""``Tracer``: the interface of every tracer; ``DummyTracer``, which stores nothing; and which tracer is active."""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, ClassVar

from agentlightning.store.base import LightningStore
from agentlightning.types import Attributes, Span, SpanCoreFields, SpanRecordingContext, StatusCode, TraceStatus
from agentlightning.types.attributes import format_exception_attributes
from agentlightning.types.rollouts import ParallelWorkerBase


class Tracer(ParallelWorkerBase):
    """Records what happens inside an agent as spans, and sends them to the store.

    One tracer serves all concurrent rollouts of its process. Each rollout has a ``trace_context`` of its own, which
    belongs to the task or thread that entered it.
    """

    records: ClassVar[bool] = True
    """Whether this tracer stores its spans. If not, the runner sends the reward by itself."""

    def __init__(self) -> None:
        super().__init__()
        self._store: LightningStore | None = None

    def init_worker(self, worker_id: int, store: LightningStore | None = None) -> None:
        """Get ready in a worker.

        Args:
            worker_id: index of the worker, from 0.
            store: where spans go, for a ``trace_context`` that names no other.
        """
        super().init_worker(worker_id)
        self._store = store

    def teardown_worker(self, worker_id: int) -> None:
        """Send the remaining spans, then release what ``init_worker`` took."""
        super().teardown_worker(worker_id)
        self._store = None

    @abstractmethod
    def trace_context(
        self,
        name: str | None = None,
        *,
        store: LightningStore | None = None,
        rollout_id: str | None = None,
        attempt_id: str | None = None,
    ) -> AbstractAsyncContextManager[Any]:
        """Trace what runs inside the block. All its spans are in the store afterwards.

        Args:
            name: name of the trace in logs and errors.
            store: where the spans go; default: the store of ``init_worker``.
            rollout_id, attempt_id: the attempt that the spans belong to. Without both, no span is stored.

        Raises:
            StoreUnavailable: at the end of the block, when the store did not accept the spans.
        """

    @abstractmethod
    def get_last_trace(self) -> list[Span]:
        """The spans of this context's open trace, or else of its last one, in the order in which they ended."""

    @abstractmethod
    def create_span(
        self,
        name: str,
        attributes: Attributes | None = None,
        timestamp: float | None = None,
        status: TraceStatus | None = None,
    ) -> SpanCoreFields:
        """Record an event of no duration.

        Args:
            name: name of the span.
            attributes: attributes of the span.
            timestamp: when it happened, in Unix seconds; default: now.
            status: default: ``OK``.
        """

    @abstractmethod
    def operation_context(
        self,
        name: str,
        attributes: Attributes | None = None,
        start_time: float | None = None,
        end_time: float | None = None,
    ) -> AbstractContextManager[SpanRecordingContext]:
        """Record the block as one span, the parent of all spans made inside it.

        An exception that leaves the block is recorded and raised again.

        Args:
            name: name of the span.
            attributes: attributes that are known at the start.
            start_time, end_time: Unix seconds; default: when the block is entered and left.
        """

    def trace_run(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a plain function in a trace without a rollout; ``get_last_trace`` returns its spans afterwards."""
        raise NotImplementedError(f"{type(self).__name__} does not trace plain functions; use trace_run_async")

    async def trace_run_async(self, func: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
        """Await a coroutine function in a trace without a rollout; ``get_last_trace`` returns its spans afterwards."""
        async with self.trace_context(name=getattr(func, "__name__", None)):
            return await func(*args, **kwargs)

    def get_langchain_handler(self) -> Any | None:
        """A callback handler for LangChain, or None from tracers that record it through OpenTelemetry."""
        return None

    @contextmanager
    def lifespan(self, store: LightningStore | None = None) -> Generator[None]:
        """Set up, be the active tracer inside the block, and tear down; for use without a runner."""
        self.init()
        try:
            self.init_worker(0, store)
            try:
                with activated(self):
                    yield
            finally:
                self.teardown_worker(0)
        finally:
            self.teardown()


_of_context: ContextVar[Tracer | None] = ContextVar("agentlightning_tracer", default=None)
_of_process: list[Tracer] = []
"""The active tracers of all contexts of this process, one entry per activation; the newest is last."""
_lock = threading.Lock()


def set_active_tracer(tracer: Tracer) -> None:
    """Make ``tracer`` the active one of this context, and of threads that have no context of their own."""
    _of_context.set(tracer)
    with _lock:
        _of_process.append(tracer)


def clear_active_tracer() -> None:
    """Undo the last ``set_active_tracer`` of this context."""
    tracer = _of_context.get()
    _of_context.set(None)
    _deactivate(tracer)


def get_active_tracer() -> Tracer | None:
    """The tracer of this context, else the one that was activated last in this process; None if there is none."""
    tracer = _of_context.get()
    if tracer is not None:
        return tracer
    try:
        return _of_process[-1]
    except IndexError:
        return None


@contextmanager
def activated(tracer: Tracer) -> Generator[None]:
    """Make ``tracer`` the active one inside the block, and the previous one after it."""
    before = _of_context.get()
    set_active_tracer(tracer)
    try:
        yield
    finally:
        _of_context.set(before)
        _deactivate(tracer)


def _deactivate(tracer: Tracer | None) -> None:
    """Remove the newest entry of a tracer."""
    with _lock:
        for position in range(len(_of_process) - 1, -1, -1):
            if _of_process[position] is tracer:
                del _of_process[position]
                return


@contextmanager
def recorded(span: SpanRecordingContext, finish: Callable[[], None]) -> Generator[None]:
    """Record an exception that leaves the block in the span; ``finish`` the span with the block."""
    try:
        yield
    except BaseException as error:
        span.record_exception(error)
        raise
    finally:
        finish()


class DummySpanRecordingContext:
    """An open span in memory."""

    def __init__(self, name: str, attributes: Attributes | None = None, start_time: float | None = None) -> None:
        self._name = name
        self._attributes: Attributes = dict(attributes or {})
        self._status = TraceStatus(status_code="UNSET")
        self._start_time = time.time() if start_time is None else start_time
        self._end_time: float | None = None

    def record_exception(self, exception: BaseException) -> None:
        """Record the exception as attributes, and set the status to ``ERROR``."""
        self.record_attributes(format_exception_attributes(exception))
        self.record_status("ERROR", str(exception))

    def record_attributes(self, attributes: Attributes) -> None:
        """Add attributes; an attribute of the same name is replaced."""
        self._attributes.update(attributes)

    def record_status(self, status_code: StatusCode, description: str | None = None) -> None:
        """Set how the work ended. The last call counts."""
        self._status = TraceStatus(status_code=status_code, description=description)

    def finish(self, end_time: float | None = None) -> None:
        """Set the end time (Unix seconds; default: now), and the status ``OK`` unless one was recorded."""
        self._end_time = time.time() if end_time is None else end_time
        if self._status.status_code == "UNSET":
            self.record_status("OK")

    def get_recorded_span(self) -> SpanCoreFields:
        """Return what was recorded so far."""
        return SpanCoreFields(
            name=self._name,
            status=self._status,
            attributes=dict(self._attributes),
            start_time=self._start_time,
            end_time=self._end_time,
        )


class DummyTracer(Tracer):
    """For runs without traces, and for spans that the caller stores in another way."""

    records = False

    @asynccontextmanager
    async def trace_context(
        self,
        name: str | None = None,
        *,
        store: LightningStore | None = None,
        rollout_id: str | None = None,
        attempt_id: str | None = None,
    ) -> AsyncGenerator[DummyTracer]:
        """Be the active tracer inside the block; no span is stored."""
        with activated(self):
            yield self

    def trace_run(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        with activated(self):
            return func(*args, **kwargs)

    def get_last_trace(self) -> list[Span]:
        """Always empty."""
        return []

    def create_span(
        self,
        name: str,
        attributes: Attributes | None = None,
        timestamp: float | None = None,
        status: TraceStatus | None = None,
    ) -> SpanCoreFields:
        """Make the span without storing it."""
        at = time.time() if timestamp is None else timestamp
        status = status or TraceStatus(status_code="OK")
        return SpanCoreFields(name=name, status=status, attributes=dict(attributes or {}), start_time=at, end_time=at)

    @contextmanager
    def operation_context(
        self,
        name: str,
        attributes: Attributes | None = None,
        start_time: float | None = None,
        end_time: float | None = None,
    ) -> Generator[DummySpanRecordingContext]:
        """Make a span of the block without storing it."""
        span = DummySpanRecordingContext(name, attributes, start_time)
        with recorded(span, partial(span.finish, end_time)):
            yield span
