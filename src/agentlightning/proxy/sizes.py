"""Fits spans of calls into the 4 MiB that stores take: texts are shortened, numbers never.

Lists of numbers that are too long go into spans of their own beside that of the call (``semconv``: ``PARTS``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import msgspec

from agentlightning.types.plain_spans import PlainAttributes, PlainValue

_SPAN_BYTES = 3_800_000
"""Of the 4 MiB; the rest is for what every span has."""
_PART_BYTES = 1_900_000
"""The numbers of one span take at most so much, and those of a part."""
_MAX_BODY_BYTES = 1_500_000
_MAX_TEXT_CHARS = 2_000
_SMALL_COUNT = 10_000
"""So many numbers are too few to matter."""
_NUMBER_FIELDS = frozenset({"logprobs", "prompt_logprobs", "token_ids", "response_token_ids", "prompt_token_ids"})
"""Fields of replies whose numbers are in attributes of their own."""
_encode = msgspec.json.encode


def split_numbers(numbers: PlainAttributes) -> tuple[PlainAttributes, list[tuple[str, list[Any]]]]:
    """Return the lists that fit into the span of a call, and the others in pieces, each with its name."""
    sizes = {name: _size_of(value) for name, value in numbers.items()}
    if sum(sizes.values()) <= _PART_BYTES:
        return numbers, []
    moved = {name: cast("list[Any]", value) for name, value in numbers.items() if sizes[name]}
    kept = {name: value for name, value in numbers.items() if name not in moved}
    return kept, [(name, piece) for name, values in moved.items() for piece in _pieces(values)]


def _size_of(value: PlainValue) -> int:
    """Return the bytes of a list in JSON; 0 if they are few."""
    return len(_encode(value)) if isinstance(value, list) and len(value) > _SMALL_COUNT else 0


def _pieces(values: list[Any]) -> Iterator[list[Any]]:
    if len(values) <= _SMALL_COUNT or len(_encode(values)) <= _PART_BYTES:
        yield values
        return
    middle = len(values) // 2
    yield from _pieces(values[:middle])
    yield from _pieces(values[middle:])


def text_limit(numbers: PlainAttributes) -> int:
    """Return how many bytes of JSON each of request and reply may take beside these numbers."""
    return min(_MAX_BODY_BYTES, (_SPAN_BYTES - sum(map(_size_of, numbers.values()))) // 2)


def body_text(body: bytes, limit: int) -> tuple[str | None, bool]:
    """Return a body as text, and whether it was shortened; it stays JSON then."""
    if not body:
        return None, False
    text = body.decode("utf-8", "replace")
    if len(body) <= limit // 6 or len(_encode(text)) <= limit:  # JSON escapes a character in at most six bytes
        return text, False
    try:
        shortened = _encode(_shortened(msgspec.json.decode(body)))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        shortened = None
    if shortened is None or len(_encode(shortened.decode())) > limit:
        shortened = _encode({"agentlightning.shortened": f"{len(body)} bytes, too large for a span"})
    return shortened.decode(), True


def _shortened(value: Any) -> Any:
    """Return ``value`` with long texts cut; each says how long it was. Images are sent as texts of megabytes."""
    if isinstance(value, str):
        if len(value) <= _MAX_TEXT_CHARS:
            return value
        return f"{value[:_MAX_TEXT_CHARS]}… (shortened: {len(value)} characters)"
    if isinstance(value, list):
        return [_shortened(each) for each in cast("Sequence[Any]", value)]
    if isinstance(value, dict):
        fields = cast("Mapping[str, Any]", value)
        return {name: None if name in _NUMBER_FIELDS else _shortened(each) for name, each in fields.items()}
    return value
