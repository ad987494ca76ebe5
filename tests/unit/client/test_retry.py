"""Retries: what is sent again, when, how often, and what the caller gets in the end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from agentlightning.errors import StoreUnreachable
from agentlightning.http.client.health import BreakerNumbers, BreakerState, Health
from agentlightning.http.client.retry import Resilience, Retrying
from agentlightning.http.client.transport import Transport, WireRequest
from agentlightning.http.routes import Priority
from scripted_transport import Act, ScriptedTransport, lost, replies, silent
from virtual_time import in_virtual_time

Clock = Callable[[], float]
REQUEST = WireRequest("POST", "/agl/v1/rollouts?secret=1", b"{}", patience_seconds=100.0)


PROBE = WireRequest("GET", "/health", priority="read")
NEVER_OPENS = BreakerNumbers(min_calls=2**62)


class _Watcher(Health):
    """Notes what it hears."""

    def __init__(self, clock: Clock) -> None:
        super().__init__("http://server", NEVER_OPENS, clock, lambda: 1.0)
        self.retries: list[tuple[str, float]] = []
        self.given_up: list[str] = []

    def retried(self, request: WireRequest, why: str, delay_seconds: float) -> None:
        self.retries.append((why, delay_seconds))

    def gave_up(self, request: WireRequest, why: str) -> None:
        self.given_up.append(why)


def _retrying(
    inner: Transport,
    clock: Clock,
    *,
    delays: Sequence[float] | None = None,
    budget: Resilience = Resilience(retry_ratio=1.0, retries_per_second=1000.0, retries_saved=1000.0),  # noqa: B008
    health: Health | None = None,
    ask_first: Sequence[float] | None = None,
) -> Retrying:
    made = Retrying(
        inner,
        server="http://server",
        probe=PROBE,
        numbers=budget._replace(probe_interval_seconds=1e9),
        retry_delays=delays,
        health_retry_delays=ask_first,
        monotonic=clock,
        chance=lambda: 1.0,
    )
    made.health = health or _Watcher(clock)
    return made


def _budget(*, ratio: float, per_second: float, capacity: float) -> Resilience:
    return Resilience(retry_ratio=ratio, retries_per_second=per_second, retries_saved=capacity)


def _run(scene: Callable[[Clock], Awaitable[Any]]) -> None:
    async def run(clock: Clock) -> None:
        await scene(clock)

    in_virtual_time(run)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 507, 520])
def test_what_may_be_different_later_is_sent_again(status: int) -> None:
    async def scene(clock: Clock) -> None:
        inner = ScriptedTransport(replies(status, status), clock)
        reply = await _retrying(inner, clock).send(REQUEST)
        assert (reply.status, len(inner.tries)) == (200, 3)
        assert inner.requests == [REQUEST] * 3, "the same bytes each time"

    _run(scene)


@pytest.mark.parametrize("status", [200, 201, 204, 301, 400, 401, 403, 404, 405, 409, 410, 413, 422, 499, 501, 505])
def test_answers_are_not_asked_for_again(status: int) -> None:
    async def scene(clock: Clock) -> None:
        inner = ScriptedTransport(replies(status), clock)
        assert (await _retrying(inner, clock).send(REQUEST)).status == status
        assert len(inner.tries) == 1

    _run(scene)


def test_waits_are_those_of_the_backoff() -> None:
    async def scene(clock: Clock) -> None:
        watcher = _Watcher(clock)
        inner = ScriptedTransport([*lost(3), *replies(503)], clock)
        assert (await _retrying(inner, clock, health=watcher).send(REQUEST)).status == 200
        assert inner.tries == pytest.approx([0.0, 0.2, 0.6, 1.4, 3.0])
        assert [delay for _, delay in watcher.retries] == pytest.approx([0.2, 0.4, 0.8, 1.6])
        assert [why for why, _ in watcher.retries] == ["the connection was reset"] * 3 + ["status 503"]

    _run(scene)


def test_retry_after_is_the_least_that_is_waited() -> None:
    async def scene(clock: Clock) -> None:
        inner = ScriptedTransport(
            [Act(429, headers={"Retry-After": "7"}), Act(503, headers={"Retry-After": "x"})], clock
        )
        await _retrying(inner, clock).send(REQUEST)
        assert inner.tries == pytest.approx([0.0, 7.2, 7.6])

    _run(scene)


def test_a_server_that_is_gone_is_given_up_when_the_patience_has_run_out() -> None:
    async def scene(clock: Clock) -> None:
        watcher = _Watcher(clock)
        inner = ScriptedTransport(lost(1000), clock)
        with pytest.raises(StoreUnreachable) as caught:
            await _retrying(inner, clock, health=watcher).send(REQUEST)
        assert 60 < clock() <= 100, "it did not stop early, nor late"
        assert "http://server did not answer POST /agl/v1/rollouts (" in caught.value.message
        assert "secret" not in caught.value.message
        assert watcher.given_up == ["the connection was reset"]

    _run(scene)


def test_the_last_no_is_returned_when_the_patience_has_run_out() -> None:
    async def scene(clock: Clock) -> None:
        inner = ScriptedTransport(replies(*[503] * 1000), clock)
        assert (await _retrying(inner, clock).send(REQUEST)).status == 503
        assert 60 < clock() <= 100

    _run(scene)


def test_a_wait_that_would_outlast_the_patience_is_not_begun() -> None:
    async def scene(clock: Clock) -> None:
        inner = ScriptedTransport([Act(503, headers={"Retry-After": "101"})], clock)
        assert (await _retrying(inner, clock).send(REQUEST)).status == 503
        assert clock() == 0.0

    _run(scene)


def test_a_try_ends_with_the_patience() -> None:
    async def scene(clock: Clock) -> None:
        inner = ScriptedTransport([silent(90), *lost()], clock)
        await _retrying(inner, clock).send(REQUEST)
        assert inner.tries == pytest.approx([0.0, 30.2, 30.6])
        began = clock()
        inner = ScriptedTransport([*lost(3, seconds=29.0), silent(29.0)], clock)
        with pytest.raises(StoreUnreachable, match=r"no reply to POST .* within 11\.6 s"):
            await _retrying(inner, clock).send(REQUEST)
        assert inner.tries[-1] - began == pytest.approx(3 * 29 + 1.4)
        assert clock() - began == pytest.approx(100.0)

    _run(scene)


def test_a_bug_of_the_server_is_not_insisted_on() -> None:
    async def scene(clock: Clock) -> None:
        inner = ScriptedTransport(replies(*[500] * 10), clock)
        assert (await _retrying(inner, clock).send(REQUEST)).status == 500
        assert len(inner.tries) == 4

    _run(scene)


def test_fixed_delays() -> None:
    async def scene(clock: Clock) -> None:
        inner = ScriptedTransport(lost(10), clock)
        with pytest.raises(StoreUnreachable, match="4 tries in 8"):
            await _retrying(inner, clock, delays=(1.0, 2.0, 5.0)).send(REQUEST)
        assert inner.tries == pytest.approx([0.0, 1.0, 3.0, 8.0])

    _run(scene)


def test_no_retry_while_the_server_does_not_say_that_it_is_well() -> None:
    async def scene(clock: Clock) -> None:
        inner = ScriptedTransport([*lost(), *replies(200), *lost(10)], clock)
        with pytest.raises(StoreUnreachable, match="2 tries"):
            await _retrying(inner, clock, ask_first=()).send(REQUEST)
        assert inner.requests == [REQUEST, PROBE, REQUEST, PROBE]

    _run(scene)


@pytest.mark.parametrize(
    ("act", "others_are_answered", "second_try"),
    [(lost()[0], True, (7.0, 8.0)), (lost()[0], False, (20.0, 20.0)), (Act(503), True, (20.0, 20.0))],
    ids=["an outage that is over", "one that is not", "a server that has said no"],
)
def test_a_wait_ends_with_the_outage(act: Act, others_are_answered: bool, second_try: tuple[float, float]) -> None:
    async def scene(clock: Clock) -> None:
        inner = ScriptedTransport([act], clock)
        health = _Watcher(clock)
        if others_are_answered:
            asyncio.get_running_loop().call_later(7.0, health.answered, 200)
        retrying = _retrying(inner, clock, delays=[20.0], health=health)
        assert (await retrying.send(REQUEST)).status == 200
        assert second_try[0] <= inner.tries[1] <= second_try[1]

    _run(scene)


def test_a_cancelled_call_is_not_tried_again() -> None:
    async def scene(clock: Clock) -> None:
        inner = ScriptedTransport([*lost(), silent(10.0)], clock)
        call = asyncio.ensure_future(_retrying(inner, clock).send(REQUEST))
        await asyncio.sleep(1.0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert (len(inner.tries), inner.cancelled) == (2, 1)

    _run(scene)


# --- The budget ------------------------------------------------------------------------------------


def test_retries_of_all_calls_together_are_bounded() -> None:
    """A hundred calls at a dead server: without a budget, each would come back five times in ten seconds."""

    async def scene(clock: Clock) -> None:
        def tries_within_ten_seconds(budget: Resilience) -> Awaitable[int]:
            return _tries_of_many(clock, budget, seconds=10.0)

        bounded = _budget(ratio=0.2, per_second=10, capacity=20)
        assert await tries_within_ten_seconds(bounded) <= 100 + 20 + 20 + 100
        unbounded = _budget(ratio=1000, per_second=1e6, capacity=1e6)
        assert await tries_within_ten_seconds(unbounded) > 500

    _run(scene)


async def _tries_of_many(clock: Clock, budget: Resilience, seconds: float) -> int:
    inner = ScriptedTransport(lost(1_000_000), clock)
    transport = _retrying(inner, clock, budget=budget)
    began = clock()
    calls = [asyncio.ensure_future(transport.send(REQUEST)) for _ in range(100)]
    await asyncio.sleep(seconds)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    return sum(each <= began + seconds for each in inner.tries)


def test_a_budget_that_is_used_up_delays_and_refuses_nobody() -> None:
    async def scene(clock: Clock) -> None:
        budget = _budget(ratio=0.0, per_second=2.0, capacity=1.0)
        inner = ScriptedTransport(lost(4), clock)
        assert (await _retrying(inner, clock, delays=[0.0] * 9, budget=budget).send(REQUEST)).status == 200
        assert inner.tries == pytest.approx([0.0, 0.0, 0.5, 1.0, 1.5])

    _run(scene)


# --- The breaker's word ----------------------------------------------------------------------------


class _Shedding(Health):
    """Holds requests back until a moment."""

    def __init__(self, until: float, clock: Clock) -> None:
        super().__init__("http://server", NEVER_OPENS, clock, lambda: 1.0)
        self.breaker = BreakerState.OPEN
        self._shed_until = until
        self._clock = clock

    def admit(self, priority: Priority) -> float:
        return 2.0 if self._clock() < self._shed_until else 0.0


@pytest.mark.parametrize("until", [9.0, 99.0])
def test_a_request_that_is_held_back_waits(until: float) -> None:
    async def scene(clock: Clock) -> None:
        shedding = _Shedding(until, clock)
        budget = _budget(ratio=0, per_second=0.001, capacity=0)
        inner = ScriptedTransport([], clock)
        retrying = _retrying(inner, clock, health=shedding, budget=budget, delays=())
        assert (await retrying.send(REQUEST)).status == 200
        assert until <= clock() < until + 2.0

    _run(scene)


@pytest.mark.parametrize(("waits", "gives_up_after"), [(True, 100.0), (False, 0.0)])
def test_how_long_a_request_may_be_held_back(waits: bool, gives_up_after: float) -> None:
    async def scene(clock: Clock) -> None:
        request = REQUEST._replace(waits_while_shed=waits)
        with pytest.raises(StoreUnreachable, match=r"0 tries in .* held back"):
            await _retrying(ScriptedTransport([], clock), clock, health=_Shedding(1e9, clock)).send(request)
        assert clock() == gives_up_after

    _run(scene)
