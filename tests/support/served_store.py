"""A store on a file, served by this process over HTTP on a free port of the loopback interface."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentlightning.store.base import LightningStore
from agentlightning.store.client_server.server import LightningStoreServer
from agentlightning.store.clock import Clock
from agentlightning.store.sqlite.store import SqliteLightningStore

__all__ = ["served"]


@contextmanager
def served(
    database: Path,
    work: Callable[[LightningStore], Awaitable[Any]] | None = None,
    *,
    clock: Clock | None = None,
    **options: Any,
) -> Iterator[LightningStoreServer]:
    """A running server, after ``work`` was done to its store. It runs in threads of its own."""
    store = SqliteLightningStore(database, clock=clock)
    server = LightningStoreServer(store, port=0, **options)

    async def start() -> None:
        if work is not None:
            await work(store)
        await server.start()

    async def stop() -> None:
        await server.stop()
        await store.close()

    asyncio.run(start())
    try:
        yield server
    finally:
        asyncio.run(stop())
