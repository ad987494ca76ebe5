"""What a client tells about its server, and the probes that keep it informed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

import pytest

from agentlightning.errors import StoreUnreachable
from agentlightning.http.client.health import BreakerNumbers, BreakerState, Health, HealthReport
from agentlightning.http.client.retry import Resilience, Retrying
from agentlightning.http.client.transport import WireRequest
from scripted_transport import Act, ScriptedTransport, lost, replies, silent
from virtual_time import in_virtual_time

Clock = Callable[[], float]
PROBE = WireRequest("GET", "/health", priority="read")
REQUEST = WireRequest("POST", "/work")


def _resilient(acts: Iterable[Act], clock: Clock, numbers: Resilience) -> tuple[ScriptedTransport, Retrying]:
    http = ScriptedTransport(acts, clock)
    return http, Retrying(http, server="http://s", probe=PROBE, numbers=numbers, monotonic=clock, chance=lambda: 0.5)


def _now(made: Retrying) -> HealthReport:
    return made.health.report()


def test_states(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def scene(clock: Clock) -> None:
        numbers = Resilience(breaker=BreakerNumbers(min_calls=5), patience_seconds=1000)
        http, made = _resilient([*replies(200), *lost(8)], clock, numbers)
        assert (_now(made).state, _now(made).seconds_since_answer) == ("unknown", None)
        await made.send(REQUEST)
        assert _now(made).state == "healthy"
        waiting = asyncio.ensure_future(made.send(REQUEST))
        seen: list[str] = []
        while not waiting.done():
            await asyncio.sleep(0.01)
            if _now(made).state != (seen or [""])[-1]:
                seen.append(_now(made).state)
        assert seen == ["degraded", "unreachable", "degraded"]
        for _ in range(40):
            await made.send(REQUEST)
        report = _now(made)
        assert (report.state, report.breaker, report.failures_in_a_row) == ("healthy", BreakerState.CLOSED, 0)
        assert report.seconds_since_answer is not None
        assert report.seconds_since_answer < 1
        assert (report.failures, report.retries, report.last_failure) == (8, 8, "the connection was reset")
        assert report.calls == len(http.tries)

    in_virtual_time(scene)
    assert [record.message.partition(",")[0] for record in caplog.records] == [
        "http://s does not answer as it should: the connection was reset",
        "too many calls to http://s fail; they are held back until it is well",
        "http://s answers again",
        "http://s is well again; all calls pass",
    ]


def test_probes_as_long_as_somebody_waits() -> None:
    async def scene(clock: Clock) -> None:
        http, made = _resilient([silent(25.0)], clock, Resilience())
        await made.send(REQUEST)
        assert http.tries == [0.0, 10.0, 20.0]
        assert [each.target for each in http.requests] == ["/work", "/health", "/health"]
        await asyncio.sleep(1000)
        assert http.tries == [0.0, 10.0, 20.0], "nobody waits any more"
        await made.send(REQUEST)
        await asyncio.sleep(100)
        assert http.tries[3:] == [1025.0, 1035.0], "once, because there was a request since the last time"

    in_virtual_time(scene)


def test_a_probe_that_the_server_sits_on_holds_nobody_up() -> None:
    async def scene(clock: Clock) -> None:
        numbers = Resilience(breaker=BreakerNumbers(min_calls=2, open_seconds=5.0), patience_seconds=60)
        http, made = _resilient([*lost(2), silent(29.0)], clock, numbers)
        calls = [asyncio.ensure_future(made.send(REQUEST)) for _ in range(2)]
        await asyncio.sleep(6.0)
        assert made.health.breaker is BreakerState.PROBING
        await asyncio.wait(calls)
        assert [each.target for each in http.requests][:5] == ["/work"] * 4 + ["/health"]
        assert http.tries[3] < 7, "the one that the server answered at once"
        assert http.tries[2] + 29 <= clock() < 40, "and the one that it did not"

    in_virtual_time(scene)


def test_a_loop_that_was_closed_takes_no_probes_along() -> None:
    now = 0.0
    http, made = _resilient([], lambda: now, Resilience())

    async def use(seconds: float) -> None:
        await made.send(REQUEST)
        await asyncio.sleep(seconds)

    asyncio.run(use(0.0))
    now = 50.0

    async def scene(clock: Clock) -> None:
        await use(15.0)

    in_virtual_time(scene)
    assert [each.target for each in http.requests] == ["/work", "/work", "/health"]


def test_the_gate_of_a_retry() -> None:
    async def scene(clock: Clock) -> None:
        acts = [*lost(3), *replies(503)]
        http = ScriptedTransport(acts, clock)
        made = _asking_first(http, clock, retry_delays=(1.0,))
        assert (await made.send(REQUEST)).status == 200
        assert http.tries == pytest.approx([0.0, 0.0, 0.1, 0.3, 0.8, 1.8])
        assert [each.target for each in http.requests] == ["/work"] + ["/health"] * 4 + ["/work"]

    in_virtual_time(scene)


def _asking_first(
    http: ScriptedTransport,
    clock: Clock,
    retry_delays: tuple[float, ...],
    breaker: BreakerNumbers = BreakerNumbers(),  # noqa: B008
) -> Retrying:
    return Retrying(
        http,
        server="http://s",
        probe=PROBE,
        numbers=Resilience(breaker=breaker),
        retry_delays=retry_delays,
        health_retry_delays=(0.1, 0.2, 0.5),
        monotonic=clock,
    )


def test_0_3_style_retries_end_early_when_the_server_is_gone() -> None:
    async def scene(clock: Clock) -> None:
        http = ScriptedTransport(lost(100), clock)
        made = _asking_first(http, clock, retry_delays=(1.0, 2.0, 5.0))
        with pytest.raises(StoreUnreachable):
            await made.send(REQUEST)
        assert [each.target for each in http.requests] == ["/work"] + ["/health"] * 4
        assert clock() == pytest.approx(0.8)

    in_virtual_time(scene)


def test_0_3_style_questions_are_told_but_do_not_move_the_breaker() -> None:
    async def scene(clock: Clock) -> None:
        http = ScriptedTransport(lost(5), clock)
        made = _asking_first(http, clock, (1.0,), BreakerNumbers(min_calls=2))
        with pytest.raises(StoreUnreachable):
            await made.send(REQUEST)
        report = _now(made)
        assert (report.calls, report.failures, report.failures_in_a_row) == (5, 5, 5)
        assert (report.state, report.breaker) == ("unreachable", BreakerState.CLOSED)
        made.health.unanswered("lost")
        assert _now(made).breaker is BreakerState.OPEN, "the second call that failed"
        made.health.answered(200, guarded=False)
        assert _now(made).breaker is BreakerState.OPEN
        assert _now(made).failures_in_a_row == 0

    in_virtual_time(scene)


def test_cached_resources_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    health = Health("http://s", BreakerNumbers(), lambda: 0.0, lambda: 0.5)
    for age in (5.0, 6.0, None, 7.0):
        health.cached_resources(age)
        assert health.report().cached_resources_age_seconds == age
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


# --- Response time -------------------------------------------------------------------------------------


def test_15_answers_of_4_s_are_not_healthy(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def scene(clock: Clock) -> None:
        _, made = _resilient([silent(4.0)] * 15, clock, Resilience(probe_interval_seconds=1e9))
        for number in range(15):
            await made.send(REQUEST)
            assert (_now(made).state == "degraded") is (number >= 4), "five answers are needed for a judgement"
        report = _now(made)
        assert (report.state, report.score, report.response_seconds) == ("degraded", 0.0, 4.0)
        assert (report.failures, report.breaker) == (0, BreakerState.CLOSED)
        for _ in range(20):
            await made.send(REQUEST)
        report = _now(made)
        assert (report.state, report.score, report.response_seconds) == ("healthy", 1.0, 0.0)

    in_virtual_time(scene)
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "http://s answers slowly: after 4.0 s (median), score 0.00"),
        ("INFO", "http://s answers in time again: after 0.0 s (median), score 0.55"),
    ]


@pytest.mark.parametrize(
    ("seconds", "score"), [(0.4, 1.0), (1.9, 0.5), (2.1, 0.0)], ids=["fast", "tolerated", "too slow"]
)
def test_the_score_is_apdex(seconds: float, score: float) -> None:
    async def scene(clock: Clock) -> None:
        _, made = _resilient([silent(seconds)] * 10, clock, Resilience(probe_interval_seconds=1e9))
        for _ in range(10):
            await made.send(REQUEST)
        assert _now(made).score == score

    in_virtual_time(scene)


def test_failures_and_slow_answers_weigh_together() -> None:
    async def scene(clock: Clock) -> None:
        acts = [silent(0.1)] * 16 + lost(2) + [silent(1.0)] * 2
        _, made = _resilient(acts, clock, Resilience(probe_interval_seconds=1e9))
        for _ in range(16):
            await made.send(REQUEST)
        assert _now(made).state == "healthy"
        await made.send(REQUEST)
        await made.send(REQUEST)
        report = _now(made)
        assert report.score == pytest.approx((16 + 0 + 2 * 0.5) / 20)
        assert (report.state, report.failures_in_a_row) == ("healthy", 0)
        await made.send(REQUEST._replace(body=b"x" * 3 * 2**20))
        assert _now(made).score == pytest.approx((16 + 0 + 2 * 0.5) / 20), "one of the first has left"

    in_virtual_time(scene)


@pytest.mark.parametrize(
    "request_",
    [
        REQUEST._replace(long_poll=True),
        REQUEST._replace(silence_seconds=30.0),
        REQUEST._replace(body=b"x" * 4 * 2**20),
    ],
    ids=["long poll", "long reply", "large body"],
)
def test_what_has_a_reason_to_take_long_is_not_slow(request_: WireRequest) -> None:
    async def scene(clock: Clock) -> None:
        _, made = _resilient([silent(4.0)] * 10, clock, Resilience(probe_interval_seconds=1e9))
        for _ in range(10):
            await made.send(request_)
        assert (_now(made).state, _now(made).score) == ("healthy", 1.0)

    in_virtual_time(scene)


def test_the_last_minute_counts() -> None:
    async def scene(clock: Clock) -> None:
        _, made = _resilient([silent(4.0)] * 10, clock, Resilience(probe_interval_seconds=1e9))
        for _ in range(10):
            await made.send(REQUEST)
        assert _now(made).state == "degraded"
        await asyncio.sleep(61)
        assert (_now(made).state, _now(made).score, _now(made).response_seconds) == ("healthy", None, None)

    in_virtual_time(scene)


# --- In use by a runner --------------------------------------------------------------------------------


def test_probes_go_on_while_a_runner_has_the_client_and_asks_nothing() -> None:
    async def scene(clock: Clock) -> None:
        http, made = _resilient([], clock, Resilience())
        made.keep_probing(45.0)
        await made.send(REQUEST)
        await asyncio.sleep(1000)
        assert http.tries == [0.0, 10.0, 20.0, 30.0, 40.0]

        made.keep_probing(1000.0)
        await made.send(REQUEST)
        await asyncio.sleep(25)
        made.interrupt()
        await asyncio.sleep(1000)
        assert http.tries[5:] == [1000.0, 1010.0, 1020.0], "until it is closed"

    in_virtual_time(scene)
