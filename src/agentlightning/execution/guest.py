"""A runner whose run is on another machine: it joins the server, and ends when the run does.

``LitAgentRunner`` hears by its heartbeat that its worker is asked to leave. A bundle of somebody else may not listen,
or may not even tell the store who it is. The run would not wait for what it still has to report, and it would not end.
So its worker is introduced to the store here, and its stop event is set when the worker is asked to leave.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from agentlightning.errors import ExecutionFailed, StoreUnavailable, StoreUnreachable, WrongServer
from agentlightning.execution.base import ExecutionEvent
from agentlightning.store.base import LightningStore
from agentlightning.types import Worker, WorkerDirective

JOIN_SECONDS = 30.0
"""How long a new process waits for a server that has answered before; it may be restarting."""
_GONE_SECONDS = 600.0
"""How long one that has been at work waits for it, as ``LitAgentRunner`` does."""
_YOUNG_SECONDS = 30.0
_POLL_SECONDS, _ASK_SECONDS = 1.0, 2.0
_LEASE_SECONDS = 30.0
_STOP_SECONDS = 1.0
"""How long a bundle may take to end when it is asked to stop, until it is cancelled."""

Join = Callable[[float], Awaitable[object]]
"""Joins the server within so many seconds. Raises as ``join_server``."""


@asynccontextmanager
async def while_served(
    store: LightningStore, name: str, event: ExecutionEvent, join: Join
) -> AsyncGenerator[GuestWatch, None]:
    """Join the server, and end the block when the worker is asked to leave, or the server has gone.

    The event is set when it is asked to drain. The block is cancelled when it is asked to stop and does not end, or
    when there has been no server for too long. A runner that sends heartbeats itself is left to itself.

    Raises:
        StoreUnreachable: the server could not be joined, or has gone.
        WrongServer: as ``join_server``.
    """
    try:
        await join(JOIN_SECONDS)
    except ExecutionFailed as error:
        raise StoreUnreachable(str(error)) from error
    limit = asyncio.timeout(None)
    watch = GuestWatch(store, name, event, join, limit)
    watching = asyncio.create_task(watch.run())
    try:
        async with limit:
            yield watch
    except TimeoutError as error:
        if not limit.expired():
            raise
        if watch.server_gone:
            raise StoreUnreachable("the server has gone, and has not asked this worker to leave before") from error
    finally:
        watching.cancel()
        await asyncio.wait([watching])


@dataclass
class GuestWatch:
    """Watches the server for one runner."""

    store: LightningStore
    name: str
    event: ExecutionEvent
    join: Join
    limit: asyncio.Timeout
    server_gone: bool = False
    directive: WorkerDirective | None = None
    """What the worker has been asked to do, as far as it has been seen here."""

    async def run(self) -> None:
        """Ask again and again what the worker shall do."""
        clock = asyncio.get_running_loop().time
        began, about = clock(), {"host": socket.gethostname(), "pid": os.getpid(), "introduced_by": "its strategy"}
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            try:
                await self.join(JOIN_SECONDS if clock() < began + _YOUNG_SECONDS else _GONE_SECONDS)
            except (ExecutionFailed, WrongServer):
                self.server_gone = True
                self.limit.reschedule(clock())
                return
            with contextlib.suppress(TimeoutError, StoreUnavailable, NotImplementedError):
                async with asyncio.timeout(_ASK_SECONDS):
                    worker = await self.store.get_worker_by_id(self.name)
                    if worker is not None and "agentlightning" in (worker.registration or {}):
                        return  # a LitAgentRunner
                    if worker is None or worker.registration in (None, about):
                        worker = await self._introduce(about)
                self.directive = worker.directive
                if self.directive is not None:
                    self.event.set()
                if self.directive == "stop":
                    self.limit.reschedule(clock() + _STOP_SECONDS)
                    return

    async def _introduce(self, about: dict[str, Any]) -> Worker:
        """Say for the bundle that its worker lives, so that the run waits for it at its end."""
        return await self.store.update_worker(self.name, lease_seconds=_LEASE_SECONDS, registration=about)
