"""A runner as a process, for tests that kill it: `python runner_program.py URL WORKER_NAME`.

Its agent works on tasks ``{"hang": bool}``: it emits a message, says so on standard output, and hangs on the first
attempt of a rollout that shall. Variables change the runner: ``CONCURRENCY``; ``HOLD_SECONDS``, how long it keeps a
prefetched rollout; ``CONFIRM_PREFETCHED``, for a negative control, lists prefetched rollouts in its heartbeats.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import agentlightning as agl
from agentlightning.runner import worker_loop


@agl.rollout
async def agent(task: dict[str, Any], rollout: agl.AttemptedRollout) -> float:
    agl.emit_message("begun")
    print(f"begun {rollout.rollout_id} {rollout.attempt.sequence_id}", flush=True)
    if task["hang"] and rollout.attempt.sequence_id == 1:
        await asyncio.sleep(600)
    return 1.0


def change_runner() -> None:
    """Apply the variables."""
    worker_loop.PREFETCH_HOLD_SECONDS = float(os.environ.get("HOLD_SECONDS", worker_loop.PREFETCH_HOLD_SECONDS))
    if "CONFIRM_PREFETCHED" in os.environ:
        accept = worker_loop.WorkerLoop._accept

        def accept_and_confirm(self: Any, claimed: Any) -> None:
            for rollout in claimed:
                self._heartbeat.begin(rollout)
            accept(self, claimed)

        worker_loop.WorkerLoop._accept = accept_and_confirm


async def main(url: str) -> None:
    change_runner()
    concurrency = int(os.environ.get("CONCURRENCY", "4"))
    async with agl.LightningStoreClient(url) as store:
        tracer = agl.OtelTracer(interval_seconds=0.05)
        runner = agl.LitAgentRunner[Any](tracer, concurrency=concurrency, heartbeat_interval=0.2, lease_seconds=1.0)
        with runner.run_context(agent=agent, store=store):
            await runner.iter()


if __name__ == "__main__":
    os.environ["AGL_WORKER_NAME"] = sys.argv[2]
    asyncio.run(main(sys.argv[1]))
