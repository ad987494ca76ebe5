"""The workload of ``bench/e2e.py``: a run with Trainer, runners and store, in whatever agentlightning is installed.

    python e2e_load.py '{"pattern": "batch", "rollouts": 200, "runners": 2, "in_flight": 64,
                          "concurrency": null, "database": null}'

Only names that both 0.3.0 and ours have are used, so the same text runs on both sides. The agent opens nested spans
with random attributes and emits rewards; nothing sleeps. The last line of standard output is the result, as JSON:
seconds from the first submission to the last rollout's end, and the CPU seconds of all processes of the run meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import sys
import time
from typing import Any

import psutil
from opentelemetry import trace

import agentlightning as agl

SPANS = 6
"""Spans for each rollout: five nested ones, and the reward."""
WAIT_SECONDS = 10.0
"""For how long at most the algorithm waits in one call."""


def attributes() -> dict[str, Any]:
    """Eight random attributes, about 400 bytes."""
    texts = {f"text.{index}": random.randbytes(32).hex() for index in range(5)}
    return texts | {"number": random.random(), "count": random.randrange(1000), "flag": random.random() < 0.5}


@agl.rollout
async def agent(task: dict[str, Any], llm: Any) -> None:
    """Two steps, each with a tool call inside, and the reward of it all."""
    tracer = trace.get_tracer("bench")
    with tracer.start_as_current_span("agent", attributes=attributes()):
        for step in range(2):
            with (
                tracer.start_as_current_span(f"step {step}", attributes=attributes()),
                tracer.start_as_current_span("tool", attributes=attributes()),
            ):
                pass
    agl.emit_reward(random.random())


class Load(agl.Algorithm):
    """Submits rollouts in one of three patterns, and waits for all of them."""

    def __init__(self, pattern: str, rollouts: int, runners: int, in_flight: int) -> None:
        super().__init__()
        self.pattern, self.rollouts, self.runners, self.in_flight = pattern, rollouts, runners, in_flight
        self.result: dict[str, Any] = {}

    async def run(self, train_dataset: Any = None, val_dataset: Any = None) -> None:
        store = self.get_store()
        await store.add_resources({"llm": agl.LLM(endpoint="http://localhost/v1", model="none")})
        await self.finish(store, [await self.submit(store) for _ in range(4 * self.runners)])  # all are up, and warm
        cpu, began = cpu_seconds(), time.monotonic()
        ids = await getattr(self, self.pattern)(store)
        seconds = time.monotonic() - began
        rewards = [agl.find_final_reward(await store.query_spans(each)) for each in ids[:: max(1, len(ids) // 20)]]
        assert None not in rewards, "a rollout has no reward"
        self.result = {"seconds": seconds, "cpu_seconds": cpu_seconds() - cpu, "rollouts": len(ids)}

    async def batch(self, store: Any) -> list[str]:
        """All at once."""
        requests = [agl.EnqueueRolloutRequest(input={"question": random.random()}, mode="train")] * self.rollouts
        ids = [rollout.rollout_id for rollout in await store.enqueue_many_rollouts(requests)]
        await self.finish(store, ids)
        return ids

    async def queue(self, store: Any) -> list[str]:
        """As many at a time as keep all runners busy; the next one as soon as one has ended."""
        ids: list[str] = []

        async def keep_one_in_flight() -> None:
            while len(ids) < self.rollouts:
                mine = len(ids)
                ids.append("")
                ids[mine] = await self.submit(store)
                await self.finish(store, [ids[mine]])

        await asyncio.gather(*[keep_one_in_flight() for _ in range(self.in_flight)])
        return ids

    async def single(self, store: Any) -> list[str]:
        """One after the other."""
        ids: list[str] = []
        for _ in range(max(1, self.rollouts // 10)):
            ids.append(await self.submit(store))
            await self.finish(store, ids[-1:])
        return ids

    async def submit(self, store: Any) -> str:
        rollout = await store.enqueue_rollout({"question": random.random()}, mode="train")
        return rollout.rollout_id

    async def finish(self, store: Any, ids: list[str]) -> None:
        left = set(ids)
        while left:
            for rollout in await store.wait_for_rollouts(rollout_ids=list(left)[:50], timeout=WAIT_SECONDS):
                assert rollout.status == "succeeded", rollout
                left.discard(rollout.rollout_id)


def cpu_seconds() -> float:
    """What this process and all below it have used up."""
    me = psutil.Process()
    total = 0.0
    for process in [me, *me.children(recursive=True)]:
        times = process.cpu_times()
        total += times.user + times.system
    return total


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def main() -> None:
    asked = json.loads(sys.argv[1])
    runner: dict[str, Any] = {"type": "agentlightning.LitAgentRunner", "poll_interval": 0.001}
    if asked["concurrency"] is not None:
        runner["concurrency"] = asked["concurrency"]
    database = asked["database"]
    store = agl.InMemoryLightningStore() if database is None else agl.SqliteLightningStore(database)
    os.environ["AGL_SERVER_HOST"] = "127.0.0.1"
    strategy = agl.ClientServerExecutionStrategy(
        role="both", server_host="127.0.0.1", server_port=free_port(), n_runners=asked["runners"]
    )
    load = Load(asked["pattern"], asked["rollouts"], asked["runners"], asked["in_flight"])
    trainer = agl.Trainer(
        algorithm=load,
        n_runners=asked["runners"],
        tracer=agl.OtelTracer(),
        store=store,
        strategy=strategy,
        runner=runner,
    )
    trainer.fit(agent, train_dataset=[{"question": 0.0}])
    print(json.dumps(load.result))


if __name__ == "__main__":
    main()
