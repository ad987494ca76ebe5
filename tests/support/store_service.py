"""A process that serves one store after another, whose clock a test moves: the other side of ``ProcessStores``."""

from __future__ import annotations

import asyncio
import sys

from agentlightning.http.server.server import LightningStoreServer
from agentlightning.store.sqlite.store import SqliteLightningStore
from clocks import ManualClock

__all__ = ["main"]


class _Service:
    """What is served now."""

    def __init__(self) -> None:
        self._clock = ManualClock()
        self._store: SqliteLightningStore | None = None
        self._server: LightningStoreServer | None = None

    async def obey(self, word: str, argument: str) -> str:
        """Do as told; returns what to answer."""
        match word:
            case "open":
                self._clock = ManualClock()
                self._store = SqliteLightningStore(argument, clock=self._clock)
                self._server = LightningStoreServer(self._store, port=0)
                await self._server.start()
                return self._server.endpoint
            case "close":
                assert self._store is not None
                assert self._server is not None
                await self._server.stop()
                await self._store.close()
                return "closed"
            case "advance":
                self._clock.advance(float(argument))
            case "jump":
                self._clock.jump_wall(float(argument))
            case _:
                raise ValueError(word)
        return "moved"


async def _serve() -> None:
    service = _Service()
    while line := await asyncio.to_thread(sys.stdin.readline):
        word, _, argument = line.strip().partition(" ")
        sys.stdout.write(f"{await service.obey(word, argument)}\n")
        sys.stdout.flush()


def main() -> None:
    """Obey the lines of standard input until it ends."""
    asyncio.run(_serve())
