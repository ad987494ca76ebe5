"""Long waits over HTTP: made of slices, and ended when there is a reason."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agentlightning.http.client import calls
from agentlightning.http.client.calls import Caller, Claims, ended_early
from agentlightning.http.client.client import LightningStoreClient
from agentlightning.http.server.server import LightningStoreServer
from agentlightning.store.sources import TimeOrderedIds
from served_store import served

SLICE = 0.2


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server; and clients that wait for 0.2 s at a time instead of 20."""
    monkeypatch.setattr(calls, "LONGEST_SLICE_SECONDS", SLICE)
    with served(tmp_path / "store.db") as server:
        assert isinstance(server, LightningStoreServer)
        yield server.endpoint


def _calls(client: LightningStoreClient) -> int:
    return client.health.calls


async def test_a_claim_waits_in_slices_for_as_long_as_it_was_asked_to(url: str) -> None:
    async with LightningStoreClient(url, spool_dir=None) as client:
        began = time.monotonic()
        assert await client.dequeue_rollout("w", request_id="rq-1", wait_seconds=5 * SLICE) is None
        assert time.monotonic() - began >= 5 * SLICE
        assert 5 <= _calls(client) <= 6


async def test_work_that_comes_in_a_later_slice_is_claimed_at_once(url: str) -> None:
    async with LightningStoreClient(url, spool_dir=None) as client:
        waiting = asyncio.create_task(client.dequeue_rollout("w", request_id="rq-1", wait_seconds=60))
        await asyncio.sleep(3.5 * SLICE)
        await client.enqueue_rollout("work")
        async with asyncio.timeout(5):
            claim = await waiting
        assert claim is not None
        assert claim.input == "work"


@pytest.mark.parametrize("directive", ["drain", "stop"])
async def test_a_claim_ends_when_its_worker_is_asked_to(url: str, directive: str) -> None:
    async with LightningStoreClient(url, spool_dir=None) as client:
        await client.update_worker("w")
        waiting = asyncio.create_task(client.dequeue_rollout("w", request_id="rq-1", wait_seconds=60))
        await asyncio.sleep(1.5 * SLICE)
        await client.direct_workers(directive)  # type: ignore[arg-type]
        async with asyncio.timeout(5):
            assert await waiting is None
            assert await client.dequeue_rollout("w", request_id="rq-2", wait_seconds=60) is None
        assert (await client.update_worker("w")).directive == directive


async def test_a_claim_that_is_replaced_does_not_take_its_place_back(url: str) -> None:
    async with LightningStoreClient(url, spool_dir=None) as client:
        first = asyncio.create_task(client.dequeue_rollout("w", request_id="rq-1", wait_seconds=60))
        await asyncio.sleep(SLICE / 2)
        second = asyncio.create_task(client.dequeue_rollout("w", request_id="rq-1", wait_seconds=60))
        async with asyncio.timeout(5):
            assert await first is None
        await client.enqueue_rollout("work")
        async with asyncio.timeout(5):
            assert await second is not None


async def test_a_wait_for_rollouts_asks_only_for_those_that_are_missing(url: str) -> None:
    async with LightningStoreClient(url, spool_dir=None) as client:
        ids = [(await client.enqueue_rollout(number)).rollout_id for number in range(3)]
        await client.cancel_rollout(ids[1])
        waiting = asyncio.create_task(client.wait_for_rollouts(rollout_ids=[*ids, "ro-unknown"]))
        await asyncio.sleep(2.5 * SLICE)
        for each in (ids[2], ids[0]):
            await client.cancel_rollout(each)
        async with asyncio.timeout(5):
            assert [each.rollout_id for each in await waiting] == ids
        began = time.monotonic()
        fourth = await client.enqueue_rollout(4)
        some = await client.wait_for_rollouts(rollout_ids=[*ids, fourth.rollout_id], timeout=3 * SLICE)
        assert [each.rollout_id for each in some] == ids
        assert time.monotonic() - began >= 3 * SLICE


async def test_unknown_rollouts_are_not_waited_for(url: str) -> None:
    async with LightningStoreClient(url, spool_dir=None) as client, asyncio.timeout(5):
        assert await client.wait_for_rollouts(rollout_ids=["ro-1", "ro-2"]) == []
        assert await client.wait_for_rollouts(rollout_ids=[]) == []


@pytest.mark.parametrize(
    ("asked", "took", "early"), [(20.0, 20.1, False), (20.0, 19.9, False), (20.0, 5.0, True), (0.0, 0.0, False)]
)
def test_what_is_early(asked: float, took: float, early: bool) -> None:
    assert ended_early(asked, took) is early


def test_open_claims_are_kept_by_worker_and_limit() -> None:
    no_transport: Any = SimpleNamespace(send=None)
    claims = Claims(Caller(no_transport, "", TimeOrderedIds(), timeout_seconds=1.0, patience_seconds=1.0))
    claims.keep("w1", 1, "rq-1")
    claims.keep("w1", 1, "rq-2")
    claims.keep("w2", 1, "rq-3")
    assert claims.take("w1", 2) is None
    assert [claims.take("w1", 1) for _ in range(3)] == ["rq-1", "rq-2", None]
    assert claims.take("w2", 1) == "rq-3"
    assert not claims._unanswered, "workers come and go"
    for number in range(2000):
        claims.keep(None, 1, f"rq-{number}")
    assert claims.take(None, 1) == "rq-1000", "the oldest are let go"


async def test_a_cancelled_claim_is_taken_up_by_the_next(url: str) -> None:
    async with LightningStoreClient(url, spool_dir=None) as client:
        await client.enqueue_rollout("work")
        claiming_now = asyncio.create_task(client.dequeue_rollout("w"))
        while not (await client.statistics())["total_attempts"]:
            await asyncio.sleep(0)
        claiming_now.cancel()
        try:
            claim = await claiming_now
        except asyncio.CancelledError:
            claim = await client.dequeue_rollout("w")
        assert claim is not None
        assert claim.attempt.sequence_id == 1
