"""A program for agentlightning 0.3.0, written against what it documents: run by the Python that has it installed.

It does a day's work on the server whose URL is its argument, and prints what it saw, as JSON. It imports nothing of
this repository.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import agentlightning as agl
from agentlightning.types import EnqueueRolloutRequest, OtelResource, PromptTemplate, RolloutConfig, Span, TraceStatus


def span(rollout_id: str, attempt_id: str, number: int) -> Span:
    return Span(
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        sequence_id=number,
        trace_id="0" * 32,
        span_id=f"{number:016x}",
        parent_id=None,
        name=f"span {number}",
        status=TraceStatus(status_code="OK"),
        attributes={"number": number, "agentlightning.reward": 0.5},
        events=[],
        links=[],
        start_time=1.0,
        end_time=2.0,
        context=None,
        parent=None,
        resource=OtelResource(attributes={}, schema_url=""),
    )


async def work(store: Any) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    made = await store.add_resources({"prompt": PromptTemplate(template="Guess {n}", engine="f-string")})
    changed = await store.update_resources(made.resources_id, made.resources)
    latest = await store.get_latest_resources()
    seen["resources"] = [made.version, changed.version, latest.resources_id == made.resources_id]
    one = await store.enqueue_rollout({"task": 1}, mode="train", metadata={"k": "v"})
    two, three = await store.enqueue_many_rollouts(
        [EnqueueRolloutRequest(input=2), EnqueueRolloutRequest(input=3, config=RolloutConfig(max_attempts=2))]
    )
    seen["enqueued"] = [one.status, one.input, one.metadata, one.resources_id == made.resources_id]
    claim = await store.dequeue_rollout(worker_id="worker-0.3")
    seen["claimed"] = [claim.rollout_id == one.rollout_id, claim.status, claim.attempt.sequence_id]
    more = await store.dequeue_many_rollouts(limit=5, worker_id="worker-0.3")
    seen["claimed more"] = [each.rollout_id for each in more] == [two.rollout_id, three.rollout_id]
    seen["nothing left"] = await store.dequeue_rollout() is None
    ids = (claim.rollout_id, claim.attempt.attempt_id)
    await store.update_attempt(*ids, status="running", worker_id="worker-0.3")
    first = await store.get_next_span_sequence_id(*ids)
    added = await store.add_span(span(*ids, first))
    again = await store.add_span(span(*ids, first))
    many = await store.add_many_spans([span(*ids, number) for number in (2, 3, 4)])
    seen["spans"] = [first, added.sequence_id, again is None, len(many)]
    found = await store.query_spans(ids[0], ids[1], name_contains="span", sort_by="sequence_id")
    seen["found"] = [each.sequence_id for each in found]
    worker = await store.update_worker("worker-0.3", {"load": 0.5})
    seen["worker"] = [worker.status, worker.heartbeat_stats, worker.current_rollout_id == ids[0] or None]
    finished = await store.update_attempt(*ids, status="succeeded")
    seen["finished"] = finished.status
    waited = await store.wait_for_rollouts(rollout_ids=[ids[0], two.rollout_id], timeout=0.05)
    seen["waited"] = [each.rollout_id for each in waited] == [ids[0]]
    await store.update_attempt(three.rollout_id, "latest", status="failed")
    started = await store.start_rollout(4)
    cancelled = await store.update_rollout(started.rollout_id, status="cancelled")
    seen["others"] = [cancelled.status, (await store.get_rollout_by_id(three.rollout_id)).status]
    latest_attempt = await store.get_latest_attempt(three.rollout_id)
    retried = await store.start_attempt(two.rollout_id)
    attempts = await store.query_attempts(two.rollout_id)
    seen["attempts"] = [latest_attempt.status, retried.attempt.sequence_id, len(attempts)]
    done = await store.query_rollouts(status_in=["succeeded", "failed"], sort_by="start_time")
    seen["queried"] = [each.status for each in done]
    workers = await store.query_workers(worker_id_contains="0.3")
    seen["workers"] = [each.worker_id for each in workers]
    seen["statistics"] = (await store.statistics())["total_rollouts"]
    seen["unknown"] = [
        await store.get_rollout_by_id("ro-unknown"),
        await store.get_resources_by_id("rs-unknown"),
        await store.get_worker_by_id("w-unknown"),
    ]
    return seen


async def main(url: str) -> None:
    store = agl.LightningStoreClient(url)
    try:
        seen = await work(store)
    finally:
        await store.close()
    sys.stdout.write("SEEN " + json.dumps(seen) + "\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
