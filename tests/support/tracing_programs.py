"""Programs whose OpenTelemetry is set up in ways that rewards must survive; run in interpreters of their own."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fresh_process import say

__all__ = ["logfire_configured", "run_in_a_fork", "run_pools", "train_disabled_and_seeded"]


def train_disabled_and_seeded() -> None:
    """Run an agent that seeds ``random`` in each step, with ``OTEL_SDK_DISABLED``; says what each rollout has."""
    os.environ["OTEL_SDK_DISABLED"] = "true"
    import agentlightning as agl

    @agl.rollout
    def agent(task: dict[str, Any], prompt_template: agl.PromptTemplate) -> float:
        for step in range(3):
            random.seed(42)
            agl.emit_message(f"step {step}")
        random.seed(42)
        return 1.0

    @agl.algo
    async def algorithm(store: agl.LightningStore, train_dataset: Any) -> None:
        template = agl.PromptTemplate(template="x", engine="f-string")
        resources = await store.add_resources({"prompt_template": template})
        for task in train_dataset:
            rollout = await store.enqueue_rollout(task, resources_id=resources.resources_id)
            await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=50)
            spans = await store.query_spans(rollout.rollout_id)
            say(f"{len(spans)} spans, reward {agl.find_final_reward(spans)}")

    agl.Trainer(algorithm=algorithm, n_runners=1, progress="off", strategy="shm").fit(agent, [{"q": 1}, {"q": 2}])


Trace = Callable[[Callable[[], object]], Awaitable[list[Any]]]
"""Calls a function in the trace of a rollout; returns the stored spans."""


@asynccontextmanager
async def tracing() -> AsyncIterator[tuple[Any, Trace]]:
    """A tracer, whose spans go to a store in memory, and a ``Trace``."""
    import agentlightning as agl
    from scenes import started

    async with agl.InMemoryLightningStore() as store:
        tracer = agl.OtelTracer()

        async def trace(work: Callable[[], object]) -> list[Any]:
            rollout = await started(store)
            async with tracer.trace_context(rollout_id=rollout.rollout_id, attempt_id=rollout.attempt.attempt_id):
                work()
            return list(await store.query_spans(rollout.rollout_id))

        with tracer.lifespan(store):
            yield tracer, trace


def logfire_configured() -> None:
    """Trace a rollout where Logfire owns the provider; says the names of the stored spans."""
    import logfire  # pyright: ignore[reportMissingImports]

    def work() -> None:
        with logfire.span("call"):
            pass
        _reward(1.0)

    async def run() -> None:
        logfire.configure(send_to_logfire=False, console=False)
        async with tracing() as (_, trace):
            say(", ".join(span.name for span in await trace(work)))

    asyncio.run(run())


def run_pools() -> None:
    """Trace rollouts that use pools of forked processes; says what the store has of each."""
    import logging

    import agentlightning as agl

    logging.disable(logging.ERROR)

    def many() -> None:
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
            list(pool.map(_reward, range(40)))

    async def run() -> None:
        async with tracing() as (tracer, trace):
            kept = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork"))

            def mixed() -> None:
                kept.submit(_tool, 0.1).result()
                agl.emit_reward(0.9)

            spans = await trace(mixed)
            ids = len({span.span_id for span in spans})
            say(f"{', '.join(span.name for span in spans)}: {agl.find_final_reward(spans)}, {ids} ids")
            spans = await trace(many)
            ends = [span.end_time for span in spans]
            rewards = sorted(int(agl.get_reward_value(span) or 0) for span in spans)
            say(f"{len({span.span_id for span in spans})} ids, {rewards[0]} to {rewards[-1]}, {ends == sorted(ends)}")
            (span,) = await trace(lambda: run_forked(_large))
            say(f"{len(str(span.attributes['text']))} characters, {span.attributes['odd']}")
            spans = await trace(lambda: kept.submit(_reward, 5).result())
            forked = processor_of(tracer).forked
            say(f"{len(spans)} spans, {forked.lost} lost")
            kept.shutdown()
            forked.collect()
            say(f"{len(os.listdir(forked.folder))} files")

    asyncio.run(run())


def processor_of(tracer: Any) -> Any:
    """The processor of a tracer that is set up."""
    return tracer._wired[0]


def run_forked(function: Callable[[], object]) -> None:
    """Call a function in a forked child, and wait for its end."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        pool.submit(function).result()


def _tool(reward: float) -> None:
    from opentelemetry import trace

    import agentlightning as agl

    with trace.get_tracer("tool").start_as_current_span("tool.call"):
        pass
    with agl.operation(name="operation"):
        pass
    agl.emit_reward(reward)


def _reward(value: float) -> None:
    import agentlightning as agl

    agl.emit_reward(value)


def _large() -> None:
    from opentelemetry import trace

    with trace.get_tracer("tool").start_as_current_span("large") as span:
        span.set_attributes({"text": "x" * 3_000_000, "odd": float("nan")})


def run_in_a_fork() -> None:
    """Trace a rollout in a fork of a process that has traced one; says the rewards of both, each with a forked tool."""
    import agentlightning as agl

    def work() -> None:
        run_forked(_half)
        _reward(1.0)

    async def run() -> None:
        async with tracing() as (_, trace):
            say([agl.get_reward_value(span) for span in await trace(work)])

    asyncio.run(run())
    child = os.fork()
    if child == 0:
        asyncio.run(run())
        os._exit(0)
    say(os.waitpid(child, 0)[1])


def _half() -> None:
    _reward(0.5)
