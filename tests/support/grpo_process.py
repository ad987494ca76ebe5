"""A process that trains a policy by GRPO in a database file, and may kill itself in the middle.

Arguments, as JSON: ``folder``, ``run`` (null: not under a name), ``steps``, ``kill_at_claim`` (null: never).
Prints ``step N`` after each step.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from agentlightning.algorithm.grpo import GRPO
from agentlightning.algorithm.run import Run
from agentlightning.demo import game
from agentlightning.demo.softmax_policy import SoftmaxPolicy
from agentlightning.store.sqlite.store import SqliteLightningStore
from agentlightning.types import AttemptedRollout, RolloutConfig

__all__ = ["BATCH_SIZE", "GROUP_SIZE", "train_in_process"]

BATCH_SIZE = 4
GROUP_SIZE = 4


def train_in_process(folder: Path, run: str | None, steps: int, kill_at_claim: int | None) -> tuple[int, list[int]]:
    """Train in another process; return its exit code and the steps that it reported."""
    arguments = {"folder": str(folder), "run": run, "steps": steps, "kill_at_claim": kill_at_claim}
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(arguments)], env=environment, capture_output=True, text=True, timeout=90
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode, [int(line.split()[1]) for line in done.stdout.splitlines()]


async def _train(folder: str, run: str | None, steps: int, kill_at_claim: int | None) -> None:
    from game_runners import SECRETS, GameRunners

    claims = 0

    def count(_: AttemptedRollout) -> None:
        nonlocal claims
        claims += 1
        if claims == kill_at_claim:
            os.kill(os.getpid(), signal.SIGKILL)

    algorithm = GRPO(
        SoftmaxPolicy(game.VOCABULARY), group_size=GROUP_SIZE, batch_size=BATCH_SIZE, n_steps=steps, seed=7
    )
    async with SqliteLightningStore(Path(folder) / "store.db", "process") as store:
        for worker in await store.query_workers():  # they died with the process before
            await store.report_worker_lost(worker.worker_id, message="the process was killed")
        algorithm.set_store(store)
        algorithm.set_rollout_config(RolloutConfig(max_attempts=3, retry_condition=["unresponsive"]))
        algorithm.set_reporter(_print_step)
        if run is not None:
            algorithm.set_run(Run(run, folder))
        async with GameRunners(store, count, count=3):
            await algorithm.run(SECRETS)


def _print_step(step: int, _: dict[str, Any]) -> None:
    print(f"step {step}", flush=True)


if __name__ == "__main__":
    asyncio.run(_train(**json.loads(sys.argv[1])))
