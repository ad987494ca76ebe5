"""How hard a client tries, and how the parts of that are put together.

A request passes ``Retrying`` (again, until there is an answer), ``OneTry`` (the circuit breaker, the timeout, what is
told to ``Health``) and ``HttpTransport``. A ``Prober`` asks for the server's health while requests are under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from agentlightning.errors import StoreUnreachable
from agentlightning.http.client.breaker import Breaker, BreakerNumbers, BreakerState
from agentlightning.http.client.health import Health
from agentlightning.http.client.retry import FixedDelays, FullJitter, RetryBudget, Retrying
from agentlightning.http.client.transport import TROUBLE, RequestShed, Transport, WireReply, WireRequest


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
    spool_after_seconds: float = 5.0
    """How long spans are tried to be sent before they are written to the disk."""
    cache_after_seconds: float = 5.0
    """How long the server is asked for resources before the copy on the disk is taken."""


class Resilient(NamedTuple):
    """A transport that rides out what it can, and what can be asked about it."""

    transport: Retrying
    health: Health
    breaker: Breaker


class OneTry:
    """A `Transport` that lets a request through if the breaker does, and waits for the reply at most its timeout.

    Args:
        inner: does the sending; is cancelled when the time is up.
        breaker: says what passes, and hears how it ended.
        health: hears how it ended.
    """

    def __init__(self, inner: Transport, breaker: Breaker, health: Health) -> None:
        self._inner = inner
        self._breaker = breaker
        self._health = health

    async def send(self, request: WireRequest) -> WireReply:
        """The server's reply.

        Raises:
            RequestShed: the breaker held it back.
            StoreUnreachable: there was no reply in time.
        """
        breaker = self._breaker
        if breaker.state is not BreakerState.CLOSED:
            wait = breaker.admit(request.priority)
            if wait > 0:
                raise RequestShed(f"held back by the circuit breaker, which is {breaker.state}", wait)
        try:
            async with asyncio.timeout(request.timeout_seconds):
                reply = await self._inner.send(request)
        except (TimeoutError, StoreUnreachable) as error:
            lost = error if isinstance(error, StoreUnreachable) else _too_late(request)
            self._health.unanswered(lost.message)
            breaker.failed()
            raise lost from error.__cause__ if lost is error else error
        except BaseException:  # the caller gave up, which says nothing about the server
            breaker.abandoned()
            raise
        self._health.answered(reply.status)
        if reply.status in TROUBLE:
            breaker.failed()
        else:
            breaker.succeeded()
        return reply


def _too_late(request: WireRequest) -> StoreUnreachable:
    return StoreUnreachable(f"no reply to {request.method} {request.target} within {request.timeout_seconds:g} s")


class Prober:
    """Asks for the server's health at intervals, as long as requests are under way.

    A probe is the least important of all requests, and so the first that a circuit breaker lets through again. Its
    outcome is seen by breaker and health, as that of any request.

    Args:
        transport: sends the probes.
        probe: asks for the server's health.
        is_busy: whether a request is under way.
        interval_seconds: from one probe to the next.
        monotonic: seconds since some moment.
    """

    def __init__(
        self,
        transport: Transport,
        probe: WireRequest,
        is_busy: Callable[[], bool],
        *,
        interval_seconds: float,
        monotonic: Callable[[], float],
    ) -> None:
        self._transport = transport
        self._probe = probe
        self._is_busy = is_busy
        self._interval = interval_seconds
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._used = False
        self._due: float | None = None
        self._task: asyncio.Task[None] | None = None

    def note_use(self) -> None:
        """A request begins, in the running event loop."""
        self._used = True
        if not self._is_armed():
            with self._lock:
                if not self._is_armed():  # else another thread was first
                    self._arm()

    def _is_armed(self) -> bool:
        # A closed event loop takes its timers along, so one that is long overdue will never fire.
        return self._due is not None and self._monotonic() <= self._due + self._interval

    def _arm(self) -> None:
        self._due = self._monotonic() + self._interval
        asyncio.get_running_loop().call_later(self._interval, self._tick)

    def _tick(self) -> None:
        with self._lock:
            if not self._used and not self._is_busy():
                self._due = None
                return
            self._used = False
            self._arm()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._ask())

    async def _ask(self) -> None:
        with contextlib.suppress(StoreUnreachable, RequestShed):  # breaker and health have heard of it
            await self._transport.send(self._probe)


async def answers_soon(transport: Transport, probe: WireRequest, delays: Sequence[float]) -> bool:
    """Whether the server says that it is well, asked once and again after each of these delays in seconds."""
    for delay in (0.0, *delays):
        await asyncio.sleep(delay)
        with contextlib.suppress(StoreUnreachable):
            if (await transport.send(probe)).status == 200:
                return True
    return False


def make_resilient(
    http: Transport,
    *,
    server: str,
    probe: WireRequest,
    numbers: Resilience,
    retry_delays: Sequence[float] | None = None,
    health_retry_delays: Sequence[float] | None = None,
    monotonic: Callable[[], float] = time.monotonic,
    chance: Callable[[], float] = random.random,
) -> Resilient:
    """Wrap a transport.

    Args:
        http: the innermost transport.
        server: its address, for messages.
        probe: asks for the server's health.
        numbers: how hard to try.
        retry_delays: waits between tries that replace the exponential ones, and bound their number.
        health_retry_delays: where given, a retry is made only if the server answers the probe, asked again after
            these delays.
        monotonic: seconds since some moment.
        chance: a number from 0 up to 1.
    """
    health = Health(server, monotonic)
    breaker = Breaker(numbers.breaker, monotonic, chance, health.breaker_changed)
    one_try = OneTry(http, breaker, health)

    # Whether the server is there is asked also while the breaker is open, so it has one that stays closed.
    never_opens = Breaker(BreakerNumbers(min_calls=2**62), monotonic, chance, health.breaker_changed)
    unguarded = OneTry(http, never_opens, health)

    async def is_there() -> bool:
        return await answers_soon(unguarded, probe, health_retry_delays or ())

    def is_busy() -> bool:
        return retrying.is_busy

    prober = Prober(one_try, probe, is_busy, interval_seconds=numbers.probe_interval_seconds, monotonic=monotonic)
    retrying = Retrying(
        one_try,
        server=server,
        backoff=FullJitter(numbers.backoff_base_seconds, numbers.backoff_cap_seconds, chance)
        if retry_delays is None
        else FixedDelays(retry_delays),
        budget=RetryBudget(
            ratio=numbers.retry_ratio,
            per_second=numbers.retries_per_second,
            capacity=numbers.retries_saved,
            monotonic=monotonic,
        ),
        monotonic=monotonic,
        watcher=health,
        answers=health.answers,
        gate=None if health_retry_delays is None else is_there,
        on_use=prober.note_use,
    )
    return Resilient(retrying, health, breaker)
