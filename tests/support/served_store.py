"""A store on a file, served over HTTP on the loopback interface: by this process, or by `agl store`."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentlightning.http.server.server import LightningStoreServer
from agentlightning.store.base import LightningStore
from agentlightning.store.sources import Clock
from agentlightning.store.sqlite.store import SqliteLightningStore
from command_line import clean_environment

__all__ = ["closed_port", "served", "served_elsewhere"]


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


@contextmanager
def served_elsewhere(database: Path, port: int = 0, **environment: str) -> Iterator[tuple[str, int]]:
    """(URL, process id) of `agl store`, which is stopped at the end if it has not been killed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "agentlightning", "store", "--db", str(database), "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(**environment),
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split()[-1], process.pid
    finally:
        process.terminate()
        _, err = process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGKILL), err


def closed_port() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]
