"""The states of rollouts and attempts, and every move between them, as tables.

A rollout::

                      ┌────────────── requeuing ◀─────────────┐
                      ▼                   │ ▲ (revived)       │
    queuing ───▶ preparing ───▶ running ◀─┘ └─ (to retry) ────┤
       │              │            │                          │
       └──────────────┴────────────┴───▶ succeeded │ failed │ cancelled

An attempt starts ``preparing``, becomes ``running`` with its first sign of life, and ends
``succeeded``, ``failed``, ``timeout`` or ``unresponsive``. Only an unresponsive one may come
back to life, and only while nothing else holds its rollout (``attempts.standing``).

A terminal state has no way out, so each rollout reaches exactly one.
"""

from __future__ import annotations

from collections.abc import Mapping

from agentlightning.errors import IllegalMove
from agentlightning.types import AttemptStatus, RolloutStatus

ROLLOUT_MOVES: Mapping[RolloutStatus, frozenset[RolloutStatus]] = {
    "queuing": frozenset({"preparing", "succeeded", "failed", "cancelled"}),
    "preparing": frozenset({"preparing", "running", "requeuing", "succeeded", "failed", "cancelled"}),
    "running": frozenset({"preparing", "requeuing", "succeeded", "failed", "cancelled"}),
    "requeuing": frozenset({"preparing", "running", "succeeded", "failed", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
"""From each rollout state to the states it may move to. ``preparing`` again: a new attempt replaces a live one."""

ATTEMPT_MOVES: Mapping[AttemptStatus, frozenset[AttemptStatus]] = {
    "preparing": frozenset({"running", "succeeded", "failed", "timeout", "unresponsive"}),
    "running": frozenset({"succeeded", "failed", "timeout", "unresponsive"}),
    "unresponsive": frozenset({"running"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "timeout": frozenset(),
}
"""From each attempt state to the states it may move to. ``unresponsive`` to ``running`` is the revival."""

CLAIMABLE: frozenset[RolloutStatus] = frozenset({"queuing", "requeuing"})
"""Rollouts that wait for a claim."""

FINAL: frozenset[RolloutStatus] = frozenset(status for status, ways in ROLLOUT_MOVES.items() if not ways)
"""Terminal rollout states."""

LIVE: frozenset[AttemptStatus] = frozenset({"preparing", "running"})
"""Attempts that hold their rollout."""

ENDED: frozenset[AttemptStatus] = frozenset(ATTEMPT_MOVES) - LIVE
"""Attempts that do not hold their rollout any more."""


def check_rollout_move(rollout_id: str, status: RolloutStatus, to: RolloutStatus) -> None:
    """Raise ``IllegalMove`` unless the table has a way from ``status`` to ``to``."""
    if to not in ROLLOUT_MOVES[status]:
        raise IllegalMove(
            f"rollout {rollout_id!r} is {status} and cannot become {to}; from {status} it can become "
            f"{_ways(ROLLOUT_MOVES[status])}"
        )


def check_attempt_move(attempt_id: str, status: AttemptStatus, to: AttemptStatus) -> None:
    """Raise ``IllegalMove`` unless the table has a way from ``status`` to ``to``."""
    if to not in ATTEMPT_MOVES[status]:
        raise IllegalMove(
            f"attempt {attempt_id!r} is {status} and cannot become {to}; from {status} it can become "
            f"{_ways(ATTEMPT_MOVES[status])}"
        )


def _ways(states: frozenset[RolloutStatus] | frozenset[AttemptStatus]) -> str:
    return ", ".join(sorted(states)) or "nothing else: it has ended"
