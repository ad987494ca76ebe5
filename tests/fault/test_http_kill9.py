"""The server is killed and restarted while clients work: nothing acknowledged is lost, and they see no error."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from agentlightning.errors import AgentLightningError, StoreUnreachable
from agentlightning.http.client.client import LightningStoreClient
from agentlightning.store.sqlite.store import SqliteLightningStore
from http_load import Journal, check, read_journals, spans_accepted, work
from store_server_process import StoreServerProcess
from store_state import assert_sound

CLIENTS = 16


async def _work_through_kills(server: StoreServerProcess, folder: Path, kills: int) -> int:
    """Returns how many tries of all clients failed on the way."""
    chance = random.Random(kills)
    stop = asyncio.Event()
    clients = [LightningStoreClient(server.url, spool_dir=folder / "spool") for _ in range(CLIENTS)]
    journals = [Journal(folder / f"{number}.journal") for number in range(CLIENTS)]
    working = [
        asyncio.create_task(work(client, f"worker-{number}", journals[number], stop))
        for number, client in enumerate(clients)
    ]
    for _ in range(kills):
        await _let_work(folder, chance.randint(10, 100))
        server.kill()
        await asyncio.to_thread(server.start)
    await _let_work(folder, 20)
    stop.set()
    await asyncio.gather(*working)
    failures = sum(client.health.failures for client in clients)
    await asyncio.gather(*(client.close() for client in clients))
    for journal in journals:
        journal.close()
    return failures


async def _let_work(folder: Path, spans: int) -> None:
    """Wait until so many more spans were accepted."""
    enough = spans_accepted(folder) + spans
    async with asyncio.timeout(60):
        while spans_accepted(folder) < enough:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
async def test_acknowledged_writes_survive_and_no_client_sees_an_error(tmp_path: Path, kills: int) -> None:
    with StoreServerProcess(tmp_path / "store.db") as server:
        failures = await _work_through_kills(server, tmp_path, kills)
        server.stop()
    assert failures > kills, "the kills were not felt, so nothing was tested"
    promised = read_journals(tmp_path)
    assert len(promised.enqueued) > CLIENTS
    async with SqliteLightningStore(tmp_path / "store.db") as store:
        await check(store, promised)
        await assert_sound(store)


async def test_the_check_sees_what_is_lost_and_what_is_there_twice(tmp_path: Path) -> None:
    """The control of the test above."""
    async with SqliteLightningStore(tmp_path / "store.db") as store:
        journal = Journal(tmp_path / "1.journal")
        stop = asyncio.Event()
        working = asyncio.create_task(work(store, "worker", journal, stop))
        while len(read_journals(tmp_path).succeeded) < 3:
            await asyncio.sleep(0.01)
        stop.set()
        await working
        journal.close()
        promised = read_journals(tmp_path)
        await check(store, promised)
        for spoilt in [
            promised._replace(enqueued=[*promised.enqueued, "ro-lost"]),
            promised._replace(enqueued=promised.enqueued[1:]),
            promised._replace(spans=[*promised.spans, (*promised.spans[0][:2], "lost", 0)]),
            promised._replace(succeeded=[*promised.succeeded, promised.succeeded[0]]),
        ]:
            with pytest.raises(AssertionError):
                await check(store, spoilt)


async def test_a_client_without_patience_sees_the_errors_that_retries_hide(tmp_path: Path) -> None:
    """The other control: the same work, without retries."""
    with StoreServerProcess(tmp_path / "store.db") as server:
        async with LightningStoreClient(server.url, retry_delays=(), spool_dir=None) as client:
            journal = Journal(tmp_path / "1.journal")
            working = asyncio.create_task(work(client, "worker", journal, asyncio.Event()))
            while not read_journals(tmp_path).succeeded:
                await asyncio.sleep(0.01)
            server.kill()
            with pytest.raises(AgentLightningError) as seen:
                await working
            assert type(seen.value) is StoreUnreachable
            journal.close()
