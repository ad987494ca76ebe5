"""Callers that wait for a change in the store. Events wake them; nothing polls."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence

from agentlightning.errors import AgentLightningError
from agentlightning.lifecycle.rollouts import Change

_READ_AT_ONCE = 64
"""A caller that waits for many rollouts reads them in batches of this size, so that little is left at the last end."""


class _Signal:
    """A one-shot flag that any thread may raise and one loop waits for."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[bool] = self._loop.create_future()

    def raise_flag(self, error: AgentLightningError | None = None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._settle, error)
        except RuntimeError:  # the loop was closed, and with it the caller
            return

    async def wait(self, timeout: float | None) -> bool:
        """Wait until the flag is raised or the time is up; returns whether it was raised. May be called once."""
        end = None if timeout is None else self._loop.call_later(timeout, self._give_up)
        try:
            return await self._future
        finally:
            if end is not None:
                end.cancel()

    def _give_up(self) -> None:
        if not self._future.done():
            self._future.set_result(False)

    def _settle(self, error: AgentLightningError | None) -> None:
        if self._future.done():
            return
        if error is None:
            self._future.set_result(True)
        else:
            self._future.set_exception(error)


class FinishWatch:
    """One caller that waits for rollouts to end."""

    def __init__(self, rollout_ids: Iterable[str]) -> None:
        self.rollout_ids = frozenset(rollout_ids)
        self.pending = set(self.rollout_ids)
        self.ended: set[str] = set()
        """Rollouts that have ended and that the caller has not read yet."""
        self.deleted: dict[str, Change] = {}
        """Rollouts that ended and were deleted while this caller waited for others."""
        self.signal = _Signal()


class FinishWaiters:
    """The callers that wait for rollouts to end, by rollout. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches: dict[str, list[FinishWatch]] = {}
        self._all: set[FinishWatch] = set()

    def watch(self, rollout_ids: Iterable[str]) -> FinishWatch:
        """Record which of these rollouts end from now on.

        The caller reads the store after this, and then calls ``settle`` with the rollouts that have ended already. In
        this order no end is missed between the read and the wait.
        """
        watch = FinishWatch(rollout_ids)
        with self._lock:
            self._all.add(watch)
            for rollout_id in watch.pending:
                self._watches.setdefault(rollout_id, []).append(watch)
        return watch

    def settle(self, watch: FinishWatch, rollout_ids: Iterable[str]) -> None:
        """Note that a caller need not wait for these rollouts."""
        with self._lock:
            watch.pending.difference_update(rollout_ids)

    def take(self, watch: FinishWatch) -> set[str]:
        """The rollouts that have ended since the last call; the caller reads them now."""
        with self._lock:
            ended, watch.ended, watch.signal = watch.ended, set(), _Signal()
            return ended

    def finished(self, rollout_id: str) -> None:
        """A rollout has ended: wake the callers for which it was the last, or that have many to read by now."""
        with self._lock:
            for watch in self._watches.pop(rollout_id, ()):
                watch.pending.discard(rollout_id)
                watch.ended.add(rollout_id)
                if not watch.pending or len(watch.ended) == _READ_AT_ONCE:
                    watch.signal.raise_flag()

    def deleted(self, rollouts: Sequence[Change]) -> None:
        """Ended rollouts were deleted: keep each for the callers that have yet to read it."""
        with self._lock:
            for each in rollouts:
                for watch in self._all:
                    if each.rollout.rollout_id in watch.rollout_ids:
                        watch.deleted[each.rollout.rollout_id] = each

    def unwatch(self, watch: FinishWatch) -> None:
        """Forget a caller that no longer waits."""
        with self._lock:
            self._all.discard(watch)
            for rollout_id in watch.rollout_ids:
                others = [each for each in self._watches.get(rollout_id, ()) if each is not watch]
                if others:
                    self._watches[rollout_id] = others
                else:
                    self._watches.pop(rollout_id, None)

    def close(self, error: AgentLightningError) -> None:
        """The store has stopped or closed: raise ``error`` in every caller that waits."""
        with self._lock:
            for watches in self._watches.values():
                for watch in watches:
                    watch.signal.raise_flag(error)
            self._watches.clear()


class ClaimTicket:
    """The place in line of one caller that waits for a claimable rollout."""

    def __init__(self, worker_id: str | None = None) -> None:
        self.worker_id = worker_id
        self.signal = _Signal()
        self.woken = False
        self.replaced = False


class ClaimWaiters:
    """The callers that wait for claimable rollouts, in the order of arrival. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tickets: OrderedDict[ClaimTicket, str | None] = OrderedDict()
        self._by_request: dict[str, ClaimTicket] = {}

    def join(self, worker_id: str | None, request_id: str | None) -> ClaimTicket:
        """Add a caller to the line; it must look at the queue after this. Replaces a ticket of the same request."""
        ticket = ClaimTicket(worker_id)
        with self._lock:
            if request_id is not None:
                older = self._by_request.get(request_id)
                if older is not None:
                    older.replaced = True
                    self._forget(older)
                    older.signal.raise_flag()
                self._by_request[request_id] = ticket
            self._tickets[ticket] = request_id
        return ticket

    def leave(self, ticket: ClaimTicket, *, will_look: bool) -> None:
        """Leave the line. If this caller was woken but will not look at the queue, the next one is woken instead."""
        with self._lock:
            self._forget(ticket)
            if ticket.woken and not will_look:
                self._wake(1)

    def wake(self, count: int) -> None:
        """Wake one caller for each of ``count`` rollouts that have become claimable."""
        with self._lock:
            self._wake(count)

    def wake_all(self) -> None:
        """Wake all callers, because the number of claimable rollouts is not known."""
        with self._lock:
            self._wake(len(self._tickets))

    def wake_workers(self, worker_ids: Collection[str]) -> None:
        """Wake the callers that claim for these workers, because a directive for them has changed."""
        with self._lock:
            for ticket in [each for each in self._tickets if each.worker_id in worker_ids]:
                self._forget(ticket)
                ticket.signal.raise_flag()

    def close(self, error: AgentLightningError) -> None:
        """The store has stopped or closed: raise ``error`` in every caller that waits."""
        with self._lock:
            for ticket in self._tickets:
                ticket.signal.raise_flag(error)
            self._tickets.clear()
            self._by_request.clear()

    def _wake(self, count: int) -> None:
        for ticket in list(self._tickets)[:count]:
            self._forget(ticket)
            ticket.woken = True
            ticket.signal.raise_flag()

    def _forget(self, ticket: ClaimTicket) -> None:
        request_id = self._tickets.pop(ticket, None)
        if request_id is not None and self._by_request.get(request_id) is ticket:
            del self._by_request[request_id]
