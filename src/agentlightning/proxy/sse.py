"""Server-sent events, as far as model calls use them (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import re

DONE = b"[DONE]"
"""The data of the event with which OpenAI's streams end."""

_END = re.compile(rb"\r?\n\r?\n")
_END_BYTES = 4
"""The longest end."""


class EventTooLarge(Exception):
    """An event does not end within the limit."""


class EventSplitter:
    """Cuts a stream of bytes into whole events.

    Args:
        max_event_bytes: the longest event that is waited for.
    """

    def __init__(self, max_event_bytes: int) -> None:
        self._max_event_bytes = max_event_bytes
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The events that are complete now, each with its empty line.

        Raises:
            EventTooLarge: one grows without end.
        """
        looked_at = max(0, len(self._rest) - _END_BYTES + 1)  # not again: an event may come in very many pieces
        self._rest += data
        events: list[bytes] = []
        start = 0
        for end in _END.finditer(self._rest, looked_at):
            events.append(bytes(self._rest[start : end.end()]))
            start = end.end()
        del self._rest[:start]
        if len(self._rest) > self._max_event_bytes:
            raise EventTooLarge(f"an event of the backend's stream is longer than {self._max_event_bytes:,} bytes")
        return events

    def rest(self) -> bytes:
        """What came after the last complete event."""
        return bytes(self._rest)


def data_of(event: bytes) -> bytes | None:
    """The data of an event; None if it has none, as a comment."""
    if event.startswith(b"data:") and event.count(b"\n") == 2:  # nearly all: one line and the empty one
        return event[5:].strip()
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines).strip() if lines else None


def event_of(data: bytes) -> bytes:
    """An event with this data, which has no line break."""
    return b"data: " + data + b"\n\n"
