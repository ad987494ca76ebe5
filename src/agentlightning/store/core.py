"""Runs operations on a backend: opens it, sweeps expired deadlines first, and wakes the callers that wait."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar, cast

from agentlightning.errors import AgentLightningError, StoreClosed, StoreUnavailable
from agentlightning.lifecycle.rollouts import Change
from agentlightning.store.backend import (
    Backend,
    Deadline,
    Directed,
    Event,
    Finished,
    ReadTransaction,
    Stopped,
    Swept,
    Transaction,
    Waiting,
)
from agentlightning.store.sweep import Alarm, Deadlines, sweep
from agentlightning.store.waits import ClaimTicket, ClaimWaiters, FinishWaiters, FinishWatch

T = TypeVar("T")
_log = logging.getLogger(__name__)
_RETRY_SWEEP_SECONDS = 1.0


class Core:
    """Connects a backend with the deadlines and the waiting callers.

    Args:
        backend: where rows live. It is opened by the first operation.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._alarm = Alarm(backend.lease_now, self._ring)
        self._deadlines = Deadlines(backend.lease_now, self._alarm.set)
        self._finishes = FinishWaiters()
        self._claims = ClaimWaiters()
        self._open = False
        self._closed = False
        self._no_more_waiting: AgentLightningError | None = None
        self._claims_held = False

    def open(self) -> None:
        """Take possession of the data; idempotent. Raises as ``Backend.open``."""
        if not self._open or self._closed:
            self.backend.open(self._take_in)
            self._open = True

    async def close(self) -> None:
        """Finish the accepted operations; callers that still wait get ``StoreClosed``. Idempotent.

        In a forked child it does nothing: a lock that another thread held at the fork stays locked there.
        """
        if self.backend.forked:
            return
        self._closed = True
        self._end_waiting(StoreClosed("the store was closed while this call waited"))
        await asyncio.to_thread(self._alarm.close)
        await self.backend.close()

    async def write(self, operation: Callable[[Transaction], Awaitable[T]]) -> T:
        """Run an operation that writes, after sweeping everything that is due. That may take several transactions."""
        if not self._open or self._closed:
            self.open()
        if not self._deadlines.passed():
            return await self.backend.write(operation)
        more_is_due = True

        # One operation with its sweep, so that it is accepted at once and also carried out if its caller goes away.
        async def swept_first(tx: Transaction) -> T | None:
            nonlocal more_is_due
            more_is_due = await sweep(tx)
            return None if more_is_due else await operation(tx)

        result = None
        while more_is_due:
            result = await self.backend.write(swept_first)
        return cast(T, result)

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
            while self._deadlines.passed() and not self.backend.stopped:
                await self.backend.write(sweep)
            if save_touched and not self.backend.stopped:
                await self.backend.write(lambda tx: tx.save_touched())
        except StoreClosed:
            raise
        except StoreUnavailable:
            pass
        return await self.backend.read(operation, rows=rows)

    # --- Waiting ---------------------------------------------------------------------------------

    def hold_claims(self) -> None:
        """Hand out nothing until ``release_claims``: claims find the queue empty."""
        self._claims_held = True

    @property
    def claims_held(self) -> bool:
        """Whether nothing is handed out now."""
        return self._claims_held

    def release_claims(self) -> None:
        """Hand out rollouts again, and wake the claims that wait. Idempotent."""
        if self._claims_held:
            self._claims_held = False
            self._claims.wake_all()

    async def claim_or_wait(
        self,
        claim: Callable[[], Awaitable[Sequence[T] | None]],
        worker_id: str | None,
        request_id: str | None,
        wait_seconds: float,
    ) -> Sequence[T]:
        """Claim; while the queue is empty, wait for it to fill and claim again, until the time is up.

        If ``claim`` returns None, its worker must not claim: the result is empty, without a wait.
        """
        self._check_process()

        async def claim_unless_held() -> Sequence[T] | None:
            return () if self._claims_held else await claim()

        clock = asyncio.get_running_loop().time
        until = clock() + wait_seconds
        while True:
            if until - clock() <= 0:
                return await claim_unless_held() or []
            ticket = self._claims.join(worker_id, request_id)
            will_look = False
            try:
                claimed = await claim_unless_held()
                if claimed is None:
                    self._claims.wake(1)  # this ticket may have been woken for a rollout that another worker can take
                    return []
                if claimed or ticket.replaced:
                    return claimed
                called = await self._wait_turn(ticket, until - clock())
                if ticket.replaced or not called:
                    return []
                will_look = True
            finally:
                self._claims.leave(ticket, will_look=will_look)

    async def _wait_turn(self, ticket: ClaimTicket, seconds: float) -> bool:
        """Wait until this ticket is woken; returns whether that happened in time."""
        self._check_waiting()
        return await ticket.signal.wait(seconds)

    def watch(self, rollout_ids: Sequence[str]) -> FinishWatch:
        """Record which of these rollouts end from now on, until ``unwatch``."""
        self._check_process()
        return self._finishes.watch(rollout_ids)

    def _check_process(self) -> None:
        """Raise in a forked child, before it takes a lock that another thread may have held at the fork."""
        if self.backend.forked:
            self.backend.open(self._take_in)  # raises

    def keep_for_waiters(self, deleted: Sequence[Change]) -> None:
        """Give deleted rollouts to those who wait for them: they have ended, and cannot be read any more."""
        self._finishes.deleted(deleted)

    def unwatch(self, watch: FinishWatch) -> None:
        """Forget a watch."""
        self._finishes.unwatch(watch)

    def settle(self, watch: FinishWatch, rollout_ids: Iterable[str]) -> None:
        """Do not wait for these rollouts: they had ended before, or are unknown."""
        self._finishes.settle(watch, rollout_ids)

    async def next_ends(self, watch: FinishWatch, until: float | None) -> set[str]:
        """Wait until watched rollouts have ended: the last of them, or enough to read them together.

        Args:
            until: the time of the event loop at which the wait ends; None: no limit.

        Returns:
            Those that have ended since the last call; none if the time is up.
        """
        seconds = None if until is None else until - asyncio.get_running_loop().time()
        if watch.pending and (seconds is None or seconds > 0):
            self._check_waiting()
            await watch.signal.wait(seconds)
        return self._finishes.take(watch)

    def _end_waiting(self, error: AgentLightningError) -> None:
        """Raise ``error`` in every caller that waits, now and from now on."""
        self._no_more_waiting = error
        self._finishes.close(error)
        self._claims.close(error)

    def _check_waiting(self) -> None:
        error = self._no_more_waiting
        if error is not None:
            raise type(error)(error.message) from error

    # --- Events ----------------------------------------------------------------------------------

    def _take_in(self, events: list[Event]) -> None:
        """Handle the events of committed transactions. Called in the order of the commits, from any thread."""
        waiting = 0
        for event in events:
            match event:
                case Finished(rollout_id):
                    self._finishes.finished(rollout_id)
                case Waiting(rollouts):
                    waiting += rollouts
                case Deadline() | Swept():
                    self._deadlines.note(event)
                case Directed(worker_ids):
                    self._claims.wake_workers(worker_ids)
                case Stopped(error):
                    self._end_waiting(error)
        if waiting:
            self._claims.wake(waiting)

    def _ring(self) -> None:
        """A deadline has passed and no call has swept: sweep, so that the callers that wait are woken."""
        try:
            while self.backend.write_blocking(sweep):
                pass
        except StoreUnavailable as error:
            _log.warning("expired attempts are not swept: %s", error)
        except Exception:  # noqa: BLE001 - the boundary of the alarm's thread
            _log.exception("a sweep failed; it is tried again in %g s", _RETRY_SWEEP_SECONDS)
            self._alarm.set(self.backend.lease_now() + _RETRY_SWEEP_SECONDS)
        else:
            if self._deadlines.passed() and self._deadlines.next < math.inf:
                self._alarm.set(self._deadlines.next)
