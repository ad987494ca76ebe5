"""What an adapter is."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from agentlightning.types import Span

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

T_from = TypeVar("T_from")
T_to = TypeVar("T_to")


class Adapter(Generic[T_from, T_to]):
    """Turns one kind of data into another. A subclass writes `adapt`."""

    def __call__(self, source: T_from, /) -> T_to:
        """Call `adapt`."""
        return self.adapt(source)

    def adapt(self, source: T_from, /) -> T_to:
        """Return what was made of ``source``, which stays as it is."""
        raise NotImplementedError(f"{type(self).__name__} has no adapt method; an adapter must write one")


class OtelTraceAdapter(Adapter[Sequence["ReadableSpan"], T_to], Generic[T_to]):
    """An adapter of spans of the OpenTelemetry SDK."""


class TraceAdapter(Adapter[Sequence[Span], T_to], Generic[T_to]):
    """An adapter of spans as the store keeps them."""


# --- What an adapter made of spans, and which spans it could not use ---

T = TypeVar("T")


@dataclass(frozen=True)
class UnusableSpan:
    """A span that looks like what the adapter wants, and cannot be used."""

    span_id: str
    name: str
    reason: str

    @classmethod
    def of(cls, span: Span, reason: str) -> UnusableSpan:
        """Say why a span is unusable."""
        return cls(span.span_id, span.name, reason)


@dataclass(frozen=True)
class Adapted(Generic[T]):
    """What was made, in the order of the spans, and what could not be used."""

    made: list[T]
    unusable: list[UnusableSpan]


def log_unusable(logger: logging.Logger, unusable: Sequence[UnusableSpan]) -> None:
    """Log one warning about all of them, if there are any: how many for which reason, and the first of each."""
    if not unusable:
        return
    counts = Counter(each.reason for each in unusable)
    first = {each.reason: each for each in reversed(unusable)}
    told = "; ".join(f"{count}× {reason} (span {first[reason].span_id})" for reason, count in counts.most_common())
    logger.warning("%d spans of model calls could not be used: %s", len(unusable), told)
