"""The supervisor: starts the processes of a run, replaces those that crash, and stops them.

A run has slots, each of which one process after another fills (``agentlightning.execution.child.Slot``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from agentlightning.errors import AgentLightningError, ExecutionFailed, NotFound
from agentlightning.execution.abort import AbortStage, ProcessEnd, abort, log_ends
from agentlightning.execution.child import (
    Crash,
    ProcessExited,
    ProcessJob,
    ProcessReady,
    ProcessResult,
    ProcessStarted,
    SetStopEvent,
    Slot,
)
from agentlightning.execution.launcher import Launcher, open_launcher
from agentlightning.execution.process_tree import MARK, Cgroup, ProcessTree, make_cgroup, send_signal
from agentlightning.execution.shipping import StartMethod, choose_start_method
from agentlightning.store.base import LightningStore
from agentlightning.types import WorkerDirective

_log = logging.getLogger(__name__)

_T = TypeVar("_T")


class LoopThread:
    """An event loop in a thread of its own, from the first use to ``close``.

    The supervisor and calls of the store run there, because the main thread runs one side of the run, which may block.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop. It is started only now, because a thread that exists earlier forbids to fork the launcher."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name=self._name, daemon=True)
            self._thread.start()
        return self._loop

    def begin(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Start a coroutine in the loop; other threads get its result from the future."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def call(self, work: Coroutine[Any, Any, _T], seconds: float | None = None) -> _T:
        """Run a coroutine in the loop and wait for it. Raises what it raises, and ``TimeoutError``."""
        future = self.begin(work)
        try:
            return future.result(seconds)
        except BaseException:  # also an interrupt of this thread: the coroutine must not run on
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what runs, and end the thread. Idempotent."""
        loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return
        self._loop = self._thread = None
        asyncio.run_coroutine_threadsafe(cancel_all_tasks(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def cancel_all_tasks() -> None:
    """Cancel all other tasks of this loop and wait for them, then finish its generators and worker threads."""
    loop = asyncio.get_running_loop()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()


# --- The supervisor --------------------------------------------------------------------------------------------------

_REPORT_SECONDS = 10.0
"""How long a restart waits for the store to record the loss of the worker; after that, its lease has to expire."""
_LAST_REPORT_SECONDS = 1.0
"""The same, when everything is being stopped."""
_START_SECONDS = 5.0
_COLLECT_SECONDS = 2.0


class Supervisor:
    """Keeps the slots of a run filled.

    It works in the loop of ``thread``. Its public methods are called from other threads and block: ``open`` starts the
    launcher, which must happen before this process has threads if the launcher is to be forked; ``begin`` starts the
    processes; ``abort`` stops them; ``close`` ends the launcher and everything that is left.

    Args:
        jobs: what processes do, by name.
        start_method: how they are started; None: ``fork`` from a process with one thread, else ``forkserver``.
        thread: where the supervisor works. It outlives the supervisor.
    """

    def __init__(self, jobs: Mapping[str, ProcessJob], start_method: StartMethod | None, thread: LoopThread) -> None:
        self._jobs = jobs
        self._start_method: StartMethod | None = start_method
        self._thread = thread
        self._launcher: Launcher | None = None
        self._tree: ProcessTree | None = None
        self._cgroup: Cgroup | None = None
        self._slots: dict[str, Slot] = {}
        self._allowed_exit_codes = frozenset[int]()
        self._store: LightningStore | None = None
        self._on_over: Callable[[ExecutionFailed | None], None] = lambda _: None
        self._on_ready: Callable[[], None] = lambda: None
        self._stop_requested = asyncio.Event()
        self._recoveries: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._names: dict[int, str] = {}
        """Which slot each process fills or filled, by number."""
        self.over = False
        """Whether no slot will be filled any more, unless ``begin_again`` is called."""

    def open(self) -> None:
        """Start the launcher.

        Raises:
            InvalidValue: a job cannot be sent to another process; the message names it and the alternatives.
        """
        method = choose_start_method(self._start_method, self._jobs)
        mark = secrets.token_hex(8)
        self._cgroup = make_cgroup(f"agl-{mark}")
        try:
            self._launcher = open_launcher(self._jobs, method, mark, self._cgroup)
        except BaseException:
            if self._cgroup is not None:
                self._cgroup.remove()
            raise
        self._tree = ProcessTree(mark, self._launcher.pid, self._cgroup)
        self._environment = {MARK: mark}

    def begin(
        self,
        slots: Sequence[Slot],
        *,
        allowed_exit_codes: frozenset[int],
        store: LightningStore | None,
        on_over: Callable[[ExecutionFailed | None], None],
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        """Start a process in every slot, and watch them from now on.

        Args:
            slots: the slots of the run.
            allowed_exit_codes: codes that are not a crash.
            store: is told which workers are dead; None: nobody needs to know.
            on_over: called once when no slot will be filled any more and no abort has begun: with the reason of the
                failure, or None if all processes have ended as they should.
            on_ready: called when a process has begun with its job and so has one in every other slot.
        """
        for number, slot in enumerate(slots):
            slot.environment = {**slot.environment, **self._environment}
            slot.cgroup = None if self._cgroup is None else self._cgroup.child(f"{slot.job}-{number}")
        self._slots = {slot.name: slot for slot in slots}
        self._allowed_exit_codes, self._store = allowed_exit_codes, store
        self._on_over, self._on_ready = on_over, on_ready
        self._thread.call(self._begin())

    def begin_again(self, names: Collection[str]) -> None:
        """Start a process in each of these slots that has none, also if it was given up."""

        async def begin_again() -> None:
            for slot in self._slots.values():
                if slot.name in names and not slot.is_live and not self._stop_requested.is_set():
                    self.over = False
                    self._start(slot)

        self._thread.call(begin_again())

    def abort(self, stages: tuple[AbortStage, ...], hurry: Callable[[], bool]) -> list[ProcessEnd]:
        """Stop all processes, stage by stage, and log for each which stage ended it. Idempotent.

        Args:
            stages: what is done.
            hurry: whether to go to the last stage at once.
        """
        launcher, tree = self._launcher, self._tree
        if launcher is None or tree is None or not self._slots or self._stop_requested.is_set():
            return []
        try:
            self._thread.call(self._stop_starting(), _START_SECONDS)
        except TimeoutError:
            _log.error("the launcher does not answer; its processes are ended nevertheless")
        ends = abort(stages, tree.living, self._names, lambda: launcher.send(SetStopEvent()), hurry=hurry)
        log_ends(ends)
        try:
            self._thread.call(self._wait_until_collected(), _COLLECT_SECONDS)
        except TimeoutError:
            _log.error("the launcher has not reported the end of every process")
        return ends

    def close(self) -> None:
        """End the launcher and everything that is left. Idempotent."""
        launcher, self._launcher = self._launcher, None
        if launcher is None:
            return
        if self._slots:

            async def stop_reading() -> None:
                asyncio.get_running_loop().remove_reader(launcher.fileno())

            self._thread.call(stop_reading())
        launcher.close()
        if self._cgroup is not None:
            self._cgroup.remove()

    # --- In the loop: events of the launcher ---------------------------------------------------------------------

    async def _begin(self) -> None:
        assert self._launcher is not None
        asyncio.get_running_loop().add_reader(self._launcher.fileno(), self._read, self._launcher)
        for slot in self._slots.values():
            self._start(slot)

    def _start(self, slot: Slot) -> None:
        if self._launcher is not None:
            self._launcher.send(slot.next_start(time.monotonic()))

    async def _stop_starting(self) -> None:
        """Start no more processes; return when the number of every process that was started is known."""
        self._stop_requested.set()
        while any(slot.state == "starting" and not slot.pid for slot in self._slots.values()):
            self._changed.clear()
            await self._changed.wait()

    async def _wait_until_collected(self) -> None:
        """Wait until the launcher has reported the end of every process."""
        while any(slot.state in ("starting", "running") for slot in self._slots.values()):
            self._changed.clear()
            await self._changed.wait()
        await asyncio.gather(*self._recoveries)

    def _read(self, launcher: Launcher) -> None:
        events = launcher.receive()
        if events is None:
            asyncio.get_running_loop().remove_reader(launcher.fileno())
            self._lose_launcher()
            return
        for event in events:
            slot = self._slots[event.slot]
            if event.generation == slot.generation:
                self._handle(slot, event)
        self._changed.set()

    def _handle(self, slot: Slot, event: ProcessStarted | ProcessReady | ProcessExited) -> None:
        assert self._tree is not None
        match event:
            case ProcessStarted(_, _, pid):
                slot.pid = pid
                if pid:
                    self._names[pid] = slot.name
                    self._tree.add_session(pid)
            case ProcessReady():
                slot.state, slot.ready = "running", True
                if all(each.ready for each in self._slots.values()):
                    self._on_ready()
            case ProcessExited():
                if not self._stop_requested.is_set():  # during an abort, its stages end what is left
                    self._kill_leftovers(slot, self._tree)
                # After the slow part, because other threads must not see a slot that has ended long before `over`.
                crash = slot.end(event, self._allowed_exit_codes)
                if crash is not None:
                    slot.state = "waiting"
                    self._later(self._recover(slot, crash))
                    return
                _log.info("%s (pid %d) has ended", slot.name, event.pid)
                if event.result is None:  # an allowed exit code, but the worker has not deregistered
                    self._later(self._report_lost(slot.name, f"its process (pid {event.pid}) has ended"))
                self._check_over()

    def _lose_launcher(self) -> None:
        """The launcher has died, so nothing can be started, and the kernel has killed all its processes."""
        for slot in self._slots.values():
            if slot.is_live:
                self._later(self._report_lost(slot.name, "the launcher has died, and its process with it"))
            slot.state = "ended"
        self._changed.set()
        self._finish(ExecutionFailed("the launcher, the process that starts and watches all others, has died"))

    def _kill_leftovers(self, slot: Slot, tree: ProcessTree) -> None:
        """Kill what a process has left in its session or its control group, so that the next one starts clean."""
        grouped = set[int]() if slot.cgroup is None else slot.cgroup.processes()
        for process in tree.living():
            if process.session == slot.pid or process.pid in grouped:
                send_signal(process, signal.SIGKILL)

    # --- In the loop: crashes, and the end -----------------------------------------------------------------------

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._recoveries.add(task)
        task.add_done_callback(self._recoveries.discard)

    async def _recover(self, slot: Slot, crash: Crash) -> None:
        """Report the loss to the store, then start the next process after a delay, unless the slot is given up."""
        stopped = self._stop_requested.is_set()
        reason_code = "resource_exhausted" if crash.exhausted else None
        # The store is told first: otherwise the next process, which has the same worker id, would renew the lease of
        # the dead one, and the attempts of the dead one would seem to run on.
        await self._report_lost(slot.name, f"its process (pid {crash.pid}) {crash.what}", reason_code)
        directive = None if stopped else await self._directive(slot.name)
        delay = None if stopped or directive else slot.restart_delay(time.monotonic())
        trace = f"\n{crash.traceback}" if crash.traceback else ""
        if delay is not None:
            _log.warning("%s; it is started again in %.1f s%s", crash, delay, trace)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._stop_requested.wait()
        if self._stop_requested.is_set():
            slot.state = "ended"
            if stopped and trace:
                _log.error("%s while it was being stopped%s", crash, trace)
        elif directive is not None:
            slot.state, slot.result = "ended", ProcessResult(directive)
            _log.warning("%s; it had been asked to leave, and is not started again", crash)
            self._check_over()
        elif delay is None:
            slot.state = "given up"
            _log.error("%s; it is not started again%s", crash, trace)
            self._check_over()
        else:
            self._start(slot)
        self._changed.set()

    async def _report_lost(self, worker_id: str, message: str, reason_code: str | None = None) -> None:
        if self._store is None:
            return
        seconds = _LAST_REPORT_SECONDS if self._stop_requested.is_set() else _REPORT_SECONDS
        try:
            async with asyncio.timeout(seconds):
                await self._store.report_worker_lost(worker_id, message=message, reason_code=reason_code)
        except NotFound:
            return  # it died before it registered, so it held nothing
        except (TimeoutError, AgentLightningError, NotImplementedError) as error:
            _log.warning("the store does not know yet that %s is lost; its lease will expire (%s)", worker_id, error)

    async def _directive(self, worker_id: str) -> WorkerDirective | None:
        """What the worker had been asked to do, if anything. A new process would not know of it and would stay."""
        if self._store is None:
            return None
        try:
            async with asyncio.timeout(_REPORT_SECONDS):
                worker = await self._store.get_worker_by_id(worker_id)
        except (TimeoutError, AgentLightningError, NotImplementedError):
            return None
        return None if worker is None else worker.directive

    def _check_over(self) -> None:
        if any(slot.is_live for slot in self._slots.values()):
            return
        given_up = [slot for slot in self._slots.values() if slot.state == "given up"]
        if len(given_up) < len(self._slots):
            self._finish(None)
            return
        crash = given_up[-1].crash
        assert crash is not None  # that is why it was given up
        why = str(crash) if given_up[-1].restart is None else f"no runner can be kept alive; the last one: {crash}"
        self._finish(ExecutionFailed(why, crash.traceback))

    def _finish(self, reason: ExecutionFailed | None) -> None:
        if not self.over and not self._stop_requested.is_set():
            self._on_over(reason)
            self.over = True
