"""A store in which some work was done: what the commands that look into one are tried on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from agentlightning import SqliteLightningStore
from agentlightning.store.base import LightningStore
from agentlightning.types import LLM, AttemptedRollout, PromptTemplate, Span
from scenes import claimed, config, span_of

__all__ = ["KEY", "RESOURCES", "make_database", "spans_of_a_turn", "work"]

KEY = "sk-never-shown"
RESOURCES = "rs-main"
ENQUEUED, SUCCEEDED, FAILED = 8, 4, 2
"""One more is at work, and one waits."""


def spans_of_a_turn(attempted: AttemptedRollout, reward: float) -> list[Span]:
    """What an agent leaves behind: a span of its own, a model call and a tool call below it, and a reward."""

    def span(number: int, name: str, start: float, end: float, attributes: dict[str, Any]) -> Span:
        made = span_of(attempted, span_id=f"{number:016x}", name=name, attributes=attributes)
        parent = None if number == 1 else f"{1:016x}"
        return made.model_copy(update={"parent_id": parent, "start_time": start, "end_time": end})

    return [
        span(1, "agent", 100.0, 102.0, {}),
        span(2, "chat policy", 100.1, 100.9, {"gen_ai.usage.input_tokens": 120, "gen_ai.usage.output_tokens": 33}),
        span(3, "tool search", 101.0, 101.8, {"query": "x"}),
        span(
            4,
            "agentlightning.annotation",
            102.0,
            102.0,
            {"agentlightning.reward.0.name": "primary", "agentlightning.reward.0.value": reward},
        ),
    ]


async def work(store: LightningStore) -> None:
    """Two versions of resources, two workers, and eight rollouts: done, failed, at work, waiting."""

    def llm(model: str) -> LLM:
        return LLM(endpoint="http://127.0.0.1:8000/v1", model=model, api_key=KEY)

    def prompt(text: str) -> PromptTemplate:
        return PromptTemplate(template=text, engine="f-string")

    await store.add_resources({"prompt": prompt("Guess {x}\nplease"), "llm": llm("m")}, resources_id=RESOURCES)
    await store.update_resources(RESOURCES, {"prompt": prompt("Guess {x}\nnow"), "llm": llm("m")})
    for worker_id in ("w-1", "w-2"):
        await store.update_worker(worker_id, lease_seconds=600.0, registration={"host": "gpu-1", "pid": 4711})
    for number in range(ENQUEUED):
        await store.enqueue_rollout(
            {"task": f"number {number}"}, mode="train", config=config(max_attempts=1), rollout_id=f"ro-task-{number}"
        )
    for number in range(SUCCEEDED + FAILED + 1):
        attempted = await claimed(store, f"w-{number % 2 + 1}", request_id=f"q-{number}")
        await store.add_many_spans(spans_of_a_turn(attempted, number / 8))
        ids = (attempted.rollout_id, attempted.attempt.attempt_id)
        if number < SUCCEEDED:
            await store.update_attempt(*ids, "succeeded")
        elif number < SUCCEEDED + FAILED:
            await store.update_attempt(
                *ids, "failed", reason_code="agent_error", reason_message="ValueError: boom\x1b[2J"
            )


def make_database(path: Path) -> Path:
    """``work`` in a new file that nobody has open after."""

    async def make() -> None:
        async with SqliteLightningStore(path) as store:
            await work(store)

    asyncio.run(make())
    return path
