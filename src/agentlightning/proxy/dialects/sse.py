"""Server-sent events, as far as model calls use them (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import re

_END = re.compile(rb"\r?\n\r?\n")
_LONGEST_END_BYTES = 4


class EventTooLarge(Exception):
    """An event is longer than the limit."""


class EventSplitter:
    """Cuts a stream of bytes into whole events.

    Args:
        max_event_bytes: how long an event may grow before it is given up.
    """

    def __init__(self, max_event_bytes: int) -> None:
        self._max_event_bytes = max_event_bytes
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Return the events that are complete now, each with its empty line.

        Raises:
            EventTooLarge: the event that is not complete yet is longer than the limit.
        """
        # Only the end of the old bytes is searched again: an event may arrive in very many pieces, and searching
        # all of it for each piece would take quadratic time.
        search_from = max(0, len(self._rest) - _LONGEST_END_BYTES + 1)
        self._rest += data
        events: list[bytes] = []
        start = 0
        for end in _END.finditer(self._rest, search_from):
            events.append(bytes(self._rest[start : end.end()]))
            start = end.end()
        del self._rest[:start]
        if len(self._rest) > self._max_event_bytes:
            raise EventTooLarge(f"an event of the backend's stream is longer than {self._max_event_bytes:,} bytes")
        return events

    def rest(self) -> bytes:
        """Return what came after the last complete event."""
        return bytes(self._rest)


def data_of(event: bytes) -> bytes | None:
    """Return the data of an event; None if it has none, such as a comment."""
    if event.startswith(b"data:") and event.count(b"\n") == 2:  # nearly all events: one line and the empty one
        return event[5:].strip()
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines).strip() if lines else None


def event_of(data: bytes) -> bytes:
    """Return an event with this data, which must not contain a line break."""
    return b"data: " + data + b"\n\n"
