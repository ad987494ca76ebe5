"""Which calls may begin: none while the proxy is paused or stopped, and only so many at once, of so many bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from agentlightning.proxy.dialects.base import ProxyError

HOLD_SECONDS = 300.0
"""How long a pause holds calls: less than the 600 s that OpenAI's clients wait for a reply."""
RETRY_AFTER_SECONDS = 30.0
"""What a call that was held in vain is told. OpenAI's clients obey up to 60 s, and repeat sooner if told more; some
programs give up at once without it."""
_MAX_BYTES = 256 * 1024 * 1024
"""How much memory the requests and kept replies of calls in flight, and of those held, may take together."""


class TurnedAway(ProxyError):
    """A call was not admitted. It is no call, so nothing of it is recorded."""


class CallAdmission:
    """Admits calls: none while the proxy is paused or stopped, and only ``max_calls`` at once. For one event loop."""

    def __init__(self, max_calls: int) -> None:
        self._max_calls = max_calls
        self._max_bytes = _MAX_BYTES
        self._bytes = 0
        self._calls: set[asyncio.Task[Any]] = set()
        self._held = 0
        self._open = asyncio.Event()
        self._open.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._retry_after_seconds = RETRY_AFTER_SECONDS
        self._hold_seconds = HOLD_SECONDS
        self.is_closed = False

    @property
    def in_flight(self) -> int:
        """How many calls are in flight."""
        return len(self._calls)

    @property
    def held(self) -> int:
        """How many calls are held until ``resume``."""
        return self._held

    @property
    def is_paused(self) -> bool:
        """Whether calls are held, or refused, until ``resume``."""
        return not self._open.is_set()

    @asynccontextmanager
    async def place(self) -> AsyncGenerator[Place]:
        """Give the current task's call a place for the length of the block: in flight, or held in a pause.

        Raises:
            TurnedAway: the proxy is paused and holds no more calls (429); it is stopped, or has too many calls in
                flight (503).
        """
        place = Place(self)
        if not self.is_paused:
            self._begin()
        elif self._hold_seconds > 0 and self._held < self._max_calls:
            self._held += 1
            place.held_until = asyncio.get_running_loop().time() + self._hold_seconds
        else:
            raise self._paused()
        try:
            yield place
        finally:
            self.take(-place.taken)
            self._held -= place.held_until is not None
            self._calls.discard(current_task())
            if not self._calls:
                self._idle.set()

    def _begin(self) -> None:
        """Count the current task among the calls in flight."""
        if self.is_closed:
            raise TurnedAway(503, "proxy_stopped", "The proxy is being stopped; no new calls are taken.")
        if len(self._calls) >= self._max_calls:
            why = f"The proxy holds {self._max_calls:,} calls already, which is its limit; repeat this one later."
            raise TurnedAway(503, "proxy_overloaded", why, retry_after_seconds=1.0)
        self._calls.add(current_task())
        self._idle.clear()

    async def begin_held(self, place: Place) -> None:
        """Wait for the end of the pause, then count the held call of the current task among those in flight. See
        ``Place.admitted``."""
        try:
            async with asyncio.timeout_at(place.held_until):
                while self.is_paused:  # the next pause may have begun before this task woke up
                    await self._open.wait()
        except TimeoutError:
            raise self._paused() from None
        self._begin()
        self._held -= 1
        place.held_until = None

    def take(self, size: int) -> None:
        """Take so many bytes for calls. Raises ``ProxyError`` (503) if all calls take too many together."""
        if size > 0 and self._bytes + size > self._max_bytes:
            why = f"The calls in flight take up {self._bytes:,} bytes, near the proxy's limit; repeat this one later."
            raise ProxyError(503, "proxy_overloaded", why, retry_after_seconds=1.0)
        self._bytes += size

    def _paused(self) -> TurnedAway:
        why = "The proxy is paused while the model is updated; repeat the call later."
        return TurnedAway(429, "proxy_paused", why, retry_after_seconds=self._retry_after_seconds)

    async def pause(self, retry_after_seconds: float, hold_seconds: float, timeout_seconds: float | None) -> int:
        """Admit no calls until ``resume``, and wait for those in flight. See ``LLMProxy.pause``."""
        self._retry_after_seconds = retry_after_seconds
        self._hold_seconds = hold_seconds
        self._open.clear()
        return await self.wait_idle(timeout_seconds)

    async def resume(self) -> None:
        """Admit calls again. A coroutine, so that other threads can run it in the loop of the proxy."""
        self._open.set()

    def close(self) -> None:
        """Admit no calls any more; those that are held are refused."""
        self.is_closed = True
        self._open.set()

    async def wait_idle(self, timeout_seconds: float | None) -> int:
        """Wait until no call is in flight, for at most so long; returns how many still are."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._idle.wait()
        except TimeoutError:
            return len(self._calls)
        return 0

    def cancel_calls(self) -> None:
        """Cancel the calls that are in flight."""
        for task in list(self._calls):
            task.cancel()


class Place:
    """The place of one call: in flight, or held."""

    def __init__(self, admission: CallAdmission) -> None:
        self._admission = admission
        self.taken = 0
        """How many bytes of memory the call takes."""
        self.held_until: float | None = None
        """On the clock of the loop; None: the call is in flight."""

    def grow(self, size: int) -> None:
        """Take so many bytes more, until the place is left. Raises ``ProxyError`` (503) if all calls take too many."""
        self._admission.take(size)
        self.taken += size

    async def admitted(self) -> None:
        """Wait until a held call may begin; one that is in flight already goes on at once.

        Raises:
            TurnedAway: the pause is too long (429); the proxy is stopped, or has too many calls in flight now (503).
        """
        if self.held_until is not None:
            await self._admission.begin_held(self)


def current_task() -> asyncio.Task[Any]:
    """Return the task that runs; every call has one."""
    task = asyncio.current_task()
    assert task is not None, "calls run in tasks"
    return task
