"""The algorithm's process is killed -9 in the middle of a fit, and the run is taken up again under its name."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

import agentlightning as agl
from agentlightning.demo.game import VOCABULARY
from agentlightning.demo.policy_endpoint import PolicyEndpoint
from agentlightning.errors import AgentLightningError
from agentlightning.store.sqlite.store import ReadOnlySqliteStore
from trainer_programs import LEFT_BEHIND, RESUMABLE, RESUMABLE_GRPO, end_programs, start_program

DEADLINE_SECONDS = 60.0


def attempts_by_rollout(database: Path) -> dict[str, list[agl.Attempt]]:
    """All attempts in a store, whoever has it open."""

    async def read() -> dict[str, list[agl.Attempt]]:
        async with ReadOnlySqliteStore(database) as store:
            assert (await store.verify()).ok
            rollouts = await store.query_rollouts()
            return {each.rollout_id: list(await store.query_attempts(each.rollout_id)) for each in rollouts}

    return asyncio.run(read())


def statistics(database: Path) -> dict[str, int]:
    """How many rollouts there are in each state, read beside the process that owns the file."""

    async def read() -> dict[str, int]:
        async with ReadOnlySqliteStore(database) as store:
            return dict((await store.statistics()).get("rollouts_by_status", {}))

    try:
        return asyncio.run(read())
    except AgentLightningError:  # the file is not there yet, or not yet whole
        return {}


def finished(attempts: dict[str, list[agl.Attempt]]) -> dict[str, list[str]]:
    """Rollouts that have succeeded, with the ids of their attempts."""
    return {
        rollout_id: [attempt.attempt_id for attempt in each]
        for rollout_id, each in attempts.items()
        if any(attempt.status == "succeeded" for attempt in each)
    }


def wait_until(ready: Callable[[], bool]) -> None:
    """Look, again and again, until the moment has come."""
    end = time.monotonic() + DEADLINE_SECONDS
    while not ready():
        assert time.monotonic() < end, "the moment never came"
        time.sleep(0.02)


def kill_when(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    """Kill the process, and only it, as soon as the moment has come."""

    def is_time() -> bool:
        if process.poll() is not None:
            pytest.fail(f"it ended before it was killed: {process.communicate()}")
        return ready()

    wait_until(is_time)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=DEADLINE_SECONDS)


def run_to_the_end(program: str, folder: Path, *arguments: str) -> None:
    process = start_program(program, folder, *arguments)
    out, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, err
    assert "FINISHED" in out
    assert "Traceback" not in err


def free_port() -> int:
    """One that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Generator[None]:
    yield
    end_programs()


@pytest.fixture
def model() -> Generator[str]:
    """The URL of a model that outlives all runs."""
    endpoint = PolicyEndpoint(agl.SoftmaxPolicy(VOCABULARY), api_key="")
    asyncio.run(endpoint.start())
    yield endpoint.url
    asyncio.run(endpoint.stop())


@pytest.mark.parametrize(("program", "size"), [(RESUMABLE, 60), (RESUMABLE_GRPO, 6)], ids=["baseline", "grpo"])
def test_a_killed_run_goes_on_and_runs_nothing_twice(program: str, size: int, tmp_path: Path) -> None:
    database = tmp_path / "survivor" / "store.db"
    first = start_program(program, tmp_path, str(tmp_path), str(size))
    kill_when(first, lambda: statistics(database).get("succeeded", 0) >= 10)
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


@pytest.mark.parametrize("algorithm", ["grpo", "baseline", "waits", "polls"])
def test_what_waited_when_its_model_died_is_worked_on_when_there_is_one_again(
    algorithm: str, model: str, tmp_path: Path
) -> None:
    database = tmp_path / "both" / "survivor" / "store.db"
    arguments = (algorithm, str(tmp_path), model, "both", "0")
    gate = tmp_path / "gate"
    gate.touch()
    first = start_program(LEFT_BEHIND, tmp_path, *arguments)
    kill_when(first, lambda: statistics(database).get("queuing") == 7 and any(tmp_path.glob("at work *")))
    gate.unlink()
    (tmp_path / "slow").touch()

    run_to_the_end(LEFT_BEHIND, tmp_path, *arguments)

    attempts = attempts_by_rollout(database)
    assert len(finished(attempts)) == len(attempts) == 8
    retried = [rollout_id for rollout_id, each in attempts.items() if len(each) > 1]
    assert len(retried) == 1, "only what was being worked on was begun again"


@pytest.mark.parametrize("algorithm", ["grpo", "baseline", "waits"])
def test_what_runs_elsewhere_when_its_model_dies_is_tried_again(algorithm: str, model: str, tmp_path: Path) -> None:
    database = tmp_path / "algorithm" / "survivor" / "store.db"
    gate = tmp_path / "gate"
    gate.touch()
    port = str(free_port())
    first = start_program(LEFT_BEHIND, tmp_path, algorithm, str(tmp_path), model, "algorithm", port)
    elsewhere = start_program(LEFT_BEHIND, tmp_path, algorithm, str(tmp_path), model, "runner", port)
    try:
        kill_when(first, lambda: statistics(database).get("queuing") == 7 and any(tmp_path.glob("at work *")))
        gate.unlink()
        wait_until((tmp_path / "cut off").exists)

        run_to_the_end(LEFT_BEHIND, tmp_path, algorithm, str(tmp_path), model, "algorithm", port)
        elsewhere.communicate(timeout=DEADLINE_SECONDS)
    finally:
        if elsewhere.poll() is None:
            os.killpg(elsewhere.pid, signal.SIGKILL)
            elsewhere.communicate()

    attempts = attempts_by_rollout(database)
    assert len(finished(attempts)) == len(attempts) == 8
    (cut_off,) = [each for each in attempts.values() if len(each) > 1]
    assert [attempt.status for attempt in cut_off] == ["failed", "succeeded"]
    assert cut_off[0].reason_code == "requeued"
    assert len({attempt.worker_id for each in attempts.values() for attempt in each}) == 1
