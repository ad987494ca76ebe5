"""How a client's transports are put together: what each of them does is said in its own file.

``probes(retries(breaker(health(timeouts(HTTP)))))``
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from agentlightning.store.client_server.resilience.backoff import FixedDelays, FullJitter
from agentlightning.store.client_server.resilience.breaker import Breaker, BreakerNumbers, Guarded
from agentlightning.store.client_server.resilience.health import Health, Observed
from agentlightning.store.client_server.resilience.probe import ProbedWhileUsed, answers_soon
from agentlightning.store.client_server.resilience.retry import Retrying
from agentlightning.store.client_server.resilience.retry_budget import RetryBudget
from agentlightning.store.client_server.resilience.timeouts import TimeLimited
from agentlightning.store.client_server.resilience.transport import Transport, WireRequest

__all__ = ["Resilience", "Resilient", "make_resilient"]


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
