"""The stores that the contract suite runs against. A new kind is a class here and a fixture in ``tests/contract``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from agentlightning.http.client.client import LightningStoreClient
from agentlightning.http.server.server import LightningStoreServer
from agentlightning.store.base import LightningStore
from agentlightning.store.sqlite.store import InMemoryLightningStore, SqliteLightningStore
from agl_store import AglStore
from clocks import ManualClock
from fresh_process import FreshProcess
from store_state import assert_sound

__all__ = ["HttpStores", "MemoryStores", "Opened", "ProcessStores", "SqliteStores", "StoreClock", "Stores"]


class StoreClock(Protocol):
    """The clock that a store under test reads, in the hands of the test."""

    def wall(self) -> float:
        """Unix seconds, as the records of the store will show them."""
        ...

    def advance(self, seconds: float) -> None:
        """Time passes."""
        ...

    def jump_wall(self, seconds: float) -> None:
        """The machine's clock is set, forward or back, while no time passes."""
        ...


class Opened(NamedTuple):
    """An empty store that is open, and its clock."""

    store: LightningStore
    clock: StoreClock


class Stores(ABC):
    """Makes empty stores of one kind."""

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Opened]:
        """A store whose clock stands still unless moved; checked for consistency at the end of the block."""
        async with self.open_controlled() as opened:
            yield opened
            await assert_sound(opened.store)

    @asynccontextmanager
    async def open_in_real_time(self) -> AsyncIterator[LightningStore]:
        """A store that reads the machine's clocks; checked for consistency at the end of the block."""
        async with self.open_plain() as store:
            yield store
            await assert_sound(store)

    @abstractmethod
    def open_controlled(self) -> AbstractAsyncContextManager[Opened]:
        """An empty store and the clock it reads, which moves only when told."""

    @abstractmethod
    def open_plain(self) -> AbstractAsyncContextManager[LightningStore]:
        """An empty store as users get it."""


class MemoryStores(Stores):
    """``InMemoryLightningStore``."""

    @asynccontextmanager
    async def open_controlled(self) -> AsyncIterator[Opened]:
        clock = ManualClock()
        async with InMemoryLightningStore(clock=clock) as store:
            yield Opened(store, clock)

    @asynccontextmanager
    async def open_plain(self) -> AsyncIterator[LightningStore]:
        async with InMemoryLightningStore() as store:
            yield store


class SqliteStores(Stores):
    """``SqliteLightningStore``, as durable as it can be.

    Args:
        folder: where the database files go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made = 0

    @asynccontextmanager
    async def open_controlled(self) -> AsyncIterator[Opened]:
        clock = ManualClock()
        async with SqliteLightningStore(self._new_file(), clock=clock) as store:
            yield Opened(store, clock)

    @asynccontextmanager
    async def open_plain(self) -> AsyncIterator[LightningStore]:
        async with SqliteLightningStore(self._new_file()) as store:
            yield store

    def _new_file(self) -> Path:
        self._made += 1
        return self._folder / f"store-{self._made}.db"


class HttpStores(Stores):
    """Stores of another kind behind a server in this process, as a client sees them.

    Args:
        served: makes the stores that are served.
        prefix: the prefix under which the client finds the routes.
    """

    def __init__(self, served: Stores, prefix: str) -> None:
        self._served = served
        self._prefix = prefix

    @asynccontextmanager
    async def open_controlled(self) -> AsyncIterator[Opened]:
        async with self._served.open_controlled() as (store, clock), self._client_of(store) as client:
            yield Opened(client, clock)

    @asynccontextmanager
    async def open_plain(self) -> AsyncIterator[LightningStore]:
        async with self._served.open_plain() as store, self._client_of(store) as client:
            yield client

    @asynccontextmanager
    async def _client_of(self, store: LightningStore) -> AsyncIterator[LightningStoreClient]:
        async with LightningStoreServer(store, port=0) as server:
            client = LightningStoreClient(server.endpoint + self._prefix, spool_dir=None)
            async with client:
                yield client


class ProcessStores(Stores):
    """Stores in another process: in real time that of `agl store`; else one whose clock can be moved from here.

    Args:
        folder: where the database files go.
        service: runs ``store_service.main``.
        prefix: the prefix under which the client finds the routes.
    """

    def __init__(self, folder: Path, service: FreshProcess, prefix: str) -> None:
        self._folder = folder
        self._service = service
        self._prefix = prefix
        self._made = 0

    @asynccontextmanager
    async def open_controlled(self) -> AsyncIterator[Opened]:
        self._made += 1
        endpoint = self._ask(f"open {self._folder / f'store-{self._made}.db'}")
        try:
            async with LightningStoreClient(endpoint + self._prefix, spool_dir=None) as client:
                yield Opened(client, _RemoteClock(self._ask))
        finally:
            self._ask("close")

    @asynccontextmanager
    async def open_plain(self) -> AsyncIterator[LightningStore]:
        self._made += 1
        with AglStore(database=self._folder / f"store-{self._made}.db") as agl:
            async with LightningStoreClient(agl.endpoint + self._prefix, spool_dir=None) as client:
                yield client

    def _ask(self, line: str) -> str:
        self._service.tell(line)
        return self._service.hear()


class _RemoteClock:
    """The clock of a store in another process, and what it shows."""

    def __init__(self, ask: Callable[[str], str]) -> None:
        self._ask = ask
        self._same = ManualClock()

    def wall(self) -> float:
        return self._same.wall()

    def advance(self, seconds: float) -> None:
        self._same.advance(seconds)
        self._ask(f"advance {seconds!r}")

    def jump_wall(self, seconds: float) -> None:
        self._same.jump_wall(seconds)
        self._ask(f"jump {seconds!r}")
