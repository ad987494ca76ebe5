"""Sending again what may have been lost.

Every request of the client is repeatable (its ids are minted before it is first sent), so a reply that
does not come, and a status that says "not now", lead to the same bytes being sent again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from agentlightning.errors import StoreUnreachable
from agentlightning.store.client_server.resilience.backoff import Backoff, retry_after_seconds
from agentlightning.store.client_server.resilience.retry_budget import RetryBudget
from agentlightning.store.client_server.resilience.transport import (
    RequestShed,
    Transport,
    WireReply,
    WireRequest,
    is_transient,
)

__all__ = ["RetryWatcher", "Retrying"]

_INTERNAL_ERROR_TRIES = 4
"""How often a request is sent that the server answers with 500. That is a bug on the other side: it may be a
passing one, but nothing is gained by insisting."""
_LOOK_UP_SECONDS = 1.0
"""How often a call that waits looks whether the server has answered another one meanwhile."""


class RetryWatcher(Protocol):
    """Hears of what the retries do."""

    def retried(self, request: WireRequest, why: str, delay_seconds: float) -> None:
        """A request is sent again after this delay."""
        ...

    def gave_up(self, request: WireRequest, why: str) -> None:
        """A request is not sent again."""
        ...


class Retrying:
    """A `Transport` that tries again until there is an answer or the caller's patience has run out.

    Statuses of 4xx are answers, apart from 408, 425 and 429. ``Retry-After`` is a lower bound for the next delay.
    Time that the circuit breaker holds a request back counts against the patience, not against the budget. A call that
    waits because nobody answered goes on as soon as the server has answered any other, a probe for example: otherwise
    an outage would last longer for those who have waited for long, and a server that comes and goes would be missed.

    Args:
        inner: makes one try.
        server: the server's address, for messages.
        backoff: the delays between tries.
        budget: bounds the retries of all requests together.
        monotonic: seconds since some moment.
        watcher: hears of retries.
        answers: how many calls the server has answered; any number that grows with each.
        gate: asked before each retry whether the server is there at all; if not, the request is given up.
    """

    def __init__(
        self,
        inner: Transport,
        *,
        server: str,
        backoff: Backoff,
        budget: RetryBudget,
        monotonic: Callable[[], float],
        watcher: RetryWatcher,
        answers: Callable[[], int],
        gate: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        self._inner = inner
        self._server = server
        self._backoff = backoff
        self._budget = budget
        self._monotonic = monotonic
        self._watcher = watcher
        self._answers = answers
        self._gate = gate

    async def send(self, request: WireRequest) -> WireReply:
        """The server's answer, or the last "not now" when the patience has run out.

        Raises:
            StoreUnreachable: no try brought a reply.
        """
        started = self._monotonic()
        deadline = started + request.patience_seconds
        failed = 0
        self._budget.earn()
        while True:
            try:
                reply = await self._inner.send(self._within(request, deadline))
            except RequestShed as shed:
                remaining = deadline - self._monotonic()
                if remaining <= 0 or not request.waits_while_shed:
                    raise self._unreachable(request, failed, started, shed) from shed
                await asyncio.sleep(min(shed.retry_after_seconds, remaining))
                continue
            except StoreUnreachable as lost:
                failed += 1
                delay = await self._delay(request, failed, None, deadline)
                if delay is None:
                    self._watcher.gave_up(request, str(lost))
                    raise self._unreachable(request, failed, started, lost) from lost
                why, until_answer = str(lost), True
            else:
                if not is_transient(reply.status):
                    return reply
                failed += 1
                delay = await self._delay(request, failed, reply, deadline)
                why, until_answer = f"status {reply.status}", False
                if delay is None:
                    self._watcher.gave_up(request, why)
                    return reply
            self._watcher.retried(request, why, delay)
            await self._pause(delay, until_answer)

    async def _pause(self, seconds: float, until_answer: bool) -> None:
        """Wait before the next try; no longer than until the server answers somebody, if that is what is missing."""
        ends_at = self._monotonic() + seconds
        answered = self._answers()
        while (left := ends_at - self._monotonic()) > 0:
            await asyncio.sleep(min(left, _LOOK_UP_SECONDS))
            if until_answer and self._answers() != answered:
                return

    def _within(self, request: WireRequest, deadline: float) -> WireRequest:
        """The request with a timeout that ends with the caller's patience."""
        remaining = max(deadline - self._monotonic(), 0.001)
        return request if remaining >= request.timeout_seconds else request._replace(timeout_seconds=remaining)

    async def _delay(self, request: WireRequest, failed: int, reply: WireReply | None, deadline: float) -> float | None:
        """Seconds before the next try; None if there shall be none."""
        if reply is not None and reply.status == 500 and failed >= _INTERNAL_ERROR_TRIES:
            return None
        delay = self._backoff.delay(failed)
        if delay is None:
            return None
        asked = None if reply is None else retry_after_seconds(reply.headers.get("Retry-After"))
        if asked is not None:
            delay += asked  # on top, so that those who were told the same moment do not all come at it
        delay = max(delay, self._budget.spend())
        if self._monotonic() + delay >= deadline or (self._gate is not None and not await self._gate()):
            self._budget.refund()
            return None
        return delay

    def _unreachable(
        self, request: WireRequest, failed: int, started: float, last: StoreUnreachable | RequestShed
    ) -> StoreUnreachable:
        seconds = self._monotonic() - started
        tries = "1 try" if failed == 1 else f"{failed} tries"
        return StoreUnreachable(
            f"{self._server} did not answer {request.method} {request.target.partition('?')[0]} "
            f"({tries} in {seconds:.1f} s; the last: {last.message}). Check that the server runs and that the address "
            "is right. Whether it did what was asked is unknown; a repeat with the same ids is safe"
        )
