"""Spans that no store would take, made into ones that it does.

A store refuses text with NUL or with half of a surrogate pair, integers outside ±2^63, rewards that are not
finite, and spans of more than 4 MiB as JSON. An agent's output may hold any of these, and its trace shall not be
lost over it. So the offending part is changed as little as possible, and the span says which parts were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import msgspec

from agentlightning.semconv import LightningSpanAttributes

CHARACTERS_LIMIT = 600_000
"""A span with fewer characters of text fits into 4 MiB, however JSON has to escape them (6 bytes for one)."""

SPAN_BYTES = 3 * 1024 * 1024
"""What the attributes of one span may take as JSON, which leaves room for its other parts."""

NAME_CHARACTERS = 5000
"""Of a longer name of a span the beginning is kept."""

_REWARDS = ("agentlightning.reward", "reward")
_INT64_END = 2**63
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MENDED = LightningSpanAttributes.MENDED.value
_encode = msgspec.json.Encoder().encode


def fits(text: str) -> bool:
    """Whether every store takes this text."""
    if "\0" in text:
        return False
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_odd_name(name: str) -> bool:
    """Whether the name of a span has to be mended."""
    return len(name) > NAME_CHARACTERS or not fits(name)


def mend_text(text: str) -> str:
    """The text with U+FFFD for NULs and for surrogates without a partner. Pairs become the character they mean."""
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return whole.replace("\0", _REPLACEMENT)


def mend_attributes(attributes: dict[str, Any], where: str = "attributes") -> list[str]:
    """Change in place what no store would take; returns the paths of what was changed."""
    changed: list[str] = []
    for name, value in list(attributes.items()):
        if not fits(name):
            del attributes[name]
            name = mend_text(name)
            attributes[name] = value
            changed.append(f"{where}.{name}")
        better = _mended(name, value)
        if better is not value:
            attributes[name] = better
            changed.append(f"{where}.{name}")
    return changed


def _mended(name: str, value: Any) -> Any:
    """The value itself if it can be stored."""
    if isinstance(value, str):
        return value if fits(value) else mend_text(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if -_INT64_END <= value < _INT64_END else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) or not name.startswith(_REWARDS) else str(value)
    items = cast("Sequence[Any]", value)
    better = [_mended("", item) for item in items]
    if all(after is before for after, before in zip(better, items, strict=True)):
        return value
    return [str(item) for item in better]  # of one type, as a list of an attribute is


def sizeable(attributes: dict[str, Any]) -> int:
    """Roughly how many characters there are: numbers in lists count as some."""
    size = 0
    for name, value in attributes.items():
        size += len(name) + 8
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, Sequence):
            items = cast("Sequence[Any]", value)
            size += sum(len(item) for item in items) if items and isinstance(items[0], str) else 24 * len(items)
    return size


def mend_size(attributes: dict[str, Any], limit: int = SPAN_BYTES) -> list[str]:
    """Cut the largest values in place until all fit into ``limit`` bytes of JSON; returns the paths of those cut.

    Of a text or a list the beginning is kept, and a text says how much of it is missing.
    """
    sizes = {name: len(_encode(value)) for name, value in attributes.items()}
    excess = sum(sizes.values()) + sum(len(_encode(name)) + 2 for name in attributes) - limit
    changed: list[str] = []
    for name in sorted(sizes, key=lambda each: sizes[each], reverse=True):
        if excess <= 0:
            break
        before = sizes[name]
        attributes[name] = _cut(attributes[name], before, max(before - excess, 256))
        excess -= before - len(_encode(attributes[name]))
        changed.append(f"attributes.{name}")
    return changed


def _cut(value: Any, size: int, wanted: int) -> Any:
    """The beginning of a text or list that takes ``size`` bytes, so that it takes at most about ``wanted``."""
    while size > wanted and isinstance(value, Sequence) and len(cast("Sequence[Any]", value)) > 1:
        items = cast("Sequence[Any]", value)
        kept = max(1, int(len(items) * wanted / size * 0.9))
        value = items[:kept]
        size = len(_encode(value))
    return value + "… (cut)" if isinstance(value, str) else list(cast("Sequence[Any]", value))


def mark(attributes: dict[str, Any], changed: list[str]) -> None:
    """Note in the attributes what was changed."""
    attributes[_MENDED] = sorted(set(changed))
