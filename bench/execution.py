"""How long it takes to start four runners, and to stop them cooperatively; with each start method.

Real runners (`LitAgentRunner` with `OtelTracer`) of a real run (`ClientServerExecutionStrategy`, role `both`).
Started is a run from the call of `execute` until all four runners have claimed and begun a rollout each, which none
ends before the last has begun; stopped, from the end of the algorithm until `execute` has returned.

    scripts/bench execution [--runners 4] [--rounds 3]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from agentlightning import (
    ClientServerExecutionStrategy,
    InMemoryLightningStore,
    LitAgent,
    LitAgentRunner,
    OtelTracer,
    Rollout,
)
from agentlightning.execution.child import StartMethod
from agentlightning.store.base import LightningStore

METHODS: tuple[StartMethod, ...] = ("fork", "forkserver", "spawn")
LIMITS = {"fork": 2.0, "forkserver": 6.0, "spawn": 6.0}
"""Seconds in which four runners shall be at work."""
STOP_LIMIT = 1.0


class Waiting(LitAgent[Any]):
    """Works until it is told that all are at work."""

    def rollout(self, task: Any, resources: Any, rollout: Any) -> float:
        while not Path(task).exists():
            time.sleep(0.005)
        return 1.0


class RealRunner:
    """A runner's side."""

    async def __call__(self, store: LightningStore, worker_id: int, event: Any) -> None:
        runner: LitAgentRunner[Any] = LitAgentRunner(OtelTracer())
        with runner.run_context(agent=Waiting(), store=store, worker_id=worker_id):
            await runner.iter(event=event)


class Clock:
    """The algorithm, which notes when all runners are at work, and when it ends.

    Args:
        runners: how many there are.
        go: the file that lets them finish.
    """

    def __init__(self, runners: int, go: Path) -> None:
        self.runners = runners
        self.go = go
        self.working = self.ended = 0.0

    async def __call__(self, store: LightningStore, event: Any) -> None:
        ids = [(await store.enqueue_rollout(str(self.go))).rollout_id for _ in range(self.runners)]
        while await self._busy(store) < self.runners:  # noqa: ASYNC110 - a store has no event for that
            await asyncio.sleep(0.005)
        self.working = time.monotonic()
        self.go.touch()
        rollouts: list[Rollout] = await store.wait_for_rollouts(rollout_ids=ids, timeout=30)
        assert all(each.status == "succeeded" for each in rollouts)
        self.ended = time.monotonic()

    async def _busy(self, store: LightningStore) -> int:
        return len(await store.query_workers(status_in=["busy"]))


def measure(method: StartMethod, runners: int, go: Path) -> tuple[float, float]:
    """Seconds to start, and to stop."""
    clock = Clock(runners, go)
    strategy = ClientServerExecutionStrategy(server_port=0, n_runners=runners, start_method=method)
    began = time.monotonic()
    strategy.execute(clock, RealRunner(), InMemoryLightningStore())
    go.unlink()
    return clock.working - began, time.monotonic() - clock.ended


def main() -> int:
    parser = argparse.ArgumentParser(description="Time to start and to stop runners.")
    parser.add_argument("--runners", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    go = Path(f"/tmp/agl-bench-{os.getpid()}")
    print(f"{options.runners} runners, {os.cpu_count()} cores; median and range")
    within = True
    for method in METHODS:
        times = [measure(method, options.runners, go) for _ in range(options.rounds)]
        starts, stops = zip(*times, strict=True)
        start, stop = statistics.median(starts), statistics.median(stops)
        within &= start < LIMITS[method] and stop < STOP_LIMIT
        print(
            f"{method:>10}: at work after {start:.2f} s ({min(starts):.2f} to {max(starts):.2f}; "
            f"limit {LIMITS[method]:g}), stopped within {stop:.2f} s ({min(stops):.2f} to {max(stops):.2f}; "
            f"limit {STOP_LIMIT:g})"
        )
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
