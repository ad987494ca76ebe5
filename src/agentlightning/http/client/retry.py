"""Sending again what may have been lost.

Every request of the client is repeatable (its ids are minted before it is first sent), so a reply that
does not come, and a status that says "not now", lead to the same bytes being sent again.
"""

from __future__ import annotations

import asyncio
import email.utils
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from agentlightning.errors import StoreClosed, StoreUnreachable
from agentlightning.http.client.transport import RequestShed, Transport, WireReply, WireRequest, is_transient


class RetryBudget:
    """Tokens for retries: some for each first try, some with time. Who finds none waits for one; nobody is refused.

    Args:
        ratio: retries earned by each first try.
        per_second: retries earned by each second, so that a quiet client can retry too.
        capacity: the most that can be saved up.
        monotonic: seconds since some moment.
    """

    def __init__(self, *, ratio: float, per_second: float, capacity: float, monotonic: Callable[[], float]) -> None:
        self._ratio = ratio
        self._per_second = per_second
        self._capacity = capacity
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._tokens = capacity
        self._at = monotonic()

    def earn(self) -> None:
        """A first try is made."""
        with self._lock:
            self._tokens = min(self._capacity, self._tokens + self._ratio)

    def spend(self) -> float:
        """Take a token for a retry; returns the seconds to wait until it is there."""
        with self._lock:
            now = self._monotonic()
            self._tokens = min(self._capacity, self._tokens + (now - self._at) * self._per_second)
            self._at = now
            self._tokens -= 1
            return max(0.0, -self._tokens / self._per_second)

    def refund(self) -> None:
        """A token that was taken is not used after all."""
        with self._lock:
            self._tokens = min(self._capacity, self._tokens + 1)


_LONGEST_RETRY_AFTER = 3600.0


class Backoff(Protocol):
    """Says how long to wait after a number of failed tries."""

    def delay(self, failed_tries: int) -> float | None:
        """Seconds before the next try; None: there shall be none."""
        ...


class FullJitter:
    """Exponential back-off with full jitter: a random time up to ``base * 2 ** n``, at most ``cap``.

    Spreading over the whole interval is what keeps many clients from returning together (M. Brooker,
    "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).

    Args:
        base_seconds: the most that is waited before the second try.
        cap_seconds: the most that is waited before any try.
        random: a number from 0 up to 1.
    """

    def __init__(self, base_seconds: float, cap_seconds: float, random: Callable[[], float]) -> None:
        self._base = base_seconds
        self._cap = cap_seconds
        self._random = random

    def delay(self, failed_tries: int) -> float | None:
        """Seconds before the next try; never None."""
        return self._random() * min(self._cap, self._base * 2.0 ** min(failed_tries - 1, 60))


class FixedDelays:
    """The delays that a caller lists, and no more tries than they allow.

    Args:
        delays: seconds before the second, third, … try.
    """

    def __init__(self, delays: Sequence[float]) -> None:
        self._delays = tuple(delays)

    def delay(self, failed_tries: int) -> float | None:
        """Seconds before the next try; None after the last of the delays."""
        return self._delays[failed_tries - 1] if failed_tries <= len(self._delays) else None


def retry_after_seconds(value: str | None, wall: Callable[[], float] = time.time) -> float | None:
    """What a ``Retry-After`` header asks for (RFC 9110, section 10.2.3: seconds, or a date); None if it is no such.

    Args:
        value: the header's text, or None if there was none.
        wall: Unix seconds now, which a date is compared with.
    """
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:9]), _LONGEST_RETRY_AFTER)
    try:
        moment = email.utils.parsedate_to_datetime(text)
        seconds = moment.timestamp() - wall()
    except (ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0), _LONGEST_RETRY_AFTER)


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
        on_use: called at each request.
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
        on_use: Callable[[], None] | None = None,
    ) -> None:
        self._inner = inner
        self._server = server
        self._backoff = backoff
        self._budget = budget
        self._monotonic = monotonic
        self._watcher = watcher
        self._answers = answers
        self._gate = gate
        self._on_use = on_use
        self._under_way: dict[asyncio.Timeout, asyncio.AbstractEventLoop] = {}

    @property
    def is_busy(self) -> bool:
        """Whether a request is under way."""
        return bool(self._under_way)

    async def send(self, request: WireRequest) -> WireReply:
        """The server's answer, or the last "not now" when the patience has run out.

        Raises:
            StoreUnreachable: no try brought a reply.
            StoreClosed: it was interrupted. Whether the server did what was asked is unknown.
        """
        scope = asyncio.timeout(None)
        try:
            async with scope:
                self._under_way[scope] = asyncio.get_running_loop()
                if self._on_use is not None:
                    self._on_use()
                self._budget.earn()
                started = self._monotonic()
                outcome = await self._try(request, started + request.patience_seconds)
                if type(outcome) is WireReply and not is_transient(outcome.status):
                    return outcome
                return await self._try_again(request, started, outcome)
        except TimeoutError as error:
            raise StoreClosed(
                f"the client was closed while {request.method} {request.target.partition('?')[0]} was under way"
            ) from error
        finally:
            self._under_way.pop(scope, None)

    def interrupt(self) -> None:
        """End all requests that are under way now, in any event loop; their callers get ``StoreClosed``."""
        for scope, loop in list(self._under_way.items()):
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._end, scope)

    def _end(self, scope: asyncio.Timeout) -> None:
        if scope in self._under_way:
            scope.reschedule(asyncio.get_running_loop().time())

    async def _try(self, request: WireRequest, deadline: float) -> WireReply | StoreUnreachable | RequestShed:
        """What came of one try, whose timeout ends with the caller's patience."""
        remaining = max(deadline - self._monotonic(), 0.001)
        if remaining < request.timeout_seconds:
            request = request._replace(timeout_seconds=remaining)
        try:
            return await self._inner.send(request)
        except (StoreUnreachable, RequestShed) as error:
            return error

    async def _try_again(
        self, request: WireRequest, started: float, outcome: WireReply | StoreUnreachable | RequestShed
    ) -> WireReply:
        """Go on after a first try that was no answer."""
        deadline = started + request.patience_seconds
        failed = 0
        while not (isinstance(outcome, WireReply) and not is_transient(outcome.status)):
            if isinstance(outcome, RequestShed):
                remaining = deadline - self._monotonic()
                if remaining <= 0 or not request.waits_while_shed:
                    raise self._unreachable(request, failed, started, outcome) from outcome
                await asyncio.sleep(min(outcome.retry_after_seconds, remaining))
            else:
                failed += 1
                reply = outcome if isinstance(outcome, WireReply) else None
                why = str(outcome) if isinstance(outcome, StoreUnreachable) else f"status {outcome.status}"
                delay = await self._delay(request, failed, reply, deadline)
                if delay is None:
                    self._watcher.gave_up(request, why)
                    if isinstance(outcome, WireReply):
                        return outcome
                    raise self._unreachable(request, failed, started, outcome) from outcome
                self._watcher.retried(request, why, delay)
                await self._pause(delay, until_answer=reply is None)
            outcome = await self._try(request, deadline)
        return outcome

    async def _pause(self, seconds: float, until_answer: bool) -> None:
        """Wait before the next try; no longer than until the server answers somebody, if that is what is missing."""
        ends_at = self._monotonic() + seconds
        answered = self._answers()
        while (left := ends_at - self._monotonic()) > 0:
            await asyncio.sleep(min(left, _LOOK_UP_SECONDS))
            if until_answer and self._answers() != answered:
                return

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
