"""Runs operations on a backend: opens it, sweeps expired deadlines first, and wakes the callers that wait.

Attempts and workers expire although nobody calls the store. When a deadline has passed, the next call sweeps before it
does anything else, so that no caller sees an expired attempt as running. If there is no call, the alarm sweeps, so that
callers that wait are woken.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import weakref
from collections.abc import Awaitable, Callable
from types import MethodType
from typing import TypeVar, cast

from msgspec.structs import replace

from agentlightning.errors import AgentLightningError, StoreClosed, StoreUnavailable
from agentlightning.lifecycle import attempts, workers
from agentlightning.lifecycle.records import AttemptRow, Holder, Pair, RolloutRow, WorkerRow
from agentlightning.lifecycle.rollouts import Change
from agentlightning.store.backend import (
    Backend,
    Claimed,
    Deadline,
    Directed,
    Ended,
    Event,
    Finished,
    ReadTransaction,
    Renewed,
    Stopped,
    Swept,
    Transaction,
    Waiting,
)
from agentlightning.store.operations.attempts import holder_of, lose_attempts
from agentlightning.store.operations.rows import save, save_worker
from agentlightning.store.tally import Tally
from agentlightning.store.waits import ClaimWaiters, FinishWaiters

T = TypeVar("T")
_log = logging.getLogger(__name__)
_SLICE = 100
"""Rows per transaction of a sweep, so that it does not block other writes for long."""
_RETRY_SWEEP_SECONDS = 1.0
_PULSE_SECONDS = 0.5
_STILL_SECONDS = 3.0
"""A process that did not get to look at its clock for so long stood still. A busy machine alone is not that slow, and
leases leave their holders more than that."""


async def sweep(tx: Transaction) -> bool:
    """Check rows whose deadline has passed, and end what has expired; returns whether more rows are due."""
    now = tx.now()
    due = await tx.due(now.lease, _SLICE)
    holders: dict[str | None, Holder] = {}
    for row in due:
        if isinstance(row, AttemptRow):
            rollout = await tx.get(RolloutRow, row.rollout_id)
            if rollout is None:  # a damaged store; `verify` names the row, and the sweep must not stand still at it
                await tx.put(row, replace(row, deadline=None))
                continue
            if row.worker_id not in holders:
                holders[row.worker_id] = await holder_of(tx, row.worker_id)
            before = Pair(rollout, row)
            await save(tx, Change(*before), Change(*attempts.expire(before, holders[row.worker_id], now)))
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
        holder = await holder_of(tx, worker_id)
        _, more = await lose_attempts(tx, worker_id, workers.silence(worker), holder)
        if more:
            return  # it stays due
        worker = await tx.get(WorkerRow, worker_id) or worker
        after, _ = workers.expire(worker, tx.now())
    await save_worker(tx, worker, after)


class Alarm:
    """The next moment at which something may expire, and a thread that rings when it has passed.

    The moment is possibly early, never late. The thread starts with the first deadline, and ends with ``close``, or
    when nobody holds the object of ``ring`` any more. It looks at the clock all the time, so that it is known when the
    process stood still: those who were to be heard of meanwhile could not be heard.

    Args:
        lease_now: reads the lease clock, in seconds.
        boot_now: reads the clock that tells whether the process stood still.
        ring: called after a deadline has passed, or the process has stood still; it should sweep, which sets the next
            deadline.
    """

    def __init__(self, lease_now: Callable[[], float], boot_now: Callable[[], float], ring: MethodType) -> None:
        self.next = -math.inf
        self.pulse = math.inf
        """When the thread looked last, on the clock of ``boot_now``, and the process was not known to stand still."""
        self._boot_now = weakref.WeakMethod(boot_now)
        # Weak references: the thread must not keep a store alive that nobody uses any more.
        self._lease_now = weakref.WeakMethod(lease_now)
        self._ring = weakref.WeakMethod(ring)
        self._owner = weakref.ref(ring.__self__)
        self._condition = threading.Condition()
        self._rings_at = math.inf
        self._rung_for = math.inf
        """The pulse at which it rang last because the process had stood still."""
        self._closed = False
        self._thread: threading.Thread | None = None

    def note(self, event: Deadline | Swept | Renewed) -> None:
        """Handle an event of a committed transaction. Events come in the order of the commits."""
        match event:
            case Deadline(at):
                following = min(self.next, at)
            case Swept(at):
                following = math.inf if at is None else at
            case Renewed(boot):
                self.pulse = boot
                return
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

    def stood_still(self) -> float:
        """For how many seconds the process has stood still since leases were renewed last; 0 if it has not."""
        since = self._since_pulse()
        return since if since > _STILL_SECONDS else 0.0

    def _since_pulse(self) -> float:
        boot_now = self._boot_now()
        return 0.0 if boot_now is None else boot_now() - self.pulse

    def close(self) -> None:
        """Never ring again; idempotent."""
        self._end()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="agl-sweep", daemon=True)
        boot_now = self._boot_now()
        self.pulse = math.inf if boot_now is None else boot_now()
        try:
            thread.start()
        except RuntimeError as error:  # the system has no more threads; the next deadline tries again
            _log.warning("expired attempts are found only when the store is used: %s", error)
            self.pulse = math.inf
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

    def look(self) -> float:
        """Look at the clocks; returns for how many seconds there is nothing to do. 0: ring now, once."""
        left = self._left()
        if left > 0:
            since = self._since_pulse()  # read once: the process may be stopped at any moment
            if since <= _STILL_SECONDS:
                self.pulse += since
                return min(left, _PULSE_SECONDS)
            if self._rung_for == self.pulse:  # once: should that sweep fail, the next one renews the leases
                return min(left, _PULSE_SECONDS)
            self._rung_for = self.pulse
        self._rings_at = math.inf
        return 0.0

    def ring(self) -> bool:
        """Ring; returns whether there is still somebody to ring for."""
        ring = self._ring()
        if ring is not None:
            ring()
        return ring is not None

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._closed and (pause := self.look()) > 0:
                    self._condition.wait(pause)
                if self._closed:
                    return
            if not self.ring():
                return


class Core:
    """Connects a backend with the deadlines and the waiting callers.

    Args:
        backend: where rows live. It is opened by the first operation.
        alarm: makes the alarm.
    """

    def __init__(self, backend: Backend, alarm: Callable[..., Alarm] = Alarm) -> None:
        self.backend = backend
        self.tally = Tally()
        self.finishes = FinishWaiters()
        self.claims = ClaimWaiters()
        self._alarm = alarm(backend.lease_now, backend.boot_now, self._ring)
        self._usable = False
        self._unattended: set[asyncio.Future[object]] = set()

    def open(self) -> None:
        """Take possession of the data; idempotent. Raises as ``Backend.open``, also in a forked child."""
        if not self._usable or self.backend.forked:
            self.backend.open(self._take_in)
            self._usable = True

    async def close(self) -> None:
        """Finish the accepted operations; callers that still wait get ``StoreClosed``. Idempotent.

        In a forked child it does nothing: a lock that another thread held at the fork stays locked there.
        """
        if self.backend.forked:
            return
        self._usable = False
        self._end_waiting(StoreClosed("the store was closed while this call waited"))
        await asyncio.to_thread(self._alarm.close)
        await self.backend.close()

    def write(self, operation: Callable[[Transaction], Awaitable[T]]) -> Awaitable[T]:
        """Run an operation that writes, after sweeping everything that is due. That may take several transactions."""
        if not self._usable:
            self.open()
        if self.backend.lease_now() < self._alarm.next:
            return self.backend.write(operation)
        return self._sweep_and_write(operation)

    async def _sweep_and_write(self, operation: Callable[[Transaction], Awaitable[T]]) -> T:
        more_is_due = True

        # One operation with its sweep, so that it is accepted at once and also carried out if its caller goes away.
        async def swept_first(tx: Transaction) -> T | None:
            nonlocal more_is_due
            more_is_due = await self._sweep(tx)
            return None if more_is_due else await operation(tx)

        result = None
        while more_is_due:
            result = await self.backend.write(swept_first)
        return cast(T, result)

    def write_unattended(self, operation: Callable[[Transaction], Awaitable[object]]) -> None:
        """``write`` for nobody who waits. If the store takes nothing any more, that is all right."""
        try:
            writing = asyncio.ensure_future(self.write(operation))
        except AgentLightningError:
            return
        self._unattended.add(writing)
        writing.add_done_callback(self._note_unattended)

    def _note_unattended(self, writing: asyncio.Future[object]) -> None:
        self._unattended.discard(writing)
        if not writing.cancelled() and (error := writing.exception()) is not None:
            _log.debug("what a caller left behind was not cleared up: %s", error)

    async def read(
        self, operation: Callable[[ReadTransaction], Awaitable[T]], *, rows: int = 1, save_touched: bool = False
    ) -> T:
        """Run an operation that only reads, after a sweep if one is due.

        A store that cannot write is still read; ``queries.as_of`` then computes what has expired.

        Args:
            operation: reads.
            rows: about how many rows it will read.
            save_touched: make signs of life durable first, because the operation sorts by them.
        """
        self.open()
        try:
            while self._something_is_due() and not self.backend.stopped:
                await self.backend.write(self._sweep)
            if save_touched and not self.backend.stopped:
                await self.backend.write(lambda tx: tx.save_touched())
        except StoreClosed:
            raise
        except StoreUnavailable:
            pass
        return await self.backend.read(operation, rows=rows)

    async def _sweep(self, tx: Transaction) -> bool:
        """``sweep``, after every lease has got a full new term if the process has stood still."""
        lost = self._alarm.stood_still()
        if lost:
            _log.warning("this process stood still for %.1f s: every lease gets a full new term", lost)
            await tx.renew_leases(lost)
            tx.publish(Renewed(self._alarm.pulse + lost))
        return await sweep(tx)

    def _something_is_due(self) -> bool:
        return self.backend.lease_now() >= self._alarm.next

    def _end_waiting(self, error: AgentLightningError) -> None:
        self.finishes.close(error)
        self.claims.close(error)

    def _take_in(self, events: list[Event]) -> None:
        """Handle the events of committed transactions. Called in the order of the commits, from any thread."""
        waiting = 0
        for event in events:
            match event:
                case Finished(rollout_id, status):
                    self.finishes.finished(rollout_id)
                    self.tally.rollout_ended(status)
                case Ended(status, seconds):
                    self.tally.attempt_ended(status, seconds)
                case Waiting(rollouts):
                    waiting += rollouts
                case Claimed(request_id, rollouts):
                    waiting -= rollouts
                    self.claims.wake_request(request_id)
                case Deadline() | Swept() | Renewed():
                    self._alarm.note(event)
                case Directed(worker_ids):
                    self.claims.wake_workers(worker_ids)
                case Stopped(error):
                    self._end_waiting(error)
        if waiting > 0:
            self.claims.wake(waiting)

    def _ring(self) -> None:
        """A deadline has passed and no call has swept: sweep, so that the callers that wait are woken."""
        try:
            while self.backend.write_blocking(self._sweep):
                pass
        except StoreUnavailable as error:
            _log.warning("expired attempts are not swept: %s", error)
        except Exception:  # noqa: BLE001 - the boundary of the alarm's thread
            _log.exception("a sweep failed; it is tried again in %g s", _RETRY_SWEEP_SECONDS)
            self._alarm.set(self.backend.lease_now() + _RETRY_SWEEP_SECONDS)
        else:
            if self._something_is_due() and self._alarm.next < math.inf:
                self._alarm.set(self._alarm.next)
