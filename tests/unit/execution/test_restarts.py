"""Back-off, and the limit per minute."""

from __future__ import annotations

from agentlightning.execution.quotas import CrashCounter, RestartPolicy

POLICY = RestartPolicy(most_per_minute=4, first_delay=0.5, factor=2.0, longest_delay=3.0, short_life=1.0)


def test_each_short_life_makes_the_next_delay_longer() -> None:
    restarts = CrashCounter(POLICY)
    assert [restarts.crashed(0.1, now) for now in (100.0, 200.0, 300.0, 400.0)] == [1.0, 2.0, 3.0, 3.0]


def test_a_longer_life_begins_anew() -> None:
    restarts = CrashCounter(POLICY)
    assert [restarts.crashed(lived, now) for lived, now in ((0.1, 100.0), (5.0, 200.0), (0.1, 300.0))] == [
        1.0,
        0.5,
        1.0,
    ]


def test_too_many_within_a_minute_are_the_end() -> None:
    restarts = CrashCounter(POLICY)
    delays = [restarts.crashed(10.0, now) for now in (0.0, 10.0, 20.0, 30.0, 59.0)]
    assert delays == [0.5, 0.5, 0.5, 0.5, None]


def test_those_of_the_minute_before_do_not_count() -> None:
    restarts = CrashCounter(POLICY)
    for now in (0.0, 10.0, 20.0, 30.0):
        restarts.crashed(10.0, now)
    assert restarts.crashed(10.0, 60.0) == 0.5


def test_none_may_be_allowed() -> None:
    assert CrashCounter(RestartPolicy(most_per_minute=0)).crashed(1000.0, 0.0) is None
