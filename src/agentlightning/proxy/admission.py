"""What a request has to pass before it is answered: its key, its ids, and the limits of calls in flight."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request

from agentlightning.errors import InvalidId, NotAllowed
from agentlightning.proxy.dialects.base import ProxyError
from agentlightning.proxy.recording import CallOrigin
from agentlightning.security.access import ANONYMOUS, AccessPolicy, AllowAll, Permission, Principal
from agentlightning.security.hosts import AllowedHosts
from agentlightning.security.keys import ApiKey
from agentlightning.store.validation import check_id
from agentlightning.telemetry.logs import trace_of

_MAX_BYTES = 256 * 1024 * 1024
"""How much memory the requests and kept replies of calls in flight may take together."""
_AGENT, _OPERATOR = Principal("agent"), Principal("control")
"""The callers that a key tells apart."""


class ProxyAccess:
    """Decides whether a request may use a route. Every route of the proxy passes here, and only here.

    Args:
        api_key: what agents must show as bearer token; None: agents need none, but web pages are kept out.
        control_key: what algorithms must show; None: there are no control routes.
        policy: decides what a caller with the right key may do.
    """

    def __init__(
        self, api_key: ApiKey | None, control_key: ApiKey | None = None, policy: AccessPolicy | None = None
    ) -> None:
        self._api_key = api_key
        self._control_key = control_key
        self._policy = policy or AllowAll()
        self._hosts = AllowedHosts()

    @property
    def has_control(self) -> bool:
        """Whether there are control routes."""
        return self._control_key is not None

    def authorize(self, headers: Headers, permission: Permission | None) -> None:
        """Check that a request with these headers has the permission of its route.

        Args:
            permission: ``run`` for model calls and the model list, ``operate`` for control; None: open to everybody.

        Raises:
            ProxyError: 401 without the right key; 403 for a web page, if there is no key, and for a caller that the
                policy does not allow it.
        """
        if permission is None:
            return
        try:
            self._policy.authorize(self._identify(headers, permission), permission)
        except NotAllowed as error:
            raise ProxyError(403, "not_allowed", error.message) from error

    def _identify(self, headers: Headers, permission: Permission) -> Principal:
        shown, host = (
            None if value is None else value.encode("latin-1")
            for value in (headers.get("authorization"), headers.get("host"))
        )
        if permission == "operate":
            if self._control_key is None or not self._control_key.opens(shown):
                raise ProxyError(401, "invalid_control_key", "The control key is missing or wrong.")
            return _OPERATOR
        if self._api_key is not None:
            if not self._api_key.opens(shown):
                why = "The proxy's API key is missing or wrong; use the api_key of the LLM resource."
                raise ProxyError(401, "invalid_api_key", why)
            return _AGENT
        if "origin" in headers or not self._hosts.allows(host):
            # Any web page that the user opens can send requests to this machine. Browsers add Origin to them, and
            # a page whose own name resolves to this machine (DNS rebinding) sends that name as Host.
            why = "A proxy without a key answers programs on this machine only, and no web pages; give it an api_key."
            raise ProxyError(403, "forbidden_origin", why)
        return ANONYMOUS


def read_origin(request: Request) -> CallOrigin | None:
    """Read which attempt a call belongs to; None: none, and the call is not recorded.

    The ids are those of ``/rollout/{rollout_id}/attempt/{attempt_id}/`` or of the headers ``x-rollout-id`` and
    ``x-attempt-id``. A ``traceparent`` names the agent's span that the call is a child of.

    Raises:
        ProxyError: one id is given without the other, or one is not valid (400).
    """
    params, headers = request.path_params, request.headers
    rollout_id = params.get("rollout_id") or headers.get("x-rollout-id")
    attempt_id = params.get("attempt_id") or headers.get("x-attempt-id")
    if rollout_id is None and attempt_id is None:
        return None
    try:
        rollout_id = check_id(rollout_id, "rollout_id")
        attempt_id = check_id(attempt_id, "attempt_id")
    except InvalidId as error:
        raise ProxyError(400, "invalid_id", f"The call says for which attempt it is, but {error}.") from error
    trace_id, parent_span_id = trace_of(headers.get("traceparent", "")) or (None, None)
    return CallOrigin(rollout_id, attempt_id, trace_id, parent_span_id)


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
        self._retry_after_seconds = 1.0
        self._hold_seconds = 0.0
        self.is_closed = False

    @property
    def in_flight(self) -> int:
        """How many calls are in flight."""
        return len(self._calls)

    @property
    def is_paused(self) -> bool:
        """Whether calls are refused until ``resume``."""
        return not self._open.is_set()

    @asynccontextmanager
    async def admit(self) -> AsyncGenerator[Callable[[int], None]]:
        """Make the current task a call for the length of the block.

        Yields:
            Takes so many bytes more for the call, until its end. Raises 503 if all calls take too many together.

        Raises:
            ProxyError: the proxy is paused (429), stopped, or has too many calls in flight (503).
        """
        if not self._open.is_set():
            await self._wait_until_open()
        if self.is_closed:
            raise ProxyError(503, "proxy_stopped", "The proxy is being stopped; no new calls are taken.")
        if len(self._calls) >= self._max_calls:
            raise _overloaded(f"The proxy holds {self._max_calls:,} calls already, which is its limit")
        task = current_task()
        self._calls.add(task)
        self._idle.clear()
        taken = 0

        def grow(size: int) -> None:
            nonlocal taken
            if size > 0 and self._bytes + size > self._max_bytes:
                raise _overloaded(f"The calls in flight take up {self._bytes:,} bytes, near the proxy's limit")
            self._bytes += size
            taken += size

        try:
            yield grow
        finally:
            self._bytes -= taken
            self._calls.discard(task)
            if not self._calls:
                self._idle.set()

    async def _wait_until_open(self) -> None:
        if self._hold_seconds > 0 and self._held < self._max_calls:
            self._held += 1
            try:
                async with asyncio.timeout(self._hold_seconds):
                    await self._open.wait()
                    return
            except TimeoutError:
                pass  # refused below, like a call that is not held
            finally:
                self._held -= 1
        why = "The proxy is paused while the model is updated; repeat the call later."
        raise ProxyError(429, "proxy_paused", why, retry_after_seconds=self._retry_after_seconds)

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


def _overloaded(why: str) -> ProxyError:
    return ProxyError(503, "proxy_overloaded", f"{why}; repeat this one later.", retry_after_seconds=1.0)


def current_task() -> asyncio.Task[Any]:
    """Return the task that runs; every call has one."""
    task = asyncio.current_task()
    assert task is not None, "calls run in tasks"
    return task
