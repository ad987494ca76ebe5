"""A heartbeat says that a runner uses the client: its health is kept up to date while agents are at work."""

from __future__ import annotations

import asyncio

import pytest

from agentlightning.http.client.client import LightningStoreClient
from agentlightning.http.client.retry import Resilience
from agentlightning.http.server.server import LightningStoreServer
from agentlightning.store.sqlite.store import InMemoryLightningStore
from agentlightning.types import UNSET, Unset


@pytest.mark.parametrize("lease", [UNSET, 60.0])
async def test_an_idle_runner_notices_that_the_server_is_gone(lease: float | Unset) -> None:
    resilience = Resilience(probe_interval_seconds=0.05, patience_seconds=0.1)
    async with InMemoryLightningStore() as store:
        server = LightningStoreServer(store, port=0)
        await server.start()
        client = LightningStoreClient(server.endpoint, spool_dir=None, resilience=resilience)
        other = LightningStoreClient(server.endpoint, spool_dir=None, resilience=resilience)
        await client.update_worker("w", {}, attempt_ids=[], lease_seconds=lease)
        await other.query_workers()
        await server.stop()
    while client.health.state != "unreachable":
        await asyncio.sleep(0.01)
    calls, before = other.health.calls, client.health.calls
    while client.health.calls < before + 3:
        await asyncio.sleep(0.01)
    assert other.health.calls == calls <= 2, "nobody uses this one"
    await other.close()
    await client.close()
    calls = client.health.calls
    await asyncio.sleep(0.2)  # four times the interval
    assert client.health.calls == calls
