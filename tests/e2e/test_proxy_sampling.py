"""Sampling parameters that the proxy imposes on the calls of training rollouts, and on no others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agentlightning import InMemoryLightningStore
from agentlightning.errors import InvalidValue
from agentlightning.semconv import GenAIAttributes as GenAI, LLMCallAttributes as Call
from agentlightning.types import Rollout, RolloutMode, Span
from openai_backend import OpenAIBackend
from proxied import MESSAGES, Proxied, attribute, body_of, proxied

IMPOSED = {"temperature": 1.0, "top_p": 1.0, "seed": None}
PINNED: dict[str, Any] = {"temperature": 0, "seed": 7, "max_tokens": 4}


async def call(scene: Proxied, mode: RolloutMode | None, *, model: str = "policy", **sampling: Any) -> Span:
    """Make a call of a new rollout, and return its span."""
    rollout = await scene.store.start_rollout({}, mode=mode)
    scene.llm = scene.proxy.as_resource(rollout.rollout_id, rollout.attempt.attempt_id, model=model)
    async with scene.client() as agent:
        await agent.chat.completions.create(model=model, messages=MESSAGES, **sampling)
    (span,) = await scene.store.query_spans(rollout.rollout_id)
    return span


def sent(backend: OpenAIBackend) -> dict[str, Any]:
    """The sampling parameters of the last call that the backend got."""
    return {name: value for name, value in backend.seen[-1].body.items() if name in (*IMPOSED, "max_tokens")}


async def test_training_calls_are_sampled_as_imposed_and_the_span_says_so() -> None:
    async with proxied(backend := OpenAIBackend()) as scene:
        scene.proxy.impose_sampling(IMPOSED, model="policy")
        span = await call(scene, "train", **PINNED)
    assert sent(backend) == {"temperature": 1.0, "top_p": 1.0, "max_tokens": 4}
    assert {name: body_of(span, Call.REQUEST)[name] for name in PINNED} == PINNED, "what was asked"
    assert (attribute(span, GenAI.REQUEST_TEMPERATURE), attribute(span, GenAI.REQUEST_SEED)) == (1.0, None)
    assert json.loads(attribute(span, Call.IMPOSED_SAMPLING)) == {
        "temperature": {"asked": 0, "sent": 1.0},
        "top_p": {"asked": None, "sent": 1.0},
        "seed": {"asked": 7, "sent": None},
    }


@pytest.mark.parametrize("mode", ["val", "test", None])
async def test_calls_of_other_rollouts_are_as_the_agent_made_them(mode: RolloutMode | None) -> None:
    async with proxied(backend := OpenAIBackend()) as scene:
        scene.proxy.impose_sampling(IMPOSED)
        span = await call(scene, mode, **PINNED)
    assert sent(backend) == PINNED
    assert attribute(span, Call.IMPOSED_SAMPLING) is None


async def test_calls_of_no_rollout_and_of_other_models_are_as_they_were() -> None:
    with OpenAIBackend() as backend:
        async with proxied(entries=[backend.entry(), backend.entry("judge")]) as scene:
            scene.proxy.impose_sampling(IMPOSED, model="policy")
            await call(scene, "train", model="judge", **PINNED)
            assert sent(backend) == PINNED
            scene.llm = scene.llm.model_copy(update={"endpoint": f"{scene.proxy.url}/v1"})
            async with scene.client() as agent:
                await agent.chat.completions.create(model="policy", messages=MESSAGES, **PINNED)
            assert sent(backend) == PINNED
            scene.proxy.impose_sampling({}, model="policy")
            await call(scene, "train", **PINNED)
            assert sent(backend) == PINNED, "nothing is imposed any more"


async def test_a_rollout_is_looked_up_once() -> None:
    class Counting(InMemoryLightningStore):
        looked_up = 0

        async def get_rollout_by_id(self, rollout_id: str) -> Rollout | None:
            self.looked_up += 1
            return await super().get_rollout_by_id(rollout_id)

    async with Counting() as store, proxied(OpenAIBackend()) as scene:
        scene.proxy.set_store(store)
        scene.proxy.impose_sampling(IMPOSED)
        rollout = await store.start_rollout({}, mode="train")
        scene.llm = scene.proxy.as_resource(rollout.rollout_id, rollout.attempt.attempt_id)
        async with scene.client() as agent:
            for _ in range(3):
                await agent.chat.completions.create(model="policy", messages=MESSAGES)
    assert store.looked_up == 1


@pytest.mark.parametrize(
    "wrong", [{"stop": 1.0}, {"temperature": float("nan")}, {"temperature": "hot"}, {"seed": True}]
)
async def test_what_cannot_be_imposed_is_refused(wrong: dict[str, Any]) -> None:
    async with proxied(OpenAIBackend()) as scene:
        with pytest.raises(InvalidValue, match=next(iter(wrong))):
            scene.proxy.impose_sampling(wrong)
