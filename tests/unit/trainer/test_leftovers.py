"""Workers of an earlier start: only those that certainly are dead are ended before their leases are."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import agentlightning as agl
from agentlightning.algorithm.resume import end_lost_workers
from agentlightning.runner.heartbeat import process_space


def pid_of_nobody() -> int:
    """The id of a process that has ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


async def test_only_a_worker_that_certainly_is_dead_is_ended() -> None:
    dead = pid_of_nobody()
    registrations: dict[str, dict[str, Any]] = {
        "gone": {"process_space": process_space(), "pid": dead},
        "alive": {"process_space": process_space(), "pid": os.getpid()},
        "elsewhere": {"process_space": "another boot:1", "pid": dead},
        "silent": {},
    }
    async with agl.InMemoryLightningStore() as store:
        for name, told in registrations.items():
            await store.update_worker(name, registration=told, lease_seconds=60)
            await store.enqueue_rollout(
                name,
                config=agl.RolloutConfig(max_attempts=2, retry_condition=["unresponsive"]),
                rollout_id=f"ro-{name}",
            )
            claimed = await store.dequeue_rollout(worker_id=name)
            assert claimed is not None
            await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, status="running")
        assert await end_lost_workers(store, process_space()) == {"alive", "elsewhere", "silent"}
        statuses = {each.rollout_id: each.status for each in await store.query_rollouts()}
    assert statuses.pop("ro-gone") == "requeuing"
    assert set(statuses.values()) == {"running"}
