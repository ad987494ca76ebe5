"""A tour of the store: what an algorithm and a runner do with it, in one process.

The algorithm's side puts work into the queue; the runner's side claims it, reports what happened
as spans, and ends each attempt. One answer fails at first and is tried again. Then the store is
closed and opened again, and everything is still there.

Run it with: python examples/store_tour.py
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from tempfile import TemporaryDirectory

import agentlightning as agl
from agentlightning.types import Span

QUESTIONS = {"6 times 7": 42, "12 plus 30": 42, "100 minus 1": 99}


def answer(prompt: str) -> int:
    """Stands for an agent that calls a model. It gets one of the questions wrong."""
    return 98 if "100 minus 1" in prompt else 42


async def enqueue_work(store: agl.LightningStore) -> None:
    """What an algorithm does: publish the resources that it tunes, then ask for rollouts."""
    template = agl.PromptTemplate(template="What is {question}? Answer with a number.", engine="f-string")
    resources = await store.add_resources({"prompt": template})
    print(f"resources {resources.resources_id}, version {resources.version}")
    for question, expected in QUESTIONS.items():
        rollout = await store.enqueue_rollout(
            input={"question": question, "expected": expected},
            mode="train",
            config=agl.RolloutConfig(max_attempts=2, retry_condition=["failed"]),
        )
        print(f"enqueued {rollout.rollout_id}: {question}")


async def work_until_empty(store: agl.LightningStore) -> None:
    """What a runner does: claim, work, report, until nothing is left."""
    while claimed := await store.dequeue_rollout(worker_id="worker-1"):
        rollout_id, attempt = claimed.rollout_id, claimed.attempt
        if claimed.input["question"] == "12 plus 30" and attempt.sequence_id == 1:
            await store.update_attempt(
                rollout_id, attempt.attempt_id, status="failed", reason_message="the model gave no answer"
            )
            continue

        assert claimed.resources_id is not None
        resources = await store.get_resources_by_id(claimed.resources_id, version=claimed.resources_version)
        assert resources is not None
        template = resources.resources["prompt"]
        assert isinstance(template, agl.PromptTemplate)

        prompt = template.format(question=claimed.input["question"])
        given = answer(prompt)
        reward = 1.0 if given == claimed.input["expected"] else 0.0
        call = Span.from_attributes(
            name="agent.answer",
            rollout_id=rollout_id,
            attempt_id=attempt.attempt_id,
            attributes={"prompt": prompt, "answer": given},
        )
        score = Span.from_attributes(
            name="agentlightning.annotation",
            rollout_id=rollout_id,
            attempt_id=attempt.attempt_id,
            attributes={"agentlightning.reward.0.name": "primary", "agentlightning.reward.0.value": reward},
        )
        await store.add_many_spans([call, score])
        await store.update_attempt(rollout_id, attempt.attempt_id, status="succeeded")


async def report(store: agl.LightningStore) -> None:
    """What an algorithm reads afterwards: how each rollout ended, and what it was worth."""
    for rollout in await store.query_rollouts():
        attempts = await store.query_attempts(rollout.rollout_id)
        spans = await store.query_spans(rollout.rollout_id, "latest")
        rewards = [
            value for span in spans if (value := span.attributes.get("agentlightning.reward.0.value")) is not None
        ]
        print(
            f"{rollout.input['question']:>12}: {rollout.status} after {len(attempts)} attempt(s), "
            f"{len(spans)} spans, reward {rewards[-1]}"
        )


async def main() -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tour.db"

        async with agl.SqliteLightningStore(path=path, durability="full") as store:
            await enqueue_work(store)
            await work_until_empty(store)
        print("closed the store; opening it again")

        store = agl.SqliteLightningStore(path=path, durability="full")
        try:
            await report(store)
        finally:
            await store.close()


if __name__ == "__main__":
    asyncio.run(main())
