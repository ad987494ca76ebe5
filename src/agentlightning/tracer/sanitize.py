"""Changes spans that stores refuse into spans that they accept.

A store refuses text with NUL or with half of a surrogate pair, integers outside ±2^63, rewards that are not
finite, and spans of more than 4 MiB as JSON. An agent's output may contain any of these. Its trace must not be lost
for that, so the sanitizer changes such a part as little as possible, and lists the changed parts in the span.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import msgspec

from agentlightning.semconv import LightningSpanAttributes

CHARACTERS_LIMIT = 600_000
"""A span with fewer characters of text fits into 4 MiB, since JSON escapes one in at most 6 bytes."""

SPAN_BYTES = 3 * 1024 * 1024
"""How many bytes of JSON the attributes of one span may take; the rest of the 4 MiB is for its other parts."""

NAME_CHARACTERS = 5000
"""A longer name of a span is cut to so many characters."""

_REWARDS = ("agentlightning.reward", "reward")
_INT64_END = 2**63
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_SANITIZED = LightningSpanAttributes.MENDED.value
_encode = msgspec.json.Encoder().encode


def fits(text: str) -> bool:
    """Whether every store accepts this text."""
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
    """Whether the name of a span has to be changed."""
    return len(name) > NAME_CHARACTERS or not fits(name)


def sanitize_text(text: str) -> str:
    """The text with U+FFFD for NULs and for surrogates without a partner. Pairs become the character they mean."""
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return whole.replace("\0", _REPLACEMENT)


def sanitize_values(attributes: dict[str, Any], where: str = "attributes") -> list[str]:
    """Change refused names and values in place; returns the paths of what was changed."""
    changed: list[str] = []
    for name, value in list(attributes.items()):
        if not fits(name):
            del attributes[name]
            name = sanitize_text(name)
            attributes[name] = value
            changed.append(f"{where}.{name}")
        better = _sanitized(name, value)
        if better is not value:
            attributes[name] = better
            changed.append(f"{where}.{name}")
    return changed


def _sanitized(name: str, value: Any) -> Any:
    """The value itself if stores accept it, else one as close to it as possible."""
    if isinstance(value, str):
        return value if fits(value) else sanitize_text(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if -_INT64_END <= value < _INT64_END else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) or not name.startswith(_REWARDS) else str(value)
    items = cast("Sequence[Any]", value)
    better = [_sanitized("", item) for item in items]
    if all(after is before for after, before in zip(better, items, strict=True)):
        return value
    return [str(item) for item in better]  # OpenTelemetry allows only lists of one type


def characters_in(attributes: dict[str, Any]) -> int:
    """An upper bound of the characters in the attributes: a number in a list counts as 24."""
    size = 0
    for name, value in attributes.items():
        size += len(name) + 8
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, Sequence):
            items = cast("Sequence[Any]", value)
            size += sum(len(item) for item in items) if items and isinstance(items[0], str) else 24 * len(items)
    return size


def cut_to_size(attributes: dict[str, Any], limit: int = SPAN_BYTES) -> list[str]:
    """Cut the largest values in place until all fit into ``limit`` bytes of JSON; returns the paths of those cut.

    The beginning of a text or list is kept; a cut text ends with a mark.
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
    """List the changed parts in the attributes."""
    attributes[_SANITIZED] = sorted(set(changed))
