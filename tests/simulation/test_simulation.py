"""Many small worlds of a server, runners and a network, each drawn from its seed (``simulation``), and what they find.

What must hold: nothing acknowledged is lost; every rollout reaches one end; every span is stored once; nothing has a
doubled effect; no living runner is declared dead; an attempt with a successor changes nothing; everything ends.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import simulation
from command_line import clean_environment
from simulated_bugs import BUGS

IN_CI = bool(os.environ.get("CI"))
PROCESSES = 16
"""The seeds are split among so many processes, so that what a process may leave behind reaches no other test."""
SEEDS = (5_000 if IN_CI else 320) // PROCESSES
"""Of the next 5,000, three find faults that are not repaired yet (docs/robustness.md)."""
FIRST = int(os.environ.get("SIMULATION_FIRST", "0"))
"""The first seed of the long form; with ``SIMULATION_COUNT`` it can be split among machines."""
COUNT = int(os.environ.get("SIMULATION_COUNT", "1000000"))


def run_seeds(*arguments: object, hash_seed: str = "random") -> tuple[int, str]:
    """The command that runs seeds: its exit status, and what it printed."""
    done = subprocess.run(
        [sys.executable, simulation.__file__, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=clean_environment(PYTHONHASHSEED=hash_seed),
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(PROCESSES))
def test_the_rules_hold_in_every_world(part: int) -> None:
    status, told = run_seeds(part * SEEDS, SEEDS)
    assert status == 0, told
    assert f"{SEEDS} seeds, 0 failed" in told


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("part", range(PROCESSES))
def test_the_rules_hold_in_a_million_worlds(part: int) -> None:
    share = COUNT // PROCESSES
    for first in range(FIRST + part * share, FIRST + (part + 1) * share, 10_000):
        count = min(10_000, FIRST + (part + 1) * share - first)
        status, told = run_seeds(first, count)
        assert status == 0, told


def test_a_seed_gives_the_same_course_of_events_each_time() -> None:
    for seed in (3, 31, 88):
        first = run_seeds(seed, hash_seed="1")
        assert first == run_seeds(seed, hash_seed="2")
        assert "runner-0#1: starts" in first[1]


def test_seeds_do_not_depend_on_those_before_them() -> None:
    alone = simulation.simulate(31)
    simulation.simulate(90, "fence_is_open")
    assert simulation.simulate(31).trace == alone.trace


MOST = 2_000
"""Seeds within which each of the faults is found."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("bug", sorted(BUGS))
def test_it_finds_a_fault_that_is_planted(bug: str) -> None:
    status, told = run_seeds(0, MOST, "--bug", bug, "--until-found")
    assert status == 1, f"{bug} is not found within {MOST} seeds: {told}"
    again = next(line for line in told.splitlines() if line.startswith("again: "))
    seed = again.split()[3]
    assert again == f"again: {simulation.command(int(seed), bug)}"
    status, repeated = run_seeds(seed, 1, "--bug", bug)
    assert status == 1
    assert [line for line in repeated.splitlines() if line.startswith("seed ")] == [
        line for line in told.splitlines() if line.startswith("seed ")
    ]
    assert run_seeds(seed)[0] == 0  # and not without the fault
