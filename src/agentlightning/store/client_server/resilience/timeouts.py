"""A reply that does not come is given up."""

from __future__ import annotations

import asyncio

from agentlightning.errors import StoreUnreachable
from agentlightning.store.client_server.resilience.transport import Transport, WireReply, WireRequest

__all__ = ["TimeLimited"]


class TimeLimited:
    """A `Transport` that waits for each reply at most ``request.timeout_seconds``, by the clock of the event loop.

    Args:
        inner: does the sending; is cancelled when the time is up.
    """

    def __init__(self, inner: Transport) -> None:
        self._inner = inner

    async def send(self, request: WireRequest) -> WireReply:
        try:
            async with asyncio.timeout(request.timeout_seconds):
                return await self._inner.send(request)
        except TimeoutError as error:
            raise StoreUnreachable(
                f"no reply to {request.method} {request.target} within {request.timeout_seconds:g} s"
            ) from error
