"""What the processes of a run do: one side of it, with a store to do it on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from agentlightning.errors import StoreUnavailable, StoreUnreachable
from agentlightning.execution.base import AlgorithmBundle, RunnerBundle
from agentlightning.execution.events import ExecutionEvent
from agentlightning.execution.membership import join_server, say_goodbye
from agentlightning.execution.messages import Child
from agentlightning.http.client.client import LightningStoreClient
from agentlightning.settings import LightningEnvVar, resolve_str_env_var
from agentlightning.store.base import LightningStore

_JOIN_SECONDS = 30.0
"""A server that the supervisor has seen before; it may be restarting."""
_ASK_SECONDS = 2.0


@dataclass(frozen=True)
class Door:
    """Where a process finds the store.

    Args:
        store: the store itself, where it is not served.
        url: of the server; read if there is no ``store``.
        api_key: for the server.
        run_id: the run that the server must serve; None: any.
    """

    store: LightningStore | None = None
    url: str = ""
    api_key: str | None = None
    run_id: str | None = None

    def arguments(self) -> dict[str, Any]:
        """What goes to a process as plain values; the key goes by its environment."""
        return {"url": self.url, "run_id": self.run_id}


@asynccontextmanager
async def opened(door: Door) -> AsyncGenerator[LightningStore, None]:
    """The store behind the door, for the length of the block. Raises as ``join_server``."""
    if door.store is not None:
        yield door.store
        return
    await join_server(door.url, api_key=door.api_key, run_id=door.run_id, limit_seconds=_JOIN_SECONDS)
    client = LightningStoreClient(door.url, api_key=door.api_key)
    try:
        yield client
    finally:
        await client.close()


async def run_runner(bundle: RunnerBundle, door: Door, name: str, index: int, event: ExecutionEvent) -> str:
    """Run one runner to its end, and let it say goodbye.

    Returns:
        ``drain`` or ``stop``, if that is what the worker has been asked to do; ``gone``, if the server cannot be
        reached any more; else ``done``.
    """
    async with opened(door) as store:
        try:
            await bundle(store, index, event)
            why = await _why(store, name)
        except StoreUnreachable:
            return "gone"
        except BaseException as error:
            await say_goodbye(store, name, error)
            raise
        await say_goodbye(store, name)
        return why


async def _why(store: LightningStore, name: str) -> str:
    try:
        async with asyncio.timeout(_ASK_SECONDS):
            worker = await store.get_worker_by_id(name)
    except (TimeoutError, StoreUnavailable):
        return "gone"
    return "done" if worker is None or worker.directive is None else worker.directive


@dataclass(frozen=True)
class RunnerJob:
    """One runner in a process of its own.

    Args:
        bundle: the runner's side.
        store: where it is not served.
    """

    bundle: RunnerBundle
    store: LightningStore | None = None

    def __call__(self, child: Child, arguments: Mapping[str, Any]) -> str:
        """Run it. ``arguments``: its ``index``, and where the store is."""
        door = _door(self.store, arguments)
        return asyncio.run(run_runner(self.bundle, door, child.slot, arguments["index"], child.event))


@dataclass(frozen=True)
class AlgorithmJob:
    """The algorithm in a process of its own.

    Args:
        bundle: the algorithm's side.
        store: where it is not served.
    """

    bundle: AlgorithmBundle
    store: LightningStore | None = None

    def __call__(self, child: Child, arguments: Mapping[str, Any]) -> str:
        """Run it. ``arguments``: where the store is."""
        asyncio.run(self._run(_door(self.store, arguments), child.event))
        return "done"

    async def _run(self, door: Door, event: ExecutionEvent) -> None:
        async with opened(door) as store:
            await self.bundle(store, event)


def _door(store: LightningStore | None, arguments: Mapping[str, Any]) -> Door:
    key = resolve_str_env_var(LightningEnvVar.AGL_API_KEY)  # it came by the environment, which few can look into
    return Door(store=store, url=arguments["url"], api_key=key, run_id=arguments["run_id"])
