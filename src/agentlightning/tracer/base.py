"""``Tracer``: what every tracer offers to runners and emitters."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

from agentlightning.store.base import LightningStore
from agentlightning.types import Attributes, Span, SpanCoreFields, SpanRecordingContext, TraceStatus
from agentlightning.types.tasks import ParallelWorkerBase

# --- Which tracer the code that runs right now is traced by ---

_of_context: ContextVar[Tracer | None] = ContextVar("agentlightning_tracer", default=None)
_of_process: list[Tracer] = []
"""Tracers that are at work in this process, each once for each time; the newest is last."""
_lock = threading.Lock()


def set_active_tracer(tracer: Tracer) -> None:
    """Trace by ``tracer`` from here on: what this context runs, and what has no context of its own."""
    _of_context.set(tracer)
    with _lock:
        _of_process.append(tracer)


def clear_active_tracer() -> None:
    """Undo the last ``set_active_tracer`` of this context."""
    tracer = _of_context.get()
    _of_context.set(None)
    _forget(tracer)


def get_active_tracer() -> Tracer | None:
    """The tracer of this context, else the newest that is at work in this process; None if there is none."""
    tracer = _of_context.get()
    if tracer is not None:
        return tracer
    try:
        return _of_process[-1]
    except IndexError:
        return None


@contextmanager
def activated(tracer: Tracer) -> Generator[None]:
    """Trace by ``tracer`` inside of the block, then as before."""
    before = _of_context.get()
    set_active_tracer(tracer)
    try:
        yield
    finally:
        _of_context.set(before)
        _forget(tracer)


def _forget(tracer: Tracer | None) -> None:
    with _lock:
        for position in range(len(_of_process) - 1, -1, -1):
            if _of_process[position] is tracer:
                del _of_process[position]
                return


# ---


class Tracer(ParallelWorkerBase):
    """Records what happens inside an agent as spans, and hands them to the store.

    One tracer serves many rollouts of its process at once; each is traced in a ``trace_context`` of its own, which
    belongs to the task or thread that entered it.
    """

    records: ClassVar[bool] = True
    """Whether spans made by this tracer get into the store. If not, the runner sends the reward by itself."""

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
        """Hand over what is left, then release what ``init_worker`` took."""
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
        """Trace what runs inside of the block. All its spans are in the store after.

        Args:
            name: what the trace is called in logs and errors.
            store: where the spans go; default: the store of ``init_worker``.
            rollout_id, attempt_id: whose spans they are. Without both, they go to no store.

        Raises:
            StoreUnavailable: at the end of the block, when the store did not take the spans.
        """

    @abstractmethod
    def get_last_trace(self) -> list[Span]:
        """The spans of this context's present trace or, outside of any, of its last; in the order they ended in."""

    @abstractmethod
    def create_span(
        self,
        name: str,
        attributes: Attributes | None = None,
        timestamp: float | None = None,
        status: TraceStatus | None = None,
    ) -> SpanCoreFields:
        """Record something that takes no time.

        Args:
            name: of the span.
            attributes: what it says.
            timestamp: when it was, in Unix seconds; default: now.
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
        """Record what happens inside of the block as one span, the parent of all spans made in there.

        An exception that leaves the block is recorded, and passes on.

        Args:
            name: of the span.
            attributes: what is known at the start.
            start_time, end_time: Unix seconds; default: when the block is entered and left.
        """

    def trace_run(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a plain function in a trace without a rollout; ``get_last_trace`` has its spans after."""
        raise NotImplementedError(f"{type(self).__name__} traces no plain functions; use trace_run_async")

    async def trace_run_async(self, func: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
        """Await a coroutine function in a trace without a rollout; ``get_last_trace`` has its spans after."""
        async with self.trace_context(name=getattr(func, "__name__", None)):
            return await func(*args, **kwargs)

    def get_langchain_handler(self) -> Any | None:
        """A callback handler for LangChain, from tracers that have one. Others trace it through OpenTelemetry."""
        return None

    @contextmanager
    def lifespan(self, store: LightningStore | None = None) -> Generator[None]:
        """Set up, be the tracer of this process inside of the block, and take down; for use without a runner."""
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
