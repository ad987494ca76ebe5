"""Runs of which only the runners are on this machine: they wait for a server, and may come back for the next."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager

from agentlightning.errors import ExecutionFailed
from agentlightning.execution.base import RunnerBundle
from agentlightning.execution.jobs import Door, RunnerJob
from agentlightning.execution.membership import Joined, anybody_may, away, join_server, welcome
from agentlightning.execution.run import Run, RunSettings, runner_slots
from agentlightning.execution.supervision import Shutdown, Supervision
from agentlightning.execution.supervisor import Slot
from agentlightning.http.client.client import LightningStoreClient
from agentlightning.store.base import LightningStore

_log = logging.getLogger(__name__)
_LOOK_SECONDS = 0.1
_ASK_SECONDS = 1.0
"""Between two questions whether workers that have left may come back."""
_UNSERVED = Joined(run_id=None, instance=None)
"""Stands for a store that this machine has without a server."""


class RunnerHostRun(Run):
    """Runners here, for a server elsewhere."""

    def __init__(self, settings: RunSettings, store: LightningStore) -> None:
        super().__init__(settings, store)
        self._unserved = None if settings.managed_store else store
        self._changed = threading.Event()
        self._ending: Shutdown | None = None
        self._server: Joined | None = None
        """The one that the runners are, or were, at work for."""
        self._told = False
        self._joining: Future[Joined | None] | None = None

    def execute(self, runner: RunnerBundle) -> None:
        """Run them. Raises as ``ExecutionStrategy.execute``."""
        job = RunnerJob(runner, self._unserved)
        supervision = Supervision({"runner": job}, self._settings.start_method, self._thread)
        self._ending = self._shutdown(supervision)
        supervision.open()
        try:
            with self._interrupts:
                try:
                    if self._join(self._settings.connect_timeout):
                        with self._teller() as teller:
                            self._serve_runs(supervision, teller)
                    self._interrupts.conclude()
                finally:
                    self._ending.begin("stop")
                    self._ending.finish()
        finally:
            supervision.close()
            self._thread.close()
        self._conclude()

    def _serve_runs(self, supervision: Supervision, teller: LightningStore) -> None:
        settings = self._settings
        slots = runner_slots(settings, Door(store=self._unserved, url=settings.url, run_id=settings.run_id))
        supervision.begin(
            slots,
            allowed_exit_codes=settings.allowed_exit_codes,
            store=teller,
            on_over=self._all_over,
            on_ready=self._all_ready,
        )
        asked = 0.0
        while not self._stopped():
            self._changed.wait(_LOOK_SECONDS)
            self._changed.clear()
            over, left = supervision.over, away(slots)
            if over and not (settings.stay and left):
                self._check_gone(left, slots)
                return
            if over:
                supervision.begin_again(self._wait_to_return(teller, slots))
            elif settings.stay and left and time.monotonic() - asked >= _ASK_SECONDS:
                supervision.begin_again(self._thread.call(welcome(teller, left)))
                asked = time.monotonic()

    @contextmanager
    def _teller(self) -> Generator[LightningStore, None, None]:
        """Through whom the supervisor tells that a worker is dead."""
        if self._unserved is not None:
            yield self._unserved
            return
        client = LightningStoreClient(self._settings.url, api_key=self._settings.api_key)
        try:
            yield client
        finally:
            self._thread.call(client.close())

    # --- Joining, and coming back ----------------------------------------------------------------

    def _join(self, limit_seconds: float, held_back: Callable[[Joined], Awaitable[str | None]] = anybody_may) -> bool:
        """Wait for the server, and for leave to join it; False: interrupted. Raises as ``join_server``."""
        settings = self._settings
        if self._unserved is not None:
            joining = self._wait_for_leave(held_back)
        else:
            joining = join_server(
                settings.url,
                api_key=settings.api_key,
                run_id=settings.run_id,
                limit_seconds=limit_seconds,
                stopped=self._stopped,
                held_back=held_back,
            )
        self._joining = self._thread.begin(joining)
        try:
            joined = self._joining.result()
        except CancelledError:
            return False
        if joined is not None:
            self._told = self._told and joined == self._server
            self._server = joined
        return joined is not None

    async def _wait_for_leave(self, held_back: Callable[[Joined], Awaitable[str | None]]) -> Joined | None:
        while not self._stopped():
            if await held_back(_UNSERVED) is None:
                return _UNSERVED
            await asyncio.sleep(_ASK_SECONDS)
        return None

    def _wait_to_return(self, teller: LightningStore, slots: Sequence[Slot]) -> list[str]:
        """Wait for another server, or for leave to work on for this one: whom to start then; none: interrupted.

        A run that comes to its end goes on answering for a while, and would only send its workers away again.
        """
        left, names = away(slots), list[str]()
        reasons = ", ".join(sorted({slot.outcome.word for slot in left if slot.outcome is not None}))
        _log.warning("all runners have left (%s); waiting for the next run", reasons)

        async def held_back(server: Joined) -> str | None:
            names[:] = [slot.name for slot in slots] if server != self._server else await welcome(teller, left)
            return None if names else "it has asked these workers to leave, and nobody has resumed them"

        return names if self._join(math.inf, held_back) else []

    # --- What happens meanwhile ------------------------------------------------------------------

    def _stopped(self) -> bool:
        return self._failure is not None or self._interrupts.number is not None

    def _check_gone(self, left: Sequence[Slot], slots: Sequence[Slot]) -> None:
        if len(left) == len(slots) and {slot.outcome.word for slot in left if slot.outcome is not None} == {"gone"}:
            self._failure = ExecutionFailed(f"the server at {self._settings.url} cannot be reached any more")

    def _all_ready(self) -> None:
        if not self._told and self._server is not None:
            self._told = True
            what = f"run {self._server.run_id}" if self._server.run_id else "the store"
            where = "" if self._unserved is not None else f" at {self._settings.url}"
            _log.info("joined %s%s; runners ready: %d", what, where, len(self._settings.worker_names))

    def _all_over(self, reason: ExecutionFailed | None) -> None:
        self._failure = reason
        self._changed.set()

    def _interrupted(self) -> None:
        self._changed.set()
        if self._joining is not None:
            self._joining.cancel()
        if self._ending is not None:
            self._ending.begin("stop")
