"""What an earlier start of a run left in the store is handed out when the algorithm is there, and with what it has."""

from __future__ import annotations

import asyncio

import pytest

import agentlightning as agl
from agentlightning.algorithm.resume import ProxyMove, prepare_to_resume
from agentlightning.trainer.roles import algorithm_store

HERE = "http://127.0.0.1:9/v1"
GONE = "http://127.0.0.1:1/v1"


class RunningProxy(agl.LLMProxy):
    """Says where it would be."""

    def is_running(self) -> bool:
        return True


def proxy() -> agl.LLMProxy:
    parameters = {"model": "openai/m", "api_base": "http://127.0.0.1:2/v1", "api_key": "x"}
    return RunningProxy(port=9, model_list=[{"model_name": "m", "litellm_params": parameters}], api_key="")


def behind(endpoint: str, model: str = "m") -> agl.NamedResources:
    prompt = agl.PromptTemplate(template="hello", engine="f-string")
    llm = agl.ProxyLLM(endpoint=endpoint, model=model, api_key="not-needed", sampling_parameters={"temperature": 0.5})
    return {"llm": llm, "prompt": prompt}


async def resources_of(store: agl.LightningStore, rollout_id: str) -> agl.NamedResources:
    rollout = await store.get_rollout_by_id(rollout_id)
    assert rollout is not None
    assert rollout.resources_id is not None
    found = await store.get_resources_by_id(rollout.resources_id, version=rollout.resources_version)
    assert found is not None
    return found.resources


@pytest.mark.parametrize("asks", ["enqueue", "wait"])
async def test_nothing_is_handed_out_before_the_algorithm_asks(asks: str) -> None:
    async with agl.InMemoryLightningStore() as store:
        await store.enqueue_rollout("left")
        await prepare_to_resume(store, None, behind_proxy=False)
        assert await store.dequeue_rollout("w") is None
        waiting = asyncio.create_task(store.dequeue_rollout("w", wait_seconds=30))
        await asyncio.sleep(0)
        await store.query_rollouts()
        assert await store.update_worker("w", {})
        assert not waiting.done()
        if asks == "enqueue":
            await store.enqueue_rollout("new")
        else:
            await store.wait_for_rollouts(rollout_ids=[], timeout=0)
        claimed = await waiting
        assert claimed is not None
        assert claimed.input == "left"


@pytest.mark.parametrize("asks", ["enqueue", "wait", "look twice"])
async def test_what_waits_is_told_where_the_proxy_is_now(asks: str) -> None:
    async with agl.InMemoryLightningStore() as store:
        prompts = await store.add_resources({"prompt": agl.PromptTemplate(template="x", engine="f-string")})
        for name, resources in (("ours", behind(GONE)), ("other", behind(GONE, "unknown to our proxy"))):
            await store.add_resources(resources, resources_id=name)
            await store.enqueue_rollout(name, rollout_id=name, resources_id=name)
        await store.enqueue_rollout("prompts", rollout_id="prompts", resources_id=prompts.resources_id)
        latest = await store.add_resources({"prompt": agl.PromptTemplate(template="newest", engine="f-string")})
        algorithms = algorithm_store(store, agl.RolloutConfig(), move=ProxyMove(store, proxy()))

        match asks:
            case "enqueue":
                await algorithms.enqueue_rollout("new")
            case "wait":
                await algorithms.wait_for_rollouts(rollout_ids=["ours"], timeout=0)
            case _:
                await algorithms.get_rollout_by_id("ours")
                assert await resources_of(store, "ours") == behind(GONE), "once may be to see whether it exists"
                await algorithms.get_rollout_by_id("ours")

        assert await resources_of(store, "ours") == behind(HERE)
        assert await resources_of(store, "other") == behind(GONE, "unknown to our proxy")
        kept = await store.get_rollout_by_id("prompts")
        assert kept is not None
        assert kept.resources_id == prompts.resources_id
        now = await store.get_latest_resources()
        assert now is not None
        assert (now.resources_id, now.resources) == (latest.resources_id, latest.resources)


async def test_only_what_was_behind_a_proxy_is_begun_again() -> None:
    async with agl.InMemoryLightningStore() as store:
        plain: agl.NamedResources = {"llm": agl.LLM(endpoint="https://model.example/v1", model="m")}
        for name, resources in (("proxied", behind(GONE)), ("plain", plain)):
            await store.add_resources(resources, resources_id=name)
            await store.enqueue_rollout(name, rollout_id=name, resources_id=name)
            assert await store.dequeue_rollout("w") is not None
        await prepare_to_resume(store, None, behind_proxy=True)
        statuses = {each.rollout_id: each.status for each in await store.query_rollouts()}
        assert statuses == {"proxied": "requeuing", "plain": "preparing"}
        failing = await store.get_latest_attempt("proxied")
        assert failing is not None
        await store.update_attempt("proxied", failing.attempt_id, "failed", reason_code="agent_error")
        now = await store.get_rollout_by_id("proxied")
        assert now is not None
        assert now.status == "requeuing", "the failure comes too late to count"
