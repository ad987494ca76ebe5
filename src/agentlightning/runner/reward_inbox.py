"""A letter box for one reward: an HTTP server on this machine, for as long as a program runs."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from types import TracebackType

from aiohttp import web

from agentlightning.runner.reward_text import WrittenReward, read_reward

__all__ = ["RewardInbox"]

_MAX_BYTES = 64 * 1024


class RewardInbox:
    """Takes rewards by POST at ``url``, which only who is told can know. Use as an async context manager.

    Args:
        take: called with each reward; what it raises as ``TypeError``, ``ValueError`` or
            ``OverflowError`` is the sender's mistake.
    """

    def __init__(self, take: Callable[[WrittenReward], None]) -> None:
        self.url = ""
        """Where to post; known inside of the block."""
        self.received = 0
        """How many rewards have come."""
        self._take = take
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> RewardInbox:
        path = f"/reward/{secrets.token_urlsafe(16)}"
        app = web.Application(client_max_size=_MAX_BYTES)
        app.router.add_post(path, self._receive)
        app.router.add_put(path, self._receive)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}{path}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _receive(self, request: web.Request) -> web.Response:
        text = (await request.read()).decode("utf-8", "replace")
        reward = read_reward(text)
        if reward is None:
            wanted = 'a number, or {"reward": number}, or {"reward": {name: number, …}, "primary_key": name}'
            return web.Response(status=422, text=f"{text[:200]!r} is no reward; send {wanted}\n")
        try:
            self._take(reward)
        except (TypeError, ValueError, OverflowError) as error:
            return web.Response(status=422, text=f"{error}\n")
        self.received += 1
        return web.Response(status=204)
