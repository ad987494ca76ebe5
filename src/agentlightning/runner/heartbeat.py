"""The heart of a worker: tells the store that it lives, and hears what the store has to say.

It beats in a thread with an event loop of its own, so that an agent which keeps the runner's loop busy does not
look dead. With each beat go the attempts that the worker holds; the reply names those that it has lost, and whether
the worker has been asked to drain or to stop. New attempts are confirmed here, too, for the same reason.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import psutil

from agentlightning.errors import Conflict, NotFound
from agentlightning.store.base import LightningStore
from agentlightning.types import UNSET, AttemptedRollout, Unset

# --- How a worker's process and machine are doing, for its heartbeat ---

_GPU_FIELDS = ("index", "name", "utilization.gpu", "memory.used", "memory.total")
_GPU_SECONDS = 5.0


def system_snapshot(include_gpu: bool = False) -> dict[str, Any]:
    """CPU (percent since the last call), memory and disk (bytes) of the machine and of this process, as JSON.

    Args:
        include_gpu: also ask ``nvidia-smi``; the list is empty where there is none.
    """
    memory, disk, process = psutil.virtual_memory(), psutil.disk_usage("/"), psutil.Process()
    with process.oneshot():
        own = {
            "rss_bytes": process.memory_info().rss,
            "cpu_seconds": sum(process.cpu_times()[:2]),
            "threads": process.num_threads(),
        }
    snapshot: dict[str, Any] = {
        "time": time.time(),
        "cpu_percent": psutil.cpu_percent(None),
        "load_average": list(psutil.getloadavg()),
        "memory": {"total_bytes": memory.total, "available_bytes": memory.available, "percent": memory.percent},
        "disk": {"total_bytes": disk.total, "free_bytes": disk.free, "percent": disk.percent},
        "process": own,
    }
    if include_gpu:
        snapshot["gpus"] = _gpus()
    return snapshot


def _gpus() -> list[dict[str, str]]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=_GPU_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return [{"error": str(error)}]
    return [dict(zip(_GPU_FIELDS, map(str.strip, line.split(",")), strict=False)) for line in told.splitlines()]


# ---

Directive: TypeAlias = Literal["drain", "stop"]

CONFIRM_SECONDS = 0.25
"""An attempt that is held for longer than this is confirmed. Shorter ones are confirmed by their spans or their end."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeartSettings:
    """How a heart beats. All times in seconds."""

    interval_seconds: float
    jitter_seconds: float
    lease_seconds: float
    """How long the store waits for a beat before it counts the worker as lost."""
    include_gpu: bool
    in_thread: bool
    """Whether it beats in a thread of its own, or in the loop of the runner."""
    registration: dict[str, Any]


@dataclass
class _Held:
    """An attempt that the worker works on."""

    rollout_id: str
    since: float
    confirmed: bool = False


class Heart:
    """Beats from ``start`` to ``stop``.

    Args:
        store: whom to tell.
        worker_id: who beats.
        settings: how.
    """

    def __init__(self, store: LightningStore, worker_id: str, settings: HeartSettings) -> None:
        self.on_stale: Callable[[str], None] | None = None
        """Called, in the thread of the heart, with the id of each attempt that the store says is lost."""
        self.on_directive: Callable[[Directive], None] | None = None
        """Called, in the thread of the heart, when the worker is asked to drain or to stop."""
        self.first_beat: Future[None] = Future()
        """Done when the store knows the worker."""
        self._store = store
        self._worker_id = worker_id
        self._settings = settings
        self._held: dict[str, _Held] = {}
        self._thread: threading.Thread | None = None
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None
        self._now = False
        self._stopping = False
        self._missed = 0
        self._beaten_at = math.inf
        self._awaited: list[Future[None]] = []

    def start(self) -> None:
        """Begin to beat, in a thread. In the runner's loop instead, if so set, it begins with ``start_in_loop``."""
        if self._settings.in_thread and self._thread is None:
            self._thread = threading.Thread(
                target=lambda: asyncio.run(self._beat_on()), name="agentlightning-heart", daemon=True
            )
            self._thread.start()

    def start_in_loop(self) -> None:
        """Begin to beat in the running loop, if so set and not done yet."""
        if not self._settings.in_thread and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._beat_on(), name="agentlightning-heart")

    def stop(self) -> None:
        """Beat no more. A thread has ended after; a task of the runner's loop ends with its next turn."""
        self._stopping = True
        self._call(lambda: self._wake and self._wake.set())
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        if self._task is not None and self._loop is not None and not self._loop.is_closed():
            self._call(self._task.cancel)

    def beat_now(self) -> None:
        """Beat at once, because the reply may have something to say."""
        self._now = True
        self._call(lambda: self._wake and self._wake.set())

    def caught_up(self) -> Future[None] | None:
        """For a worker that was silent for longer than its lease (stopped, cut off): done with its next beat.

        By then it has back what it still may work on, and knows what it has lost. Else None.
        """
        if time.monotonic() - self._beaten_at < self._settings.lease_seconds:
            return None
        caught_up: Future[None] = Future()
        self._awaited.append(caught_up)
        self.beat_now()
        return caught_up

    def hold(self, rollout: AttemptedRollout) -> None:
        """The worker works on this attempt from now on."""
        self._held[rollout.attempt.attempt_id] = _Held(rollout.rollout_id, time.monotonic())

    def release(self, attempt_id: str) -> None:
        """The worker is done with this attempt."""
        self._held.pop(attempt_id, None)

    def _call(self, function: Callable[[], object]) -> None:
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # closed meanwhile
                loop.call_soon_threadsafe(function)

    # --- In the thread ---------------------------------------------------------------------------

    async def _beat_on(self) -> None:
        self._loop, self._wake = asyncio.get_running_loop(), asyncio.Event()
        due, first = 0.0, True
        while not self._stopping:
            if self._now or time.monotonic() >= due:
                self._now = False
                beaten = await self._beat(first)
                first = first and not beaten
                due = time.monotonic() + (self._pause() if beaten else min(1.0, self._settings.interval_seconds))
            await self._confirm()
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, min(CONFIRM_SECONDS, due - time.monotonic()))):
                    await self._wake.wait()
            self._wake.clear()
        self._loop = self._wake = None

    def _pause(self) -> float:
        spread = min(self._settings.jitter_seconds, self._settings.interval_seconds / 2)
        return self._settings.interval_seconds + random.uniform(-spread, spread)

    async def _beat(self, first: bool) -> bool:
        """Tell the store, and pass on its answer; whether it could be told."""
        settings, awaited = self._settings, list(self._awaited)
        stats = await self._snapshot()
        registration: dict[str, Any] | Unset = settings.registration if first else UNSET
        try:
            worker = await self._store.update_worker(
                self._worker_id,
                stats,
                attempt_ids=list(self._held),
                lease_seconds=settings.lease_seconds,
                registration=registration,
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, the next beat may get through
            self._missed += 1
            if self._missed in (1, 10) or self._missed % 100 == 0:
                _logger.warning("heartbeat %d in a row not taken: %s: %s", self._missed, type(error).__name__, error)
            return False
        self._missed = 0
        self._beaten_at = time.monotonic()
        if not self.first_beat.done():
            self.first_beat.set_result(None)
        for attempt_id in worker.stale_attempt_ids or ():
            self._lost(attempt_id)
        for each in awaited:
            self._awaited.remove(each)
            if not each.cancelled():
                each.set_result(None)
        if worker.directive is not None and self.on_directive is not None:
            self.on_directive(worker.directive)
        return True

    async def _snapshot(self) -> dict[str, Any]:
        if self._settings.include_gpu:  # asks another program, which takes a while
            return await asyncio.to_thread(system_snapshot, True)
        return system_snapshot()

    async def _confirm(self) -> None:
        """Confirm the claims of attempts that go on for a while."""
        since = time.monotonic() - CONFIRM_SECONDS
        for attempt_id, held in list(self._held.items()):
            if held.confirmed or held.since > since:
                continue
            held.confirmed = True
            try:
                await self._store.update_attempt(held.rollout_id, attempt_id, status="running")
            except (Conflict, NotFound):
                self._lost(attempt_id)
            except Exception as error:  # noqa: BLE001 - the next beat names the attempt, which confirms it as well
                _logger.warning("attempt %s not confirmed yet: %s: %s", attempt_id, type(error).__name__, error)

    def _lost(self, attempt_id: str) -> None:
        if attempt_id in self._held and self.on_stale is not None:
            self.on_stale(attempt_id)
