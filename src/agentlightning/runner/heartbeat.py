"""A worker's heartbeat: tells the store that the worker lives, and receives the store's instructions.

The heartbeat runs in a thread with an event loop of its own, because an agent that blocks the runner's loop must not
look dead. While an agent holds the interpreter itself, the supervisor beats instead (``vital_signs``). Each beat lists
the attempts that the worker has begun; the reply names those that it has lost, and says whether the worker was asked to
drain or to stop. Claims whose work has begun are confirmed here for the same reason.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import platform
import random
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeAlias

import psutil

from agentlightning.errors import Conflict, NotFound, StoreUnavailable
from agentlightning.runner.vital_signs import Times, VitalSigns
from agentlightning.settings import LightningEnvVar, resolve_str_env_var
from agentlightning.store.base import LightningStore
from agentlightning.types import UNSET, AttemptedRollout, Unset

Directive: TypeAlias = Literal["drain", "stop"]

CONFIRM_SECONDS = 0.25
"""A claim is confirmed when its attempt has run for so long. A shorter attempt is confirmed by its report."""
_SHORTEST_INTERVAL_SECONDS = 0.2
_BEATS_PER_TERM = 3
"""How often an attempt with ``unresponsive_seconds`` is heard of in that time, at least."""
_TRIES_PER_TERM = 5
"""A beat that is not answered within this part of the lease (or of an attempt's term) is lost: there is time for more,
and the store's client would wait longer than the lease for a lost reply."""
_SHORTEST_PATIENCE_SECONDS = 0.5
_REPORT_SECONDS = 2.0
"""How long a report may take before its claim is confirmed by a call of its own; an overloaded store gets fewer."""
_LONGEST_RETRY_SECONDS = 1.0
_STOP_SECONDS = 2.0
"""How long the end waits for the answer to a beat."""
_GPU_FIELDS = ("index", "name", "utilization.gpu", "memory.used", "memory.total")
_GPU_SECONDS = 5.0
_NOT_IN_IDS = re.compile(r"[^A-Za-z0-9._~-]+")
_HOST_CHARACTERS = 64

_logger = logging.getLogger(__name__)

_CHANCE = random.SystemRandom().random
"""From 0 up to 1, for jitter; not from the generator that an agent's program may have seeded, and draws from."""


@dataclass
class _BegunAttempt:
    rollout_id: str
    since: float
    interval_seconds: float
    confirmed: bool = False


class Heartbeat:
    """Beats in a thread, or in the runner's loop, as ``LitAgentRunner`` was told."""

    def __init__(
        self,
        store: LightningStore,
        worker_id: str,
        *,
        interval_seconds: float,
        jitter_seconds: float,
        lease_seconds: float,
        include_gpu: bool,
        in_thread: bool,
        registration: dict[str, Any],
        statistics: Callable[[bool], dict[str, Any]],
        signs: VitalSigns | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = _CHANCE,
    ) -> None:
        self._chance = chance
        self.on_stale: Callable[[str], None] | None = None
        """Called, in the heartbeat's thread, with the id of each attempt that has lost its rollout."""
        self.on_directive: Callable[[Directive], None] | None = None
        """Called, in the heartbeat's thread, when the worker is asked to drain or to stop."""
        self.first_beat: Future[None] = Future()
        """Done when the store knows the worker, or has refused to."""
        self._store = store
        self.worker_id = worker_id
        self._interval, self._jitter = interval_seconds, jitter_seconds
        self._lease_seconds = lease_seconds
        self._include_gpu = include_gpu
        self._in_thread = in_thread
        self._signs = signs
        self._registration = registration
        self._statistics, self._monotonic = statistics, monotonic
        self._begun: dict[str, _BegunAttempt] = {}
        self._thread: threading.Thread | None = None
        self._task: asyncio.Task[None] | None = None
        self._confirming: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None
        self._beat_requested = False
        self._stopping = False
        self._failures = 0
        self._last_beat = math.inf
        self._awaiting_beat: list[Future[None]] = []

    def start(self) -> None:
        """Start the thread. Settings without a thread begin to beat with ``start_in_loop`` instead."""
        if self._in_thread and self._thread is None:
            self._thread = threading.Thread(
                target=lambda: asyncio.run(self._run()), name="agentlightning-heartbeat", daemon=True
            )
            self._thread.start()

    def start_in_loop(self) -> None:
        """Begin to beat in the running loop, if the settings say so and it is not beating yet."""
        if not self._in_thread and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._run(), name="agentlightning-heartbeat")

    def stop(self) -> None:
        """Stop beating. A thread has ended on return; a task of the runner's loop ends at its next turn."""
        self._stopping = True
        self._call_in_loop(lambda: self._wake and self._wake.set())
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(_STOP_SECONDS)
        self._call_in_loop(lambda: self._task and self._task.cancel())  # of a beat that no server answers
        if thread is not None:
            thread.join()
        if self._signs is not None:
            self._signs.clear()

    def beat_now(self) -> None:
        """Beat at once, because the reply may carry an instruction."""
        self._beat_requested = True
        self._call_in_loop(lambda: self._wake and self._wake.set())

    @property
    def silent_too_long(self) -> bool:
        """Whether the last beat is older than the lease (after a suspend or a partition).

        The store may have counted the worker as lost meanwhile, and have handed its attempts to others.
        """
        return self._monotonic() - self._last_beat >= self._lease_seconds

    def next_beat(self) -> Future[None]:
        """Beat at once; the future is done when the store has answered.

        By then the worker has its leases back, and ``on_stale`` was called for what it has lost.
        """
        answered: Future[None] = Future()
        self._awaiting_beat.append(answered)
        self.beat_now()
        return answered

    def begin(self, rollout: AttemptedRollout) -> None:
        """List this attempt in beats from now on. A claim whose work has not begun must not be listed."""
        attempt_id, term = rollout.attempt.attempt_id, rollout.config.unresponsive_seconds
        interval = math.inf if term is None else max(term / _BEATS_PER_TERM, _SHORTEST_INTERVAL_SECONDS)
        self._begun[attempt_id] = _BegunAttempt(rollout.rollout_id, self._monotonic(), interval)
        if self._signs is not None:
            self._signs.begin(attempt_id)
            if term is not None:  # at once, because the agent may not let the heartbeat have another turn
                self._note_life(self._signs)

    def reporting(self, attempt_id: str) -> None:
        """The agent has finished, and the report of the attempt, which confirms its claim, is under way."""
        self._begun[attempt_id].since = self._monotonic() + _REPORT_SECONDS - CONFIRM_SECONDS
        if self._signs is not None:
            self._signs.reporting(attempt_id)

    def end(self, attempt_id: str) -> None:
        """Stop listing this attempt."""
        self._begun.pop(attempt_id, None)
        if self._signs is not None:
            self._signs.end(attempt_id)

    def _longest_pause(self) -> float:
        """How long the attempts that have ``unresponsive_seconds`` may not be heard of."""
        return min((each.interval_seconds for each in list(self._begun.values())), default=math.inf)

    def _call_in_loop(self, function: Callable[[], object]) -> None:
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # the loop was closed in the meantime
                loop.call_soon_threadsafe(function)

    # --- In the thread ---------------------------------------------------------------------------

    async def _run(self) -> None:
        self._task = asyncio.current_task()
        self._loop, self._wake = asyncio.get_running_loop(), asyncio.Event()
        try:
            with suppress(asyncio.CancelledError):  # by `stop`
                await self._beat_until_stopped(self._wake)
        finally:
            self._loop = self._wake = None
            if self._confirming is not None:
                self._confirming.cancel()

    async def _beat_until_stopped(self, wake: asyncio.Event) -> None:
        self._show_life(asyncio.get_running_loop())
        beaten, pause, first = -math.inf, 0.0, True
        while not self._stopping:
            if self._beat_requested or self._monotonic() >= beaten + min(pause, self._longest_pause()):
                self._beat_requested = False
                answered = await self._beat(first)
                first = first and not answered
                beaten, pause = self._monotonic(), min(_LONGEST_RETRY_SECONDS, self._interval)
                if answered:  # the jitter keeps the workers of a fleet that started together from beating in step
                    spread = min(self._jitter, self._interval / 2)
                    pause = self._interval + spread * (2 * self._chance() - 1)
            if self._unconfirmed() and (self._confirming is None or self._confirming.done()):
                self._confirming = asyncio.create_task(self._confirm())  # no lost reply shall hold up the beats
            due = beaten + min(pause, self._longest_pause())
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, min(CONFIRM_SECONDS, due - self._monotonic()))):
                    await wake.wait()
            wake.clear()

    def _show_life(self, loop: asyncio.AbstractEventLoop) -> None:
        """Note for the supervisor, again and again, that this loop gets its turns, also while a beat is under way."""
        if self._signs is not None and not self._stopping:
            self._note_life(self._signs)
            loop.call_later(CONFIRM_SECONDS, self._show_life, loop)

    def _note_life(self, signs: VitalSigns) -> None:
        interval = min(self._interval, self._longest_pause())
        signs.show_life(Times(self._monotonic(), interval, self._lease_seconds))

    async def _beat(self, first: bool) -> bool:
        """Send one beat and pass the reply on; returns whether the store answered."""
        awaiting = list(self._awaiting_beat)
        stats = await self._stats()
        about: dict[str, Any] | Unset = self._registration if first else UNSET
        patience = min(self._lease_seconds, self._longest_pause() * _BEATS_PER_TERM) / _TRIES_PER_TERM
        try:
            async with asyncio.timeout(max(patience, _SHORTEST_PATIENCE_SECONDS)):
                worker = await self._store.update_worker(
                    self.worker_id,
                    stats,
                    attempt_ids=list(self._begun),
                    lease_seconds=self._lease_seconds,
                    registration=about,
                )
        except Exception as error:  # noqa: BLE001 - a store may fail in any way, and the next beat may succeed
            if not isinstance(error, (StoreUnavailable, OSError, TimeoutError)):
                self._end_first_beat()  # whoever asks the store for work gets the same error
            self._failures += 1
            if self._failures in (1, 10) or self._failures % 100 == 0:
                _logger.warning("%d consecutive heartbeats failed: %s: %s", self._failures, type(error).__name__, error)
            return False
        self._failures = 0
        self._last_beat = self._monotonic()
        self._end_first_beat()
        for attempt_id in worker.stale_attempt_ids or ():
            self._report_stale(attempt_id)
        for each in awaiting:
            self._awaiting_beat.remove(each)
            if not each.cancelled():
                each.set_result(None)
        if worker.directive is not None and self.on_directive is not None:
            self.on_directive(worker.directive)
        return True

    async def _stats(self) -> dict[str, Any] | Unset:
        """What the machine tells of itself; nothing, if it tells nothing: the worker lives all the same."""
        try:
            # nvidia-smi takes a while
            return await asyncio.to_thread(self._statistics, True) if self._include_gpu else self._statistics(False)
        except Exception as error:  # noqa: BLE001 - whatever is the matter (no free file descriptor, no /proc)
            _logger.debug("a heartbeat goes without statistics: %s: %s", type(error).__name__, error)
            return UNSET

    def _end_first_beat(self) -> None:
        if not self.first_beat.done():
            self.first_beat.set_result(None)

    def _unconfirmed(self) -> list[str]:
        """The attempts that have run for ``CONFIRM_SECONDS`` and are not confirmed."""
        since = self._monotonic() - CONFIRM_SECONDS
        begun = list(self._begun.items())
        return [attempt_id for attempt_id, each in begun if not each.confirmed and each.since <= since]

    async def _confirm(self) -> None:
        """Confirm the claims of the unconfirmed attempts."""
        for attempt_id in self._unconfirmed():
            begun = self._begun.get(attempt_id)
            if begun is None:
                continue
            begun.confirmed = True
            try:
                await self._store.update_attempt(begun.rollout_id, attempt_id, status="running")
            except (Conflict, NotFound):
                self._report_stale(attempt_id)
            except Exception as error:  # noqa: BLE001 - the next beat lists the attempt, which confirms it as well
                _logger.warning("attempt %s is not confirmed yet: %s: %s", attempt_id, type(error).__name__, error)

    def _report_stale(self, attempt_id: str) -> None:
        if attempt_id in self._begun and self.on_stale is not None:
            self.on_stale(attempt_id)


# --- What a worker tells about itself --------------------------------------------------------------------------------


def worker_name(index: int) -> str:
    """The name of this process's worker number ``index``; the same on each call.

    A supervisor sets it by ``AGL_WORKER_NAME``, so that a restarted process keeps the name of its slot.
    Otherwise it is ``{host}-{pid}-{start}-{index}``; the start time tells the process from others that had its pid.
    """
    given = resolve_str_env_var(LightningEnvVar.AGL_WORKER_NAME)
    if given:
        return given
    start = int(psutil.Process().create_time() * 100) & 0xFFFF_FFFF
    return f"{host_part()}-{os.getpid()}-{start:08x}-{index}"


def host_part() -> str:
    """The name of this machine in the form that ids allow."""
    return _NOT_IN_IDS.sub("-", socket.gethostname()).strip("-")[:_HOST_CHARACTERS] or "host"


def registration(labels: dict[str, str] | None = None) -> dict[str, Any]:
    """What a worker says about itself when it starts: host, process, versions, and the user's labels."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_space": process_space(),
        "start_time": psutil.Process().create_time(),
        "python": platform.python_version(),
        "agentlightning": metadata.version("agentlightning"),
        "platform": platform.platform(terse=True),
        "cpus": os.cpu_count(),
        "labels": labels or {},
    }


def process_space() -> str | None:
    """Where this process's pid is valid: the boot id of the machine and the PID namespace.

    Two processes with the same value can look each other up by pid. None: unknown on this platform.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return None


def system_statistics(include_gpu: bool = False) -> dict[str, Any]:
    """CPU (percent since the last call), memory, disk and network (bytes) of the machine, and what this process uses.

    Args:
        include_gpu: also ask ``nvidia-smi``; the list is empty where the program is missing.
    """
    memory, disk, process = psutil.virtual_memory(), psutil.disk_usage("/"), psutil.Process()
    with process.oneshot():
        own = {
            "rss_bytes": process.memory_info().rss,
            "cpu_seconds": sum(process.cpu_times()[:2]),
            "threads": process.num_threads(),
        }
    statistics: dict[str, Any] = {
        "time": time.time(),
        "cpu_percent": psutil.cpu_percent(None),
        "load_average": list(psutil.getloadavg()),
        "memory": {"total_bytes": memory.total, "available_bytes": memory.available, "percent": memory.percent},
        "disk": {"total_bytes": disk.total, "free_bytes": disk.free, "percent": disk.percent, **_disk_traffic()},
        "network": _network_traffic(),
        "process": own,
    }
    if include_gpu:
        statistics["gpus"] = _gpus()
    return statistics


def _disk_traffic() -> dict[str, int]:
    """Bytes read from and written to all disks since the machine started; empty where that is not known."""
    counts = psutil.disk_io_counters()
    return {} if counts is None else {"read_bytes": counts.read_bytes, "written_bytes": counts.write_bytes}


def _network_traffic() -> dict[str, int]:
    """Bytes that went through all network interfaces but loopback since the machine started."""
    counts = [each for name, each in psutil.net_io_counters(pernic=True).items() if not name.startswith("lo")]
    return {
        "received_bytes": sum(each.bytes_recv for each in counts),
        "sent_bytes": sum(each.bytes_sent for each in counts),
    }


def _gpus() -> list[dict[str, str]]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=_GPU_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return [{"error": str(error)}]
    return [dict(zip(_GPU_FIELDS, map(str.strip, line.split(",")), strict=False)) for line in output.splitlines()]
