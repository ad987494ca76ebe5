"""What is under way when a client is closed ends at once, and says why."""

from __future__ import annotations

import asyncio
import threading

from agentlightning.errors import StoreClosed
from agentlightning.store.client_server.resilience.transport import Transport, WireReply, WireRequest

__all__ = ["Interruptible"]


class Interruptible:
    """A `Transport` whose requests can be interrupted, in whichever event loop they are under way.

    Args:
        inner: does the sending.
    """

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self._lock = threading.Lock()
        self._under_way: dict[asyncio.Timeout, asyncio.AbstractEventLoop] = {}

    async def send(self, request: WireRequest) -> WireReply:
        """As the inner one.

        Raises:
            StoreClosed: it was interrupted. Whether the server did what was asked is unknown.
        """
        scope = asyncio.timeout(None)
        try:
            async with scope:
                with self._lock:
                    self._under_way[scope] = asyncio.get_running_loop()
                return await self._inner.send(request)
        except TimeoutError as error:
            raise StoreClosed(
                f"the client was closed while {request.method} {request.target.partition('?')[0]} was under way"
            ) from error
        finally:
            with self._lock:
                self._under_way.pop(scope, None)

    def interrupt(self) -> None:
        """End all requests that are under way now; their callers get ``StoreClosed``."""
        with self._lock:
            under_way = dict(self._under_way)
        for scope, loop in under_way.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._end, scope)

    def _end(self, scope: asyncio.Timeout) -> None:
        with self._lock:
            still = scope in self._under_way
        if still:
            scope.reschedule(asyncio.get_running_loop().time())
