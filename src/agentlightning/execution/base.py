"""What an execution strategy is given, what it promises, and the stop event by which both sides of a run end."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from abc import ABC, abstractmethod
from multiprocessing import synchronize
from multiprocessing.context import BaseContext
from typing import ClassVar, Protocol

from agentlightning.runner.base import StopEvent
from agentlightning.security.tls import Serving
from agentlightning.settings import LightningEnvVar, resolve_bool_env_var
from agentlightning.store.base import LightningStore


class ExecutionEvent(StopEvent, Protocol):
    """A flag that one side sets and the other sees."""

    def set(self) -> None:
        """Set the flag; idempotent."""
        ...

    def clear(self) -> None:
        """Clear the flag."""
        ...


class ThreadingEvent(threading.Event):
    """A flag for the threads of one process."""


class MultiprocessingEvent(synchronize.Event):
    """A flag for processes that ``multiprocessing`` starts; it is passed to them at their start.

    Args:
        ctx: the context that starts the processes; None: the default one.
    """

    def __init__(self, *, ctx: BaseContext | None = None) -> None:
        super().__init__(ctx=ctx or multiprocessing.get_context())


LINGER_SHARE = 0.8
"""The share of a strategy's graceful time that an algorithm may linger; the rest is for its own end."""


class AlgorithmBundle(Protocol):
    """The algorithm's side of a run, ready to be called.

    It ends when it is done, soon after ``event`` is set, or when its task is cancelled. If it also has a coroutine
    method ``prepare(store)``, that is called first, before any runner can reach the store. If it has a method
    ``why_no_guests()``, that is asked why runners on other machines cannot work for it; None: they can.
    """

    async def __call__(self, store: LightningStore, event: ExecutionEvent) -> None:
        """Run the algorithm on ``store``."""
        ...


class RunnerBundle(Protocol):
    """The side of one runner, ready to be called; ``worker_id`` counts the runners of this strategy from 0.

    It ends when it is done, soon after ``event`` is set, or when its task is cancelled. If it also has a method
    ``wants_main_thread(worker_id)``, that is called first in a process of its own; where it is true, the coroutine runs
    in another thread, so that the main thread is free for agents (``Runner.wants_main_thread``).
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
        """Run both sides, and return when everything has ended.

        Raises:
            ExecutionFailed: a side failed, or no runner could be kept alive; with the reason and, where a
                process failed, its traceback. What the algorithm raises in this process is raised as it is.
            Interrupted: Ctrl+C. It is a ``KeyboardInterrupt``; a program that lets it pass ends with exit code 130.
        """

    def linger_seconds(self) -> float:
        """How long an algorithm that was stopped may keep its services up for runners that finish what they hold.

        It must be less than the time after which the strategy stops the algorithm by force. Default: 0.
        """
        return 0.0

    def serving(self) -> Serving | None:
        """Where the store is served, for services that the runners have to reach, too. Default: None, nowhere."""
        return None


def prepare_store(algorithm: AlgorithmBundle, store: LightningStore) -> None:
    """Call ``prepare`` of the algorithm's side, if it has one. Raises what that raises."""
    prepare = getattr(algorithm, "prepare", None)
    if prepare is not None:
        asyncio.run(prepare(store))


async def cancel_all_tasks() -> None:
    """Cancel all other tasks of this loop and wait for them, then finish its generators."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()


def resolve_managed_store_flag(value: bool | None) -> bool:
    """Whether a strategy serves the store by itself: ``value``, else ``AGL_MANAGED_STORE``, else true.

    Raises:
        InvalidValue: the variable is neither true nor false. (It is a ``ValueError``, too.)
    """
    return resolve_bool_env_var(LightningEnvVar.AGL_MANAGED_STORE, value, fallback=True)
