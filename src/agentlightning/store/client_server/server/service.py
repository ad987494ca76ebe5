"""A server as a whole process: from the first signal that it answers to the last byte on the disk."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
from collections.abc import Callable

from agentlightning.serving.files import allow_many_files
from agentlightning.store.client_server.server.server import LightningStoreServer
from agentlightning.store.engine import EngineStore

__all__ = ["run_service"]

_YOUNG_OBJECTS = 20_000
"""How many more objects are made than freed before the collector looks at the young ones."""
_log = logging.getLogger(__name__)


def run_service(server: LightningStoreServer, store: EngineStore, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT; then finish what was begun and close the store. For the main thread.

    A second signal ends the process at once, which loses nothing that was acknowledged.

    Args:
        server: serves ``store``.
        store: opened here, and closed at the end.
        ready: called when requests are answered.

    Raises:
        AgentLightningError: the store cannot be opened, or the port cannot be had.
    """
    allow_many_files()
    server.take_port()  # first, so that a start that fails leaves no new database behind
    try:
        asyncio.run(_serve(server, store, ready))
    finally:
        server.stop_blocking()


async def _serve(server: LightningStoreServer, store: EngineStore, ready: Callable[[], None]) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    async with store:
        await server.start()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _end, number, ended)
        _collect_seldom()
        ready()
        await ended.wait()
        await server.stop()
    _log.info("stopped; everything that was acknowledged is in the store")


def _end(number: signal.Signals, ended: asyncio.Event) -> None:
    _log.info("%s: finishing what was begun", number.name)
    ended.set()
    for each in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().remove_signal_handler(each)
        signal.signal(each, signal.SIG_DFL)


def _collect_seldom() -> None:
    """Let the garbage collector pass over what is there for good, and look for cycles less often.

    Requests leave hardly any cycles behind; looking for them took a twentieth of the processor.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, 20, 20)
