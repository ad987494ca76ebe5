"""Asking the server now and then whether it is well, while somebody uses it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence

from agentlightning.errors import StoreUnreachable
from agentlightning.store.client_server.resilience.transport import RequestShed, Transport, WireReply, WireRequest

__all__ = ["ProbedWhileUsed", "answers_soon"]


class ProbedWhileUsed:
    """A `Transport` that asks after the server's health at intervals, as long as requests are under way.

    A probe is the least important of all requests, and so the first that a circuit breaker lets through again. What
    comes of it is seen by the wrappers around ``probed``.

    Args:
        inner: does the sending.
        probed: sends the probes.
        probe: asks for the server's health.
        interval_seconds: from one probe to the next.
        monotonic: seconds since some moment.
    """

    def __init__(
        self,
        inner: Transport,
        probed: Transport,
        probe: WireRequest,
        *,
        interval_seconds: float,
        monotonic: Callable[[], float],
    ) -> None:
        self._inner = inner
        self._probed = probed
        self._probe = probe
        self._interval = interval_seconds
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._under_way = 0
        self._used = False
        self._due: float | None = None
        self._task: asyncio.Task[None] | None = None

    async def send(self, request: WireRequest) -> WireReply:
        self._begin()
        try:
            return await self._inner.send(request)
        finally:
            with self._lock:
                self._under_way -= 1

    def _begin(self) -> None:
        with self._lock:
            self._under_way += 1
            self._used = True
            # An event loop that was closed takes its timers along: one that is long overdue will not come.
            if self._due is None or self._monotonic() > self._due + self._interval:
                self._arm()

    def _arm(self) -> None:
        self._due = self._monotonic() + self._interval
        asyncio.get_running_loop().call_later(self._interval, self._tick)

    def _tick(self) -> None:
        with self._lock:
            if not self._used and not self._under_way:
                self._due = None
                return
            self._used = False
            self._arm()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._ask())

    async def _ask(self) -> None:
        with contextlib.suppress(StoreUnreachable, RequestShed):  # no news is told by the wrappers, like news
            await self._probed.send(self._probe)


async def answers_soon(transport: Transport, probe: WireRequest, delays: Sequence[float]) -> bool:
    """Whether the server says that it is well, asked once and again after each of these delays in seconds."""
    for delay in (0.0, *delays):
        await asyncio.sleep(delay)
        with contextlib.suppress(StoreUnreachable):
            if (await transport.send(probe)).status == 200:
                return True
    return False
