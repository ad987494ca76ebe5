"""A curve of any length in bounded memory, and as one line of text."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import pairwise

__all__ = ["Curve", "sparkline"]

_BARS = "▁▂▃▄▅▆▇█"


class Curve:
    """Means of consecutive values: at most ``points`` of them, each over equally many values.

    When there is one too many, neighbours are merged and each point stands for twice as many values.

    Args:
        points: the most points to keep; even.
        recent: over how many of the newest values ``recent_mean`` goes.
    """

    def __init__(self, points: int = 64, recent: int = 100) -> None:
        self._limit = points
        self._means: list[float] = []
        self._width = 1
        self._open: list[float] = []
        self._recent = deque[float](maxlen=recent)
        self.count = 0

    def add(self, value: float) -> None:
        """Append one value."""
        self.count += 1
        self._recent.append(value)
        self._open.append(value)
        if len(self._open) == self._width:
            self._means.append(_mean(self._open))
            self._open.clear()
        if len(self._means) > self._limit:
            self._merge()

    def _merge(self) -> None:
        last = self._means.pop()
        self._means = [(first + second) / 2 for first, second in zip(self._means[::2], self._means[1::2], strict=True)]
        self._open = [last] * self._width
        self._width *= 2

    @property
    def means(self) -> list[float]:
        """The points of the curve, oldest first; the last one may still be filling."""
        return [*self._means, _mean(self._open)] if self._open else list(self._means)

    @property
    def recent_mean(self) -> float | None:
        """Mean of the newest values; None if there is none yet."""
        return _mean(self._recent) if self._recent else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as ``width`` bars at most, from the lowest to the highest value."""
    if not values or width < 1:
        return ""
    if len(values) > width:
        edges = [index * len(values) // width for index in range(width + 1)]
        values = [_mean(values[start:end]) for start, end in pairwise(edges)]
    low, high = min(values), max(values)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in values)
