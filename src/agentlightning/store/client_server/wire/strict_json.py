"""The strict JSON door: what every body that comes in has to pass, before anything else looks at it.

Accepted is JSON as RFC 8259 has it, in UTF-8, and of that only what every reader understands alike
(RFC 7493, I-JSON): no key twice in one object, no number that a reader would round or lose, no NUL
and no lone surrogate. And only so much of it that reading costs little.
"""

from __future__ import annotations

import json
import re
from typing import Any, cast

import msgspec

from agentlightning.errors import NotJson, TooLarge
from agentlightning.store.door import INT64_END, MAX_DEPTH

__all__ = ["MAX_BODY_DEPTH", "MAX_NODES", "decode_strict"]

MAX_BODY_DEPTH = MAX_DEPTH + 6
"""The deepest nesting of a body: that of a value, below the objects and arrays of the wire that may hold it."""
MAX_NODES = 1_000_000
"""The most keys and values in one body."""

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode
_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
_SPACED_COLONS = (b" :", b"\t:", b"\n:", b"\r:")


def decode_strict(raw: bytes, what: str = "the body") -> Any:
    """The value that ``raw`` stands for; ``what`` names it in errors.

    Raises:
        NotJson: it is not strict JSON.
        TooLarge: it is nested deeper than ``MAX_BODY_DEPTH``, or has more than ``MAX_NODES`` keys and values.
    """
    # Each node but the first comes after one of these, so this bounds their number without decoding.
    if len(raw) > MAX_NODES and raw.count(b",") + raw.count(b":") + raw.count(b"[") + raw.count(b"{") > MAX_NODES:
        _check_nodes(raw, what)
    try:
        value = _decode(raw)
    except RecursionError as error:
        raise _too_deep(what) from error
    except (msgspec.MsgspecError, ValueError) as error:
        raise NotJson(f"{what} is not JSON: {_reason(raw, error)}") from error
    if b"\\" in raw and b"\\u0000" in raw and _NUL.search(raw):
        raise NotJson(f"{what} holds a NUL character, which not every database can store; remove it")
    if isinstance(value, (dict, list)):
        keys = _count_keys(value, MAX_BODY_DEPTH, what)
        if keys and _encode(value) != raw:  # JSON that we would write ourselves has no key twice
            _check_unique(raw, keys, what)
    elif isinstance(value, int):
        _check_int(value, what)
    return cast(Any, value)


def _count_keys(container: Any, depth: int, what: str) -> int:
    """How many keys all objects in this one have together; checks depth and integers on the way."""
    if depth == 0:
        raise _too_deep(what)
    if type(container) is dict:
        items: Any = cast("dict[str, Any]", container).values()
        keys = len(items)
    else:
        items = container
        keys = 0
    for item in items:
        kind = cast("type[Any]", type(item))
        if kind is str or kind is float:
            continue
        if kind is dict or kind is list:
            keys += _count_keys(item, depth - 1, what)
        elif kind is int:
            _check_int(item, what)
    return keys


def _check_int(value: int, what: str) -> None:
    if not -INT64_END <= value < INT64_END:
        raise NotJson(f"{what} holds an integer outside ±2^63; send it as a string")


def _check_unique(raw: bytes, keys: int, what: str) -> None:
    """Raise if there are more keys in the text than there are in the decoded value.

    In nearly all JSON every key is directly followed by its colon, so that the keys can be counted by
    counting ``":`` outside of strings. Inside of strings it is ``\\":``, unless the backslash before
    the quote is itself escaped. Where counting does not settle it, all objects are looked at.
    """
    if not any(spaced in raw for spaced in _SPACED_COLONS) and b'\\\\"' not in raw:
        found = raw.count(b'":') - (raw.count(b'\\":') if b"\\" in raw else 0)
        if found == keys:
            return

    def unique(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise NotJson(f"{what} has the key {key[:80]!r} twice in one object; give each key once")
            seen.add(key)

    json.loads(raw, object_pairs_hook=unique)


def _check_nodes(raw: bytes, what: str) -> None:
    """Raise if there are too many keys and values, not counting what only looks like some inside of strings."""
    outside = re.sub(rb'"(?:[^"\\]|\\.)*+"', b"", raw)
    nodes = outside.count(b",") + outside.count(b":") + outside.count(b"[") + outside.count(b"{") + 1
    if nodes > MAX_NODES:
        raise TooLarge(f"{what} has more than {MAX_NODES:,} keys and values; send less at a time")


def _too_deep(what: str) -> TooLarge:
    return TooLarge(f"{what} is nested deeper than {MAX_BODY_DEPTH} levels")


def _reason(raw: bytes, error: Exception) -> str:
    if not raw.strip():
        return "it is empty"
    if raw.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        return "it begins with a byte order mark; send UTF-8 without one"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 ({error.reason})"
    if re.search(rb"\\u[dD][89a-fA-F]", raw) and "truncated" in str(error):
        return "it holds half of a surrogate pair, which is no character"
    return str(error)
