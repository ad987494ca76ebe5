"""A reward after each step belongs to the calls of that step: it is in the store before the next call is."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import agentlightning as agl
from openai_backend import OpenAIBackend
from proxied import Proxied, proxied

STEPS = 4


def question(step: int) -> Any:
    return {"model": "policy", "messages": [{"role": "user", "content": f"q{step}"}]}


async def play(scene: Proxied) -> None:
    """A coroutine is not held up by its reward, which is sent at once; here it waits by itself."""
    async with scene.client() as client:
        for step in range(STEPS):
            await client.chat.completions.create(**question(step))
            agl.emit_reward(float(step))
            async with asyncio.timeout(60):
                while len(await scene.spans()) < 2 * (step + 1):
                    await asyncio.sleep(0.01)


def play_in_a_thread(scene: Proxied) -> None:
    with scene.sync_client() as client:
        for step in range(STEPS):
            client.chat.completions.create(**question(step))
            agl.emit_reward(float(step))


@pytest.mark.parametrize("is_plain", [False, True])
async def test_each_call_gets_the_reward_of_its_step(is_plain: bool) -> None:
    async with proxied(OpenAIBackend(words=2)) as scene:
        tracer = agl.OtelTracer(interval_seconds=600)
        (attempt,) = await scene.store.query_attempts(scene.rollout_id)
        with tracer.lifespan(scene.store):
            async with tracer.trace_context(rollout_id=scene.rollout_id, attempt_id=attempt.attempt_id):
                await (asyncio.to_thread(play_in_a_thread, scene) if is_plain else play(scene))
        spans = await scene.spans()
    for adapter in (agl.TracerTraceToTriplet(), agl.LlmProxyTraceToTriplet()):
        assert [triplet.reward for triplet in adapter.adapt(spans)] == [0.0, 1.0, 2.0, 3.0]
