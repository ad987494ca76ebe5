"""The circuit breaker: when it opens, what passes meanwhile, and how it closes again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import pytest

from agentlightning.errors import StoreUnreachable
from agentlightning.http.client.health import BreakerNumbers, BreakerState, FailureWindow, Health
from agentlightning.http.client.retry import Resilience, Retrying
from agentlightning.http.client.transport import WireRequest
from agentlightning.http.routes import SHED_ORDER, Priority
from scripted_transport import Act, ScriptedTransport, lost, replies, silent
from virtual_time import in_virtual_time

NUMBERS = BreakerNumbers()
CLOSED, OPEN, PROBING, RETURNING = BreakerState


class _Bench:
    """A breaker and a clock in the test's hands."""

    def __init__(self, numbers: BreakerNumbers = NUMBERS) -> None:
        self.now = 1000.0
        self.health = Health("http://s", numbers, lambda: self.now, lambda: 1.0)

    @property
    def state(self) -> BreakerState:
        return self.health.breaker

    def calls(self, *, ok: int = 0, failed: int = 0) -> None:
        for _ in range(ok):
            self.health.answered(200)
        for _ in range(failed):
            self.health.unanswered("lost")

    def passes(self, priority: Priority = "write") -> bool:
        return self.health.admit(priority) == 0.0

    def passing(self, priority: Priority, of: int = 100) -> int:
        return sum(self.passes(priority) for _ in range(of))

    def open(self) -> None:
        self.calls(failed=NUMBERS.min_calls)
        assert self.state is OPEN

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def begin_return(self) -> None:
        self.open()
        self.wait(NUMBERS.open_seconds)
        assert self.passes("read")
        self.calls(ok=1)
        assert self.state is RETURNING


@pytest.mark.parametrize(
    ("ok", "failed", "opens"),
    [(0, 9, False), (0, 10, True), (7, 3, True), (8, 2, False), (71, 29, False), (70, 30, True), (1000, 0, False)],
)
def test_it_opens_at_a_rate_of_failures_among_enough_calls(ok: int, failed: int, opens: bool) -> None:
    bench = _Bench()
    bench.calls(ok=ok, failed=failed)
    assert (bench.state is OPEN) is opens
    assert bench.passes() is not opens


def test_old_failures_do_not_count() -> None:
    bench = _Bench()
    bench.calls(failed=9)
    bench.wait(NUMBERS.window_seconds + 1)
    bench.calls(failed=9)
    assert bench.state is CLOSED
    bench.calls(failed=1)
    assert bench.state is OPEN


def test_nothing_passes_until_the_pause_is_over_and_then_one_probe() -> None:
    bench = _Bench()
    bench.open()
    assert bench.health.admit("write") == pytest.approx(NUMBERS.open_seconds)
    bench.wait(NUMBERS.open_seconds - 0.01)
    assert not bench.passes("read")
    bench.wait(0.01)
    assert [bench.passes("read") for _ in range(5)] == [True, False, False, False, False]
    assert bench.state is PROBING


def test_a_probe_that_fails_makes_the_next_pause_longer() -> None:
    bench = _Bench()
    bench.open()
    pauses: list[float] = []
    for _ in range(7):
        pauses.append(bench.health.admit("write"))
        bench.wait(pauses[-1])
        assert bench.passes("claim")
        bench.calls(failed=1)
    assert pauses == pytest.approx([1, 2, 4, 8, 15, 15, 15])


def test_a_probe_that_its_caller_gives_up_makes_room_for_another() -> None:
    bench = _Bench()
    bench.open()
    bench.wait(NUMBERS.open_seconds)
    assert bench.passes()
    assert not bench.passes()
    bench.health.abandoned("write")
    assert bench.passes()


@pytest.mark.parametrize("given_up", ["a vital call", "a call from before"])
def test_a_call_that_took_no_permit_gives_none_back(given_up: str) -> None:
    async def scene(clock: Callable[[], float]) -> None:
        http = ScriptedTransport([silent(1000.0), silent(1000.0)], clock)
        made = Retrying(
            http, server="http://s", probe=WireRequest("GET", "/health"), numbers=Resilience(), monotonic=clock
        )
        before = asyncio.ensure_future(made.send(WireRequest("POST", "/", timeout_seconds=1000.0)))
        await asyncio.sleep(0)
        for _ in range(NUMBERS.min_calls):
            made.health.unanswered("lost")
        await asyncio.sleep(NUMBERS.open_seconds)
        assert made.health.admit("write") == 0.0, "the only permit"
        beat = asyncio.ensure_future(made.send(WireRequest("POST", "/beat", priority="heartbeat")))
        await asyncio.sleep(0)
        gone = before if given_up == "a call from before" else beat
        gone.cancel()
        await asyncio.wait([gone])
        assert gone.cancelled()
        assert http.cancelled == 1
        assert made.health.admit("write") > 0.0
        for each in (before, beat):
            each.cancel()
        await asyncio.wait([before, beat])

    in_virtual_time(scene)


def test_a_probe_that_takes_long_makes_room_for_another() -> None:
    bench = _Bench()
    bench.open()
    bench.wait(NUMBERS.open_seconds)
    assert bench.passes("claim")
    bench.wait(1.9)
    assert not bench.passes("read")
    bench.wait(0.1)
    assert bench.passes("read")
    bench.calls(ok=1)
    assert bench.state is RETURNING


def test_each_success_lets_two_more_calls_through_reads_first() -> None:
    bench = _Bench()
    bench.begin_return()
    assert (bench.passing("span"), bench.passing("read"), bench.passing("read")) == (0, 2, 0)
    bench.calls(ok=2)
    assert (bench.passing("span"), bench.passing("read")) == (0, 4)
    bench.calls(ok=1)
    bench.wait(NUMBERS.reads_first_seconds)
    assert (bench.passing("span"), bench.passing("read")) == (2, 0)
    assert bench.state is RETURNING


def test_a_return_goes_on_when_the_calls_that_were_let_through_take_long() -> None:
    bench = _Bench()
    bench.begin_return()
    assert bench.passing("read") == 2
    bench.wait(2.0)
    assert bench.passing("span") == 1


def test_enough_successes_close_it() -> None:
    bench = _Bench()
    assert bench.health.report().breaker_share == 1.0
    bench.begin_return()
    for number in range(NUMBERS.trial_calls):
        assert bench.state is RETURNING
        assert bench.health.report().breaker_share == number / NUMBERS.trial_calls
        bench.calls(ok=1)
    assert bench.state is CLOSED
    assert bench.health.report().breaker_share == 1.0
    assert (bench.passing("read"), bench.passing("span")) == (100, 100)


@pytest.mark.parametrize(("ok", "failed"), [(2, 1), (4, 2), (7, 3)])
def test_failures_on_the_way_back_open_it_again(ok: int, failed: int) -> None:
    bench = _Bench()
    bench.begin_return()
    bench.calls(ok=ok, failed=failed - 1)
    assert bench.state is RETURNING
    bench.calls(failed=1)
    assert bench.state is OPEN
    assert bench.health.report().breaker_share == 0.0
    assert bench.health.admit("write") == pytest.approx(2 * NUMBERS.open_seconds)


def test_a_single_failure_on_the_way_back_does_not() -> None:
    bench = _Bench()
    bench.begin_return()
    bench.calls(ok=4, failed=1)
    assert bench.state is RETURNING


def test_pauses_are_short_again_after_a_full_return() -> None:
    bench = _Bench()
    bench.begin_return()
    bench.calls(ok=NUMBERS.trial_calls)
    bench.open()
    assert bench.health.admit("write") == pytest.approx(NUMBERS.open_seconds)


@pytest.mark.parametrize("vital", ["heartbeat", "completion"])
def test_vital_calls_pass_out_of_a_budget_of_their_own(vital: Priority) -> None:
    bench = _Bench()
    bench.open()
    assert bench.passing(vital) == NUMBERS.vital_burst
    bench.wait(0.25)
    assert bench.health.admit(vital) == pytest.approx(0.25)
    bench.wait(0.25)
    assert bench.passing(vital) == 1
    bench.wait(3600)
    assert bench.passing(vital) == NUMBERS.vital_burst
    assert [bench.passes(other) for other in SHED_ORDER if other not in ("heartbeat", "completion")] == [True] + [
        False
    ] * 3, "the rest still has its one probe"


def test_a_vital_call_that_succeeds_ends_the_pause() -> None:
    bench = _Bench()
    bench.open()
    assert bench.passes("heartbeat")
    bench.calls(ok=1)
    assert bench.state is RETURNING


def test_a_vital_call_that_fails_does_not_make_the_pause_longer() -> None:
    bench = _Bench()
    bench.open()
    for _ in range(5):
        assert bench.passes("heartbeat")
        bench.calls(failed=1)
    assert bench.health.admit("write") == pytest.approx(NUMBERS.open_seconds)


# --- Around a transport ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("acts", "opens"),
    [
        (lost(10), True),
        (replies(*[503] * 10), True),
        (replies(*[500] * 10), True),
        (replies(*[429] * 10), False),
        (replies(*[507] * 10), False),
        (replies(*[404] * 10), False),
    ],
    ids=["no reply", "503", "500", "429", "507", "404"],
)
def test_what_counts_as_a_failure(acts: list[Act], opens: bool) -> None:
    async def scene(clock: Callable[[], float]) -> None:
        http = ScriptedTransport(acts, clock)
        guarded = Retrying(
            http,
            server="http://s",
            probe=WireRequest("GET", "/health"),
            numbers=Resilience(),
            retry_delays=(),
            monotonic=clock,
            chance=lambda: 1.0,
        )
        for _ in range(10):
            with contextlib.suppress(StoreUnreachable):
                await guarded.send(WireRequest("POST", "/"))
        assert (guarded.health.breaker is OPEN) is opens
        assert len(http.tries) == 10
        if opens:
            with pytest.raises(StoreUnreachable, match="held back by the circuit breaker, which is open"):
                await guarded.send(WireRequest("POST", "/", waits_while_shed=False))
            assert len(http.tries) == 10
            assert (await guarded.send(WireRequest("POST", "/"))).status == 200
            assert clock() == pytest.approx(NUMBERS.open_seconds)

    in_virtual_time(scene)


def test_the_window_slides() -> None:
    window = FailureWindow(10.0)
    for second in range(30):
        window.add(float(second), ok=second % 2 == 0)
        calls, failures = window.totals(float(second))
        assert calls == min(second + 1, 10)
        assert failures == calls // 2 if second % 2 else (calls - 1) // 2 <= failures <= calls // 2
    window.clear()
    assert window.totals(29.0) == (0, 0)
