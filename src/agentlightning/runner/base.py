"""``Runner``: the interface of every runner, for trainers and for those who debug an agent."""

from __future__ import annotations

import asyncio
import threading
from abc import abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Generic, Protocol, TypeVar

from agentlightning.litagent.litagent import Hook, LitAgent
from agentlightning.store.base import LightningStore
from agentlightning.types import ResourceUnion, Rollout, RolloutMode
from agentlightning.types.rollouts import ParallelWorkerBase

T = TypeVar("T")
_WAIT_SLICE_SECONDS = 0.5


class Runner(ParallelWorkerBase, Generic[T]):
    """Runs an agent on rollouts.

    Order of calls: ``init``, then in the worker ``init_worker``, ``iter`` or ``step`` any number of times,
    ``teardown_worker``, ``teardown``. ``run_context`` makes the first two and the last two around a block.
    """

    def init(self, agent: LitAgent[T], **kwargs: Any) -> None:
        """Take the agent."""
        super().init()

    def init_worker(self, worker_id: int, store: LightningStore, **kwargs: Any) -> None:
        """Get ready in a worker.

        Args:
            worker_id: index of the worker, from 0.
            store: where rollouts come from.
        """
        super().init_worker(worker_id)

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Not available: a runner is driven by ``iter`` or ``step``.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("a runner has no run(); await iter() to work on the queue, or step() for one rollout")

    @contextmanager
    def run_context(
        self,
        *,
        agent: LitAgent[T],
        store: LightningStore,
        hooks: Sequence[Hook] | None = None,
        worker_id: int | None = None,
    ) -> Generator[Runner[T]]:
        """Set up for this agent and store, and tear down at the end of the block; for use without a trainer.

        Args:
            agent: what to run.
            store: where rollouts come from.
            hooks: called around each rollout.
            worker_id: index of the worker; default: 0.
        """
        index = 0 if worker_id is None else worker_id
        self.init(agent, hooks=hooks)
        try:
            self.init_worker(index, store)
            try:
                yield self
            finally:
                self.teardown_worker(index)
        finally:
            self.teardown()

    def wants_main_thread(self, agent: LitAgent[T]) -> bool:
        """Whether this runner, in a process of its own, has its loop in a thread, to call ``agent`` in the main one."""
        return False

    @abstractmethod
    async def iter(self, *, event: StopEvent | None = None) -> None:
        """Work on the rollouts of the queue until told to end.

        Args:
            event: when it is set, nothing new is begun, and agents at work finish.
        """

    @abstractmethod
    async def step(
        self,
        input: T,
        *,
        resources: Mapping[str, ResourceUnion] | None = None,
        mode: RolloutMode | None = None,
        event: StopEvent | None = None,
    ) -> Rollout:
        """Run the agent once, on this input, past the queue.

        Args:
            input: the task.
            resources: stored first, and used; default: the latest of the store.
            mode: of the rollout.
            event: when it is set, the agent is cancelled.

        Returns:
            The rollout as it is in the store afterwards.
        """


class StopEvent(Protocol):
    """The part of an ``ExecutionEvent`` that runners use."""

    def is_set(self) -> bool:
        """Whether it is set."""
        ...

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set, at most ``timeout`` seconds; returns whether it is set."""
        ...


@contextmanager
def stop_watch(event: StopEvent | None) -> Generator[asyncio.Event]:
    """An event of the running loop that is set as soon as ``event``, of threads or processes, is set.

    A thread waits for that event during the block, because a coroutine cannot. None: nothing ever stops.
    """
    stopped, loop, over = asyncio.Event(), asyncio.get_running_loop(), threading.Event()

    def watch(event: StopEvent) -> None:
        while not over.is_set():
            if event.wait(_WAIT_SLICE_SECONDS):
                with suppress(RuntimeError):  # the loop was closed in the meantime
                    loop.call_soon_threadsafe(stopped.set)
                return

    if event is not None and event.is_set():
        stopped.set()
    elif event is not None:
        threading.Thread(target=watch, args=(event,), name="agl-stop", daemon=True).start()
    try:
        yield stopped
    finally:
        over.set()
