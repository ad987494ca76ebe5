"""A tee in a streamed reply: events go on to the agent as they come, and are taken down on the way."""

from __future__ import annotations

from typing import Any, cast

import msgspec

from agentlightning.proxy.answers import Answer
from agentlightning.proxy.asks import CallKind, without_asked
from agentlightning.proxy.assembly import ReplyAssembly
from agentlightning.proxy.models import Ask
from agentlightning.proxy.scrubbing import Scrubber
from agentlightning.proxy.sse import DONE, EventSplitter, data_of, event_of

__all__ = ["StreamTee"]

_MAX_EVENT_BYTES = 16 * 1024 * 1024


class StreamTee:
    """One streamed reply on its way.

    What comes after the last word of the reply is held back (``ending``), so that the agent does not see the end of
    a call before it has been recorded.

    Args:
        kind: of the call.
        asks: what only the proxy asked for, which the agent does not see.
        scrubber: takes the backend's key out of what the agent sees.
    """

    def __init__(self, kind: CallKind, asks: frozenset[Ask], scrubber: Scrubber) -> None:
        self._asks = asks
        self._scrubber = scrubber
        self._events = EventSplitter(_MAX_EVENT_BYTES)
        self._assembly = ReplyAssembly(kind, asks)
        self._ending = bytearray()
        self._is_done = False
        self.error: object = None
        """The error that the backend sent in the stream: an object, or a text."""

    def feed(self, data: bytes) -> bytes:
        """Take in what the backend sent; returns what the agent may see now.

        Raises:
            EventTooLarge: one event grows without end.
        """
        shown = [self._show(event) for event in self._events.feed(data)]
        return b"".join(shown) if len(shown) != 1 else shown[0]

    def _show(self, event: bytes) -> bytes:
        data = data_of(event)
        if data == DONE or self._is_done:
            return self._hold(event)
        if not data:
            return self._scrubber.bytes(event)
        try:
            chunk = msgspec.json.decode(data)
        except msgspec.MsgspecError:
            return self._scrubber.bytes(event)  # not for us to judge
        if not isinstance(chunk, dict):
            return self._scrubber.bytes(event)
        facts = cast("dict[str, Any]", chunk)
        if facts.get("error"):
            self.error = facts["error"]
            return self._hold(event)
        self._assembly.add(facts)
        if not self._asks:
            return self._scrubber.bytes(event)
        return self._scrubber.bytes(event_of(msgspec.json.encode(facts))) if without_asked(facts, self._asks) else b""

    def _hold(self, event: bytes) -> bytes:
        """The last word has come: this event, and all that follow, wait for the record."""
        self._is_done = True
        self._ending += self._scrubber.bytes(event)
        return b""

    @property
    def kept_bytes(self) -> int:
        """About how much of the reply is kept, which is less than what has passed."""
        return self._assembly.kept_bytes + len(self._ending)

    @property
    def is_complete(self) -> bool:
        """Whether the backend said that the reply ends here."""
        return self._is_done or self._assembly.is_finished

    def ending(self) -> bytes:
        """The last bytes for the agent: what was held back, and what came after the last whole event."""
        return bytes(self._ending) + self._scrubber.bytes(self._events.rest())

    def answer(self) -> Answer:
        """The facts of the reply as far as it came."""
        return self._scrubber.answer(self._assembly.answer())
