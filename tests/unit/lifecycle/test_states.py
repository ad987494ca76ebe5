"""The tables: complete, connected, and with no way out of the end."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any, get_args

import pytest

from agentlightning.errors import IllegalMove
from agentlightning.lifecycle.states import (
    ATTEMPT_MOVES,
    CLAIMABLE,
    ENDED,
    FINAL,
    LIVE,
    ROLLOUT_MOVES,
    check_attempt_move,
    check_rollout_move,
)
from agentlightning.types import AttemptEnd, AttemptStatus, RolloutStatus

ROLLOUT_STATES: tuple[RolloutStatus, ...] = get_args(RolloutStatus)
ATTEMPT_STATES: tuple[AttemptStatus, ...] = get_args(AttemptStatus)

Moves = Mapping[Any, frozenset[Any]]


def reachable(moves: Moves, start: str) -> set[str]:
    """The states that can follow, however many moves it takes; with the start."""
    found, pending = {start}, [start]
    while pending:
        new = moves[pending.pop()] - found
        found |= new
        pending += new
    return found


@pytest.mark.parametrize(("moves", "states"), [(ROLLOUT_MOVES, ROLLOUT_STATES), (ATTEMPT_MOVES, ATTEMPT_STATES)])
def test_the_table_has_every_state_and_no_other(moves: Moves, states: tuple[str, ...]) -> None:
    assert set(moves) == set(states)
    assert set().union(*moves.values()) <= set(states)


@pytest.mark.parametrize(
    ("moves", "start", "states"),
    [(ROLLOUT_MOVES, "queuing", ROLLOUT_STATES), (ATTEMPT_MOVES, "preparing", ATTEMPT_STATES)],
)
def test_every_state_can_be_reached_from_the_first(moves: Moves, start: str, states: tuple[str, ...]) -> None:
    assert reachable(moves, start) == set(states)


def test_a_rollout_never_waits_for_its_first_attempt_again() -> None:
    assert all("queuing" not in ways for ways in ROLLOUT_MOVES.values())


def test_an_attempt_never_prepares_again() -> None:
    assert all("preparing" not in ways for ways in ATTEMPT_MOVES.values())


@pytest.mark.parametrize("status", ROLLOUT_STATES)
def test_every_rollout_can_come_to_each_end_until_it_has_come_to_one(status: RolloutStatus) -> None:
    ends = {"succeeded", "failed", "cancelled"}
    assert reachable(ROLLOUT_MOVES, status) >= ({status} if status in ends else ends)
    assert (ROLLOUT_MOVES[status] == frozenset()) == (status in ends)


def test_the_groups_of_states() -> None:
    assert {"succeeded", "failed", "cancelled"} == FINAL
    assert {"queuing", "requeuing"} == CLAIMABLE
    assert {"preparing", "running"} == LIVE
    assert set(get_args(AttemptEnd)) == ENDED
    assert set(ATTEMPT_STATES) == LIVE | ENDED
    assert not LIVE & ENDED


def test_only_an_unresponsive_attempt_can_return() -> None:
    assert {status for status in ENDED if ATTEMPT_MOVES[status]} == {"unresponsive"}
    assert ATTEMPT_MOVES["unresponsive"] == {"running"}


def test_every_live_attempt_can_come_to_each_end() -> None:
    for status in LIVE:
        assert ATTEMPT_MOVES[status] >= ENDED


@pytest.mark.parametrize(("status", "to"), list(product(ROLLOUT_STATES, ROLLOUT_STATES)))
def test_a_rollout_moves_as_the_table_says(status: RolloutStatus, to: RolloutStatus) -> None:
    if to in ROLLOUT_MOVES[status]:
        check_rollout_move("ro-7", status, to)
        return
    with pytest.raises(IllegalMove) as caught:
        check_rollout_move("ro-7", status, to)
    ways = ", ".join(sorted(ROLLOUT_MOVES[status])) or "nothing else: it has ended"
    assert (
        caught.value.message == f"rollout 'ro-7' is {status} and cannot become {to}; from {status} it can become {ways}"
    )


@pytest.mark.parametrize(("status", "to"), list(product(ATTEMPT_STATES, ATTEMPT_STATES)))
def test_an_attempt_moves_as_the_table_says(status: AttemptStatus, to: AttemptStatus) -> None:
    if to in ATTEMPT_MOVES[status]:
        check_attempt_move("at-7", status, to)
        return
    with pytest.raises(IllegalMove) as caught:
        check_attempt_move("at-7", status, to)
    ways = ", ".join(sorted(ATTEMPT_MOVES[status])) or "nothing else: it has ended"
    assert (
        caught.value.message == f"attempt 'at-7' is {status} and cannot become {to}; from {status} it can become {ways}"
    )
