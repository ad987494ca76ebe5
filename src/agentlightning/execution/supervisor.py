"""The supervisor: starts the processes of a run, replaces those that crash, and stops them.

A run has slots, each of which one process after another fills (``agentlightning.execution.child.Slot``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any

from agentlightning.errors import AgentLightningError, ExecutionFailed
from agentlightning.execution.abort import Abort, AbortStage
from agentlightning.execution.child import (
    ProcessEvent,
    ProcessJob,
    ProcessResult,
    StartMethod,
    choose_start_method,
)
from agentlightning.execution.launcher import Launcher, LauncherOrders
from agentlightning.execution.membership import Loss, find_worker, report_lost
from agentlightning.execution.process_tree import MARK, ProcessTree, make_cgroup, send_signal
from agentlightning.execution.restarts import Life
from agentlightning.execution.slots import Crash, Slot
from agentlightning.execution.stand_in import StandIn
from agentlightning.lifecycle import reasons
from agentlightning.runner.vital_signs import make_places, open_shared_memory
from agentlightning.store.base import LightningStore
from agentlightning.types import Worker

_log = logging.getLogger(__name__)

_REPORT_SECONDS = 10.0
"""How long a restart waits for the store to record the loss of the worker; after that, its lease has to expire."""
_LAST_REPORT_SECONDS = 1.0
"""The same, when everything is being stopped."""
_START_SECONDS = 5.0
_COLLECT_SECONDS = 2.0


class Supervisor:
    """Keeps the slots of a run filled.

    It is made, which starts the launcher, before this process has threads if the launcher is to be forked. Its
    coroutines run in one event loop, which must be closed before ``close``.

    Args:
        side: whose job the processes do: ``runner`` or ``algorithm``.
        job: what they do.
        start_method: how they are started; None: ``fork`` from a process with one thread, else ``forkserver``.

    Raises:
        InvalidValue: the job cannot be sent to another process; the message names it and the alternatives.
    """

    def __init__(self, side: str, job: ProcessJob, start_method: StartMethod | None) -> None:
        self._side = side
        what = f"the {side}'s side"
        method = choose_start_method(start_method, what, job)
        self._mark = secrets.token_hex(8)
        self._cgroup = make_cgroup(f"agl-{self._mark}")
        self._signs_file = open_shared_memory()
        orders = LauncherOrders(os.getpid(), what, job, method, self._mark, self._cgroup, self._signs_file)
        try:
            self._launcher = Launcher(orders)
        except BaseException:
            os.close(self._signs_file)
            if self._cgroup is not None:
                self._cgroup.remove()
            raise
        self._tree = ProcessTree(self._mark, self._launcher.pid, self._cgroup)
        self._slots: dict[str, Slot] = {}
        self._allowed_exit_codes = frozenset[int]()
        self._store: LightningStore | None = None
        self._stand_in: StandIn | None = None
        self._on_ready: Callable[[], None] = lambda: None
        self._stop_requested = asyncio.Event()
        self._recoveries: set[asyncio.Task[object]] = set()
        self._changed = asyncio.Event()
        self._names: dict[int, str] = {}
        """Which slot each process fills or filled, by number."""
        self.over = asyncio.Event()
        """Set when no slot will be filled any more, unless by ``begin_again``, and no abort has begun."""
        self.failure: ExecutionFailed | None = None
        """Why it is over, if the processes have not ended as they should."""

    def close(self) -> None:
        """End the launcher and everything that is left; blocks."""
        self._launcher.close()
        os.close(self._signs_file)
        if self._cgroup is not None:
            self._cgroup.remove()

    async def begin(
        self,
        slots: Sequence[Slot],
        *,
        allowed_exit_codes: frozenset[int],
        store: LightningStore | None,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        """Start a process in every slot, and watch them from now on; ``allowed_exit_codes`` are no crash.

        ``store`` is told which workers are dead; None: nobody needs to know. ``on_ready`` is called when a process has
        begun with its job and so has one in every other slot.
        """
        places = make_places(self._signs_file, len(slots))
        for number, slot in enumerate(slots):
            environment = {**slot.start.environment, MARK: self._mark}
            slot.start, slot.signs = slot.start._replace(environment=environment, signs_place=number), places[number]
            slot.cgroup = None if self._cgroup is None else self._cgroup.child(f"{self._side}-{number}")
        self._slots = {slot.name: slot for slot in slots}
        self._allowed_exit_codes, self._store, self._on_ready = allowed_exit_codes, store, on_ready
        if store is not None:
            self._stand_in = StandIn(slots, store)
            self._stand_in.start()
        asyncio.get_running_loop().add_reader(self._launcher.fileno(), self._read)
        self.begin_again(self._slots)

    def begin_again(self, names: Collection[str]) -> None:
        """Start a process in each of these slots that has none, also if it was given up."""
        for name in names:
            if not self._slots[name].is_live and not self._stop_requested.is_set():
                self.over.clear()
                self._start(self._slots[name])

    async def abort(self, stages: tuple[AbortStage, ...], hurry: Callable[[], bool]) -> None:
        """Stop all processes, stage by stage or, in a hurry, by the last; log for each which stage ended it."""
        self._stop_requested.set()  # start no more processes
        if not await self._until(lambda slot: slot.state != "starting" or slot.pid > 0, _START_SECONDS):
            _log.error("the launcher does not answer; its processes are ended nevertheless")
        abort = Abort(self._tree.living, self._names, lambda: self._launcher.send("stop"), hurry)
        for seconds in abort.steps(stages) if self._slots else ():
            await asyncio.sleep(seconds)
        abort.log_ends()
        if not await self._until(lambda slot: slot.state not in ("starting", "running"), _COLLECT_SECONDS):
            _log.error("the launcher has not reported the end of every process")
        if self._recoveries:
            await asyncio.wait(self._recoveries, timeout=_COLLECT_SECONDS)

    async def report_ended(self) -> Collection[str]:
        """After ``abort``: tell the store that no worker of this supervisor is left; returns their ids.

        One that ended in time has deregistered, but a heartbeat that was under way may have registered it again.
        """
        await asyncio.gather(
            *(self._report_lost(each, "its process has ended", reasons.WORKER_LEFT) for each in self._slots)
        )
        return self._slots.keys()

    async def _until(self, met: Callable[[Slot], bool], seconds: float) -> bool:
        """Wait until every slot meets a condition; returns whether that was in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not all(map(met, self._slots.values())):
                    self._changed.clear()
                    await self._changed.wait()
        return all(map(met, self._slots.values()))

    # --- Events of the launcher ----------------------------------------------------------------------------------

    def _start(self, slot: Slot) -> None:
        self._launcher.send(slot.next_start(time.monotonic()))

    def _read(self) -> None:
        events = self._launcher.receive()
        if events is None:
            asyncio.get_running_loop().remove_reader(self._launcher.fileno())
            self._lose_launcher()
        for event in events or ():
            self._handle(self._slots[event.slot], event)
        self._changed.set()

    def _handle(self, slot: Slot, event: ProcessEvent) -> None:
        if event.what == "started":
            slot.pid = event.pid
            self._names[event.pid] = slot.name
            self._tree.add_session(event.pid)
        elif event.what == "ready":
            slot.state = "running"
            if not any(each.state in ("starting", "waiting", "given up") for each in self._slots.values()):
                self._on_ready()
        else:
            self._end(slot, event)

    def _end(self, slot: Slot, event: ProcessEvent) -> None:
        if not self._stop_requested.is_set():  # during an abort, its stages end what is left
            # What a process has left in its session or its control group is killed, so that the next one starts clean.
            grouped = set[int]() if slot.cgroup is None else slot.cgroup.processes()
            for process in self._tree.living():
                if process.session == slot.pid or process.pid in grouped:
                    send_signal(process, signal.SIGKILL)
        crash = slot.end(event, self._allowed_exit_codes, time.monotonic())
        if crash is not None:
            slot.state = "waiting"
            self._later(self._recover(slot, crash))
            return
        _log.info("%s (pid %d) has ended", slot.name, event.pid)
        if event.result is None or (self._stand_in and self._stand_in.speaks_for(slot.name)):
            # With an allowed exit code, but the worker has not deregistered, or is registered again at this moment.
            left = f"its process (pid {event.pid}) has ended"
            self._later(self._report_lost(slot.name, left, reasons.WORKER_LEFT))
        self._check_over()

    def _lose_launcher(self) -> None:
        """The launcher has died, so nothing can be started, and the kernel has killed all its processes."""
        for slot in self._slots.values():
            if slot.is_live:
                self._later(self._report_lost(slot.name, "the launcher has died, and its process with it"))
            slot.state = "ended"
        self._finish(ExecutionFailed("the launcher, the process that starts and watches all others, has died"))

    # --- Crashes, and the end ------------------------------------------------------------------------------------

    def _later(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._recoveries.add(task)
        task.add_done_callback(self._recoveries.discard)

    async def _recover(self, slot: Slot, crash: Crash) -> None:
        """Report the loss to the store, then start the next process after a delay, unless the slot is given up."""
        stopped = self._stop_requested.is_set()
        reason_code = reasons.RESOURCE_EXHAUSTED if crash.exhausted else None
        # The store is told first: otherwise the next process, which has the same worker id, would renew the lease of
        # the dead one, and the attempts of the dead one would seem to run on.
        loss = await self._report_lost(slot.name, crash.reason(), reason_code, crash.attempts)
        worker, life = (None, None) if stopped else await self._look_back(slot, crash, loss)
        directive = None if worker is None else worker.directive
        delay = None
        if slot.restarts is not None and life is not None and directive is None:
            delay = slot.restarts.crashed(life, time.monotonic())
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

    async def _look_back(self, slot: Slot, crash: Crash, loss: Loss) -> tuple[Worker | None, Life]:
        """What the store says of the worker after a crash, and what its process had done.

        A new process would not know what the worker had been asked to do.
        """
        worker, is_known = None, False
        if self._store is not None:
            with contextlib.suppress(TimeoutError, AgentLightningError, NotImplementedError):
                worker, is_known = await find_worker(self._store, slot.name, _REPORT_SECONDS), True
        rollouts = frozenset(each.rollout_id for each in loss.attempts if each.reason_code not in reasons.STORE_ONLY)
        # Where the store does not answer, nothing is held against the process.
        last_claim = slot.last_claim if worker is None else worker.last_dequeue_time
        claimed = not is_known or last_claim != slot.last_claim
        slot.last_claim = last_claim
        # One that raised has given back by itself what it held.
        unknown = crash.attempts is None and not crash.traceback
        worked = crash.ended > 0 or (unknown and is_known and claimed and not loss.attempts)
        return worker, Life(crash.seconds, worker is not None or not is_known, claimed, worked, rollouts)

    async def _report_lost(
        self, worker_id: str, message: str, reason_code: str | None = None, at_work: Sequence[str] | None = None
    ) -> Loss:
        if self._store is None:
            return Loss()
        if self._stand_in is not None:
            await self._stand_in.fall_silent(worker_id)
        seconds = _LAST_REPORT_SECONDS if self._stop_requested.is_set() else _REPORT_SECONDS
        loss = await report_lost(self._store, worker_id, message, reason_code, seconds, at_work)
        if loss.problem is not None:
            text = "the store does not know yet that %s is lost; its lease will expire (%s)"
            _log.warning(text, worker_id, loss.problem)
        return loss

    def _check_over(self) -> None:
        if any(slot.is_live for slot in self._slots.values()):
            return
        given_up = [slot for slot in self._slots.values() if slot.state == "given up"]
        if len(given_up) < len(self._slots):
            self._finish(None)
            return
        crash = given_up[-1].crash
        assert crash is not None  # that is why it was given up
        why = str(crash) if given_up[-1].restarts is None else f"no runner can be kept alive; the last one: {crash}"
        if crash.output:
            why += f"\nThe last lines that it printed:\n{crash.output}"
        self._finish(ExecutionFailed(why, crash.traceback))

    def _finish(self, reason: ExecutionFailed | None) -> None:
        if not self.over.is_set() and not self._stop_requested.is_set():
            self.failure = reason
            self.over.set()
