"""The two kinds of run of ``ClientServerExecutionStrategy``: with the algorithm here, or with runners only.

The order of a run matters. The launcher comes first, while this process has as few threads as possible; then the
server, so that its port is known; then the processes. At the end, workers on other machines are asked to leave while
the processes here are stopped. The server stops last, because workers that leave have results to report.

The main thread runs one side of the run, or waits. A thread of its own has the loop in which everything else happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import secrets
from collections.abc import Awaitable, Callable, Collection, Coroutine, Generator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from typing import Any

from agentlightning.errors import AgentLightningError, ExecutionFailed
from agentlightning.execution.abort import SignalHandlers, abort_stages
from agentlightning.execution.base import AlgorithmBundle, RunnerBundle, ThreadingEvent, prepare_store
from agentlightning.execution.membership import (
    JoinedServer,
    ask_workers_to_leave,
    failure_when_unserved,
    join_server,
    may_rejoin,
    unserved_rollouts,
)
from agentlightning.execution.run import (
    LoopThread,
    RunSettings,
    ServerAccess,
    SideJob,
    remote_server,
    runner_slots,
    start_of,
    worker_names,
)
from agentlightning.execution.slots import Slot
from agentlightning.execution.store_server import served_store
from agentlightning.execution.supervisor import Supervisor
from agentlightning.store.base import LightningStore
from agentlightning.types import WorkerDirective

_log = logging.getLogger(__name__)

_ALGORITHM = "algorithm"


class ClientServerRun:
    """One call of ``ClientServerExecutionStrategy.execute``."""

    def __init__(self, settings: RunSettings, store: LightningStore) -> None:
        self._settings = settings
        self._store = store
        self._unserved = None if settings.managed_store else store
        self._thread = LoopThread("agl-supervisor")
        self._signals = SignalHandlers(self._interrupted)
        self._supervisor: Supervisor | None = None
        self._failure: ExecutionFailed | None = None
        self._ending: asyncio.Task[None] | None = None
        self._guests: LightningStore | None = None
        """By which workers on other machines learn of the end; None: there are none."""

    def _interrupted(self) -> None:
        """Called in the main thread at the first signal."""
        raise NotImplementedError

    @contextmanager
    def _running(self, side: str, job: SideJob | None) -> Generator[None, None, None]:
        """Be ready to handle signals and, for the side that has a job, to start processes.

        At the end it raises why the run ended early, if it did.
        """
        if job is not None:
            self._supervisor = Supervisor(side, job, self._settings.start_method)
        self._thread.start()
        try:
            with self._signals:
                yield
        finally:
            self._thread.close()
            if self._supervisor is not None:
                self._supervisor.close()
        self._signals.check()
        if self._failure is not None:
            raise self._failure

    async def _end(self, directive: WorkerDirective) -> None:
        """End the processes here in four stages, and meanwhile ask workers on other machines to leave.

        Returns when that is over. Only the directive of the first call counts: ``drain`` lets workers elsewhere finish
        what they hold, ``stop`` does not.
        """
        if self._ending is None:
            self._ending = asyncio.create_task(self._end_processes(directive))
        await asyncio.shield(self._ending)

    async def _end_processes(self, directive: WorkerDirective) -> None:
        graceful, terminate = self._settings.graceful_timeout, self._settings.terminate_timeout
        leaving = asyncio.create_task(self._send_away(directive, graceful))
        ended: Collection[str] = ()
        if self._supervisor is not None:
            await self._supervisor.abort(abort_stages(graceful, terminate), self._signals.is_hurried)
            if self._guests is not None:  # the store is here; where it is elsewhere it may be gone
                ended = await self._supervisor.report_ended()
        left = [each for each in await leaving if each not in ended]
        if left and directive == "drain":
            left = await self._send_away("stop", terminate)
        if left:
            _log.warning("these workers have not left: %s; they will find the server gone", ", ".join(sorted(left)))

    async def _send_away(self, directive: WorkerDirective, seconds: float) -> list[str]:
        """Ask workers on other machines to leave; return who has not. In a hurry nobody is waited for."""
        if self._guests is None or self._signals.is_hurried():
            return []
        asking = asyncio.create_task(ask_workers_to_leave(self._guests, directive, seconds))
        try:
            while not asking.done() and not self._signals.is_hurried():
                await asyncio.wait([asking], timeout=0.05)
            return asking.result() if asking.done() else []
        except (AgentLightningError, NotImplementedError, TimeoutError) as error:
            why = str(error) or "the store did not answer in time"
            _log.warning("workers on other machines could not be asked to leave: %s", why)
            return []
        finally:
            asking.cancel()


# --- With the algorithm ----------------------------------------------------------------------------------------------


class AlgorithmRun(ClientServerRun):
    """A run whose algorithm is on this machine: with runners here too, or only on other machines.

    One side runs in the main thread; the other one, if it is here, in processes of its own.
    """

    def __init__(self, settings: RunSettings, store: LightningStore) -> None:
        super().__init__(settings, store)
        self._event = ThreadingEvent()
        self._main_task: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None
        self._main_end_requested = False
        self._pressing: asyncio.Task[Any] | None = None
        self._algorithm_over = asyncio.Event()

    def execute(self, algorithm: AlgorithmBundle, runner: RunnerBundle) -> None:
        """Run both sides, or the algorithm alone. Raises as ``ExecutionStrategy.execute``."""
        settings = self._settings
        runner_job = SideJob(runner, self._unserved)
        runner_is_main = settings.main_process == "runner"
        job = SideJob(algorithm, self._unserved) if runner_is_main else runner_job
        side = "algorithm" if runner_is_main else "runner"
        with self._running(side, job if settings.role == "both" else None), self._served(algorithm) as served:
            store, server, run_id = served
            try:
                if runner_is_main:
                    self._run_here(runner_job, store, server, run_id)
                else:
                    if self._supervisor is not None:
                        self._begin(runner_slots(settings, server, run_id), store)
                    self._run_main(algorithm(store, self._event))
                self._thread.begin(self._end("drain"))
            finally:
                self._event.set()
                self._thread.call(self._end("stop"))

    @contextmanager
    def _served(
        self, algorithm: AlgorithmBundle
    ) -> Generator[tuple[LightningStore, ServerAccess, str | None], None, None]:
        """The store, how processes reach it, and the id of the run, for the length of the block; the algorithm's side
        gets it first."""
        settings = self._settings
        prepare_store(algorithm, self._store)
        if self._unserved is not None:
            yield self._store, ServerAccess(""), None
            return
        run_id = settings.run_id or f"run-{secrets.token_hex(6)}"
        find_reason: Callable[[], str | None] = getattr(algorithm, "why_no_guests", lambda: None)
        with served_store(settings, self._store, run_id, find_reason(), self._note_refused_guest) as (server, access):
            self._guests = server
            yield server, access, run_id

    def _begin(self, slots: list[Slot], store: LightningStore) -> None:
        """Start the processes of the other side."""
        assert self._supervisor is not None
        told = None if self._settings.main_process == "runner" else store
        codes = self._settings.allowed_exit_codes
        self._thread.call(self._supervisor.begin(slots, allowed_exit_codes=codes, store=told))
        self._thread.begin(self._watch_processes(self._supervisor, store))

    def _run_here(self, job: SideJob, store: LightningStore, server: ServerAccess, run_id: str | None) -> None:
        """Run the one runner in this thread, and the algorithm in a process of its own."""
        settings = self._settings
        self._begin([Slot(start_of(settings, _ALGORITHM, server, run_id, None), None)], store)
        start = start_of(settings, worker_names(1)[0], server, run_id, 0)
        with _environment(start.environment):
            self._run_main(job.run(start.slot, self._event, server=server, run_id=run_id, index=0))
        if not self._algorithm_over.is_set():  # runners may work on other machines
            self._thread.begin(self._fail_when_unserved(store))
            self._thread.call(self._algorithm_over.wait())

    # --- The side in the main thread ---------------------------------------------------------------------------------

    def _run_main(self, work: Coroutine[Any, Any, object]) -> None:
        """Run one side in this thread. How it ends does not matter if it was asked to, or if the run has failed."""

        async def run() -> None:
            task = asyncio.current_task()
            assert task is not None
            self._main_task = asyncio.get_running_loop(), task
            if not self._main_end_requested:
                await work

        try:
            try:
                asyncio.run(run())
            finally:
                self._main_task = None
                self._thread.call(self._stop_pressing())  # an interrupt that is under way arrives in here
        except BaseException as error:
            ended = self._main_end_requested and isinstance(error, (asyncio.CancelledError, KeyboardInterrupt))
            if not ended and self._signals.number is None and self._failure is None:
                raise
            _log.debug("the side of the run in this process ended with %r", error)
        finally:
            work.close()

    def _end_main(self, delay_seconds: float) -> None:
        """Ask the side in the main thread to end, after so many seconds, in which it may end by itself."""
        if not self._main_end_requested:
            self._main_end_requested = True
            self._thread.begin(self._press_main(delay_seconds))

    async def _press_main(self, delay_seconds: float) -> None:
        """Cancel the side in the main thread, then interrupt that thread, until it ends."""
        self._pressing = asyncio.current_task()
        await asyncio.sleep(delay_seconds)
        if (running := self._main_task) is not None:
            with contextlib.suppress(RuntimeError):  # it has just ended
                running[0].call_soon_threadsafe(running[1].cancel)
        seconds = max(self._settings.graceful_timeout, 0.1)
        while True:
            await asyncio.sleep(seconds)
            if self._main_task is None:
                return
            _log.warning("what runs in the main thread does not end within %g s; interrupting it", seconds)
            self._signals.interrupt_main_thread()

    async def _stop_pressing(self) -> None:
        """Interrupt the main thread no more."""
        if self._pressing is not None:
            self._pressing.cancel()

    # --- What ends the run early -------------------------------------------------------------------------------------

    def _interrupted(self) -> None:
        """Any thread may call."""
        self._event.set()
        # A runner gets time to finish what it holds. An algorithm is cancelled at once; it decides itself how long it
        # keeps its services up for runners (`ExecutionStrategy.linger_seconds`).
        self._end_main(self._settings.graceful_timeout if self._settings.main_process == "runner" else 0.0)
        self._thread.loop.call_soon_threadsafe(self._algorithm_over.set)
        self._thread.begin(self._end("stop"))

    def _fail(self, reason: ExecutionFailed) -> None:
        self._failure = self._failure or reason
        self._interrupted()

    async def _watch_processes(self, supervisor: Supervisor, store: LightningStore) -> None:
        """Wait until no process of the other side will run any more."""
        await supervisor.over.wait()
        if supervisor.failure is not None:
            self._fail(supervisor.failure)
        elif self._settings.main_process == "runner":
            self._event.set()
            self._end_main(self._settings.graceful_timeout)
            self._algorithm_over.set()
            await self._end("drain")
        else:
            await self._fail_when_unserved(store)

    async def _fail_when_unserved(self, store: LightningStore) -> None:
        """Fail the run when rollouts wait and no worker is left; the algorithm would wait for them for ever."""
        self._fail(await failure_when_unserved(lambda: unserved_rollouts(store)))

    def _note_refused_guest(self, why: str) -> None:
        """End the run if it has no other worker: the one that came is refused. Any thread may call."""
        if self._settings.role == "algorithm":
            self._thread.begin(self._fail_without_workers(why))

    async def _fail_without_workers(self, why: str) -> None:
        if not (await self._store.query_workers(status_in=["idle", "busy"], limit=1)).items:
            self._fail(ExecutionFailed(f"runners on other machines cannot work for this run: {why}"))


@contextmanager
def _environment(variables: Mapping[str, str]) -> Generator[None, None, None]:
    """Let a runner in this process find its worker id in the environment, as in other processes."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# --- Only runners ----------------------------------------------------------------------------------------------------

_REJOIN_POLL_SECONDS = 1.0
"""Between two questions whether workers that have left may come back."""
_NO_SERVER = JoinedServer(run_id=None, instance=None)
"""Stands for a store that this machine has without a server."""

ReasonToWait = Callable[[JoinedServer], Awaitable[str | None]]


class RunnerHostRun(ClientServerRun):
    """A run of which only the runners are on this machine. They wait for a server, and may stay for the next run."""

    _server: JoinedServer | None = None
    """The server that the runners work, or worked, for."""
    _join_was_logged = False
    _work: Future[None] | None = None

    def __init__(self, settings: RunSettings, store: LightningStore) -> None:
        super().__init__(settings, store)
        self._access = remote_server(settings)

    def execute(self, runner: RunnerBundle) -> None:
        """Run the runners. Raises as ``ExecutionStrategy.execute``."""
        with self._running("runner", SideJob(runner, self._unserved, is_guest=self._unserved is None)):
            try:
                self._work = self._thread.begin(self._host())
                if self._signals.number is not None:  # it came before
                    self._work.cancel()
                with contextlib.suppress(CancelledError):
                    self._thread.wait(self._work)
                self._signals.conclude()
            finally:
                self._thread.call(self._end("stop"))

    def _interrupted(self) -> None:
        if self._work is not None:
            self._work.cancel()

    async def _host(self) -> None:
        await self._join(self._settings.connect_timeout)
        if self._unserved is not None:
            await self._work_for_runs(self._unserved)
            return
        async with self._access.client() as store:
            await self._work_for_runs(store)

    async def _work_for_runs(self, store: LightningStore) -> None:
        """Keep the runners at work until the run is over, or for ``stay``, until this process is stopped."""
        settings, supervisor = self._settings, self._supervisor
        assert supervisor is not None
        slots = runner_slots(settings, self._access, settings.run_id)
        codes = settings.allowed_exit_codes
        await supervisor.begin(slots, allowed_exit_codes=codes, store=store, on_ready=self._all_ready)
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REJOIN_POLL_SECONDS if settings.stay else None):
                    await supervisor.over.wait()
            left = [slot for slot in slots if slot.has_left]
            if supervisor.over.is_set() and not (settings.stay and left and supervisor.failure is None):
                if len(left) == len(slots) and all(slot.result and slot.result.status == "gone" for slot in left):
                    self._failure = ExecutionFailed(f"the server at {self._access.url} cannot be reached any more")
                self._failure = supervisor.failure or self._failure
                return
            if supervisor.over.is_set():
                supervisor.begin_again(await self._wait_to_rejoin(store, slots))
            elif left:
                supervisor.begin_again(await may_rejoin(store, left))

    async def _join(self, limit_seconds: float, reason_to_wait: ReasonToWait | None = None) -> None:
        """Wait for the server, and until there is no reason to wait. Raises as ``join_server``."""
        settings = self._settings
        joined = _NO_SERVER
        if self._unserved is None:
            joined = await join_server(
                self._access.url,
                self._access.credentials,
                run_id=settings.run_id,
                limit_seconds=limit_seconds,
                reason_to_wait=reason_to_wait,
            )
        else:
            while reason_to_wait is not None and await reason_to_wait(_NO_SERVER) is not None:  # noqa: ASYNC110
                await asyncio.sleep(_REJOIN_POLL_SECONDS)
        self._join_was_logged = self._join_was_logged and joined == self._server
        self._server = joined

    async def _wait_to_rejoin(self, store: LightningStore, slots: Sequence[Slot]) -> list[str]:
        """Wait for another server, or until this one lets workers come back; return their names.

        A run that ends goes on answering for a while, and would only send its workers away again.
        """
        left, names = [slot for slot in slots if slot.has_left], list[str]()
        reasons = ", ".join(sorted({slot.result.status for slot in left if slot.result is not None}))
        _log.warning("all runners have left (%s); waiting for the next run", reasons)

        async def reason_to_wait(server: JoinedServer) -> str | None:
            names[:] = [slot.name for slot in slots] if server != self._server else await may_rejoin(store, left)
            return None if names else "it has asked these workers to leave, and nobody has resumed them"

        await self._join(math.inf, reason_to_wait)
        return names

    def _all_ready(self) -> None:
        if not self._join_was_logged and self._server is not None:
            self._join_was_logged = True
            what = f"run {self._server.run_id}" if self._server.run_id else "the store"
            where = "" if self._unserved is not None else f" at {self._access.url}"
            _log.info("joined %s%s; runners ready: %d", what, where, self._settings.n_runners)
