"""The v0.1 server and client, over a real socket, and the loader that needs none."""

from __future__ import annotations

import asyncio

import pytest

import agentlightning as agl
from agentlightning.errors import InvalidValue, StoreUnavailable

PROMPT = {"prompt": agl.PromptTemplate(template="Say {word}", engine="f-string")}


async def test_a_task_goes_out_and_its_rollout_comes_back() -> None:
    server = agl.AgentLightningServer(port=0)
    await server.start()
    await server.start()
    try:
        client = agl.AgentLightningClient(server.endpoint, poll_interval=0.05)
        assert await client.get_latest_resources_async() is None
        resources_id = await server.update_resources(PROMPT)
        rollout_id = await server.queue_task({"word": "hello"}, mode="train", resources_id=resources_id)
        task = await client.poll_next_task_async()
        assert task is not None
        assert (task.rollout_id, task.input, task.mode, task.num_claims) == (rollout_id, {"word": "hello"}, "train", 1)
        assert task.resources_id is not None
        resources = await client.get_resources_by_id_async(task.resources_id)
        assert resources is not None
        assert resources.resources == PROMPT
        assert await client.get_resources_by_id_async("res-unknown") is None

        waiting = asyncio.create_task(server.poll_completed_rollout(rollout_id, timeout=10))
        reply = await client.post_rollout_async(agl.RolloutLegacy(rollout_id=rollout_id, final_reward=1.0))
        assert reply is not None
        assert reply["status"] == "ok"
        done = await waiting
        assert done is not None
        assert done.final_reward == 1.0
        assert await server.get_completed_rollout(rollout_id) is None
    finally:
        await server.stop()
        await server.stop()


async def test_a_poll_waits_until_there_is_a_task() -> None:
    server = agl.AgentLightningServer(port=0)
    await server.start()
    try:
        client = agl.AgentLightningClient(server.endpoint, poll_interval=0.02)
        polling = asyncio.create_task(client.poll_next_task_async())
        done, _ = await asyncio.wait([polling], timeout=0.1)
        assert not done
        await server.queue_task("now")
        task = await asyncio.wait_for(polling, 10)
        assert task is not None
        assert task.input == "now"
    finally:
        await server.stop()


async def test_reports_are_kept_whatever_their_id_and_handed_over_once() -> None:
    server = agl.AgentLightningServer(port=0)
    await server.start()
    try:
        client = agl.AgentLightningClient(server.endpoint)
        for reward in (0.0, 1.0):
            await client.post_rollout_async(agl.RolloutLegacy(rollout_id="unknown", final_reward=reward))
        assert [each.final_reward for each in await server.retrieve_completed_rollouts()] == [1.0]
        assert await server.retrieve_completed_rollouts() == []
        assert await server.poll_completed_rollout("never", timeout=0.01) is None
        with pytest.raises(StoreUnavailable, match="422"):
            await asyncio.to_thread(client._request, "/rollout", b"{}")
    finally:
        await server.stop()


async def test_a_server_that_is_not_there() -> None:
    server = agl.AgentLightningServer(port=0)
    with pytest.raises(RuntimeError, match="not been started"):
        await server.queue_task("x")
    await server.start()
    other = agl.AgentLightningServer(port=server.port)
    with pytest.raises(StoreUnavailable, match="cannot bind"):
        await other.start()
    await server.stop()
    client = agl.AgentLightningClient(server.endpoint)
    with pytest.raises(StoreUnavailable, match="does not answer"):
        await client.get_latest_resources_async()


async def test_a_task_that_takes_too_long_is_handed_out_again() -> None:
    server = agl.AgentLightningServer(port=0, task_timeout_seconds=10.0)
    await server.start()
    try:
        rollout_id = await server.queue_task("first")
        assert server._next_task(now=0.0) is not None
        assert server._next_task(now=10.0) is None
        again = server._next_task(now=10.1)
        assert again is not None
        assert (again.rollout_id, again.num_claims) == (rollout_id, 2)
    finally:
        await server.stop()


async def test_the_loader_goes_round_its_tasks() -> None:
    loader = agl.DevTaskLoader(["a", "b"], PROMPT)
    tasks = [loader.poll_next_task(), await loader.poll_next_task_async(), loader.poll_next_task()]
    assert [task.rollout_id for task in tasks if task] == ["local_task_001", "local_task_002", "local_task_001"]
    resources = loader.get_latest_resources()
    assert resources is not None
    assert await loader.get_resources_by_id_async("local") == resources
    with pytest.raises(ValueError, match="'other'"):
        loader.get_resources_by_id("other")
    await loader.post_rollout_async(agl.RolloutLegacy(rollout_id="local_task_001"))
    assert [each.rollout_id for each in loader.rollouts] == ["local_task_001"]


@pytest.mark.parametrize("tasks", [[], ["a", agl.Task(rollout_id="r", input=1)]])
def test_the_loader_refuses_no_tasks_and_both_kinds(tasks: list[object]) -> None:
    with pytest.raises(InvalidValue):
        agl.DevTaskLoader(tasks, PROMPT)


async def test_others_are_let_in_with_a_key_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGL_API_KEY", raising=False)
    with pytest.raises(InvalidValue, match=r"other machines can reach '0\.0\.0\.0'.*AGL_API_KEY"):
        await agl.AgentLightningServer("0.0.0.0", 0).start()
    monkeypatch.setenv("AGL_API_KEY", "the-key-of-both")
    server = agl.AgentLightningServer("0.0.0.0", 0)
    await server.start()
    try:
        await server.update_resources(PROMPT)
        url = server.endpoint.replace("0.0.0.0", "127.0.0.1")
        assert await agl.AgentLightningClient(url).get_latest_resources_async() is not None
        with pytest.raises(StoreUnavailable, match="answered 401"):
            await agl.AgentLightningClient(url, api_key="a-wrong-key").get_latest_resources_async()
    finally:
        await server.stop()


async def test_on_this_machine_clients_of_v01_go_on_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGL_API_KEY", "a-key-for-something-else")
    server = agl.AgentLightningServer(port=0)
    await server.start()
    try:
        monkeypatch.delenv("AGL_API_KEY")
        assert await agl.AgentLightningClient(server.endpoint).get_latest_resources_async() is None
    finally:
        await server.stop()
