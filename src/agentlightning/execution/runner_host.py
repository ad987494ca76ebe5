"""Runs of which only the runners are on this machine: they wait for a server, and may come back for the next."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Generator
from contextlib import contextmanager

from agentlightning.errors import ExecutionFailed
from agentlightning.execution.base import RunnerBundle
from agentlightning.execution.jobs import Door, RunnerJob
from agentlightning.execution.joining import join_server
from agentlightning.execution.run import Run, RunSettings, runner_slots
from agentlightning.execution.shutdown import Shutdown
from agentlightning.execution.supervision import Supervision
from agentlightning.store.base import LightningStore
from agentlightning.store.client_server.client.client import LightningStoreClient

__all__ = ["RunnerHostRun"]

_log = logging.getLogger(__name__)


class RunnerHostRun(Run):
    """Runners here, for a server elsewhere."""

    def __init__(self, settings: RunSettings, store: LightningStore) -> None:
        super().__init__(settings, store)
        self._over = threading.Event()
        self._ending: Shutdown | None = None

    def execute(self, runner: RunnerBundle) -> None:
        """Run them. Raises as ``ExecutionStrategy.execute``."""
        unserved = None if self._settings.managed_store else self._store
        supervision = Supervision({"runner": RunnerJob(runner, unserved)}, self._settings.start_method, self._thread)
        self._ending = self._shutdown(supervision)
        supervision.open()
        try:
            with self._interrupts:
                try:
                    self._serve_runs(supervision, unserved)
                    self._interrupts.conclude()
                finally:
                    self._ending.begin("stop")
                    self._ending.finish()
        finally:
            supervision.close()
            self._thread.close()
        self._conclude()

    def _serve_runs(self, supervision: Supervision, unserved: LightningStore | None) -> None:
        door = Door(store=unserved, url=self._settings.url, run_id=self._settings.run_id)
        if not self._join(door, self._settings.connect_timeout):
            return
        with self._teller(unserved) as teller:
            slots = runner_slots(self._settings, door)
            supervision.begin(
                slots,
                allowed_exit_codes=self._settings.allowed_exit_codes,
                store=teller,
                on_over=self._all_over,
            )
            while self._wait():
                reasons = {slot.outcome.word for slot in slots if slot.outcome is not None}
                if not self._settings.stay or not reasons & {"drain", "stop", "gone"}:
                    self._check_gone(reasons)
                    return
                _log.warning("the run is over (%s); waiting for the next one", ", ".join(sorted(reasons)))
                self._over.clear()
                if not self._join(door, math.inf):
                    return
                supervision.begin_again()

    def _join(self, door: Door, limit_seconds: float) -> bool:
        if door.store is not None:
            return True
        settings = self._settings
        return self._thread.call(
            join_server(
                door.url,
                api_key=settings.api_key,
                run_id=door.run_id,
                limit_seconds=limit_seconds,
                stopped=lambda: self._interrupts.number is not None,
            )
        )

    @contextmanager
    def _teller(self, unserved: LightningStore | None) -> Generator[LightningStore, None, None]:
        """Through whom the supervisor tells that a worker is dead."""
        if unserved is not None:
            yield unserved
            return
        client = LightningStoreClient(self._settings.url, api_key=self._settings.api_key)
        try:
            yield client
        finally:
            self._thread.call(client.close())

    def _wait(self) -> bool:
        """Wait until all runners have ended; whether that is how it came."""
        while not self._over.wait(0.1):
            pass
        return self._failure is None and self._interrupts.number is None

    def _check_gone(self, reasons: set[str]) -> None:
        if reasons == {"gone"}:
            self._failure = ExecutionFailed(f"the server at {self._settings.url} cannot be reached any more")

    def _all_over(self, reason: ExecutionFailed | None) -> None:
        self._failure = reason
        self._over.set()

    def _interrupted(self) -> None:
        self._over.set()
        if self._ending is not None:
            self._ending.begin("stop")
