"""The gate that calls pass: closed around weight updates and at the end, and with room for only so many inside."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from agentlightning.proxy.refusals import Refused

__all__ = ["Gate", "Room"]

_FULL_RETRY_SECONDS = 1.0


class Room:
    """What one call takes up in memory: its request and, if it is no stream, its reply."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._bytes = 0

    def grow(self, size: int) -> None:
        """Take ``size`` bytes more.

        Raises:
            Refused: there is no room (503).
        """
        self._gate.take(size)
        self._bytes += size

    def leave(self) -> None:
        """Give back everything."""
        self._gate.take(-self._bytes)
        self._bytes = 0


class Gate:
    """Counts the calls in flight. To be used from one event loop.

    Args:
        max_calls: how many may be inside at once.
        max_bytes: how much they may take up together.
    """

    def __init__(self, max_calls: int, max_bytes: int) -> None:
        self._max_calls = max_calls
        self._max_bytes = max_bytes
        self._bytes = 0
        self._calls: set[asyncio.Task[object]] = set()
        self._held = 0
        self._open = asyncio.Event()
        self._open.set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._retry_after_seconds = 1.0
        self._hold_seconds = 0.0
        self.is_closed = False

    @property
    def in_flight(self) -> int:
        """How many calls are inside."""
        return len(self._calls)

    @property
    def is_paused(self) -> bool:
        """Whether calls are turned away until ``resume``."""
        return not self._open.is_set()

    def take(self, size: int) -> None:
        """Count ``size`` bytes more, or fewer if it is negative. See ``Room.grow``."""
        if size > 0 and self._bytes + size > self._max_bytes:
            raise Refused(
                503,
                "proxy_overloaded",
                f"The calls in flight take up {self._bytes:,} bytes, near the proxy's limit; repeat this one later.",
                retry_after_seconds=_FULL_RETRY_SECONDS,
            )
        self._bytes += size

    @asynccontextmanager
    async def call(self) -> AsyncGenerator[Room]:
        """Inside of the block, the current task is a call, and takes up what it says that it does.

        Raises:
            Refused: 429 while paused, 503 when full or closed.
        """
        if not self._open.is_set():
            await self._wait_until_open()
        if self.is_closed:
            raise Refused(503, "proxy_stopped", "The proxy is being stopped; no new calls are taken.")
        if len(self._calls) >= self._max_calls:
            raise Refused(
                503,
                "proxy_overloaded",
                f"The proxy holds {self._max_calls:,} calls already, which is its limit; repeat this one later.",
                retry_after_seconds=_FULL_RETRY_SECONDS,
            )
        task = asyncio.current_task()
        assert task is not None, "calls run in tasks"
        self._calls.add(task)
        self._empty.clear()
        room = Room(self)
        try:
            yield room
        finally:
            room.leave()
            self._calls.discard(task)
            if not self._calls:
                self._empty.set()

    async def _wait_until_open(self) -> None:
        if self._hold_seconds > 0 and self._held < self._max_calls:
            self._held += 1
            try:
                async with asyncio.timeout(self._hold_seconds):
                    await self._open.wait()
                    return
            except TimeoutError:
                pass  # refused below, as one that came without a hold
            finally:
                self._held -= 1
        raise Refused(
            429,
            "proxy_paused",
            "The proxy is paused while the model is updated; repeat the call later.",
            kind="rate_limit_error",
            retry_after_seconds=self._retry_after_seconds,
        )

    def pause(self, retry_after_seconds: float, hold_seconds: float) -> None:
        """Let nobody in until ``resume``; those inside go on."""
        self._retry_after_seconds = retry_after_seconds
        self._hold_seconds = hold_seconds
        self._open.clear()

    def resume(self) -> None:
        """Let calls in again."""
        self._open.set()

    def close(self) -> None:
        """Let nobody in any more; those who wait outside are turned away."""
        self.is_closed = True
        self._open.set()

    async def wait_empty(self, timeout_seconds: float | None) -> int:
        """Wait until no call is inside, for at most so long; returns how many still are."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._empty.wait()
        except TimeoutError:
            return len(self._calls)
        return 0

    def cut_off(self) -> None:
        """Cancel the calls that are inside."""
        for task in list(self._calls):
            task.cancel()
