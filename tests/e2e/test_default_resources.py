"""A runner that cannot get the resources of its rollout: with declared defaults it works on, and says so."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

import agentlightning as agl
from agentlightning.algorithm.batches import wait_for_ends
from agentlightning.cli.services import RunnerOptions
from agentlightning.http.client.client import LightningStoreClient
from agentlightning.http.client.retry import Resilience
from agentlightning.http.server.server import LightningStoreServer
from agentlightning.runner import resources as runner_resources
from agentlightning.types import Attributes, PromptTemplate, Span
from chaos_proxy import Fault, Seen, chaos_proxy
from command_line import agl as run_agl
from served_store import served

OWN = {"prompt": PromptTemplate(template="own {n}", engine="f-string")}
DEFAULTS = {"prompt": PromptTemplate(template="default {n}", engine="f-string")}
IMPATIENT = Resilience(patience_seconds=2.0, cache_after_seconds=0.2)


class Line:
    """A server, and a way to it on which requests for resources get lost, while ``is_cut``."""

    is_cut = False

    def __init__(self, server: LightningStoreServer) -> None:
        self.server = server
        self.url = ""

    def decide(self, seen: Seen) -> Fault:
        return Fault.LOSE_REQUEST if self.is_cut and "/resources" in seen.path else Fault.NONE


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    with served(tmp_path / "store.db") as server:
        made = Line(server)
        with chaos_proxy(server.endpoint, made.decide) as proxy:
            made.url = proxy.url
            yield made


@contextmanager
def cut(line: Line) -> Iterator[None]:
    line.is_cut = True
    yield
    line.is_cut = False


@asynccontextmanager
async def client_of(line: Line, spool: Path | None = None, **options: Any) -> AsyncIterator[LightningStoreClient]:
    async with LightningStoreClient(line.url, spool_dir=spool, **{"resilience": IMPATIENT, **options}) as client:
        yield client


def said(task: int, prompt_template: PromptTemplate) -> float:
    agl.emit_message(prompt_template.format(n=task))
    return 1.0


async def run(store: Any, **options: Any) -> None:
    tracer = options.pop("tracer", None) or agl.OtelTracer()
    runner = agl.LitAgentRunner[Any](tracer, max_rollouts=1, **options)
    with runner.run_context(agent=agl.rollout(options.pop("agent", said)), store=store):
        async with asyncio.timeout(60):
            await runner.iter()


async def enqueue(line: Line, *, with_own: bool = True) -> str:
    async with LightningStoreClient(line.server.endpoint, spool_dir=None) as store:
        resources_id = (await store.add_resources(OWN)).resources_id if with_own else None
        return (await store.enqueue_rollout(1, resources_id=resources_id)).rollout_id


async def spans_of(line: Line, rollout_id: str) -> list[Span]:
    async with LightningStoreClient(line.server.endpoint, spool_dir=None) as store:
        return list(await store.query_spans(rollout_id))


def messages(spans: list[Span]) -> list[Any]:
    return [each.attributes["agentlightning.message.body"] for each in spans if each.name == "agentlightning.message"]


async def test_it_works_with_the_defaults_and_the_attempt_says_so(line: Line) -> None:
    rollout_id = await enqueue(line)
    async with client_of(line) as store:
        with cut(line):
            await run(store, default_resources=DEFAULTS)
        (ended,) = await wait_for_ends(store, [rollout_id])
    assert ended is not None
    assert ended.rollout.status == "succeeded"
    assert messages(list(ended.spans)) == ["default 1"]
    why = agl.used_default_resources(ended.spans)
    assert why is not None
    assert f"{ended.rollout.resources_id!r} version 1 could not be had: " in why
    assert agl.find_final_reward(ended.spans) == 1.0
    assert (ended.on_defaults, ended.reward) == (True, None), "an algorithm does not take it for one of its own"
    told = await asyncio.to_thread(run_agl, "rollouts", "show", rollout_id, "--url", line.server.endpoint, "-o", "json")
    assert [each["default_resources"] for each in json.loads(told.out)["attempts"]] == [why]
    shown = await asyncio.to_thread(run_agl, "trace", rollout_id, "--url", line.server.endpoint)
    assert "It ran with the default resources of its runner: resources" in shown.out


async def test_no_call_of_such_an_attempt_is_trained_on(line: Line) -> None:
    def agent(task: int, prompt_template: PromptTemplate) -> list[Any]:
        call: Attributes = {"gen_ai.prompt.0.content": "2 + 2?", "gen_ai.completion.0.content": "4"}
        return [Span.from_attributes(name="openai.chat.completion", attributes=call, start_time=1.0, end_time=2.0)]

    for is_cut in (False, True):
        rollout_id = await enqueue(line)
        async with client_of(line) as store:
            line.is_cut = is_cut
            runner = agl.LitAgentRunner[Any](agl.OtelTracer(), max_rollouts=1, default_resources=DEFAULTS)
            with runner.run_context(agent=agl.rollout(agent), store=store):
                await runner.iter()
            line.is_cut = False
        adapters: list[Any] = [agl.TracerTraceToTriplet(), agl.TraceToMessages()]
        for adapter in adapters:
            adapted = adapter.examine(await spans_of(line, rollout_id))
            assert len(adapted.made) == (0 if is_cut else 1)
            reasons = [each.reason for each in adapted.unusable]
            assert reasons == (["the attempt ran with default resources, and not with those of its rollout"] * is_cut)


@pytest.mark.parametrize(("is_cut", "defaults"), [(False, DEFAULTS), (True, None)])
async def test_nothing_is_marked_where_they_are_there_and_without_defaults_it_fails(
    line: Line, is_cut: bool, defaults: Any
) -> None:
    rollout_id = await enqueue(line)
    async with client_of(line) as store:
        line.is_cut = is_cut
        await run(store, default_resources=defaults)
        line.is_cut = False
        (ended,) = await wait_for_ends(store, [rollout_id])
    assert ended is not None
    assert not ended.on_defaults
    if is_cut:
        assert (ended.rollout.status, ended.rollout.reason_code) == ("failed", "missing_resources")
    else:
        assert (ended.reward, messages(list(ended.spans))) == (1.0, ["own 1"])


async def test_a_copy_on_the_disk_comes_first(line: Line, tmp_path: Path) -> None:
    """It is the very version that the rollout was enqueued with."""
    rollout_id = await enqueue(line)
    async with client_of(line, tmp_path / "spool") as store:
        rollout = await store.get_rollout_by_id(rollout_id)
        assert rollout is not None
        await store.get_resources_by_id(str(rollout.resources_id), version=rollout.resources_version)
        with cut(line):
            await run(store, default_resources=DEFAULTS)
        (ended,) = await wait_for_ends(store, [rollout_id])
    assert ended is not None
    assert (ended.reward, messages(list(ended.spans))) == (1.0, ["own 1"])


async def test_a_patient_client_is_not_waited_for(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_resources, "DEFAULTS_AFTER_SECONDS", 0.3)
    rollout_id = await enqueue(line, with_own=False)
    async with client_of(line, resilience=Resilience(patience_seconds=1000)) as store:
        with cut(line):
            await run(store, default_resources=DEFAULTS)
    why = agl.used_default_resources(await spans_of(line, rollout_id))
    assert why == "the latest resources could not be had: no answer within 0.3 s"


async def test_the_mark_does_not_depend_on_the_tracer(line: Line) -> None:
    rollout_id = await enqueue(line)
    async with client_of(line) as store:
        with cut(line):
            runner = agl.LitAgentRunner[Any](agl.DummyTracer(), max_rollouts=1, default_resources=DEFAULTS)
            with runner.run_context(agent=agl.rollout(lambda task, prompt_template: 0.5), store=store):
                await runner.iter()
    spans = await spans_of(line, rollout_id)
    assert agl.used_default_resources(spans)
    assert agl.find_final_reward(spans) == 0.5


async def test_resources_that_the_store_does_not_have_are_a_mistake(line: Line) -> None:
    rollout_id = await enqueue(line)
    async with LightningStoreClient(line.server.endpoint, spool_dir=None) as store:
        rollout = await store.get_rollout_by_id(rollout_id)
        assert rollout is not None
        lookup = runner_resources.RolloutResources(store, DEFAULTS)
        claimed = await store.dequeue_rollout("worker")
        assert claimed is not None
        claimed.resources_version = 99
        assert await lookup.find_or_default(claimed) == (None, None)


def test_the_command_line_takes_them_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "defaults.json"
    file.write_text(json.dumps({name: each.model_dump() for name, each in DEFAULTS.items()}), encoding="utf-8")
    settings = RunnerOptions(default_resources=file).settings()
    assert settings["default_resources"] == DEFAULTS
    assert agl.LitAgentRunner[Any](agl.OtelTracer(), **settings).default_resources == DEFAULTS
    assert RunnerOptions().settings()["default_resources"] is None
