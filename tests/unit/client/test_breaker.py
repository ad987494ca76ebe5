"""The circuit breaker: when it opens, what passes meanwhile, and how it closes again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest

from agentlightning.errors import StoreUnreachable
from agentlightning.http.client.breaker import Breaker, BreakerNumbers, BreakerState, FailureWindow
from agentlightning.http.client.health import Health
from agentlightning.http.client.resilience import OneTry
from agentlightning.http.client.transport import RequestShed, WireRequest
from agentlightning.http.routes import SHED_ORDER, Priority
from scripted_transport import Act, ScriptedTransport, lost, replies
from virtual_time import in_virtual_time

NUMBERS = BreakerNumbers()
CLOSED, OPEN, PROBING, RETURNING = BreakerState


class _Bench:
    """A breaker and a clock in the test's hands."""

    def __init__(self, numbers: BreakerNumbers = NUMBERS) -> None:
        self.now = 1000.0
        self.states = [CLOSED]
        self.breaker = Breaker(numbers, lambda: self.now, lambda: 1.0, lambda _, after: self.states.append(after))

    def calls(self, *, ok: int = 0, failed: int = 0) -> None:
        for _ in range(ok):
            self.breaker.succeeded()
        for _ in range(failed):
            self.breaker.failed()

    def passes(self, priority: Priority = "write") -> bool:
        return self.breaker.admit(priority) == 0.0

    def passing(self, priority: Priority, of: int = 100) -> int:
        return sum(self.passes(priority) for _ in range(of))

    def open(self) -> None:
        self.calls(failed=NUMBERS.min_calls)
        assert self.breaker.state is OPEN

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def begin_return(self) -> None:
        self.open()
        self.wait(NUMBERS.open_seconds)
        assert self.passes("read")
        self.breaker.succeeded()
        assert self.breaker.state is RETURNING


@pytest.mark.parametrize(
    ("ok", "failed", "opens"),
    [(0, 9, False), (0, 10, True), (7, 3, True), (8, 2, False), (71, 29, False), (70, 30, True), (1000, 0, False)],
)
def test_it_opens_at_a_rate_of_failures_among_enough_calls(ok: int, failed: int, opens: bool) -> None:
    bench = _Bench()
    bench.calls(ok=ok, failed=failed)
    assert (bench.breaker.state is OPEN) is opens
    assert bench.passes() is not opens


def test_old_failures_do_not_count() -> None:
    bench = _Bench()
    bench.calls(failed=9)
    bench.wait(NUMBERS.window_seconds + 1)
    bench.calls(failed=9)
    assert bench.breaker.state is CLOSED
    bench.calls(failed=1)
    assert bench.breaker.state is OPEN


def test_nothing_passes_until_the_pause_is_over_and_then_one_probe() -> None:
    bench = _Bench()
    bench.open()
    assert bench.breaker.admit("write") == pytest.approx(NUMBERS.open_seconds)
    bench.wait(NUMBERS.open_seconds - 0.01)
    assert not bench.passes("read")
    bench.wait(0.01)
    assert [bench.passes("read") for _ in range(5)] == [True, False, False, False, False]
    assert bench.breaker.state is PROBING


def test_a_probe_that_fails_makes_the_next_pause_longer() -> None:
    bench = _Bench()
    bench.open()
    pauses: list[float] = []
    for _ in range(7):
        pauses.append(bench.breaker.admit("write"))
        bench.wait(pauses[-1])
        assert bench.passes("claim")
        bench.breaker.failed()
    assert pauses == pytest.approx([1, 2, 4, 8, 15, 15, 15])


def test_a_probe_that_its_caller_gives_up_makes_room_for_another() -> None:
    bench = _Bench()
    bench.open()
    bench.wait(NUMBERS.open_seconds)
    assert bench.passes()
    assert not bench.passes()
    bench.breaker.abandoned()
    assert bench.passes()


def test_a_probe_that_takes_long_makes_room_for_another() -> None:
    bench = _Bench()
    bench.open()
    bench.wait(NUMBERS.open_seconds)
    assert bench.passes("claim")
    bench.wait(1.9)
    assert not bench.passes("read")
    bench.wait(0.1)
    assert bench.passes("read")
    bench.breaker.succeeded()
    assert bench.breaker.state is RETURNING


def test_calls_come_back_by_and_by_reads_first() -> None:
    bench = _Bench()
    bench.begin_return()
    seen: list[tuple[int, int]] = []
    for _ in range(3):
        seen.append((bench.passing("read"), bench.passing("span")))
        bench.wait(NUMBERS.stage_seconds)
    assert seen == [(10, 0), (25, 10), (50, 25)]
    assert (bench.passing("read"), bench.passing("span")) == (100, 100)
    assert bench.states == [CLOSED, OPEN, PROBING, RETURNING, CLOSED]


def test_enough_successes_end_a_stage_before_its_time() -> None:
    bench = _Bench()
    bench.begin_return()
    for share in (0.10, 0.25, 0.50):
        assert bench.breaker.share == share
        bench.calls(ok=NUMBERS.stage_calls)
    assert bench.breaker.state is CLOSED
    assert bench.breaker.share == 1.0


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_failures_on_the_way_back_open_it_again(stage: int) -> None:
    bench = _Bench()
    bench.begin_return()
    for _ in range(stage):
        bench.calls(ok=NUMBERS.stage_calls)
    bench.calls(ok=2, failed=1)
    assert bench.breaker.state is OPEN
    assert bench.breaker.admit("write") == pytest.approx(2 * NUMBERS.open_seconds)


def test_a_single_failure_on_the_way_back_does_not() -> None:
    bench = _Bench()
    bench.begin_return()
    bench.calls(ok=4, failed=1)
    assert bench.breaker.state is RETURNING


def test_pauses_are_short_again_after_a_full_return() -> None:
    bench = _Bench()
    bench.begin_return()
    bench.calls(ok=3 * NUMBERS.stage_calls)
    bench.open()
    assert bench.breaker.admit("write") == pytest.approx(NUMBERS.open_seconds)


@pytest.mark.parametrize("vital", ["heartbeat", "completion"])
def test_vital_calls_pass_out_of_a_budget_of_their_own(vital: Priority) -> None:
    bench = _Bench()
    bench.open()
    assert bench.passing(vital) == NUMBERS.vital_burst
    bench.wait(0.25)
    assert bench.breaker.admit(vital) == pytest.approx(0.25)
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
    bench.breaker.succeeded()
    assert bench.breaker.state is RETURNING


def test_a_vital_call_that_fails_does_not_make_the_pause_longer() -> None:
    bench = _Bench()
    bench.open()
    for _ in range(5):
        assert bench.passes("heartbeat")
        bench.breaker.failed()
    assert bench.breaker.admit("write") == pytest.approx(NUMBERS.open_seconds)


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
        breaker = Breaker(NUMBERS, clock, lambda: 1.0, lambda *_: None)
        guarded = OneTry(ScriptedTransport(acts, clock), breaker, Health("http://s", clock))
        for _ in range(10):
            with contextlib.suppress(StoreUnreachable):
                await guarded.send(WireRequest("POST", "/"))
        assert (breaker.state is OPEN) is opens
        if opens:
            with pytest.raises(RequestShed) as shed:
                await guarded.send(WireRequest("POST", "/"))
            assert shed.value.retry_after_seconds == pytest.approx(NUMBERS.open_seconds)

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
