"""Callers that wait for a change in the store. Events wake them; nothing polls. Safe to use from any thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from typing import TypeVar

from agentlightning.errors import AgentLightningError
from agentlightning.lifecycle.rollouts import Change
from agentlightning.store.operations.attempts import ClaimRequest

T = TypeVar("T")

_READ_AT_ONCE = 64
"""A caller that waits for many rollouts reads them in batches of this size, so that little is left at the last end."""


class _Caller:
    """One caller, in its event loop. Any thread may wake it, once."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._woken = self._loop.create_future()
        self._error: AgentLightningError | None = None

    def wake(self, error: AgentLightningError | None = None) -> None:
        """End its wait; with ``error``, which is raised there, if there is one."""
        with suppress(RuntimeError):  # the loop was closed, and with it the caller
            self._loop.call_soon_threadsafe(self._wake, error)

    def _wake(self, error: AgentLightningError | None) -> None:
        if not self._woken.done():
            self._error = error
            self._woken.set_result(None)

    async def wait(self, seconds: float | None) -> bool:
        """Wait to be woken, at most for so long; returns whether that happened."""
        await asyncio.wait((self._woken,), timeout=seconds)
        if self._error is not None:
            raise self._error
        return self._woken.done()


class _Waiters:
    """Callers that wait, until the store has stopped or closed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: set[_Caller] = set()
        self._error: AgentLightningError | None = None

    async def _wait(self, caller: _Caller, seconds: float | None) -> bool:
        with self._lock:
            if self._error is not None:
                raise type(self._error)(self._error.message) from self._error
            self._waiting.add(caller)
        try:
            return await caller.wait(seconds)
        finally:
            with self._lock:
                self._waiting.discard(caller)

    def close(self, error: AgentLightningError) -> None:
        """Raise ``error`` in every caller that waits, now and from now on."""
        with self._lock:
            self._error = error
            for caller in self._waiting:
                caller.wake(error)


class _Watch:
    """One caller that waits for rollouts to end."""

    def __init__(self, rollout_ids: Collection[str]) -> None:
        self.rollout_ids = frozenset(rollout_ids)
        self.pending = set(rollout_ids)
        self.ended: set[str] = set()
        """Rollouts that have ended and that the caller has not read yet."""
        self.deleted: dict[str, Change] = {}
        """Rollouts that ended and were deleted while this caller waited for others."""
        self.caller = _Caller()


class FinishWaiters(_Waiters):
    """The callers that wait for rollouts to end, by rollout."""

    def __init__(self) -> None:
        super().__init__()
        self._watches: dict[str, list[_Watch]] = {}

    async def wait(
        self,
        rollout_ids: Collection[str],
        read: Callable[[Collection[str]], Awaitable[dict[str, Change]]],
        seconds: float | None,
    ) -> dict[str, Change]:
        """Wait until these rollouts have ended, or the time is up; returns what is known of them, by id.

        Args:
            rollout_ids: no id twice.
            read: looks rollouts up in the store.
            seconds: how long to wait at most; None: without a limit.
        """
        clock = asyncio.get_running_loop().time
        until = None if seconds is None else clock() + seconds
        watch = _Watch(rollout_ids)
        with self._lock:
            for rollout_id in rollout_ids:
                self._watches.setdefault(rollout_id, []).append(watch)
        try:
            rows = await read(rollout_ids)  # after the caller has joined, so that no end is missed in between
            with self._lock:
                watch.pending.intersection_update(each for each, (rollout, _) in rows.items() if not rollout.final)
            while True:
                left = None if until is None else until - clock()
                if watch.pending and (left is None or left > 0):
                    await self._wait(watch.caller, left)
                with self._lock:
                    ended, watch.ended, watch.caller = watch.ended, set(), _Caller()
                if not ended:
                    return rows | watch.deleted
                rows |= await read(ended)
        finally:
            self._forget(watch)

    def finished(self, rollout_id: str) -> None:
        """A rollout has ended: wake the callers for which it was the last, or that have many to read by now."""
        with self._lock:
            for watch in self._watches.get(rollout_id, ()):
                watch.pending.discard(rollout_id)
                watch.ended.add(rollout_id)
                if not watch.pending or len(watch.ended) == _READ_AT_ONCE:
                    watch.caller.wake()

    def deleted(self, rollouts: Sequence[Change]) -> None:
        """Ended rollouts were deleted, and cannot be read any more: keep each for those who have yet to read it."""
        with self._lock:
            for each in rollouts:
                for watch in self._watches.get(each.rollout.rollout_id, ()):
                    watch.deleted[each.rollout.rollout_id] = each

    def _forget(self, watch: _Watch) -> None:
        with self._lock:
            for rollout_id in watch.rollout_ids:
                watches = self._watches[rollout_id]
                watches.remove(watch)
                if not watches:
                    del self._watches[rollout_id]


class _Ticket(_Caller):
    """The place in line of one caller that waits for a claimable rollout."""

    def __init__(self, wanted: ClaimRequest) -> None:
        super().__init__()
        self.wanted = wanted
        self.called = False
        self.replaced = False
        self.offered_in: object = None
        """The last transaction that claimed, or looked for something to claim, for this caller."""


class ClaimWaiters(_Waiters):
    """The callers that wait for claimable rollouts, in the order of arrival."""

    def __init__(self) -> None:
        super().__init__()
        self._line: dict[_Ticket, None] = {}
        self._by_request: dict[str, _Ticket] = {}
        self.held = False
        """Whether nothing is handed out: claims find the queue empty."""

    def release(self) -> None:
        """Hand out rollouts again, and wake the claims that wait. Idempotent."""
        if self.held:
            self.held = False
            self.wake(len(self._line))

    async def claim_or_wait(
        self,
        claim: Callable[[bool], Awaitable[Sequence[T] | None]],
        wanted: ClaimRequest,
        seconds: float,
        abandon: Callable[[], None],
    ) -> Sequence[T]:
        """Claim; while the queue is empty, wait for it to fill and claim again, until the time is up.

        Args:
            claim: claims what is ``wanted``; is told whether the caller has waited. If it returns None, it will never
                get anything: the result is empty, without a wait.
            wanted: if it has a ``request_id``, others may make the claim meanwhile (``offer``); ``claim`` then finds
                its attempts.
            seconds: how long to wait at most.
            abandon: called if this caller is cancelled after others may have made the claim.
        """
        clock = asyncio.get_running_loop().time
        until = clock() + seconds
        waited = False
        while clock() < until:
            ticket = self._join(wanted)
            will_look = False
            try:
                claimed = () if self.held else await claim(waited)
                if claimed is None:
                    self.wake(1)  # this ticket may have been called for a rollout that another worker can take
                    return []
                if claimed or ticket.replaced:
                    return claimed
                called = await self._wait(ticket, until - clock())
                if ticket.replaced or (not called and self._give_up(ticket)):
                    return []
                will_look = waited = True
            except asyncio.CancelledError:
                self._leave(ticket, will_look=False)  # nobody claims for it from now on
                if ticket.offered_in is not None and not ticket.replaced:
                    abandon()
                raise
            finally:
                self._leave(ticket, will_look=will_look)
        return [] if self.held else await claim(waited) or []

    def wake(self, count: int) -> None:
        """Wake one caller for each of ``count`` rollouts that have become claimable."""
        if not self._line:  # who joins it only now looks at the queue after this
            return
        with self._lock:
            self._call_next(count)

    def offer(self, transaction: object, count: int) -> list[ClaimRequest]:
        """What the callers want who are next in line for ``count`` rollouts, so that a transaction that fills the queue
        can claim for them: then they need not wait for two commits, one after the other. Each transaction gets
        a claim once, and only those that can be repeated."""
        if not self._line or self.held:
            return []
        with self._lock:
            first = [each for each in self._line if each.offered_in is not transaction][:count]
            for each in first:
                each.offered_in = transaction
        return [each.wanted for each in first if each.wanted.request_id is not None]

    def wake_request(self, request_id: str) -> None:
        """Wake the caller whose claim was made for it."""
        with self._lock:
            ticket = self._by_request.get(request_id)
            if ticket is not None:
                self._call(ticket)

    def wake_workers(self, worker_ids: Collection[str]) -> None:
        """Wake the callers that claim for these workers, because a directive for them has changed."""
        with self._lock:
            for ticket in [each for each in self._line if each.wanted.worker_id in worker_ids]:
                self._forget(ticket)
                ticket.wake()

    def _join(self, wanted: ClaimRequest) -> _Ticket:
        """Add a caller to the line, which looks at the queue after this. Replaces a ticket of the same request."""
        ticket, request_id = _Ticket(wanted), wanted.request_id
        with self._lock:
            if request_id is not None:
                older = self._by_request.get(request_id)
                if older is not None:
                    older.replaced = True
                    self._forget(older)
                    older.wake()
                self._by_request[request_id] = ticket
            self._line[ticket] = None
        return ticket

    def _leave(self, ticket: _Ticket, *, will_look: bool) -> None:
        """Leave the line; idempotent. If this caller was called but will not look at the queue, the next one is called
        instead."""
        with self._lock:
            self._forget(ticket)
            if ticket.called and not will_look:
                ticket.called = False
                self._call_next(1)

    def _call_next(self, count: int) -> None:
        for ticket in list(self._line)[:count]:
            self._call(ticket)

    def _call(self, ticket: _Ticket) -> None:
        self._forget(ticket)
        ticket.called = True
        ticket.wake()

    def _give_up(self, ticket: _Ticket) -> bool:
        """Leave the line because the time is up; returns False if a claim may have been made for this caller."""
        with self._lock:
            self._forget(ticket)
            return ticket.offered_in is None

    def _forget(self, ticket: _Ticket) -> None:
        self._line.pop(ticket, None)
        request_id = ticket.wanted.request_id
        if request_id is not None and self._by_request.get(request_id) is ticket:
            del self._by_request[request_id]
