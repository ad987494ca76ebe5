"""A runner that stands still past its lease and comes back: what it has lost is lost, and nothing else."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import execution_programs as programs
from agentlightning import ClientServerExecutionStrategy, InMemoryLightningStore, RolloutConfig
from execution_agents import AgentRunner, HeldAgent

RETRIES = RolloutConfig(max_attempts=3, retry_condition=["unresponsive"])


class Zombies:
    """An algorithm that stops its runner again and again while that holds two rollouts, and finishes one of them.

    Args:
        rounds: how often.
    """

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    async def __call__(self, store: Any, event: Any) -> None:
        for number in range(self.rounds):
            await self._round(store, number, late_result=number % 2 == 1)

    async def _round(self, store: Any, number: int, *, late_result: bool) -> None:
        folder = programs.folder()
        lost = await store.enqueue_rollout(f"lost-{number}", config=RETRIES)
        kept = await store.enqueue_rollout(f"kept-{number}", config=RETRIES)
        for each in (lost, kept):  # confirmed, so that it is lost with its worker and not before
            while (await store.get_rollout_by_id(each.rollout_id)).status != "running":
                await asyncio.sleep(0.02)
        [(_, pid, _)] = programs.noted(folder, f"held-lost-{number}")
        os.kill(pid, signal.SIGSTOP)
        try:
            while (await store.get_rollout_by_id(lost.rollout_id)).status != "requeuing":
                await asyncio.sleep(0.02)
            second = await store.dequeue_rollout("second")
            assert second.rollout_id == lost.rollout_id
            await store.update_attempt(second.rollout_id, second.attempt.attempt_id, "succeeded")
            if late_result:  # it finishes as soon as it goes on, and has a result that comes too late
                (folder / f"go-lost-{number}").touch()
        finally:
            os.kill(pid, signal.SIGCONT)
        first = (await store.query_attempts(lost.rollout_id))[0].attempt_id
        await programs.until(lambda: any((folder / f"{how}-{first}").exists() for how in ("aborted", "finished")))
        (folder / f"go-kept-{number}").touch()
        [rollout] = await store.wait_for_rollouts(rollout_ids=[kept.rollout_id], timeout=10)
        assert (rollout.status, rollout.attempt.sequence_id) == ("succeeded", 1)
        assert (folder / f"aborted-{first}").exists() or late_result
        await self._check(store, lost.rollout_id)

    async def _check(self, store: Any, rollout_id: str) -> None:
        rollout = await store.get_rollout_by_id(rollout_id)
        attempts = await store.query_attempts(rollout_id)
        assert (rollout.status, rollout.attempt.worker_id) == ("succeeded", "second")
        assert [(each.status, each.reason_code) for each in attempts] == [
            ("unresponsive", "worker_lost"),
            ("succeeded", "completed"),
        ]


@pytest.mark.parametrize("rounds", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_a_zombie_changes_nothing_and_gives_up_what_it_has_lost(
    rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGL_TEST_FOLDER", str(tmp_path))
    monkeypatch.setenv("AGL_SPOOL_DIR", str(tmp_path / "spool"))
    runner = AgentRunner(
        HeldAgent(), concurrency=2, heartbeat_interval=0.2, interval_jitter=0.0, lease_seconds=1.0, poll_interval=0.1
    )
    store = InMemoryLightningStore()
    ClientServerExecutionStrategy(server_port=0, n_runners=1, graceful_timeout=5.0).execute(
        Zombies(rounds), runner, store
    )
    assert len(programs.noted(tmp_path, "runner-0")) == 1  # it was never restarted
    assert asyncio.run(store.verify()).ok
