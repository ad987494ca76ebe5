"""The `Adapter` classes, and how an adapter reports spans that it could not use."""

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
T = TypeVar("T")


class Adapter(Generic[T_from, T_to]):
    """Converts one kind of data into another. A subclass implements `adapt`."""

    def __call__(self, source: T_from, /) -> T_to:
        """Call `adapt`."""
        return self.adapt(source)

    def adapt(self, source: T_from, /) -> T_to:
        """Convert ``source``, which is not changed.

        Raises:
            NotImplementedError: the subclass does not implement it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no adapt method; an adapter must implement one")


class OtelTraceAdapter(Adapter[Sequence["ReadableSpan"], T_to], Generic[T_to]):
    """An adapter whose source is spans of the OpenTelemetry SDK."""


class TraceAdapter(Adapter[Sequence[Span], T_to], Generic[T_to]):
    """An adapter whose source is spans as the store keeps them."""


@dataclass(frozen=True)
class UnusableSpan:
    """A span of a model call that nothing could be made of."""

    span_id: str
    name: str
    reason: str

    @classmethod
    def of(cls, span: Span, reason: str) -> UnusableSpan:
        """Return the record of ``span``, with the reason why it cannot be used."""
        return cls(span.span_id, span.name, reason)


@dataclass(frozen=True)
class Adapted(Generic[T]):
    """What an adapter made, in the order of the spans, and the spans that it could not use."""

    made: list[T]
    unusable: list[UnusableSpan]

    def made_with_warning(self, logger: logging.Logger) -> list[T]:
        """Return what was made; log one warning about the unusable spans: how many per reason, and the first one."""
        if self.unusable:
            counts = Counter(each.reason for each in self.unusable)
            first = {each.reason: each.span_id for each in reversed(self.unusable)}
            reasons = "; ".join(f"{count}× {reason} (span {first[reason]})" for reason, count in counts.most_common())
            logger.warning("%d spans of model calls could not be used: %s", len(self.unusable), reasons)
        return self.made
