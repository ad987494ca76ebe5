"""How a client's transports are put together: what each of them does is said in its own file.

``probes(retries(breaker(health(timeouts(HTTP)))))``
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from agentlightning.errors import StoreUnreachable
from agentlightning.http.client.breaker import Breaker, BreakerNumbers, Guarded
from agentlightning.http.client.health import Health, Observed
from agentlightning.http.client.retry import FixedDelays, FullJitter, RetryBudget, Retrying
from agentlightning.http.client.transport import RequestShed, Transport, WireReply, WireRequest

# --- Asking the server now and then whether it is well, while somebody uses it ---


class ProbedWhileUsed:
    """A `Transport` that asks after the server's health at intervals, as long as requests are under way.

    A probe is the least important of all requests, and so the first that a circuit breaker lets through again. What
    comes of it is seen by the wrappers around ``probed``.

    Args:
        inner: does the sending.
        probed: sends the probes.
        probe: asks for the server's health.
        interval_seconds: from one probe to the next.
        monotonic: seconds since some moment.
    """

    def __init__(
        self,
        inner: Transport,
        probed: Transport,
        probe: WireRequest,
        *,
        interval_seconds: float,
        monotonic: Callable[[], float],
    ) -> None:
        self._inner = inner
        self._probed = probed
        self._probe = probe
        self._interval = interval_seconds
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._under_way = 0
        self._used = False
        self._due: float | None = None
        self._task: asyncio.Task[None] | None = None

    async def send(self, request: WireRequest) -> WireReply:
        self._begin()
        try:
            return await self._inner.send(request)
        finally:
            with self._lock:
                self._under_way -= 1

    def _begin(self) -> None:
        with self._lock:
            self._under_way += 1
            self._used = True
            # An event loop that was closed takes its timers along: one that is long overdue will not come.
            if self._due is None or self._monotonic() > self._due + self._interval:
                self._arm()

    def _arm(self) -> None:
        self._due = self._monotonic() + self._interval
        asyncio.get_running_loop().call_later(self._interval, self._tick)

    def _tick(self) -> None:
        with self._lock:
            if not self._used and not self._under_way:
                self._due = None
                return
            self._used = False
            self._arm()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._ask())

    async def _ask(self) -> None:
        with contextlib.suppress(StoreUnreachable, RequestShed):  # no news is told by the wrappers, like news
            await self._probed.send(self._probe)


async def answers_soon(transport: Transport, probe: WireRequest, delays: Sequence[float]) -> bool:
    """Whether the server says that it is well, asked once and again after each of these delays in seconds."""
    for delay in (0.0, *delays):
        await asyncio.sleep(delay)
        with contextlib.suppress(StoreUnreachable):
            if (await transport.send(probe)).status == 200:
                return True
    return False


# --- A reply that does not come is given up ---


class TimeLimited:
    """A `Transport` that waits for each reply at most ``request.timeout_seconds``, by the clock of the event loop.

    Args:
        inner: does the sending; is cancelled when the time is up.
    """

    def __init__(self, inner: Transport) -> None:
        self._inner = inner

    async def send(self, request: WireRequest) -> WireReply:
        try:
            async with asyncio.timeout(request.timeout_seconds):
                return await self._inner.send(request)
        except TimeoutError as error:
            raise StoreUnreachable(
                f"no reply to {request.method} {request.target} within {request.timeout_seconds:g} s"
            ) from error


# ---


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

    transport: Transport
    health: Health
    breaker: Breaker


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
    one_try = Observed(TimeLimited(http), health)
    guarded = Guarded(one_try, breaker)
    gate: Callable[[], Awaitable[bool]] | None = None
    if health_retry_delays is not None:
        waits = tuple(health_retry_delays)

        async def gate_by_probe() -> bool:
            return await answers_soon(one_try, probe, waits)

        gate = gate_by_probe
    retrying = Retrying(
        guarded,
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
        gate=gate,
    )
    transport = ProbedWhileUsed(
        retrying, guarded, probe, interval_seconds=numbers.probe_interval_seconds, monotonic=monotonic
    )
    return Resilient(transport, health, breaker)
