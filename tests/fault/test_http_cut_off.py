"""Cut off from the server: spans go to the disk and arrive once and in order after; resources come from the disk."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path

import pytest

from agentlightning.errors import NotFound, SpoolFull, StoreUnavailable, StoreUnreachable
from agentlightning.http.client.cache import CachedResources
from agentlightning.http.client.client import LightningStoreClient
from agentlightning.http.client.retry import Resilience
from agentlightning.http.server.server import LightningStoreServer
from agentlightning.store.sqlite.store import InMemoryLightningStore
from agentlightning.types import AttemptedRollout, PromptTemplate, Span
from fresh_process import FreshProcess
from spooling_process import numbered, spool_without_end
from store_server_process import free_port
from store_state import assert_sound

SOON = 20.0
IMPATIENT = Resilience(
    patience_seconds=30.0,
    backoff_base_seconds=0.02,
    backoff_cap_seconds=0.1,
    spool_after_seconds=0.1,
    cache_after_seconds=0.1,
)


class Line:
    """A store, and a server in front of it that comes and goes."""

    def __init__(self, store: InMemoryLightningStore) -> None:
        self.store = store
        self._port = free_port()
        self._server: LightningStoreServer | None = None
        self.url = f"http://127.0.0.1:{self._port}"

    async def mend(self) -> None:
        self._server = LightningStoreServer(self.store, port=self._port)
        await self._server.start()

    async def cut(self) -> None:
        if self._server is not None:
            await self._server.stop()
            self._server = None

    def client(
        self, spool_dir: Path | None, *, resilience: Resilience = IMPATIENT, spool_max_bytes: int = 2**30
    ) -> LightningStoreClient:
        return LightningStoreClient(
            self.url, spool_dir=spool_dir, resilience=resilience, spool_max_bytes=spool_max_bytes
        )


Opens = Callable[[], AbstractAsyncContextManager[Line]]


@pytest.fixture
def line() -> Opens:
    @asynccontextmanager
    async def opened() -> AsyncIterator[Line]:
        async with InMemoryLightningStore() as store:
            made = Line(store)
            await made.mend()
            try:
                yield made
            finally:
                await made.cut()
            await assert_sound(store)

    return opened


async def _started(store: InMemoryLightningStore) -> tuple[AttemptedRollout, tuple[str, str]]:
    claim = await store.start_rollout("input")
    return claim, (claim.rollout_id, claim.attempt.attempt_id)


async def _numbers(store: InMemoryLightningStore, rollout_id: str) -> list[object]:
    return [span.attributes["n"] for span in await store.query_spans(rollout_id)]


async def _until(what: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(SOON):
        while not await what():
            await asyncio.sleep(0.01)


async def test_spans_wait_on_the_disk_and_arrive_once_in_order(line: Opens, tmp_path: Path) -> None:
    async with line() as here, here.client(tmp_path) as client:
        _, ids = await _started(here.store)
        [first] = await client.add_many_spans([numbered(*ids, 0)])
        assert first.sequence_id == 1
        await here.cut()
        [waiting] = await client.add_many_spans([numbered(*ids, 1)])
        assert waiting.sequence_id == 0, "nobody has issued one yet"
        await client.add_many_spans([numbered(*ids, number) for number in range(2, 50)])
        report = client.health.spool
        assert report is not None
        assert (report.waiting_spans, report.spooled, report.delivered) == (49, 49, 0)
        assert report.waiting_bytes > 49 * 100
        await here.mend()
        await client.add_many_spans([numbered(*ids, 50)])  # behind the others, wherever they are
        await client.update_attempt(*ids, status="succeeded")
        assert await _numbers(here.store, ids[0]) == list(range(51))
        assert [span.sequence_id for span in await here.store.query_spans(ids[0])] == list(range(1, 52))
        report = client.health.spool
        assert report is not None
        assert (report.waiting_spans, report.delivered, report.refused) == (0, report.spooled, 0)
        [direct] = await client.add_many_spans([numbered(*ids, 51)])
        assert direct.sequence_id == 52, "the way is direct again"
    assert not list(tmp_path.glob("*/*.spool")), "nothing is left of it"


async def test_an_attempt_does_not_end_before_its_spans_have_arrived(line: Opens, tmp_path: Path) -> None:
    """Whoever waits for the rollout finds its reward."""
    async with line() as here, here.client(tmp_path) as client:
        _, ids = await _started(here.store)
        await here.cut()
        await client.add_many_spans([numbered(*ids, number) for number in range(2000)])
        ending = asyncio.create_task(client.update_attempt(*ids, status="succeeded"))
        await here.mend()
        await here.store.wait_for_rollouts(rollout_ids=[ids[0]], timeout=SOON)
        assert (await here.store.query_spans(ids[0])).total == 2000
        await ending


async def test_without_waiting_an_end_overtakes_the_spans(line: Opens, tmp_path: Path) -> None:
    """The control of the test above: a client of its own, which knows nothing of those spans, is faster."""
    async with line() as here, here.client(tmp_path) as client, here.client(tmp_path / "other") as other:
        _, ids = await _started(here.store)
        await here.cut()
        await client.add_many_spans([numbered(*ids, number) for number in range(2000)])
        ending = asyncio.create_task(other.update_attempt(*ids, status="succeeded"))
        await here.mend()
        await here.store.wait_for_rollouts(rollout_ids=[ids[0]], timeout=SOON)
        early = (await here.store.query_spans(ids[0])).total
        await ending
        await _until(lambda: _has(here.store, ids[0], 2000))
        assert early < 2000


async def _has(store: InMemoryLightningStore, rollout_id: str, spans: int) -> bool:
    return (await store.query_spans(rollout_id, limit=1)).total == spans


async def test_spans_of_a_runner_that_was_killed_are_delivered_by_the_next(line: Opens, tmp_path: Path) -> None:
    async with line() as here:
        _, ids = await _started(here.store)
        await here.cut()
        with FreshProcess(spool_without_end, here.url, tmp_path, *ids) as runner:
            accepted = 0
            while accepted < 30:
                accepted = int(runner.hear())
            runner.kill()
            with suppress(AssertionError):  # it has said everything
                while True:
                    accepted = int(runner.hear())
        await here.mend()
        async with here.client(tmp_path) as nextcomer:
            assert await nextcomer.dequeue_rollout("next") is None
            await _until(lambda: _has_at_least(here.store, ids[0], accepted))
            numbers = await _numbers(here.store, ids[0])
            assert numbers == list(range(len(numbers)))
            assert accepted <= len(numbers) <= accepted + 2, "one may have been accepted and not been told of"
            await _until(lambda: _delivered(nextcomer, len(numbers)))
            assert nextcomer.health.spool is not None
            assert nextcomer.health.spool.adopted == 1
        assert not list(tmp_path.glob("*/*.spool"))


async def _delivered(client: LightningStoreClient, spans: int) -> bool:
    report = client.health.spool
    return report is not None and report.delivered == spans


async def _has_at_least(store: InMemoryLightningStore, rollout_id: str, spans: int) -> bool:
    return (await store.query_spans(rollout_id, limit=1)).total >= spans


async def test_a_live_runner_keeps_its_spool(line: Opens, tmp_path: Path) -> None:
    async with line() as here, here.client(tmp_path) as one, here.client(tmp_path) as other:
        _, ids = await _started(here.store)
        await here.cut()
        await one.add_span(numbered(*ids, 0))
        await other.add_span(numbered(*ids, 1))
        assert len(list(tmp_path.glob("*/*.spool"))) == 2
        await here.mend()
        await one.update_attempt(*ids, status="running")
        await _until(lambda: _has(here.store, ids[0], 2))
        assert all(each.health.spool is not None and each.health.spool.adopted == 0 for each in (one, other))


async def test_what_is_left_at_close_is_delivered_by_the_next_client(line: Opens, tmp_path: Path) -> None:
    async with line() as here:
        _, ids = await _started(here.store)
        await here.cut()
        client = here.client(tmp_path)
        await client.add_span(numbered(*ids, 0))
        await client.close(grace_seconds=0.1)
        await client.close()
        await here.mend()
        async with here.client(tmp_path) as nextcomer:
            await nextcomer.add_span(numbered(*ids, 1))
            await _until(lambda: _has(here.store, ids[0], 2))


async def test_a_full_spool_pushes_back_and_loses_nothing(
    line: Opens, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    patient = IMPATIENT._replace(patience_seconds=0.5)
    async with line() as here, here.client(tmp_path, resilience=patient, spool_max_bytes=5_000) as client:
        _, ids = await _started(here.store)
        await here.cut()
        accepted = await _add_until_pushed_back(client, ids)
        assert 5 < accepted < 50
        report = client.health.spool
        assert report is not None
        assert (report.waiting_spans, report.pushed_back) == (accepted, 1)
        await here.mend()
        await _insist(lambda: client.add_span(numbered(*ids, accepted)))
        await _until(lambda: _has(here.store, ids[0], accepted + 1))
        assert await _numbers(here.store, ids[0]) == list(range(accepted + 1))


async def _add_until_pushed_back(client: LightningStoreClient, ids: tuple[str, str]) -> int:
    """How many spans were accepted."""
    for number in range(100):
        try:
            await client.add_span(numbered(*ids, number))
        except SpoolFull as full:
            assert "5,000 are allowed" in full.message
            return number
    raise AssertionError("it was never full")


async def _insist(call: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(SOON):
        while True:
            try:
                await call()
                return
            except StoreUnavailable:
                await asyncio.sleep(0.01)


async def test_who_waits_for_room_gets_it_when_the_server_is_back(line: Opens, tmp_path: Path) -> None:
    async with line() as here, here.client(tmp_path, spool_max_bytes=2_000) as client:
        _, ids = await _started(here.store)
        await here.cut()
        pushing = asyncio.create_task(_add_all(client, ids, 40))
        await _until(lambda: _pushed_back(client))
        assert not pushing.done()
        await here.mend()
        async with asyncio.timeout(SOON):
            await pushing
        await _until(lambda: _has(here.store, ids[0], 40))
        assert await _numbers(here.store, ids[0]) == list(range(40))


async def _add_all(client: LightningStoreClient, ids: tuple[str, str], spans: int) -> None:
    for number in range(spans):
        await client.add_span(numbered(*ids, number))


async def _pushed_back(client: LightningStoreClient) -> bool:
    report = client.health.spool
    return report is not None and report.pushed_back > 0


async def test_a_span_that_is_refused_for_good_blocks_nobody(line: Opens, tmp_path: Path) -> None:
    async with line() as here, here.client(tmp_path) as client:
        _, ids = await _started(here.store)
        await here.cut()
        foreign = numbered(ids[0], "at-nobody-knows", 7)
        await client.add_many_spans([numbered(*ids, 0), numbered(*ids, 1)])
        await client.add_many_spans([foreign])
        await client.add_many_spans([numbered(*ids, 2)])
        await here.mend()
        await _until(lambda: _has(here.store, ids[0], 3))
        assert await _numbers(here.store, ids[0]) == [0, 1, 2]
        await _until(lambda: _settled(client))
        report = client.health.spool
        assert report is not None
        assert (report.delivered, report.refused) == (3, 1)
        [quarantine] = tmp_path.glob("*/quarantine.jsonl")
        [line_of_it] = quarantine.read_text().splitlines()
        put_away = json.loads(line_of_it)
        assert put_away["code"] == "not_found"
        assert Span.model_validate(put_away["span"]) == foreign
        with pytest.raises(NotFound):
            await client.add_span(foreign)


async def _settled(client: LightningStoreClient) -> bool:
    report = client.health.spool
    return report is not None and report.waiting_spans == 0


async def test_without_a_spool_the_caller_hears_of_it(line: Opens) -> None:
    """The control: what the disk is for."""
    async with line() as here:
        _, ids = await _started(here.store)
        async with here.client(None, resilience=IMPATIENT._replace(patience_seconds=0.3)) as client:
            await here.cut()
            with pytest.raises(StoreUnreachable):
                await client.add_span(numbered(*ids, 0))
            assert client.health.spool is None
            await here.mend()
        assert (await here.store.query_spans(ids[0])).total == 0


# --- Resources -------------------------------------------------------------------------------------


def _prompt(text: str) -> dict[str, PromptTemplate]:
    return {"p": PromptTemplate(template=text, engine="f-string")}


async def test_resources_come_from_the_disk_with_their_age(line: Opens, tmp_path: Path) -> None:
    async with line() as here:
        async with here.client(tmp_path) as before:
            assert await before.get_latest_resources() is None
            made = await before.add_resources(_prompt("one"))
            newest = await before.update_resources(made.resources_id, _prompt("two"))
            assert await before.get_latest_resources() == newest
            assert await before.get_resources_by_id(made.resources_id) == newest
            assert await before.get_resources_by_id(made.resources_id, version=1) == made
            assert before.health.cached_resources_age_seconds is None
        await here.cut()
        async with here.client(tmp_path, resilience=IMPATIENT._replace(patience_seconds=0.5)) as client:
            latest = await client.get_latest_resources()
            assert isinstance(latest, CachedResources)
            assert 0 <= latest.age_seconds < SOON
            assert client.health.cached_resources_age_seconds == latest.age_seconds
            assert (latest.version, latest.resources) == (2, _prompt("two"))
            old = await client.get_resources_by_id(made.resources_id, version=1)
            assert old is not None
            assert (old.version, old.resources) == (1, _prompt("one"))
            by_id = await client.get_resources_by_id(made.resources_id)
            assert by_id is not None
            assert by_id.version == 2
            with pytest.raises(StoreUnreachable):
                await client.get_resources_by_id("rs-never-seen")
            await here.mend()
            fresh = await _insist_on(client.get_latest_resources)
            assert fresh == newest
            assert client.health.cached_resources_age_seconds is None


async def _insist_on(call: Callable[[], Awaitable[object]]) -> object:
    """What the server itself says."""
    async with asyncio.timeout(SOON):
        while isinstance(found := await call(), CachedResources):
            await asyncio.sleep(0.01)
    return found
