"""Replies of ``/v1/responses`` that an attempt may ask for again, or continue by their id.

A client of this wire may send only what is new, and the id of the reply that it continues. What an attempt said and
got is therefore kept here while it may go on, in this process alone.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, cast

import msgspec

from agentlightning.proxy.dialects.lenient import read_object, write_json

AttemptKey: TypeAlias = tuple[str, str]
"""The ids of rollout and attempt; empty for calls without an attempt."""


class KeptReply(NamedTuple):
    """One reply, with what was new in its request."""

    previous_id: str | None
    input: bytes
    """A JSON list of items."""
    response: bytes

    @property
    def size(self) -> int:
        """How many bytes it takes."""
        return len(self.input) + len(self.response)

    def input_items(self) -> list[dict[str, Any]]:
        """Return what was new in its request."""
        return msgspec.json.decode(self.input, type=list[dict[str, Any]])

    def response_object(self) -> dict[str, Any]:
        """Return the reply."""
        return read_object(self.response) or {}


@dataclass
class _Attempt:
    replies: dict[str, KeptReply] = field(default_factory=dict[str, KeptReply])
    size: int = 0


class ReplyMemory:
    """What attempts were answered. When it is full, the attempts that were silent longest are forgotten.

    Args:
        max_bytes: how much is kept of all attempts together.
    """

    def __init__(self, max_bytes: int = 128 * 1024 * 1024) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._attempts = OrderedDict[AttemptKey, _Attempt]()

    def keep(
        self, key: AttemptKey, previous_id: str | None, items: list[dict[str, Any]], response: dict[str, Any]
    ) -> None:
        """Keep a reply under its id.

        Args:
            previous_id: the reply that its request continued.
            items: what was new in its request.
        """
        kept = KeptReply(previous_id, write_json(items), write_json(response))
        attempt = self._attempts.setdefault(key, _Attempt())
        attempt.replies[str(response["id"])] = kept
        attempt.size += kept.size
        self._bytes += kept.size
        self._attempts.move_to_end(key)
        while self._bytes > self._max_bytes and self._attempts:
            _, forgotten = self._attempts.popitem(last=False)
            self._bytes -= forgotten.size

    def find(self, key: AttemptKey, response_id: str) -> KeptReply | None:
        """Return a reply; None: there is none, or it was forgotten."""
        attempt = self._attempts.get(key)
        if attempt is None:
            return None
        self._attempts.move_to_end(key)
        return attempt.replies.get(response_id)

    def history(self, key: AttemptKey, response_id: str) -> list[dict[str, Any]] | None:
        """Return all items that led to a reply, and those of the reply itself; None: it is not known whole."""
        turns: list[KeptReply] = []
        wanted: str | None = response_id
        while wanted is not None:
            kept = self.find(key, wanted)
            if kept is None or len(turns) > 10_000:
                return None
            turns.append(kept)
            wanted = kept.previous_id
        items: list[dict[str, Any]] = []
        for kept in reversed(turns):
            items += kept.input_items()
            items += cast("list[dict[str, Any]]", kept.response_object().get("output", []))
        return items

    def item(self, key: AttemptKey, item_id: str) -> dict[str, Any] | None:
        """Return an item of an earlier request or reply by its id."""
        attempt = self._attempts.get(key)
        for kept in reversed(attempt.replies.values()) if attempt is not None else ():
            for item in (*kept.response_object().get("output", []), *kept.input_items()):
                if item.get("id") == item_id:
                    return item
        return None

    def forget(self, key: AttemptKey, response_id: str) -> bool:
        """Forget a reply, as its agent asks for. Returns whether there was one."""
        attempt = self._attempts.get(key)
        kept = None if attempt is None else attempt.replies.pop(response_id, None)
        if attempt is None or kept is None:
            return False
        attempt.size -= kept.size
        self._bytes -= kept.size
        return True
