"""Runners that are killed all the time: every rollout still ends once, and well."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import execution_programs as programs
from agentlightning import (
    ClientServerExecutionStrategy,
    EnqueueRolloutRequest,
    RestartPolicy,
    RolloutConfig,
    SqliteLightningStore,
)
from agentlightning.execution.process_tree import ProcessInfo, send_signal
from execution_agents import AgentRunner, ShortAgent

KILL_SECONDS = 0.5
RETRIES = RolloutConfig(max_attempts=100, retry_condition=["unresponsive"])
ONCE = RolloutConfig(max_attempts=1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AGL_TEST_FOLDER", str(tmp_path))
    monkeypatch.setenv("AGL_SPOOL_DIR", str(tmp_path / "spool"))
    return tmp_path


class Chaos:
    """An algorithm that has its rollouts run in peace, then while runners are killed, then in peace again.

    Args:
        rollouts: how many there are in each part.
        seed: who is killed.
        config: of the rollouts that are disturbed.
    """

    def __init__(self, rollouts: int, seed: int, config: RolloutConfig = RETRIES) -> None:
        self.rollouts = rollouts
        self.config = config
        self.seconds: list[float] = []
        self._rng = random.Random(seed)

    async def __call__(self, store: Any, event: Any) -> None:
        await self._all_at_work()
        await self._run(store)
        await self.disturbed(store)
        await self._run(store)

    async def disturbed(self, store: Any, *_: Any) -> None:
        """The part in the middle."""
        await self._all_at_work()
        killing = asyncio.create_task(self._kill())
        await self._run(store)
        killing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await killing

    async def _all_at_work(self) -> None:
        await programs.until(lambda: len(programs.noted(programs.folder(), "runner")) == 4)

    async def _run(self, store: Any) -> None:
        began = time.monotonic()
        requests = [EnqueueRolloutRequest(input=number, config=self.config) for number in range(self.rollouts)]
        ids = [each.rollout_id for each in await store.enqueue_many_rollouts(requests)]
        ended = await store.wait_for_rollouts(rollout_ids=ids, timeout=100)
        assert [each.status for each in ended] == ["succeeded"] * self.rollouts
        self.seconds.append(time.monotonic() - began)

    async def _kill(self) -> None:
        """SIGKILL for the present life of one runner or another."""
        while True:
            lives = sorted(programs.noted(programs.folder(), "runner"), key=lambda life: life[2])
            name, pid, started = self._rng.choice(list({life[0]: life for life in lives}.values()))
            send_signal(ProcessInfo(pid, 0, 0, started, name), signal.SIGKILL)
            await asyncio.sleep(KILL_SECONDS)


def run(algorithm: Any, store: SqliteLightningStore, rollout_seconds: float = 0.02) -> None:
    """With four runners, which are started again as often as it takes."""
    ClientServerExecutionStrategy(
        server_port=0,
        n_runners=4,
        start_method="fork",
        restarts=RestartPolicy(most_per_minute=1000, first_delay=0.05, longest_delay=0.5),
        graceful_timeout=5.0,
        terminate_timeout=2.0,
    ).execute(algorithm, AgentRunner(ShortAgent(rollout_seconds), poll_interval=0.1), store)


@pytest.mark.parametrize(("rollouts", "kills"), [(300, 2), pytest.param(2000, 16, marks=pytest.mark.slow)])
def test_every_rollout_ends_once_while_runners_are_killed(rollouts: int, kills: int, folder: Path) -> None:
    store = SqliteLightningStore(folder / "store.db", "process")
    chaos = Chaos(rollouts, seed=rollouts)
    run(chaos, store)
    assert len(programs.noted(folder, "runner")) - 4 >= kills
    asyncio.run(_check(store, 3 * rollouts))
    before, _, after = chaos.seconds
    assert after < 2 * max(before, 1.0)  # it has recovered
    assert [who for who in programs.alive(folder) if who.startswith("runner")] == []


def test_without_retries_the_kills_are_seen(folder: Path) -> None:
    """Negative control: they do hit runners at work; in long rollouts, since short ones are unconfirmed to the end."""
    chaos = Chaos(20, seed=1, config=ONCE)
    with pytest.raises(AssertionError, match="failed"):
        run(chaos.disturbed, SqliteLightningStore(folder / "store.db", "process"), rollout_seconds=1.0)


async def _check(store: SqliteLightningStore, rollouts: int) -> None:
    async with store:
        statistics = await store.statistics()
        assert statistics["rollouts_by_status"]["succeeded"] == statistics["total_rollouts"] == rollouts
        report = await store.verify()
        assert report.ok, report.violations
        for rollout in await store.query_rollouts():
            ends = [each.status for each in await store.query_attempts(rollout.rollout_id)]
            assert ends.count("succeeded") == 1
            assert ends[-1] == "succeeded"
