"""The algorithm's process is killed -9 in the middle of a fit, and the run is taken up again under its name."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import agentlightning as agl
from agentlightning.errors import AgentLightningError
from agentlightning.store.sqlite.store import ReadOnlySqliteStore
from trainer_programs import RESUMABLE, RESUMABLE_GRPO, start_program

DEADLINE_SECONDS = 60.0


def attempts_by_rollout(database: Path) -> dict[str, list[agl.Attempt]]:
    """All attempts in a store, whoever has it open."""

    async def read() -> dict[str, list[agl.Attempt]]:
        async with ReadOnlySqliteStore(database) as store:
            assert (await store.verify()).ok
            rollouts = await store.query_rollouts()
            return {each.rollout_id: list(await store.query_attempts(each.rollout_id)) for each in rollouts}

    return asyncio.run(read())


def finished(attempts: dict[str, list[agl.Attempt]]) -> dict[str, list[str]]:
    """Rollouts that have succeeded, with the ids of their attempts."""
    return {
        rollout_id: [attempt.attempt_id for attempt in each]
        for rollout_id, each in attempts.items()
        if any(attempt.status == "succeeded" for attempt in each)
    }


def kill_when(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    """Kill the process, and only it, as soon as the moment has come."""
    end = time.monotonic() + DEADLINE_SECONDS
    while not ready():
        if process.poll() is not None:
            pytest.fail(f"it ended before it was killed: {process.communicate()}")
        assert time.monotonic() < end, "the moment to kill never came"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=DEADLINE_SECONDS)


def run_to_the_end(program: str, folder: Path, *arguments: str) -> None:
    process = start_program(program, folder, *arguments)
    out, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, err
    assert "FINISHED" in out
    assert "Traceback" not in err


def count_finished(database: Path) -> int:
    """How many rollouts have succeeded so far, read beside the process that owns the file."""

    async def read() -> int:
        async with ReadOnlySqliteStore(database) as store:
            return (await store.statistics()).get("rollouts_by_status", {}).get("succeeded", 0)

    try:
        return asyncio.run(read())
    except AgentLightningError:  # the file is not there yet, or not yet whole
        return 0


@pytest.mark.parametrize(("program", "size"), [(RESUMABLE, 60), (RESUMABLE_GRPO, 6)], ids=["baseline", "grpo"])
def test_a_killed_run_goes_on_and_runs_nothing_twice(program: str, size: int, tmp_path: Path) -> None:
    database = tmp_path / "survivor" / "store.db"
    first = start_program(program, tmp_path, str(tmp_path), str(size))
    kill_when(first, lambda: count_finished(database) >= 10)
    before = finished(attempts_by_rollout(database))
    assert len(before) >= 10, "it was killed too early to show anything"

    run_to_the_end(program, tmp_path, str(tmp_path), str(size))

    attempts = attempts_by_rollout(database)
    after = finished(attempts)
    assert len(after) == len(attempts), "a rollout was lost"
    assert {rollout_id: after[rollout_id] for rollout_id in before} == before, "a finished rollout was run again"
    assert all(sum(attempt.status == "succeeded" for attempt in each) == 1 for each in attempts.values())
    if program is RESUMABLE:
        assert len(after) == size
    assert len(after) > len(before), "it was killed too late to show anything"
