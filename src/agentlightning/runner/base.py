"""``Runner``: what every runner offers to trainers, and to those who debug an agent."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from agentlightning.litagent.hooks import Hook
from agentlightning.litagent.litagent import LitAgent
from agentlightning.runner.stopping import StopEvent
from agentlightning.store.base import LightningStore
from agentlightning.types import NamedResources, Rollout, RolloutMode
from agentlightning.types.parallel import ParallelWorkerBase

__all__ = ["Runner"]

T = TypeVar("T")


class Runner(ParallelWorkerBase, Generic[T]):
    """Runs an agent on rollouts.

    Life: ``init``, then in the worker ``init_worker``, ``iter`` or ``step`` as often as wanted, ``teardown_worker``,
    ``teardown``. ``run_context`` does all of that around a block.
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
        """There is no such thing: a runner is driven by ``iter`` or ``step``.

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
        """Set up for this agent and store, and take down at the end of the block; for use without a trainer.

        Args:
            agent: what to run.
            store: where rollouts come from.
            hooks: what to call around each rollout.
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

    @abstractmethod
    async def iter(self, *, event: StopEvent | None = None) -> None:
        """Work on the rollouts of the queue, until told to end.

        Args:
            event: when it is set, what is being worked on is finished and nothing new is begun.
        """

    @abstractmethod
    async def step(
        self,
        input: T,
        *,
        resources: NamedResources | None = None,
        mode: RolloutMode | None = None,
        event: StopEvent | None = None,
    ) -> Rollout:
        """Run the agent once, on this input, past the queue.

        Args:
            input: the task.
            resources: stored first, and used; default: the latest of the store.
            mode: of the rollout.
            event: gives the rollout up when it is set.

        Returns:
            The rollout as it is in the store after.
        """
