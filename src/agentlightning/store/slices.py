"""Large calls in slices: each is a transaction of its own, so that the writes of others go between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

ROLLOUTS = 256
SPANS = 512
ATTEMPTS = 128
IDS = 256
BYTES = 1024 * 1024
"""A transaction of so many rows, or of so many bytes, takes a few milliseconds."""

T = TypeVar("T")


class Sized(Protocol):
    """What a caller gives."""

    @property
    def size(self) -> int:
        """Its bytes."""
        ...


S = TypeVar("S", bound=Sized)


def sized_slices(items: Iterable[S], most_items: int, most_bytes: int = BYTES) -> Iterator[list[S]]:
    """The items in their order, in lists that are moderate in number and in bytes."""
    part: list[S] = []
    size = 0
    for item in items:
        part.append(item)
        size += item.size
        if size >= most_bytes or len(part) >= most_items:
            yield part
            part, size = [], 0
    if part:
        yield part


def slices(items: Sequence[T], most_items: int) -> Iterator[Sequence[T]]:
    """The items in their order, in sequences that are moderate in number."""
    for start in range(0, len(items), most_items):
        yield items[start : start + most_items]
