"""Watching the processes of a run: each is started, and replaced when it crashes, as long as that makes sense."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from agentlightning.errors import AgentLightningError, ExecutionFailed, NotFound
from agentlightning.execution.launcher import NurseryLink
from agentlightning.execution.messages import Exited, Outcome, Ready, Start, Started
from agentlightning.execution.process_tree import Cgroup, Kin, send
from agentlightning.execution.quotas import Quotas, RestartPolicy, Restarts, exhausted
from agentlightning.store.base import LightningStore
from agentlightning.types import WorkerDirective

# --- The places of a run that processes fill, one life after another ---

SlotState = Literal["starting", "running", "waiting", "ended", "given up"]
"""``waiting``: it crashed, and is started again soon. ``ended``: it came to its end, or is not needed any more."""


@dataclass(frozen=True)
class Crash:
    """How a process failed."""

    slot: str
    pid: int
    what: str
    """In half a sentence."""
    traceback: str
    exhausted: bool
    """Whether it had used up one of its quotas."""

    def __str__(self) -> str:
        return f"{self.slot} (pid {self.pid}) {self.what}"


@dataclass
class Slot:
    """One place.

    Args:
        name: of the place; for a runner, its worker id.
        job: which job is done here.
        arguments: plain values for the job.
        restart: whether a process that crashes is replaced.
        quotas: what each process may use up.
        environment: added to that of each process.
    """

    name: str
    job: str
    arguments: Mapping[str, Any]
    restart: RestartPolicy | None
    quotas: Quotas | None = None
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    cgroup: Cgroup | None = None
    state: SlotState = "ended"
    life: int = 0
    begun: bool = False
    """Whether the process of this life has begun with its job, whatever became of it since."""
    pid: int = 0
    began: float = 0.0
    outcome: Outcome | None = None
    """Of the last life."""
    crash: Crash | None = None
    """The last one."""
    _restarts: Restarts | None = None
    _memory_kills: int = 0

    @property
    def live(self) -> bool:
        """Whether a process is there, or will be."""
        return self.state in ("starting", "running", "waiting")

    def begin(self, now: float) -> Start:
        """The order for the next life."""
        self.life += 1
        self.state, self.begun, self.pid, self.began, self.outcome = "starting", False, 0, now, None
        limited = False
        if self.cgroup is not None and self.quotas is not None and self.quotas.memory_bytes is not None:
            limited = self.cgroup.limit_memory(self.quotas.memory_bytes)
        return Start(
            slot=self.name,
            life=self.life,
            job=self.job,
            arguments=self.arguments,
            environment=self.environment,
            quotas=self.quotas,
            cgroup=None if self.cgroup is None else str(self.cgroup.path),
            memory_is_limited=limited,
        )

    def ended_as(self, exited: Exited, allowed_exit_codes: frozenset[int]) -> Crash | None:
        """Take note of the end of a life: how it crashed, or None if it came to its end in good order.

        One that ends with an exit code that is allowed, and without a word, has not crashed, but nobody else has
        told the store that it is gone.
        """
        self.state, self.outcome = "ended", exited.outcome
        kills = 0 if self.cgroup is None else self.cgroup.memory_kills()
        new_kills, self._memory_kills = kills - self._memory_kills, kills
        failed = exited.outcome is not None and exited.outcome.word == "failed"
        if exited.code in allowed_exit_codes and not failed:
            return None
        used_up = exhausted(self.quotas, exited.code, memory_kills=new_kills)
        if used_up is None and exited.outcome is not None and exited.outcome.exhausted:
            used_up = exited.outcome.exhausted
        self.crash = Crash(
            slot=self.name,
            pid=exited.pid,
            what=_told(exited, used_up),
            traceback=exited.outcome.traceback if exited.outcome else "",
            exhausted=used_up is not None,
        )
        return self.crash

    def delay(self, now: float) -> float | None:
        """Seconds until the next life after a crash; None: there is none any more."""
        if self.restart is None:
            return None
        self._restarts = self._restarts or Restarts(self.restart)
        return self._restarts.crashed(now - self.began, now)


def _told(exited: Exited, used_up: str | None) -> str:
    if exited.code < 0 and exited.pid:
        how = f"was killed by {_signal_name(-exited.code)}"
    elif exited.outcome is not None and exited.outcome.word == "failed":
        how = f"failed: {exited.outcome.error}"
    else:
        how = f"ended with exit code {exited.code}"
    return how if used_up is None else f"{how}, having used up {used_up}"


def _signal_name(number: int) -> str:

    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# ---

_log = logging.getLogger(__name__)
_REPORT_SECONDS = 10.0
"""How long a restart waits for the store to take note of the loss; after that, leases must do."""
_LAST_REPORT_SECONDS = 1.0
"""The same, when everything is being stopped and nobody waits for a restart."""


class Supervisor:
    """Keeps the slots of a run filled. It lives in one event loop.

    Args:
        link: to the nursery that makes the processes.
        kin: takes note of them.
        slots: the places.
        allowed_exit_codes: with which a process may end without having crashed.
        store: is told which workers are dead; None: nobody needs to know.
        on_over: called once, when no slot will be filled any more and nobody has asked for that: with the reason,
            or without one if all have come to their end.
        on_ready: called whenever a process has begun with its job, and so has one in every other slot.
    """

    def __init__(
        self,
        link: NurseryLink,
        kin: Kin,
        slots: Sequence[Slot],
        *,
        allowed_exit_codes: frozenset[int],
        store: LightningStore | None,
        on_over: Callable[[ExecutionFailed | None], None],
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._link = link
        self._kin = kin
        self._slots = {slot.name: slot for slot in slots}
        self._allowed_exit_codes = allowed_exit_codes
        self._store = store
        self._on_over = on_over
        self._on_ready = on_ready
        self._stop_asked = asyncio.Event()
        self.over = False
        """Whether no slot will be filled any more, unless ``begin_again`` is called."""
        self._recoveries: set[asyncio.Task[None]] = set()
        self._settled = asyncio.Event()
        self.names: dict[int, str] = {}
        """Which slot each process fills or filled, by number."""

    def begin(self) -> None:
        """Start a process in every slot."""
        asyncio.get_running_loop().add_reader(self._link.fileno(), self._read)
        for slot in self._slots.values():
            self._launch(slot)

    def begin_again(self, names: Collection[str]) -> None:
        """Start a process in each of these slots that has none; also where the last ones had crashed too often."""
        for slot in self._slots.values():
            if slot.name in names and not slot.live and not self._stop_asked.is_set():
                self.over = False
                self._launch(slot)

    async def stop_starting(self) -> None:
        """Start no more; return when every process that was ordered is there, and known by its number."""
        self._stop_asked.set()
        while any(slot.state == "starting" and not slot.pid for slot in self._slots.values()):
            self._settled.clear()
            await self._settled.wait()

    async def collected(self) -> None:
        """Wait until the nursery has told the end of every process."""
        while any(slot.state in ("starting", "running") for slot in self._slots.values()):
            self._settled.clear()
            await self._settled.wait()
        await asyncio.gather(*self._recoveries)

    async def close(self) -> None:
        """Listen to the nursery no more."""
        asyncio.get_running_loop().remove_reader(self._link.fileno())

    # --- What the nursery says -------------------------------------------------------------------

    def _read(self) -> None:
        messages = self._link.receive()
        if messages is None:
            asyncio.get_running_loop().remove_reader(self._link.fileno())
            self._nursery_lost()
            return
        for message in messages:
            slot = self._slots[message.slot]
            if message.life == slot.life:
                self._take_in(slot, message)
        self._settled.set()

    def _take_in(self, slot: Slot, message: Started | Ready | Exited) -> None:
        match message:
            case Started(_, _, pid):
                slot.pid = pid
                if pid:
                    self.names[pid] = slot.name
                    self._kin.note(pid)
            case Ready():
                slot.state, slot.begun = "running", True
                if all(each.begun for each in self._slots.values()):
                    self._on_ready()
            case Exited():
                crash = slot.ended_as(message, self._allowed_exit_codes)
                if not self._stop_asked.is_set():  # then the abort sees to what is left, stage by stage
                    self._clean_up(slot)
                if crash is not None:
                    slot.state = "waiting"
                    self._later(self._recovery(slot, crash))
                    return
                _log.info("%s (pid %d) has come to its end", slot.name, message.pid)
                if message.outcome is None:  # without a goodbye
                    self._later(self._tell_store(slot.name, f"its process (pid {message.pid}) has ended"))
                self._check_over()

    def _nursery_lost(self) -> None:
        """Without it nothing can be started, and what it had started was ended by the kernel."""
        for slot in self._slots.values():
            if slot.live:
                self._later(self._tell_store(slot.name, "the nursery has died, and its process with it"))
            slot.state = "ended"
        self._settled.set()
        self._end(ExecutionFailed("the process that starts and watches all others (the nursery) has died"))

    # --- Crashes ---------------------------------------------------------------------------------

    def _clean_up(self, slot: Slot) -> None:
        """What a process leaves behind in its session or its cgroup does not outlive it."""
        enrolled = set[int]() if slot.cgroup is None else slot.cgroup.processes()
        for process in self._kin.living():
            if process.session == slot.pid or process.pid in enrolled:
                send(process, signal.SIGKILL)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._recoveries.add(task)
        task.add_done_callback(self._recoveries.discard)

    async def _recovery(self, slot: Slot, crash: Crash) -> None:
        """Tell the store, then start the next process, after a while."""
        stopped = self._stop_asked.is_set()
        reason_code = "resource_exhausted" if crash.exhausted else None
        await self._tell_store(slot.name, f"its process (pid {crash.pid}) {crash.what}", reason_code)
        directive = None if stopped else await self._directive(slot.name)
        delay = None if stopped or directive else slot.delay(time.monotonic())
        if delay is not None:
            _log.warning("%s; it is started again in %.1f s%s", crash, delay, _indented(crash.traceback))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._stop_asked.wait()
        if self._stop_asked.is_set():
            slot.state = "ended"
            if stopped and crash.traceback:
                _log.error("%s while it was being stopped%s", crash, _indented(crash.traceback))
        elif directive is not None:
            slot.state, slot.outcome = "ended", Outcome(directive)
            _log.warning("%s; it had been asked to leave, and is not started again", crash)
            self._check_over()
        elif delay is None:
            slot.state = "given up"
            _log.error("%s; it is not started again%s", crash, _indented(crash.traceback))
            self._check_over()
        else:
            self._launch(slot)
        self._settled.set()

    async def _tell_store(self, worker_id: str, message: str, reason_code: str | None = None) -> None:
        if self._store is None:
            return
        patience = _LAST_REPORT_SECONDS if self._stop_asked.is_set() else _REPORT_SECONDS
        try:
            async with asyncio.timeout(patience):
                await self._store.report_worker_lost(worker_id, message=message, reason_code=reason_code)
        except NotFound:
            return  # it died before the store had heard of it, so it held nothing
        except (TimeoutError, AgentLightningError, NotImplementedError) as error:
            _log.warning("the store does not know yet that %s is lost; its lease will tell (%s)", worker_id, error)

    async def _directive(self, worker_id: str) -> WorkerDirective | None:
        """What the worker had been asked to do, if anything; a new process would not know of that."""
        if self._store is None:
            return None
        try:
            async with asyncio.timeout(_REPORT_SECONDS):
                worker = await self._store.get_worker_by_id(worker_id)
        except (TimeoutError, AgentLightningError, NotImplementedError):
            return None
        return None if worker is None else worker.directive

    def _launch(self, slot: Slot) -> None:
        self._link.send(slot.begin(time.monotonic()))

    # --- The end ---------------------------------------------------------------------------------

    def _check_over(self) -> None:
        if any(slot.live for slot in self._slots.values()):
            return
        given_up = [slot for slot in self._slots.values() if slot.state == "given up"]
        if len(given_up) < len(self._slots):
            self._end(None)
            return
        crash = given_up[-1].crash
        assert crash is not None  # that is why it was given up
        why = str(crash) if given_up[-1].restart is None else f"no runner can be kept alive; at last {crash}"
        self._end(ExecutionFailed(why, crash.traceback))

    def _end(self, reason: ExecutionFailed | None) -> None:
        if not self.over and not self._stop_asked.is_set():
            self._on_over(reason)
            self.over = True


def _indented(traceback: str) -> str:
    return f"\n{traceback}" if traceback else ""
