"""Deadlines: attempts and workers expire although nobody calls the store.

When a deadline has passed, the next call sweeps before it does anything else, so that no caller sees an expired
attempt as running. If there is no call, the alarm sweeps, so that callers that wait are woken.
"""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections.abc import Callable
from types import MethodType

from msgspec.structs import replace

from agentlightning.lifecycle import attempts, reasons, workers
from agentlightning.lifecycle.records import AttemptRow, Pair, Reason, RolloutRow, WorkerRow
from agentlightning.lifecycle.rollouts import Change
from agentlightning.store.backend import Deadline, Swept, Transaction
from agentlightning.store.operations.attempts import lose_attempts
from agentlightning.store.operations.rows import save, save_worker

_log = logging.getLogger(__name__)
_SLICE = 200
"""Rows per transaction, so that a sweep does not block other writes for long."""


async def sweep(tx: Transaction) -> bool:
    """Check rows whose deadline has passed, and end what has expired; returns whether more rows are due."""
    now = tx.now()
    due = await tx.due(now.lease, _SLICE)
    for row in due:
        if isinstance(row, AttemptRow):
            rollout = await tx.get(RolloutRow, row.rollout_id)
            if rollout is None:  # a damaged store; `verify` names the row, and the sweep must not stand still at it
                await tx.put(row, replace(row, deadline=None))
                continue
            before = Pair(rollout, row)
            await save(tx, Change(*before), Change(*attempts.expire(before, now)))
    for row in due:
        if isinstance(row, WorkerRow):
            await _look_at_worker(tx, row.worker_id)
    following = await tx.next_deadline()
    tx.publish(Swept(following))
    return following is not None and following <= now.lease


async def _look_at_worker(tx: Transaction, worker_id: str) -> None:
    worker = await tx.get(WorkerRow, worker_id)
    if worker is None:
        return
    after, lost = workers.expire(worker, tx.now())
    if lost:
        silence = f"worker {worker_id!r} sent no heartbeat for {worker.lease_seconds:g} s"
        await lose_attempts(tx, worker_id, Reason(reasons.WORKER_LOST, silence))
        worker = await tx.get(WorkerRow, worker_id) or worker
        after, _ = workers.expire(worker, tx.now())
    await save_worker(tx, worker, after)


class Alarm:
    """The next moment at which something may expire, and a thread that rings when it has passed.

    The moment is possibly early, never late. The thread starts with the first deadline, and ends with ``close``, or
    when nobody holds the object of ``ring`` any more.

    Args:
        lease_now: reads the lease clock, in seconds.
        ring: called after a deadline has passed; it should sweep, which sets the next one.
    """

    def __init__(self, lease_now: Callable[[], float], ring: MethodType) -> None:
        self.next = -math.inf
        # Weak references: the thread must not keep a store alive that nobody uses any more.
        self._lease_now = weakref.WeakMethod(lease_now)
        self._ring = weakref.WeakMethod(ring)
        self._owner = weakref.ref(ring.__self__)
        self._condition = threading.Condition()
        self._rings_at = math.inf
        self._closed = False
        self._thread: threading.Thread | None = None

    def note(self, event: Deadline | Swept) -> None:
        """Handle an event of a committed transaction. Events come in the order of the commits."""
        match event:
            case Deadline(at):
                following = min(self.next, at)
            case Swept(at):
                following = math.inf if at is None else at
        if following != self.next:
            self.next = following
            self.set(following)

    def set(self, moment: float) -> None:
        """Ring at this moment of the lease clock, and no longer at the one set before."""
        with self._condition:
            self._rings_at = moment
            if self._thread is None and moment < math.inf and not self._closed:
                self._start()
            else:
                self._condition.notify()

    def close(self) -> None:
        """Never ring again; idempotent."""
        self._end()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="agl-sweep", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system has no more threads; the next deadline tries again
            _log.warning("expired attempts are found only when the store is used: %s", error)
            return
        self._thread = thread
        weakref.finalize(self._owner(), self._end).atexit = False

    def _end(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify()

    def _left(self) -> float:
        """Seconds until it rings; 0 if there is no clock any more."""
        lease_now = self._lease_now()
        return 0.0 if lease_now is None else self._rings_at - lease_now()

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._closed and (left := self._left()) > 0:
                    self._condition.wait(None if left == math.inf else min(left, threading.TIMEOUT_MAX))
                if self._closed:
                    return
                self._rings_at = math.inf
            ring = self._ring()
            if ring is None:
                return
            ring()
            del ring
