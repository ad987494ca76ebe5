"""Which earlier call of its attempt a call repeats, so that its span need not say all of that again.

An agent sends the whole conversation with every call. Stored each time, a rollout of 100 turns takes fifty times what
its last call takes. So a span may refer to an earlier one (``semconv``: ``PREFIX_SPAN_ID``). Only calls that the store
has accepted are referred to, and what is kept of them here is digests: 16 bytes for 256 token ids, or for a message.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from typing import Any, NamedTuple, cast

import msgspec

from agentlightning.proxy.recording import CallRecord, Prefix

_BLOCK = 256
"""How many token ids one digest stands for; up to so many are stored twice."""
_DIGEST_BYTES = 16
_LEAST_BYTES = 2_048
"""A reference that would save less is not worth the look-up, for whoever reads the span."""
_ID_BYTES = 7
"""About the size of a token id in JSON."""
_MAX_ATTEMPTS = 4_096
_MAX_CALLS = 16
"""Of each attempt: its agents may have so many conversations at the same time."""


class _Item(NamedTuple):
    """A message or field of a request."""

    digest: bytes
    size: int


@dataclass(slots=True)
class Outline:
    """A call that has ended, in digests. Each digest of a list stands for all that comes before it, too."""

    span_id: str
    prompt: list[bytes] = field(default_factory=list[bytes])
    whole: list[bytes] = field(default_factory=list[bytes])
    """Of prompt and reply, taken together."""
    messages: list[_Item] = field(default_factory=list[_Item])
    fields: dict[str, _Item] = field(default_factory=dict[str, _Item])
    is_shortened: bool = False


class KnownCalls:
    """The calls of each attempt that the store has, as far as others may repeat them. For one event loop."""

    def __init__(self) -> None:
        self._attempts = OrderedDict[tuple[str, str], list[Outline]]()

    def find(self, attempt: tuple[str, str], mine: Outline) -> Prefix | None:
        """Return what a call that has ended repeats of an earlier one of its attempt; None: too little."""
        found = [_compare(mine, earlier) for earlier in self._attempts.get(attempt, ())]
        saved, best = max(found, key=lambda each: each[0], default=(0, None))
        return best if saved >= _LEAST_BYTES else None

    def add(self, attempt: tuple[str, str], outline: Outline, prefix: Prefix | None) -> None:
        """Note that the store has accepted a call.

        Args:
            prefix: what it repeats of an earlier one; that one is forgotten if this one says all of it.
        """
        known = self._attempts.setdefault(attempt, [])
        self._attempts.move_to_end(attempt)
        if prefix is not None:
            known[:] = [each for each in known if each.span_id != prefix.span_id or not _covers(outline, each)]
        known.append(outline)
        del known[:-_MAX_CALLS]
        if len(self._attempts) > _MAX_ATTEMPTS:
            self._attempts.popitem(last=False)


def outline_of(record: CallRecord) -> Outline | None:
    """Return a call in digests; None if it is too small to refer to another, or to be referred to."""
    prompt, reply = record.reply.prompt_token_ids or (), record.reply.token_ids or ()
    if len(record.raw_request) < _LEAST_BYTES and len(prompt) < _BLOCK:
        return None
    outline = Outline(record.span_id, *_blocks(prompt, reply))
    try:
        request = msgspec.json.decode(record.raw_request)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return outline
    if isinstance(request, dict):
        _outline_request(outline, cast("dict[str, Any]", request))
    return outline


def _blocks(prompt: Sequence[int], reply: Sequence[int]) -> tuple[list[bytes], list[bytes]]:
    data = memoryview(array("q", chain(prompt, reply)).tobytes())
    size = _BLOCK * 8
    digests: list[bytes] = []
    last = b""
    for start in range(0, len(data) - size + 1, size):
        last = _digest(last, data[start : start + size])
        digests.append(last)
    return digests[: len(prompt) // _BLOCK], digests


def _outline_request(outline: Outline, request: dict[str, Any]) -> None:
    messages = request.pop("messages", None)
    last = b""
    for message in cast("list[Any]", messages) if isinstance(messages, list) else ():
        data = msgspec.json.encode(message)
        last = _digest(last, data)
        outline.messages.append(_Item(last, len(data)))
    for name, value in request.items():
        data = msgspec.json.encode(value)
        outline.fields[name] = _Item(_digest(b"", data), len(data))


def _digest(before: bytes, data: bytes | memoryview) -> bytes:
    return blake2b(data, digest_size=_DIGEST_BYTES, key=before).digest()


def _compare(mine: Outline, earlier: Outline) -> tuple[int, Prefix]:
    """Return what a call repeats of an earlier one, and about how many bytes it need not say."""
    tokens = _BLOCK * _common(mine.prompt, earlier.whole)
    messages = _common([each.digest for each in mine.messages], [each.digest for each in earlier.messages])
    names = [name for name, item in mine.fields.items() if earlier.fields.get(name) == item and item.size > _BLOCK]
    saved = _ID_BYTES * tokens
    saved += sum(item.size for item in mine.messages[:messages]) + sum(mine.fields[name].size for name in names)
    is_shortened = earlier.is_shortened and bool(messages or names)
    return saved, Prefix(earlier.span_id, tokens, messages, tuple(names), is_shortened)


def _common(one: Sequence[bytes], other: Sequence[bytes]) -> int:
    """Return how many digests at the beginning are the same. Digests stand for all before them, so that the search
    can halve."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[middle - 1] == other[middle - 1] else (low, middle - 1)
    return low


def _covers(later: Outline, earlier: Outline) -> bool:
    """Whether nothing is lost when calls refer to the later one instead of the earlier one."""
    mine, theirs = [each.digest for each in later.messages], [each.digest for each in earlier.messages]
    return _common(mine, theirs) == len(theirs) and _common(later.whole, earlier.prompt) == len(earlier.prompt)
