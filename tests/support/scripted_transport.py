"""A transport that does what a test has written down, for the tests of what is wrapped around one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from agentlightning.errors import StoreUnreachable
from agentlightning.http.client.transport import WireReply, WireRequest

__all__ = ["Act", "ScriptedTransport", "lost", "replies", "silent"]


class Act(NamedTuple):
    """What happens to one try."""

    status: int | None = 200
    """None: there is no reply."""
    seconds: float = 0.0
    headers: Mapping[str, str] = {}


def replies(*statuses: int) -> list[Act]:
    return [Act(status) for status in statuses]


def lost(times: int = 1, seconds: float = 0.0) -> list[Act]:
    return [Act(None, seconds)] * times


def silent(seconds: float) -> Act:
    """The reply takes this long."""
    return Act(200, seconds)


class ScriptedTransport:
    """Plays acts in order, then answers 200. Notes when each try began.

    Args:
        acts: what happens to the first tries.
        clock: seconds, for the notes.
    """

    def __init__(self, acts: Iterable[Act], clock: Callable[[], float]) -> None:
        self._acts = list(acts)
        self._clock = clock
        self.tries: list[float] = []
        self.requests: list[WireRequest] = []
        self.cancelled = 0

    async def send(self, request: WireRequest) -> WireReply:
        self.tries.append(self._clock())
        self.requests.append(request)
        act = self._acts.pop(0) if self._acts else Act()
        try:
            await asyncio.sleep(act.seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if act.status is None:
            raise StoreUnreachable("the connection was reset")
        return WireReply(act.status, act.headers, b"{}")
