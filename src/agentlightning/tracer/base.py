"""``Tracer``: the interface of every tracer, for runners and emitters; and which tracer is active."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

from agentlightning.store.base import LightningStore
from agentlightning.types import Attributes, Span, SpanCoreFields, SpanRecordingContext, TraceStatus
from agentlightning.types.plain_spans import SpanOrPlain
from agentlightning.types.tasks import ParallelWorkerBase


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


class DeferredTrace(AbstractAsyncContextManager[Any]):
    """A ``trace_context`` that can leave its last spans to whoever reports the end of the attempt.

    A runner sends them in the same call as the report, which saves a durable call per rollout.
    """

    @abstractmethod
    def defer(self) -> None:
        """Do not send the last spans at the end of the block. To be called before the block is entered."""

    @abstractmethod
    def wants_own_call(self) -> bool:
        """Whether there are more spans than fit into a report; then ``send`` them."""

    @abstractmethod
    def unsent(self) -> Sequence[SpanOrPlain]:
        """The spans that the store does not have yet; from now on it is the caller who sends them."""

    @abstractmethod
    def stored(self) -> None:
        """Note that the store has the spans that ``unsent`` returned last."""

    @abstractmethod
    async def send(self) -> None:
        """Send the unsent spans by themselves; each one that the store refuses is replaced by a stub.

        Raises:
            StoreUnavailable: the store did not accept the spans.
        """


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
