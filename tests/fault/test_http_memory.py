"""What clients make a server hold: requests that wait, and replies that are not read, are within its bounds."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest

from agentlightning.http.server.app import StoreApp
from agentlightning.http.server.server import LightningStoreServer
from agentlightning.store.sqlite.store import InMemoryLightningStore

_MIB = 1024 * 1024
_JUNK = 8 * _MIB


@contextmanager
def _allocated() -> Iterator[None]:
    """Within the block, ``tracemalloc`` counts what Python has allocated and not freed."""
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


@asynccontextmanager
async def _asked(port: int, path: str, body: bytes) -> AsyncIterator[asyncio.StreamReader]:
    """A request that was sent whole."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"POST /agl/v1%b HTTP/1.1\r\nhost: localhost\r\ncontent-length: " % path.encode())
        writer.write(b"%d\r\n\r\n" % len(body) + body)
        del body
        await writer.drain()
        yield reader
    finally:
        writer.close()


async def _until_it_waits(app: StoreApp) -> None:
    async with asyncio.timeout(30):
        while not app._waits:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/queues/rollouts/dequeue", {"worker_id": "w", "request_id": "rq-1", "wait_seconds": 60.0}),
        ("/waits/rollouts", {"rollout_ids": ["ro-1"], "timeout": 60.0}),
    ],
)
async def test_a_request_that_waits_does_not_hold_its_body(path: str, fields: dict[str, object]) -> None:
    async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0) as server:
        await store.start_rollout(1, rollout_id="ro-1")
        assert server.app is not None
        with _allocated():
            before = tracemalloc.get_traced_memory()[0]
            body = json.dumps({**fields, "junk": "x" * _JUNK}).encode()
            assert tracemalloc.get_traced_memory()[0] - before > _JUNK  # a body that is held is seen
            asked = _asked(server.port, path, body)
            del body
            async with asked:
                await _until_it_waits(server.app)
                assert tracemalloc.get_traced_memory()[0] - before < _MIB
