"""Workers that vanish or hang up while they wait for work: what they are handed comes back, and is not poison."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from agentlightning.http.client.client import LightningStoreClient
from agentlightning.http.server.server import LightningStoreServer
from agentlightning.lifecycle.records import Holder
from agentlightning.store import core
from agentlightning.store.engine import EngineStore
from agentlightning.store.sources import SystemClock, TimeOrderedIds
from agentlightning.store.sqlite.backend import SqliteBackend
from agentlightning.store.sqlite.store import SqliteLightningStore
from scenes import enqueued, finish, settled
from store_state import assert_sound

WAITERS = 60
ROLLOUTS = 10


async def waiter(port: int, number: int) -> asyncio.StreamWriter:
    """A connection over which a worker has asked for work."""
    _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
    wanted = {"worker_id": f"gone-{number}", "request_id": f"rq-{number}", "wait_seconds": 3600.0}
    body = json.dumps(wanted).encode()
    writer.write(
        b"POST /agl/v1/queues/rollouts/dequeue HTTP/1.1\r\nhost: 127.0.0.1\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
    )
    return writer


@asynccontextmanager
async def vanished(store: EngineStore, port: int) -> AsyncIterator[None]:
    """So many workers have asked for work, and nobody will read what their connections get."""
    writers: list[asyncio.StreamWriter] = []
    try:
        writers += [await waiter(port, number) for number in range(WAITERS)]
        while (await store.query_workers(status_in=["idle"])).total < WAITERS:
            await asyncio.sleep(0.01)
        await settled()
        yield
    finally:
        for writer in writers:
            writer.transport.abort()


async def ends_after_they_have_gone() -> tuple[Counter[str], int]:
    """How the rollouts end that the vanished workers get first, and how often one was handed out at most."""
    async with (
        EngineStore(SqliteBackend(SystemClock()), TimeOrderedIds(), confirm_seconds=0.2) as store,
        LightningStoreServer(store, port=0) as server,
        vanished(store, server.port),
        LightningStoreClient(server.endpoint, spool_dir=None) as client,
    ):
        ids = await enqueued(client, *range(ROLLOUTS))
        waiting = asyncio.create_task(client.wait_for_rollouts(rollout_ids=ids, timeout=60))
        while not waiting.done():
            for claim in await client.dequeue_many_rollouts(worker_id="there", wait_seconds=0.2):
                await finish(client, claim)
        await assert_sound(store)
        handed_out = [(await store.query_attempts(each)).total for each in ids]
        return Counter(f"{each.status} {each.reason_code}" for each in await waiting), max(handed_out)


async def test_what_they_were_handed_is_done_by_others() -> None:
    ends, most = await ends_after_they_have_gone()
    assert ends == {"succeeded completed": ROLLOUTS}
    assert most > 4


async def test_it_would_be_poison_if_vanishing_proved_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""

    async def heard_just_now(*_: Any) -> Holder:
        return Holder(last_heard=math.inf)

    monkeypatch.setattr(core, "holder_of", heard_just_now)
    ends, most = await ends_after_they_have_gone()
    assert ends["failed poison"] > 0
    assert most == 4


def _waits_of(server: LightningStoreServer) -> int:
    """How many calls wait, and would hear of the end of their connection."""
    assert server.app is not None
    return len(server.app._waits)


async def taken_over_at_once(folder: Path, rounds: int) -> int:
    """How many rollouts another worker gets before the end of a lease, of those that were claimed for one who hung up.

    It hangs up while the claim that was made for it is committed.
    """
    taken = 0
    async with (
        SqliteLightningStore(folder / "store.db") as store,
        LightningStoreServer(store, port=0) as server,
        LightningStoreClient(server.endpoint, spool_dir=None) as client,
    ):
        for number in range(rounds):
            writer = await waiter(server.port, number)
            while not _waits_of(server):
                await asyncio.sleep(0.001)
            enqueuing = asyncio.create_task(store.enqueue_rollout(number))
            await asyncio.sleep(0)
            writer.transport.abort()
            rollout = await enqueuing
            while store._core.claims._waiting or _waits_of(server):
                await asyncio.sleep(0.001)
            claim = await client.dequeue_rollout("there", wait_seconds=5.0 if taken else 1.0)
            if claim is not None:
                assert claim.rollout_id == rollout.rollout_id
                await finish(client, claim)
                taken += 1
            else:
                await store.cancel_rollout(rollout.rollout_id)
        await assert_sound(store)
    return taken


async def test_what_was_claimed_for_one_who_hangs_up_is_given_back_at_once(tmp_path: Path) -> None:
    """Unless its reply was written just before the end of the connection was noticed."""
    assert await taken_over_at_once(tmp_path, 10) >= 5


async def test_it_would_wait_for_the_end_of_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    monkeypatch.setattr(core.Core, "write_unattended", lambda *_: None)
    assert await taken_over_at_once(tmp_path, 3) == 0
