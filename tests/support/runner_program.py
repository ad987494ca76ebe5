"""A runner as a process, for tests that kill it: `python runner_program.py URL WORKER_NAME`.

Its agent works on tasks ``{"hang": bool}``: it emits a message, says so on standard output, and hangs on the first
attempt of a rollout that shall.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import agentlightning as agl


@agl.rollout
async def agent(task: dict[str, Any], rollout: agl.AttemptedRollout) -> float:
    agl.emit_message("begun")
    print(f"begun {rollout.rollout_id} {rollout.attempt.sequence_id}", flush=True)
    if task["hang"] and rollout.attempt.sequence_id == 1:
        await asyncio.sleep(600)
    return 1.0


async def main(url: str) -> None:
    async with agl.LightningStoreClient(url) as store:
        tracer = agl.OtelTracer(interval_seconds=0.05)
        runner = agl.LitAgentRunner[Any](tracer, concurrency=4, heartbeat_interval=0.2, lease_seconds=1.0)
        with runner.run_context(agent=agent, store=store):
            await runner.iter()


if __name__ == "__main__":
    os.environ["AGL_WORKER_NAME"] = sys.argv[2]
    asyncio.run(main(sys.argv[1]))
