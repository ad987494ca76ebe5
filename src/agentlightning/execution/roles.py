"""Runs whose algorithm is on this machine: with runners here, too, or only elsewhere."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Coroutine, Generator
from contextlib import contextmanager
from typing import Any, Literal

from agentlightning.errors import AgentLightningError, ExecutionFailed
from agentlightning.execution.base import AlgorithmBundle, RunnerBundle
from agentlightning.execution.jobs import AlgorithmJob, Door, RunnerJob, run_runner
from agentlightning.execution.membership import stranded
from agentlightning.execution.run import Run, RunSettings, runner_slots
from agentlightning.execution.supervision import Shutdown, Supervision
from agentlightning.execution.supervisor import Slot
from agentlightning.settings import LightningEnvVar
from agentlightning.store.base import LightningStore

_log = logging.getLogger(__name__)
_STRANDED_LOOK_SECONDS = 1.0
_STRANDED_LOOKS = 3
_ALGORITHM = "algorithm"


class AlgorithmRun(Run):
    """The algorithm here, runners elsewhere."""

    def __init__(self, settings: RunSettings, store: LightningStore) -> None:
        super().__init__(settings, store)
        self._ending = self._shutdown(None)

    def execute(self, algorithm: AlgorithmBundle) -> None:
        """Run it. Raises as ``ExecutionStrategy.execute``."""
        try:
            with self._interrupts, self._served(algorithm) as door:
                assert door.store is not None
                self._ending.store = door.store if self._settings.managed_store else None
                try:
                    self._run_main(algorithm(door.store, self._event))
                    self._ending.begin("drain")
                finally:
                    self._event.set()
                    self._ending.begin("stop")
                    self._ending.finish()
        finally:
            self._thread.close()
        self._conclude()

    def _interrupted(self) -> None:
        self._event.set()
        self._main.end()
        self._ending.begin("stop")


class SplitRun(Run):
    """Both sides on this machine: one in this process, the other in processes of its own.

    Args:
        main: the side in this process.
    """

    def __init__(self, settings: RunSettings, store: LightningStore, main: Literal["algorithm", "runner"]) -> None:
        super().__init__(settings, store)
        self._main_side = main
        self._over = threading.Event()
        self._watches: list[asyncio.Task[None]] = []
        self._ending: Shutdown | None = None

    def execute(self, algorithm: AlgorithmBundle, runner: RunnerBundle) -> None:
        """Run them. Raises as ``ExecutionStrategy.execute``."""
        unserved = None if self._settings.managed_store else self._store
        if self._main_side == "algorithm":
            supervision = Supervision(
                {"runner": RunnerJob(runner, unserved)}, self._settings.start_method, self._thread
            )
        else:
            supervision = Supervision(
                {_ALGORITHM: AlgorithmJob(algorithm, unserved)}, self._settings.start_method, self._thread
            )
        self._ending = self._shutdown(supervision)
        supervision.open()
        try:
            with self._interrupts, self._served(algorithm) as door:
                assert door.store is not None
                self._ending.store = door.store if self._settings.managed_store else None
                try:
                    self._run_both(supervision, door, algorithm, runner)
                    self._ending.begin("drain")
                finally:
                    self._event.set()
                    self._ending.begin("stop")
                    self._ending.finish()
        finally:
            supervision.close()
            self._thread.close()
        self._conclude()

    def _run_both(self, supervision: Supervision, door: Door, algorithm: AlgorithmBundle, runner: RunnerBundle) -> None:
        assert door.store is not None
        supervision.begin(
            self._slots(door),
            allowed_exit_codes=self._settings.allowed_exit_codes,
            store=door.store if self._main_side == "algorithm" else None,
            on_over=lambda reason: self._others_over(reason, door.store),
        )
        if self._main_side == "algorithm":
            self._run_main(algorithm(door.store, self._event))
            return
        name = self._settings.worker_names[0]
        outside = Door(url=door.url, api_key=door.api_key, run_id=door.run_id) if door.url else door
        with _worker_name(name):
            self._run_main(_without_result(run_runner(runner, outside, name, 0, self._event)))
        self._wait_for_algorithm(door.store)

    def _slots(self, door: Door) -> list[Slot]:
        settings = self._settings
        if self._main_side == "runner":
            return [Slot(_ALGORITHM, _ALGORITHM, door.arguments(), None, None, settings.environment())]
        return runner_slots(settings, door)

    def _wait_for_algorithm(self, store: LightningStore | None) -> None:
        """The runner here has done its share; others may be at work elsewhere."""
        if not self._over.is_set() and store is not None:
            self._thread.loop.call_soon_threadsafe(self._watch_stranded, store)
        while not self._over.wait(0.1):
            if self._interrupts.number is not None:
                return

    def _others_over(self, reason: ExecutionFailed | None, store: LightningStore | None) -> None:
        """No process of the other side will run any more. Called in the supervisor's loop."""
        if reason is not None:
            self._fail(reason)
        elif self._main_side == "runner":  # the algorithm is done
            self._over.set()
            self._event.set()
            self._main.end(patience=self._settings.graceful_timeout)
            if self._ending is not None:
                self._ending.begin("drain")
        elif store is not None:  # all runners have done their share; there may be others elsewhere
            self._watch_stranded(store)

    def _fail(self, reason: ExecutionFailed) -> None:
        self._failure = self._failure or reason
        self._end_now()

    def _interrupted(self) -> None:
        self._end_now()

    def _end_now(self) -> None:
        self._over.set()
        self._event.set()
        self._main.end(patience=self._settings.graceful_timeout if self._main_side == "runner" else 0.0)
        if self._ending is not None:
            self._ending.begin("stop")

    def _watch_stranded(self, store: LightningStore) -> None:
        self._watches.append(asyncio.get_running_loop().create_task(self._fail_if_stranded(store)))

    async def _fail_if_stranded(self, store: LightningStore) -> None:
        """An algorithm that waits for rollouts which nobody will run would wait for ever."""
        looks, waiting = 0, 0
        while looks < _STRANDED_LOOKS:
            await asyncio.sleep(_STRANDED_LOOK_SECONDS)
            try:
                waiting = await stranded(store)
            except AgentLightningError as error:
                _log.debug("cannot tell whether rollouts wait: %s", error)
                continue
            looks = looks + 1 if waiting else 0
        self._fail(
            ExecutionFailed(
                f"all runners of this run have come to their end, and {waiting} rollouts wait that no worker is there "
                "to run; give max_rollouts more, or none, or more runners"
            )
        )


@contextmanager
def _worker_name(name: str) -> Generator[None, None, None]:
    """A runner in this process takes its name from the environment, as those in others do."""
    variable = LightningEnvVar.AGL_WORKER_NAME.value
    before = os.environ.get(variable)
    os.environ[variable] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


async def _without_result(work: Coroutine[Any, Any, object]) -> None:
    await work
