"""An agent that holds the interpreter lock of its process for longer than any lease: it works, and is not lost."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import execution_programs as programs
from agentlightning import ClientServerExecutionStrategy, InMemoryLightningStore, RolloutConfig
from agentlightning.errors import InvalidValue
from agentlightning.execution.stand_in import StandIn
from execution_agents import AgentRunner
from plain_agents import holds_the_interpreter

TERM_SECONDS = 3.0
CONFIG = RolloutConfig(unresponsive_seconds=TERM_SECONDS, max_attempts=2, retry_condition=["unresponsive"])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AGL_TEST_FOLDER", str(tmp_path))
    monkeypatch.setenv("AGL_SPOOL_DIR", str(tmp_path / "spool"))
    return tmp_path


class Holding:
    """An algorithm with one rollout, whose agent holds the interpreter. It watches the attempt.

    Args:
        seconds: how long it holds it.
        kill: whether its process is killed when the supervisor has begun to speak for it.
    """

    def __init__(self, seconds: int, *, kill: bool = False) -> None:
        self.seconds, self.kill = seconds, kill
        self.first: Any = None
        self.noticed_after = 0.0

    async def __call__(self, store: Any, event: Any) -> None:
        rollout_id = (await store.enqueue_rollout(self.seconds, config=CONFIG)).rollout_id
        await programs.until(lambda: programs.noted(programs.folder(), "holds"))
        heard, killed = (await store.query_attempts(rollout_id))[0].last_heartbeat_time, 0.0
        while True:
            self.first = (await store.query_attempts(rollout_id))[0]
            if self.first.status not in ("preparing", "running"):
                break
            if self.kill and not killed and self.first.last_heartbeat_time != heard:  # it cannot have spoken itself
                os.kill(programs.noted(programs.folder(), "holds")[0][1], signal.SIGKILL)
                killed = time.monotonic()
            await asyncio.sleep(0.02)
        self.noticed_after = time.monotonic() - killed


def run(algorithm: Holding, store: Any = None, **options: Any) -> None:
    runner = AgentRunner(
        holds_the_interpreter, heartbeat_interval=60.0, lease_seconds=600.0, max_rollouts=1
    )  # how often the attempt wants to be heard of is known only when it begins
    ClientServerExecutionStrategy(
        server_port=0, n_runners=1, graceful_timeout=1.0, terminate_timeout=1.0, **options
    ).execute(algorithm, runner, store or InMemoryLightningStore())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_it_is_not_lost(method: str, folder: Path) -> None:
    algorithm = Holding(8)
    run(algorithm, start_method=method)
    assert (algorithm.first.status, algorithm.first.reason_code) == ("succeeded", "completed")


def test_with_heartbeats_from_its_process_alone_it_would_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandIn, "start", lambda self: None)
    algorithm = Holding(60)
    run(algorithm)
    assert algorithm.first.status == "unresponsive"


def test_it_is_lost_when_its_process_is_killed(folder: Path) -> None:
    algorithm = Holding(60, kill=True)
    run(algorithm)
    assert (algorithm.first.status, algorithm.first.reason_code) == ("unresponsive", "worker_lost")
    assert "killed by SIGKILL" in algorithm.first.reason_message
    assert algorithm.noticed_after < TERM_SECONDS + 1.0


def test_the_death_of_one_that_is_spoken_for_is_noticed_by_its_silence(folder: Path) -> None:
    """The store cannot be told."""

    class Deaf(InMemoryLightningStore):
        async def report_worker_lost(self, *_: Any, **__: Any) -> Any:
            raise InvalidValue("not to be told")

    algorithm = Holding(60, kill=True)
    run(algorithm, Deaf())
    assert algorithm.first.status == "unresponsive"
    assert algorithm.noticed_after < TERM_SECONDS + 1.0 + 1.0  # and our looking
