"""Resources: versions that never change, a latest that only moves forward, rollouts that keep theirs (G11)."""

from __future__ import annotations

from types import MappingProxyType

import pytest

from agentlightning.errors import NotFound
from agentlightning.store.base import LightningStore
from agentlightning.types import LLM, NamedResources, PromptTemplate, ProxyLLM, ResourcesUpdate
from scenes import claimed, config, enqueued, finish, llm, prompt, rollout_now, started
from store_state import unchanged
from stores import Stores


async def _latest(store: LightningStore) -> tuple[str, int]:
    latest = await store.get_latest_resources()
    assert latest is not None
    return latest.resources_id, latest.version


async def _texts(store: LightningStore, resources_id: str) -> list[str]:
    """The prompts called ``p`` of all versions."""
    return [_text(version) for version in await store.query_resource_versions(resources_id)]


def _text(version: ResourcesUpdate | None) -> str:
    assert version is not None
    template = version.resources["p"]
    assert isinstance(template, PromptTemplate)
    return template.template


async def test_there_are_none_at_first(stores: Stores) -> None:
    async with stores.open() as (store, _):
        assert await store.get_latest_resources() is None
        assert await store.get_resources_by_id("rs-unknown") is None
        assert await store.get_resources_by_id("rs-unknown", version=1) is None
        assert list(await store.query_resources()) == []
        assert list(await store.query_resource_versions("rs-unknown")) == []


async def test_all_kinds_come_back_as_they_went_in(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        resources: NamedResources = {
            "llm": LLM(
                endpoint="http://a/v1", model="m", api_key="secret", sampling_parameters={"stop": ["é"], "n": 1}
            ),
            "proxy": ProxyLLM(endpoint="http://b/v1", model="m"),
            "prompt": PromptTemplate(template="Hi {name}", engine="jinja"),
        }
        added = await store.add_resources(resources)
        assert added.resources_id.startswith("rs-")
        assert (added.version, added.create_time, added.update_time) == (1, clock.wall(), clock.wall())
        assert added.resources == resources
        assert {name: type(each) for name, each in added.resources.items()} == {
            "llm": LLM,
            "proxy": ProxyLLM,
            "prompt": PromptTemplate,
        }
        assert await store.get_resources_by_id(added.resources_id) == added
        assert await store.get_latest_resources() == added
        assert list(await store.query_resources()) == [added]


async def test_any_mapping_is_taken(stores: Stores) -> None:
    async with stores.open() as (store, _):
        given = MappingProxyType({"p": prompt("1")})
        added = await store.add_resources(given, resources_id="rs-1")
        updated = await store.update_resources("rs-1", MappingProxyType({"p": prompt("2")}))
        assert added.resources == given
        assert updated.resources == {"p": prompt("2")}


async def test_an_update_is_the_next_version(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        first = await store.add_resources({"p": prompt("1")}, resources_id="rs-mine")
        clock.advance(5)
        second = await store.update_resources("rs-mine", {"p": prompt("2")})
        assert (second.resources_id, second.version) == ("rs-mine", 2)
        assert (second.create_time, second.update_time) == (first.create_time, clock.wall())
        assert await store.get_resources_by_id("rs-mine") == second
        assert await store.get_resources_by_id("rs-mine", version=1) == first
        assert await store.get_resources_by_id("rs-mine", version=2) == second
        assert await store.get_resources_by_id("rs-mine", version=3) is None
        assert list(await store.query_resource_versions("rs-mine")) == [first, second]
        assert list(await store.query_resource_versions("rs-mine", sort_order="desc")) == [second, first]
        page = await store.query_resource_versions("rs-mine", limit=1, offset=1)
        assert (list(page), page.total) == ([second], 2)
        assert list(await store.query_resources()) == [second]


async def test_an_update_of_a_new_id_is_version_one(stores: Stores) -> None:
    async with stores.open() as (store, _):
        assert (await store.update_resources("rs-new", {"p": prompt("1")})).version == 1
        assert (await store.update_resources("rs-new", {"p": prompt("1")})).version == 2


async def test_latest_is_what_was_stored_last_of_any_id(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        await store.add_resources({}, resources_id="rs-z")
        await store.add_resources({}, resources_id="rs-a")
        assert await _latest(store) == ("rs-a", 1)
        clock.jump_wall(-1000)
        await store.update_resources("rs-z", {})
        assert await _latest(store) == ("rs-z", 2)
        await store.add_resources({}, resources_id="rs-a")
        assert await _latest(store) == ("rs-z", 2)


async def test_a_rollback_is_a_new_version_with_old_content(stores: Stores) -> None:
    async with stores.open() as (store, _):
        for text in "abc":
            await store.update_resources("rs-1", {"p": prompt(text)})
        await store.add_resources({"p": prompt("other")}, resources_id="rs-2")
        back = await store.rollback_resources("rs-1", 1)
        assert (back.version, _text(back)) == (4, "a")
        assert await _latest(store) == ("rs-1", 4)
        assert await _texts(store, "rs-1") == ["a", "b", "c", "a"]
        assert (await store.rollback_resources("rs-1", 4)).version == 5


@pytest.mark.parametrize(("resources_id", "version"), [("rs-1", 2), ("rs-unknown", 1)])
async def test_there_is_no_way_back_to_what_never_was(stores: Stores, resources_id: str, version: int) -> None:
    async with stores.open() as (store, _):
        await store.add_resources({}, resources_id="rs-1")
        async with unchanged(store):
            with pytest.raises(NotFound):
                await store.rollback_resources(resources_id, version)


async def test_a_version_never_changes(stores: Stores) -> None:
    async with stores.open() as (store, _):
        given: NamedResources = {"m": llm(stop=["a"])}
        added = await store.add_resources(given, resources_id="rs-1")
        expected = added.model_copy(deep=True)
        for mutable in (given, added.resources):
            model = mutable["m"]
            assert isinstance(model, LLM)
            model.sampling_parameters["stop"].append("b")
            mutable["new"] = prompt("x")
        await store.update_resources("rs-1", {"m": llm(stop=["c"])})
        await store.rollback_resources("rs-1", 2)
        assert await store.get_resources_by_id("rs-1", version=1) == expected


async def test_a_rollout_keeps_the_version_it_was_enqueued_with(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await store.add_resources({"p": prompt("1")}, resources_id="rs-1")
        [rollout_id] = await enqueued(store, "input", config=config())
        await store.update_resources("rs-1", {"p": prompt("2")})
        await store.add_resources({}, resources_id="rs-2")
        claim = await claimed(store)
        assert (claim.resources_id, claim.resources_version) == ("rs-1", 1)
        await finish(store, claim, "failed")
        retried = await claimed(store)
        assert (retried.resources_id, retried.resources_version) == ("rs-1", 1)
        await finish(store, retried)
        ended = await rollout_now(store, rollout_id)
        assert (ended.resources_id, ended.resources_version) == ("rs-1", 1)


async def test_a_rollout_gets_the_newest_version_of_what_it_names_else_the_latest(stores: Stores) -> None:
    async with stores.open() as (store, _):
        [early] = await enqueued(store, 0)
        await store.update_resources("rs-1", {})
        await store.update_resources("rs-1", {})
        await store.update_resources("rs-2", {})
        named = await store.enqueue_rollout("input", resources_id="rs-1")
        unnamed = await store.enqueue_rollout("input")
        begun = await store.start_rollout("input", resources_id="rs-1")
        assert [
            (each.resources_id, each.resources_version) for each in (named, unnamed, begun, await started(store))
        ] == [
            ("rs-1", 2),
            ("rs-2", 1),
            ("rs-1", 2),
            ("rs-2", 1),
        ]
        rollout = await rollout_now(store, early)
        assert (rollout.resources_id, rollout.resources_version) == (None, None)
        moved = await store.update_rollout(early, resources_id="rs-1")
        assert (moved.resources_id, moved.resources_version) == ("rs-1", 2)


async def test_empty_resources_are_resources(stores: Stores) -> None:
    async with stores.open() as (store, _):
        assert (await store.add_resources({}, resources_id="rs-1")).resources == {}
        assert (await store.enqueue_rollout(1)).resources_id == "rs-1"
