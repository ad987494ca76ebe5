"""CPU of the store alone for each rollout, in whatever agentlightning is installed. Used by ``against.py``.

    python store_load.py FOLDER {calls,fused}

A rollout is an enqueue, a claim, six spans of 1.6 KB in one call and its end, or, ``fused``, an enqueue and one
call for spans, end and next claim; 64 tasks do that at once, on SQLite with full durability. The last line of
standard output is the result as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from pathlib import Path

import agentlightning as agl

TASKS, ROLLOUTS, SPANS = 64, 6_000, 6


def make_spans() -> list[agl.Span]:
    attributes = {"gen_ai.request.model": "demo", "gen_ai.usage.output_tokens": 64}
    for index in range(12):
        attributes[f"gen_ai.prompt.{index}.content"] = "the quick brown fox jumps over the lazy dog; 0123456789 ab"
    return [
        agl.Span(
            rollout_id="ro",
            attempt_id="at",
            sequence_id=0,
            trace_id=uuid.uuid4().hex,
            span_id=f"{number:016x}",
            parent_id=None,
            name="openai.chat.completion",
            status=agl.TraceStatus(status_code="OK"),
            attributes=attributes,
            events=[],
            links=[],
            start_time=1_700_000_000.0,
            end_time=1_700_000_001.0,
            context=None,
            parent=None,
            resource=agl.OtelResource(attributes={"service.name": "agent"}, schema_url=""),
        )
        for number in range(SPANS)
    ]


def own(spans: list[agl.Span], claimed: agl.AttemptedRollout) -> list[agl.Span]:
    """The spans, as those of this attempt."""
    for span in spans:
        span.rollout_id, span.attempt_id = claimed.rollout_id, claimed.attempt.attempt_id
    return spans


async def by_calls(store: agl.LightningStore, worker: str, numbers: range) -> None:
    spans = make_spans()
    for number in numbers:
        await store.enqueue_rollout({"question": f"what is {number}"})
        claimed = await store.dequeue_rollout(worker_id=worker, request_id=f"{worker}-{number}")
        assert claimed is not None
        await store.add_many_spans(own(spans, claimed))
        await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, "succeeded")


async def fused(store: agl.LightningStore, worker: str, numbers: range) -> None:
    spans = make_spans()
    held: agl.AttemptedRollout | None = None
    for number in numbers:
        await store.enqueue_rollout({"question": f"what is {number}"})
        held = held or await store.dequeue_rollout(worker_id=worker, request_id=f"{worker}-{number}-first")
        assert held is not None
        claim = {"claim_limit": 1, "worker_id": worker, "request_id": f"{worker}-{number}"}
        done = await store.finish_attempt(
            held.rollout_id, held.attempt.attempt_id, "succeeded", own(spans, held), **claim
        )
        held = done.claimed[0] if done.claimed else None


async def measure(folder: Path, pattern: str) -> dict[str, float]:
    work = {"calls": by_calls, "fused": fused}[pattern]
    async with agl.SqliteLightningStore(folder / f"{time.monotonic_ns()}.db") as store:
        await work(store, "warm-up", range(200))
        if pattern == "fused":  # so that a claim finds work: each task enqueues its own after it has claimed another's
            await store.enqueue_many_rollouts([agl.EnqueueRolloutRequest(input=n) for n in range(2 * TASKS)])
        cpu, began = time.process_time(), time.perf_counter()
        each = ROLLOUTS // TASKS
        await asyncio.gather(*(work(store, f"w{n}", range(n * each, (n + 1) * each)) for n in range(TASKS)))
        done = each * TASKS
        return {
            "cpu_us_per_rollout": (time.process_time() - cpu) / done * 1e6,
            "rollouts_per_s": done / (time.perf_counter() - began),
        }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure(Path(sys.argv[1]), sys.argv[2]))))
