"""Which of many intervals is the shortest around another one, in n log n steps."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import groupby
from typing import TypeAlias

Interval: TypeAlias = tuple[float, float]
"""Beginning and end."""


def shortest_around(wanted: Sequence[Interval], around: Sequence[Interval]) -> list[int | None]:
    """Return for each wanted interval the place in ``around`` of the shortest one that contains it.

    Intervals may share one end, but one with the same beginning and end does not count as containing. Of several
    that are equally short, the first one is taken; None if there is none.
    """
    index = _ByEnd([end for _, end in around])
    found: list[tuple[float, int]] = [_NOBODY] * len(wanted)
    begun = sorted(range(len(around)), key=lambda place: around[place][0])
    asking = sorted(range(len(wanted)), key=lambda place: wanted[place][0])
    added = 0
    for start, group in groupby(asking, key=lambda place: wanted[place][0]):
        together = list(group)
        while added < len(begun) and around[begun[added]][0] < start:
            added = index.add(around, begun, added)
        for place in together:
            found[place] = index.shortest(index.ending_at_or_after(wanted[place][1]))
        # Those that begin at the same time contain it only if they end later.
        while added < len(begun) and around[begun[added]][0] == start:
            added = index.add(around, begun, added)
        for place in together:
            found[place] = min(found[place], index.shortest(index.ending_after(wanted[place][1])))
    return [None if each == _NOBODY else each[1] for each in found]


_NOBODY: tuple[float, int] = (float("inf"), -1)


class _ByEnd:
    """The shortest of the intervals added so far, among those that end late enough: a Fenwick tree of minima."""

    def __init__(self, ends: Sequence[float]) -> None:
        self._ends = sorted({-end for end in ends})
        self._best = [_NOBODY] * (len(self._ends) + 1)

    def add(self, around: Sequence[Interval], begun: Sequence[int], added: int) -> int:
        """Add one interval; return how many there are now."""
        place = begun[added]
        start, end = around[place]
        node = bisect_left(self._ends, -end) + 1
        while node < len(self._best):
            self._best[node] = min(self._best[node], (end - start, place))
            node += node & -node
        return added + 1

    def ending_at_or_after(self, end: float) -> int:
        return bisect_right(self._ends, -end)

    def ending_after(self, end: float) -> int:
        return bisect_left(self._ends, -end)

    def shortest(self, latest: int) -> tuple[float, int]:
        """Among so many of the latest ends: the duration and the place of the shortest interval."""
        found = _NOBODY
        while latest > 0:
            found = min(found, self._best[latest])
            latest -= latest & -latest
        return found
