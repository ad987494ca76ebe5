"""What an execution strategy is given, and what it does with it."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

from agentlightning.execution.events import ExecutionEvent
from agentlightning.settings import LightningEnvVar, resolve_bool_env_var
from agentlightning.store.base import LightningStore


class AlgorithmBundle(Protocol):
    """The algorithm's side of a run, ready to be called.

    It ends when it is done, soon after ``event`` is set, or when its task is cancelled. One that also has a coroutine
    method ``prepare(store)`` gets the store itself by that first, before anybody else can reach it.
    """

    async def __call__(self, store: LightningStore, event: ExecutionEvent) -> None:
        """Run the algorithm on ``store``."""
        ...


class RunnerBundle(Protocol):
    """The side of one runner, ready to be called; ``worker_id`` counts the runners of this strategy from 0.

    It ends when it is done, soon after ``event`` is set, or when its task is cancelled.
    """

    async def __call__(self, store: LightningStore, worker_id: int, event: ExecutionEvent) -> None:
        """Claim and run rollouts of ``store``."""
        ...


class ExecutionStrategy(ABC):
    """Decides where the algorithm and the runners run, watches them, and stops them."""

    alias: ClassVar[str]
    """Short name, for ``Trainer(strategy=…)``."""

    @abstractmethod
    def execute(self, algorithm: AlgorithmBundle, runner: RunnerBundle, store: LightningStore) -> None:
        """Run both sides, and return when all of it has ended.

        Raises:
            ExecutionFailed: a side failed, or no runner could be kept alive; with the reason and, where a
                process failed, its traceback. What the algorithm raises in this process is raised as it is.
            Interrupted: Ctrl+C. It is a ``KeyboardInterrupt``; a program that lets it pass ends with exit code 130.
        """


def prepare_store(algorithm: AlgorithmBundle, store: LightningStore) -> None:
    """Let the algorithm's side have the store first, if it asks for that. Raises what its ``prepare`` raises."""
    prepare = getattr(algorithm, "prepare", None)
    if prepare is not None:
        asyncio.run(prepare(store))


def resolve_managed_store_flag(value: bool | None) -> bool:
    """Whether a strategy serves the store by itself: ``value``, else ``AGL_MANAGED_STORE``, else true.

    Raises:
        InvalidValue: the variable is neither true nor false. (It is a ``ValueError``, too.)
    """
    return resolve_bool_env_var(LightningEnvVar.AGL_MANAGED_STORE, value, fallback=True)
