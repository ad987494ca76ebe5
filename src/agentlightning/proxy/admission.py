"""The gate that calls pass: closed around weight updates and at the end, and with room for only so many inside."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from starlette.datastructures import Headers
from starlette.requests import Request

from agentlightning.errors import InvalidId
from agentlightning.proxy.errors import Refused
from agentlightning.proxy.recording import Caller
from agentlightning.security.hosts import AllowedHosts
from agentlightning.security.keys import ApiKey
from agentlightning.store.validation import check_id

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


# --- Who may call the proxy ---


class Access:
    """Checks the headers of requests.

    Args:
        api_key: what callers must show as bearer token; None: only web pages are kept out.
    """

    def __init__(self, api_key: ApiKey | None) -> None:
        self._api_key = api_key
        self._hosts = AllowedHosts()

    def check(self, headers: Headers) -> None:
        """Let the request pass, or not.

        Raises:
            Refused: 401 without the key; 403 for a web page, if there is no key.
        """
        if self._api_key is not None:
            if not self._api_key.opens(_raw(headers, "authorization")):
                raise Refused(
                    401,
                    "invalid_api_key",
                    "The proxy's API key is missing or wrong; use the api_key of the LLM resource.",
                    kind="authentication_error",
                )
        elif "origin" in headers or not self._hosts.allows(_raw(headers, "host")):
            raise Refused(
                403,
                "forbidden_origin",
                "A proxy without a key answers programs on this machine only, and no web pages; give it an api_key.",
                kind="permission_error",
            )


def _raw(headers: Headers, name: str) -> bytes | None:
    value = headers.get(name)
    return None if value is None else value.encode("latin-1")


# --- For which attempt a request is: said by its path, or else by its headers ---

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(?:-.*)?")


def caller_of(request: Request) -> Caller | None:
    """Who calls; None: nobody in particular, and the call is not recorded.

    The ids are those of ``/rollout/{rollout_id}/attempt/{attempt_id}/`` or of the headers ``x-rollout-id`` and
    ``x-attempt-id``. A ``traceparent`` (https://www.w3.org/TR/trace-context/) says of which span of the agent the
    call is a child.

    Raises:
        Refused: there is one id without the other, or one that is none (400).
    """
    given = request.path_params
    rollout_id = given.get("rollout_id") or request.headers.get("x-rollout-id")
    attempt_id = given.get("attempt_id") or request.headers.get("x-attempt-id")
    if rollout_id is None and attempt_id is None:
        return None
    try:
        rollout_id = check_id(rollout_id, "rollout_id")
        attempt_id = check_id(attempt_id, "attempt_id")
    except InvalidId as error:
        raise Refused(400, "invalid_id", f"The call says for which attempt it is, but {error}.") from error
    found = _TRACEPARENT.fullmatch(request.headers.get("traceparent", ""))
    if found is None or not found[1].strip("0") or not found[2].strip("0"):
        return Caller(rollout_id, attempt_id)
    return Caller(rollout_id, attempt_id, found[1], found[2])
