"""Pieces of a streamed message, put together to the message that the same call would have had without streaming.

OpenAI sends texts and the arguments of tool calls in pieces, everything else once, and parts of lists under their
``index``. Backends differ: some repeat what does not change in every piece, some say index 0 for each of several tool
calls, some send content as a list of parts and later as text.
"""

from __future__ import annotations

import math
from typing import Any, cast

from agentlightning.proxy.dialects.lenient import bytes_of, text_of

_ITEM_BYTES = 100
"""About the size of a value that is no text."""
_CONSTANT = frozenset({"role", "id", "type", "name", "index", "format", "call_id", "status", "object"})
"""Texts that come once, or are repeated in every piece."""
_IN_PIECES = frozenset({
    "content", "text", "arguments", "reasoning", "reasoning_content", "thinking", "refusal", "data", "transcript",
    "input", "partial_json", "summary", "output", "code",
})  # fmt: skip
"""Texts that come in pieces. Of a name that is in neither set, a piece that repeats all that was there is a repeat."""
_JOINED_PARTS = frozenset({"text", "thinking", "reasoning"})
"""Types of parts of a content list that come in pieces too: the field of the same name holds the piece."""


class MergedObject:
    """A JSON object that comes in pieces."""

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {}
        """By name: a ``bytearray`` for a text, a ``MergedObject`` for an object, a ``_MergedList`` for a list;
        everything else is as it came."""

    def add(self, piece: dict[str, Any]) -> None:
        """Take one more piece."""
        for name, value in piece.items():
            kept = self.parts.get(name)
            if isinstance(value, str) and name not in _CONSTANT:
                self._add_text(name, kept, value)
            elif isinstance(value, dict):
                kept = self.parts[name] = kept if isinstance(kept, MergedObject) else MergedObject()
                kept.add(cast("dict[str, Any]", value))
            elif isinstance(value, list):
                if not isinstance(kept, _MergedList):
                    kept = self.parts[name] = _MergedList(name, kept)
                kept.add(cast("list[Any]", value))
            elif value is not None and (value != "" or kept is None):  # later pieces may repeat an id as an empty text
                self.parts[name] = value

    def _add_text(self, name: str, kept: Any, text: str) -> None:
        if isinstance(kept, _MergedList) and kept.entries:
            kept.add_text(text)
            return
        if not isinstance(kept, bytearray):
            kept = self.parts[name] = bytearray()
        more = bytes_of(text)
        if name in _IN_PIECES or kept != more:
            kept += more

    def whole(self) -> dict[str, Any]:
        """Return everything that came, put together."""
        return {name: _whole(part) for name, part in self.parts.items()}

    @property
    def kept_bytes(self) -> int:
        """About how many bytes this takes."""
        return sum(map(_size_of, self.parts.values()))


class _MergedList:
    """A list that comes in pieces: of items that are complete, or of parts of items.

    Items are parts if they have an ``index``, and those of tool calls always. Such items lose their index, as in a
    whole reply. What follows them without an index is an item of its own.

    Args:
        name: the field that holds it.
        before: what the field held before, if that was a text.
    """

    def __init__(self, name: str, before: Any) -> None:
        self.entries: list[Any] = []
        self._joins_parts = name in ("content", "thinking")
        self._is_indexed: bool | None = True if name == "tool_calls" else None
        self._places: dict[int, tuple[int, int]] = {}
        """Of indexed items, by identity: their index, and their place among those with the same one."""
        self._latest: dict[int, MergedObject] = {}
        self._last_index = 0
        if isinstance(before, bytearray) and before:
            self.add_text(text_of(before))

    def add(self, items: list[Any]) -> None:
        if items and self._is_indexed is None:
            self._is_indexed = not self.entries and all(map(_has_index, items))
        for item in items:
            if self._is_indexed and isinstance(item, dict):
                self._add_part(cast("dict[str, Any]", item))
            elif self._joins_parts and isinstance(item, dict):
                self._add_content(cast("dict[str, Any]", item))
            else:
                self.entries.append(item)

    def add_text(self, text: str) -> None:
        """Take text that follows a list of parts."""
        if text:
            self._add_content({"type": "text", "text": text})

    def _add_content(self, item: dict[str, Any]) -> None:
        kind, last = item.get("type"), self.entries[-1] if self.entries else None
        joins = kind in _JOINED_PARTS and item.keys() <= {"type", kind}
        if joins and isinstance(last, MergedObject) and last.parts.get("type") == kind:
            last.add(item)
            return
        merged = MergedObject()
        merged.add(item)
        self.entries.append(merged if joins else item)

    def _add_part(self, item: dict[str, Any]) -> None:
        given = item.get("index")
        index = self._last_index = given if type(given) is int else self._last_index
        entry = self._latest.get(index)
        new_id = item.get("id")
        if entry is not None and isinstance(new_id, str) and new_id and entry.parts.get("id") not in (None, "", new_id):
            entry, item = self._of_other_id(index, new_id, item, entry)
        if entry is None:
            entry = MergedObject()
            self._places[id(entry)] = (index, len(self._places))
            self.entries.append(entry)
        self._latest[index] = entry
        entry.add(item)

    def _of_other_id(
        self, index: int, new_id: str, item: dict[str, Any], latest: MergedObject
    ) -> tuple[MergedObject | None, dict[str, Any]]:
        """Return the entry that an item with another id belongs to (None: a new one), and what it adds.

        Some backends say index 0 for each of several tool calls; others invent a new id for each piece of one, but do
        not repeat its name.
        """
        for entry in self.entries:
            place = self._places.get(id(entry))
            if place is not None and place[0] == index and entry.parts.get("id") == new_id:
                return entry, item
        function = item.get("function")
        if isinstance(function, dict) and not cast("dict[str, Any]", function).get("name"):
            return latest, {name: value for name, value in item.items() if name != "id"}
        return None, item

    def whole(self) -> list[Any]:
        """Return the items, those with an index in its order."""
        if not self._places:
            return [_whole(entry) for entry in self.entries]
        ordered = sorted(self.entries, key=lambda entry: self._places.get(id(entry), (math.inf, 0)))
        return [
            {name: part for name, part in entry.whole().items() if name != "index"}
            if isinstance(entry, MergedObject)
            else entry
            for entry in ordered
        ]

    @property
    def kept_bytes(self) -> int:
        return sum(map(_size_of, self.entries))


def _has_index(item: object) -> bool:
    return isinstance(item, dict) and type(cast("dict[str, Any]", item).get("index")) is int


def _whole(part: Any) -> Any:
    if isinstance(part, bytearray):
        return text_of(part)
    return part.whole() if isinstance(part, MergedObject | _MergedList) else part


def _size_of(part: Any) -> int:
    """Return about how many bytes a part takes."""
    if isinstance(part, MergedObject | _MergedList):
        return part.kept_bytes
    if isinstance(part, dict):
        return sum(map(_size_of, cast("dict[Any, Any]", part).values()))
    if isinstance(part, list):
        return sum(map(_size_of, cast("list[Any]", part)))
    return len(part) if isinstance(part, str | bytearray) else _ITEM_BYTES
