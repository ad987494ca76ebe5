"""Back-off, the limit per minute, and what counts as a crash of the runner rather than of a rollout."""

from __future__ import annotations

from collections.abc import Iterable

from agentlightning.execution.restarts import CrashCounter, Life, RestartPolicy

POLICY = RestartPolicy(most_per_minute=4, first_delay=0.5, factor=2.0, longest_delay=3.0, short_life=1.0)
HELD = Life(10.0, began=True, claimed=True, worked=False, rollouts=frozenset())
"""It was lost with a rollout on which it was not at work."""
IDLE = HELD._replace(claimed=False)
UNBORN = IDLE._replace(began=False)


def on(*rollouts: str) -> Life:
    return HELD._replace(rollouts=frozenset(rollouts), seconds=0.1)


def delays(restarts: CrashCounter, lives: Iterable[Life], apart: float = 0.0) -> list[float | None]:
    return [restarts.crashed(life, number * apart) for number, life in enumerate(lives)]


def test_each_short_life_makes_the_next_delay_longer() -> None:
    assert delays(CrashCounter(POLICY), [HELD._replace(seconds=0.1)] * 4, 100.0) == [1.0, 2.0, 3.0, 3.0]


def test_a_longer_life_begins_anew() -> None:
    lives = [HELD._replace(seconds=seconds) for seconds in (0.1, 5.0, 0.1)]
    assert delays(CrashCounter(POLICY), lives, 100.0) == [1.0, 0.5, 1.0]


def test_too_many_within_a_minute_are_the_end() -> None:
    assert delays(CrashCounter(POLICY), [HELD] * 5, 14.0) == [0.5, 0.5, 0.5, 0.5, None]


def test_those_of_the_minute_before_do_not_count() -> None:
    assert delays(CrashCounter(POLICY), [HELD] * 5, 15.0) == [0.5] * 5


def test_none_may_be_allowed() -> None:
    policy = RestartPolicy(most_per_minute=0)
    for life in (HELD, IDLE, UNBORN, on("a"), HELD._replace(worked=True)):
        assert CrashCounter(policy).crashed(life, 0.0) is None
    assert CrashCounter(policy, {"a"}).crashed(on("a"), 0.0) is None


def test_a_rollout_counts_once_and_without_back_off() -> None:
    assert delays(CrashCounter(POLICY), [on("a"), on("b")] * 50) == [0.5] * 100
    assert delays(CrashCounter(POLICY), map(on, "abcde")) == [0.5] * 4 + [None]


def test_one_that_has_crashed_another_runner_is_known() -> None:
    blamed = set[str]()
    first, second = CrashCounter(POLICY, blamed), CrashCounter(POLICY, blamed)
    assert delays(first, map(on, "abcd")) == [0.5] * 4
    assert delays(second, map(on, "abcdefgh")) == [0.5] * 8
    assert second.crashed(on("a", "i"), 0.0) is None  # it may have been the other one


def test_work_that_was_done_begins_the_count_anew() -> None:
    done = HELD._replace(worked=True)
    assert delays(CrashCounter(POLICY), [HELD, HELD, HELD, done] * 5) == [0.5] * 20
    lives = [on(str(number))._replace(worked=number % 3 == 0) for number in range(60)]
    assert delays(CrashCounter(POLICY), lives) == [0.5] * 60


def test_one_that_never_gets_anywhere_is_given_up_soon_however_long_that_takes() -> None:
    assert delays(CrashCounter(POLICY), [UNBORN] * 3, 1000.0) == [0.5, 0.5, None]
    policy = RestartPolicy(most_failed_starts=5, most_per_minute=3)
    assert delays(CrashCounter(policy), [UNBORN] * 4, 1000.0)[-1] is None  # the general limit holds, too


def test_so_is_one_that_never_claims_anything() -> None:
    assert delays(CrashCounter(POLICY), [IDLE] * 5, 1000.0) == [0.5, 0.5, 0.5, 0.5, None]
    assert None not in delays(CrashCounter(POLICY), [IDLE, IDLE, IDLE, HELD] * 5, 1000.0)
