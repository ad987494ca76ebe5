"""Runs operations on a backend: opens it, sweeps expired deadlines first, and wakes the callers that wait."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

from agentlightning.errors import AgentLightningError, StoreClosed, StoreUnavailable
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
from agentlightning.store.sweep import Alarm, sweep
from agentlightning.store.waits import ClaimWaiters, FinishWaiters

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
        self.finishes = FinishWaiters()
        self.claims = ClaimWaiters()
        self._alarm = Alarm(backend.lease_now, self._ring)
        self._usable = False

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
            while self._something_is_due() and not self.backend.stopped:
                await self.backend.write(sweep)
            if save_touched and not self.backend.stopped:
                await self.backend.write(lambda tx: tx.save_touched())
        except StoreClosed:
            raise
        except StoreUnavailable:
            pass
        return await self.backend.read(operation, rows=rows)

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
                case Finished(rollout_id):
                    self.finishes.finished(rollout_id)
                case Waiting(rollouts):
                    waiting += rollouts
                case Deadline() | Swept():
                    self._alarm.note(event)
                case Directed(worker_ids):
                    self.claims.wake_workers(worker_ids)
                case Stopped(error):
                    self._end_waiting(error)
        if waiting:
            self.claims.wake(waiting)

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
            if self._something_is_due() and self._alarm.next < math.inf:
                self._alarm.set(self._alarm.next)
