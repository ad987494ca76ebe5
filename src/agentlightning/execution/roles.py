"""The two kinds of run of ``ClientServerExecutionStrategy``: with the algorithm here, or with runners only."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from typing import Literal

from agentlightning.errors import AgentLightningError, ExecutionFailed
from agentlightning.execution.base import AlgorithmBundle, RunnerBundle
from agentlightning.execution.child import ProcessJob, Slot
from agentlightning.execution.membership import (
    JoinedServer,
    join_server,
    left_slots,
    may_rejoin,
    unserved_rollouts,
)
from agentlightning.execution.run import (
    AlgorithmJob,
    ClientServerRun,
    RunnerJob,
    RunSettings,
    RunShutdown,
    StoreAddress,
    run_runner,
)
from agentlightning.execution.supervisor import Supervisor
from agentlightning.http.client.client import LightningStoreClient
from agentlightning.settings import LightningEnvVar
from agentlightning.store.base import LightningStore

_log = logging.getLogger(__name__)

_UNSERVED_POLL_SECONDS = 1.0
_UNSERVED_POLLS = 3
"""How often in a row rollouts must be found waiting without a worker before the run fails: a worker on another machine
may just be about to register."""
_ALGORITHM = "algorithm"


class AlgorithmRun(ClientServerRun):
    """A run whose algorithm is on this machine: with runners here too, or only on other machines.

    Args:
        settings: the arguments of the strategy.
        store: what the run works on.
        main: which side runs in this thread; the other side runs in processes of its own.
    """

    def __init__(
        self, settings: RunSettings, store: LightningStore, main: Literal["algorithm", "runner"] = "algorithm"
    ) -> None:
        super().__init__(settings, store)
        self._main_side = main
        self._algorithm_over = threading.Event()
        self._watches: list[asyncio.Task[None]] = []
        self._shutdown: RunShutdown | None = None

    def execute(self, algorithm: AlgorithmBundle, runner: RunnerBundle | None) -> None:
        """Run the algorithm, and the runners if they are here. Raises as ``ExecutionStrategy.execute``.

        Args:
            algorithm: the algorithm's side.
            runner: the runners' side; None: there are no runners on this machine.
        """
        supervisor = None
        if runner is not None:
            job: ProcessJob = RunnerJob(runner, self._unserved)
            if self._main_side == "runner":
                job = AlgorithmJob(algorithm, self._unserved)
            supervisor = Supervisor({self._other_side: job}, self._settings.start_method, self._thread)
        self._shutdown = self._make_shutdown(supervisor)
        if supervisor is not None:
            supervisor.open()
        try:
            with self._signals, self._served(algorithm) as address:
                self._shutdown.store = address.store if self._settings.managed_store else None
                try:
                    self._run_sides(supervisor, address, algorithm, runner)
                    self._shutdown.begin("drain")
                finally:
                    self._event.set()
                    self._shutdown.begin("stop")
                    self._shutdown.finish()
        finally:
            if supervisor is not None:
                supervisor.close()
            self._thread.close()
        self._conclude()

    @property
    def _other_side(self) -> str:
        return "runner" if self._main_side == "algorithm" else _ALGORITHM

    def _run_sides(
        self,
        supervisor: Supervisor | None,
        address: StoreAddress,
        algorithm: AlgorithmBundle,
        runner: RunnerBundle | None,
    ) -> None:
        store, settings = address.store, self._settings
        assert store is not None
        algorithm_is_main = self._main_side == "algorithm"
        if supervisor is not None:
            slots = settings.runner_slots(address)
            if not algorithm_is_main:
                slots = [Slot(_ALGORITHM, _ALGORITHM, address.arguments(), None, None, settings.environment())]
            supervisor.begin(
                slots,
                allowed_exit_codes=settings.allowed_exit_codes,
                store=store if algorithm_is_main else None,
                on_over=lambda reason: self._other_side_over(reason, store),
            )
        if algorithm_is_main or runner is None:
            self._run_main(algorithm(store, self._event))
            return
        name = settings.worker_names[0]
        outside = StoreAddress(url=address.url, api_key=address.api_key, run_id=address.run_id)
        with _worker_name(name):
            self._run_main(run_runner(runner, outside if address.url else address, name, 0, self._event))
        self._wait_for_algorithm(store)

    def _wait_for_algorithm(self, store: LightningStore) -> None:
        """Wait for the end of the algorithm after the runner here has ended; others may work on other machines."""
        if not self._algorithm_over.is_set():
            self._thread.loop.call_soon_threadsafe(self._watch_unserved, store)
        while not self._algorithm_over.wait(0.1):
            if self._signals.number is not None:
                return

    def _other_side_over(self, reason: ExecutionFailed | None, store: LightningStore) -> None:
        """Called in the supervisor's loop when no process of the other side will run any more."""
        if reason is not None:
            self._fail(reason)
        elif self._main_side == "runner":
            self._algorithm_over.set()
            self._event.set()
            self._main.end(delay_seconds=self._settings.graceful_timeout)
            if self._shutdown is not None:
                self._shutdown.begin("drain")
        else:
            self._watch_unserved(store)

    def _fail(self, reason: ExecutionFailed) -> None:
        self._failure = self._failure or reason
        self._interrupted()

    def _interrupted(self) -> None:
        self._algorithm_over.set()
        self._event.set()
        # A runner gets time to finish what it holds. An algorithm is cancelled at once; it decides itself how long it
        # keeps its services up for runners (`ExecutionStrategy.linger_seconds`).
        self._main.end(delay_seconds=self._settings.graceful_timeout if self._main_side == "runner" else 0.0)
        if self._shutdown is not None:
            self._shutdown.begin("stop")

    def _watch_unserved(self, store: LightningStore) -> None:
        self._watches.append(asyncio.get_running_loop().create_task(self._fail_if_unserved(store)))

    async def _fail_if_unserved(self, store: LightningStore) -> None:
        """Fail the run when rollouts wait and no worker is left; the algorithm would wait for them for ever."""
        polls, waiting = 0, 0
        while polls < _UNSERVED_POLLS:
            await asyncio.sleep(_UNSERVED_POLL_SECONDS)
            try:
                waiting = await unserved_rollouts(store)
            except AgentLightningError as error:
                _log.debug("cannot tell whether rollouts wait: %s", error)
                continue
            polls = polls + 1 if waiting else 0
        self._fail(
            ExecutionFailed(
                f"all runners of this run have ended, and {waiting} rollouts wait without a worker; "
                "increase max_rollouts, or leave it out, or use more runners"
            )
        )


@contextmanager
def _worker_name(name: str) -> Generator[None, None, None]:
    """Let a runner in this process find its worker id in the environment, as runners in other processes do."""
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


# --- Only runners ----------------------------------------------------------------------------------------------------

_CHANGE_POLL_SECONDS = 0.1
_REJOIN_POLL_SECONDS = 1.0
"""Between two questions whether workers that have left may come back."""
_NO_SERVER = JoinedServer(run_id=None, instance=None)
"""Stands for a store that this machine has without a server."""

ReasonToWait = Callable[[JoinedServer], Awaitable[str | None]]


class RunnerHostRun(ClientServerRun):
    """A run of which only the runners are on this machine. They wait for a server, and may come back for the next run.

    Args:
        settings: the arguments of the strategy.
        store: used if the store is not served.
    """

    def __init__(self, settings: RunSettings, store: LightningStore) -> None:
        super().__init__(settings, store)
        self._changed = threading.Event()
        self._shutdown: RunShutdown | None = None
        self._server: JoinedServer | None = None
        """The server that the runners work, or worked, for."""
        self._join_was_logged = False
        self._joining: Future[JoinedServer | None] | None = None

    def execute(self, runner: RunnerBundle) -> None:
        """Run the runners. Raises as ``ExecutionStrategy.execute``."""
        job = RunnerJob(runner, self._unserved)
        supervisor = Supervisor({"runner": job}, self._settings.start_method, self._thread)
        self._shutdown = self._make_shutdown(supervisor)
        supervisor.open()
        try:
            with self._signals:
                try:
                    if self._join(self._settings.connect_timeout):
                        with self._reporting_store() as store:
                            self._work_for_runs(supervisor, store)
                    self._signals.conclude()
                finally:
                    self._shutdown.begin("stop")
                    self._shutdown.finish()
        finally:
            supervisor.close()
            self._thread.close()
        self._conclude()

    def _work_for_runs(self, supervisor: Supervisor, store: LightningStore) -> None:
        """Keep the runners at work until the run is over, or for ``stay``, until this process is stopped."""
        settings = self._settings
        slots = settings.runner_slots(StoreAddress(store=self._unserved, url=settings.url, run_id=settings.run_id))
        supervisor.begin(
            slots,
            allowed_exit_codes=settings.allowed_exit_codes,
            store=store,
            on_over=self._all_over,
            on_ready=self._all_ready,
        )
        asked = 0.0
        while not self._stopped():
            self._changed.wait(_CHANGE_POLL_SECONDS)
            self._changed.clear()
            over, left = supervisor.over, left_slots(slots)
            if over and not (settings.stay and left):
                if len(left) == len(slots) and all(slot.result and slot.result.status == "gone" for slot in left):
                    self._failure = ExecutionFailed(f"the server at {settings.url} cannot be reached any more")
                return
            if over:
                supervisor.begin_again(self._wait_to_rejoin(store, slots))
            elif settings.stay and left and time.monotonic() - asked >= _REJOIN_POLL_SECONDS:
                supervisor.begin_again(self._thread.call(may_rejoin(store, left)))
                asked = time.monotonic()

    @contextmanager
    def _reporting_store(self) -> Generator[LightningStore, None, None]:
        """The store by which the supervisor reports that a worker is dead."""
        if self._unserved is not None:
            yield self._unserved
            return
        client = LightningStoreClient(self._settings.url, api_key=self._settings.api_key)
        try:
            yield client
        finally:
            self._thread.call(client.close())

    def _join(self, limit_seconds: float, reason_to_wait: ReasonToWait | None = None) -> bool:
        """Wait for the server, and until there is no reason to wait; False: stopped. Raises as ``join_server``."""
        settings = self._settings
        if self._unserved is not None:
            joining = self._wait_without_server(reason_to_wait)
        else:
            joining = join_server(
                settings.url,
                api_key=settings.api_key,
                run_id=settings.run_id,
                limit_seconds=limit_seconds,
                stopped=self._stopped,
                reason_to_wait=reason_to_wait,
            )
        self._joining = self._thread.begin(joining)
        try:
            joined = self._joining.result()
        except CancelledError:
            return False
        if joined is not None:
            self._join_was_logged = self._join_was_logged and joined == self._server
            self._server = joined
        return joined is not None

    async def _wait_without_server(self, reason_to_wait: ReasonToWait | None) -> JoinedServer | None:
        while not self._stopped():
            if reason_to_wait is None or await reason_to_wait(_NO_SERVER) is None:
                return _NO_SERVER
            await asyncio.sleep(_REJOIN_POLL_SECONDS)
        return None

    def _wait_to_rejoin(self, store: LightningStore, slots: Sequence[Slot]) -> list[str]:
        """Wait for another server, or until this one lets workers come back; return their names, none if stopped.

        A run that ends goes on answering for a while, and would only send its workers away again.
        """
        left, names = left_slots(slots), list[str]()
        reasons = ", ".join(sorted({slot.result.status for slot in left if slot.result is not None}))
        _log.warning("all runners have left (%s); waiting for the next run", reasons)

        async def reason_to_wait(server: JoinedServer) -> str | None:
            names[:] = [slot.name for slot in slots] if server != self._server else await may_rejoin(store, left)
            return None if names else "it has asked these workers to leave, and nobody has resumed them"

        return names if self._join(math.inf, reason_to_wait) else []

    def _stopped(self) -> bool:
        return self._failure is not None or self._signals.number is not None

    def _all_ready(self) -> None:
        if not self._join_was_logged and self._server is not None:
            self._join_was_logged = True
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
        if self._shutdown is not None:
            self._shutdown.begin("stop")
