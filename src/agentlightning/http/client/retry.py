"""How hard a client tries: sending again what may have been lost.

Every request of the client is repeatable (its ids are minted before it is first sent), so a reply that
does not come, and a status that says "not now", lead to the same bytes being sent again.
"""

from __future__ import annotations

import asyncio
import email.utils
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from agentlightning.errors import StoreClosed, StoreUnreachable
from agentlightning.http.client.health import BreakerNumbers, BreakerState, Health
from agentlightning.http.client.transport import Transport, WireReply, WireRequest

Backoff = Callable[[int], float | None]
"""Seconds to wait after a number of failed tries; None: there shall be no other."""

_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504, 507})
_LONGEST_RETRY_AFTER = 3600.0
_CHANCE = random.SystemRandom().random
"""From 0 up to 1, for jitter; not from the generator that an agent's program may have seeded, and draws from."""
_INTERNAL_ERROR_TRIES = 4
"""How often a request is sent that the server answers with 500. That is a bug on the other side: it may be a
passing one, but nothing is gained by insisting."""
_BYTES_PER_SECOND = 2**20
"""What a slow link brings of a body; the time for that says nothing about the server."""
_LOOK_UP_SECONDS = 1.0
"""How often a call that waits looks whether the server has answered another one meanwhile."""


class Resilience(NamedTuple):
    """How hard a client tries. All times are in seconds."""

    patience_seconds: float = 120.0
    """How long a call goes on trying before it raises ``StoreUnreachable``."""
    backoff_base_seconds: float = 0.2
    """The most that is waited before the first retry; doubles with each further one."""
    backoff_cap_seconds: float = 30.0
    retry_ratio: float = 0.2
    """Retries that each call earns, for all calls together."""
    retries_per_second: float = 10.0
    """Retries that time earns."""
    retries_saved: float = 100.0
    """The most retries that are saved up."""
    breaker: BreakerNumbers = BreakerNumbers()
    probe_interval_seconds: float = 10.0
    fast_seconds: float = 0.5
    """An answer within this time is good for the health score, and one within four times of it counts half. A large
    body gets a second more for each MiB."""
    spool_after_seconds: float = 5.0
    """How long spans are tried to be sent before they are written to the disk."""
    cache_after_seconds: float = 5.0
    """How long the server is asked for resources before the copy on the disk is taken."""


def full_jitter(base_seconds: float, cap_seconds: float, random: Callable[[], float]) -> Backoff:
    """Exponential back-off with full jitter: a random time up to ``base * 2 ** n``, at most ``cap``.

    Spreading over the whole interval is what keeps many clients from returning together (M. Brooker,
    "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
    """
    return lambda failed_tries: random() * min(cap_seconds, base_seconds * 2.0 ** min(failed_tries - 1, 60))


def fixed_delays(delays: Sequence[float]) -> Backoff:
    """The delays that a caller lists, and no more tries than they allow."""
    return lambda failed_tries: delays[failed_tries - 1] if failed_tries <= len(delays) else None


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
        seconds = email.utils.parsedate_to_datetime(text).timestamp() - wall()
    except (ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0), _LONGEST_RETRY_AFTER)


class Retrying:
    """A `Transport` that tries again until there is an answer or the caller's patience has run out.

    Statuses of 4xx are answers, apart from 408, 425 and 429. ``Retry-After`` is a lower bound for the next delay.
    Time that the circuit breaker holds a request back counts against the patience, not against the budget. A call that
    waits because nobody answered goes on as soon as the server has answered any other: otherwise an outage would last
    longer for those who have waited for long, and a server that comes and goes would be missed. So that somebody does
    ask, the server's health is asked for at intervals while requests are under way, and while the client is in use by a
    runner (``keep_probing``); a probe is the least important of all requests, and so the first that the breaker lets
    through again.

    Args:
        inner: sends a request once; is cancelled when its time is up.
        server: the server's address, for messages.
        probe: asks for the server's health.
        numbers: how hard to try.
        retry_delays: waits between tries that replace the exponential ones, and bound their number.
        health_retry_delays: where given, a retry is made only if the server says that it is well, asked at once and
            again after each of these delays in seconds.
        monotonic: seconds since some moment.
        chance: a number from 0 up to 1.
    """

    def __init__(
        self,
        inner: Transport,
        *,
        server: str,
        probe: WireRequest,
        numbers: Resilience,
        retry_delays: Sequence[float] | None = None,
        health_retry_delays: Sequence[float] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = _CHANCE,
    ) -> None:
        self.health = Health(server, numbers.breaker, monotonic, chance, numbers.fast_seconds)
        """Says what passes, and hears what happens."""
        self._inner = inner
        self._probe = probe
        self._server = server
        exponential = full_jitter(numbers.backoff_base_seconds, numbers.backoff_cap_seconds, chance)
        self._backoff = exponential if retry_delays is None else fixed_delays(retry_delays)
        self._numbers = numbers
        self._monotonic = monotonic
        self._ask_first = health_retry_delays
        self._under_way: dict[asyncio.Timeout, asyncio.AbstractEventLoop] = {}
        self._lock = threading.Lock()
        self._first_tries = 0
        self._tokens, self._tokens_at = numbers.retries_saved, monotonic()
        self._used = False
        self._in_use_until = float("-inf")
        self._overdue = float("-inf")
        """When the timer of the probes must have fired, had its event loop not been closed."""
        self._probing: asyncio.Task[None] | None = None

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
                started = self._monotonic()
                self._used = True
                if started > self._overdue:
                    self._arm(started)
                self._first_tries += 1
                outcome = await self._try(request, request.patience_seconds)
                if isinstance(outcome, WireReply) and outcome.status < 400:
                    return outcome
                return await self._try_again(request, started, outcome)
        except TimeoutError as error:
            raise StoreClosed(
                f"the client was closed while {request.method} {request.target.partition('?')[0]} was under way"
            ) from error
        finally:
            self._under_way.pop(scope, None)

    def keep_probing(self, seconds: float) -> None:
        """The client is in use for so many seconds, also if there is no request; any thread may call."""
        self._in_use_until = self._monotonic() + seconds

    def interrupt(self) -> None:
        """End all requests that are under way now, in any event loop; their callers get ``StoreClosed``. The client is
        in use no more."""
        self._in_use_until = float("-inf")
        for scope, loop in list(self._under_way.items()):
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._end, scope)

    def _end(self, scope: asyncio.Timeout) -> None:
        if scope in self._under_way:
            scope.reschedule(asyncio.get_running_loop().time())

    # --- One try ---------------------------------------------------------------------------------

    async def _try(
        self, request: WireRequest, patience: float, *, guarded: bool = True
    ) -> WireReply | StoreUnreachable | float:
        """What came of one try, of which the health is told; the seconds to wait if the breaker held it back."""
        health = self.health
        is_admitted = guarded and health.breaker is not BreakerState.CLOSED
        if is_admitted:
            wait = health.admit(request.priority)
            if wait > 0:
                return wait
        seconds = min(request.timeout_seconds, max(patience, 0.001))
        began = self._monotonic()
        try:
            async with asyncio.timeout(seconds):
                reply = await self._inner.send(request)
        except StoreUnreachable as error:
            lost = error
        except TimeoutError:
            lost = StoreUnreachable(f"no reply to {request.method} {request.target} within {seconds:g} s")
        except BaseException:  # the caller gave up, which says nothing about the server
            if is_admitted:
                health.abandoned(request.priority)
            raise
        else:
            took: float | None = None
            if not request.long_poll and request.silence_seconds is None:  # else it waits on purpose, or sends much
                took = self._monotonic() - began - len(request.body or b"") / _BYTES_PER_SECOND
            health.answered(reply.status, took, guarded=guarded)
            return reply
        health.unanswered(lost.message, guarded=guarded)
        return lost

    async def _try_again(
        self, request: WireRequest, started: float, outcome: WireReply | StoreUnreachable | float
    ) -> WireReply:
        """Go on after a first try that was no answer."""
        deadline = started + request.patience_seconds
        failed = 0
        while not isinstance(outcome, WireReply) or _may_change(outcome.status):
            left = deadline - self._monotonic()
            if isinstance(outcome, int | float):
                if left <= 0 or not request.waits_while_shed:
                    why = f"held back by the circuit breaker, which is {self.health.breaker}"
                    raise self._unreachable(request, failed, started, why)
                await asyncio.sleep(min(outcome, left))
            else:
                failed += 1
                why = outcome.message if isinstance(outcome, StoreUnreachable) else f"status {outcome.status}"
                delay = await self._delay(failed, outcome, deadline)
                if delay is None:
                    self.health.gave_up(request, why)
                    if isinstance(outcome, WireReply):
                        return outcome
                    raise self._unreachable(request, failed, started, why) from outcome
                self.health.retried(request, why, delay)
                await self._pause(delay, until_answer=isinstance(outcome, StoreUnreachable))
            outcome = await self._try(request, deadline - self._monotonic())
        return outcome

    async def _delay(self, failed: int, outcome: WireReply | StoreUnreachable, deadline: float) -> float | None:
        """Seconds before the next try; None if there shall be none."""
        reply = outcome if isinstance(outcome, WireReply) else None
        delay = self._backoff(failed)
        if delay is None or (reply is not None and reply.status == 500 and failed >= _INTERNAL_ERROR_TRIES):
            return None
        asked = None if reply is None else retry_after_seconds(reply.headers.get("Retry-After"))
        if asked is not None:
            delay += asked  # on top, so that those who were told the same moment do not all come at it
        delay = max(delay, self._spend())
        if self._monotonic() + delay >= deadline or not await self._is_there():
            with self._lock:
                self._tokens += 1
            return None
        return delay

    def _spend(self) -> float:
        """Take a token for a retry; returns the seconds to wait until it is there.

        All requests share them: some come with each first try, some with time, so that a quiet client can retry too.
        Who finds none waits for one; nobody is refused.
        """
        numbers = self._numbers
        with self._lock:
            now = self._monotonic()
            earned = (now - self._tokens_at) * numbers.retries_per_second + self._first_tries * numbers.retry_ratio
            self._tokens_at, self._first_tries = now, 0
            self._tokens = min(numbers.retries_saved, self._tokens + earned) - 1
            return max(0.0, -self._tokens / numbers.retries_per_second)

    async def _pause(self, seconds: float, until_answer: bool) -> None:
        """Wait before the next try; no longer than until the server answers somebody, if that is what is missing."""
        ends_at = self._monotonic() + seconds
        answered = self.health.well_answered
        while (left := ends_at - self._monotonic()) > 0:
            await asyncio.sleep(min(left, _LOOK_UP_SECONDS))
            if until_answer and self.health.well_answered != answered:
                return

    def _unreachable(self, request: WireRequest, failed: int, started: float, last: str) -> StoreUnreachable:
        seconds = self._monotonic() - started
        tries = "1 try" if failed == 1 else f"{failed} tries"
        return StoreUnreachable(
            f"{self._server} did not answer {request.method} {request.target.partition('?')[0]} "
            f"({tries} in {seconds:.1f} s; the last: {last}). Check that the server runs and that the address "
            "is right. Whether it did what was asked is unknown; a repeat with the same ids is safe"
        )

    # --- Probes ----------------------------------------------------------------------------------

    async def _is_there(self) -> bool:
        """Whether the server says that it is well, where that has to be asked; past the breaker, which learns nothing.

        An answer to this question says little of how the server takes calls.
        """
        if self._ask_first is None:
            return True
        for delay in (0.0, *self._ask_first):
            await asyncio.sleep(delay)
            reply = await self._try(self._probe, self._probe.timeout_seconds, guarded=False)
            if isinstance(reply, WireReply) and reply.status == 200:
                return True
        return False

    def _arm(self, now: float) -> None:
        """Have a probe sent after the interval, by the running event loop."""
        with self._lock:
            if now > self._overdue:  # else another thread was first
                # A closed event loop takes its timers along, so one that is long overdue will never fire.
                interval = self._numbers.probe_interval_seconds
                self._overdue = now + 2 * interval
                asyncio.get_running_loop().call_later(interval, self._tick)

    def _tick(self) -> None:
        self._overdue = float("-inf")
        if not self._used and not self._under_way and self._monotonic() >= self._in_use_until:
            return
        self._used = False
        self._arm(self._monotonic())
        if self._probing is None or self._probing.done():
            self._probing = asyncio.get_running_loop().create_task(self._ask())

    async def _ask(self) -> None:
        await self._try(self._probe, self._probe.timeout_seconds)


def _may_change(status: int) -> bool:
    """Whether the same request may get another answer later. 501 and 505 say that it never will."""
    return status in _TRANSIENT or 507 < status < 600
