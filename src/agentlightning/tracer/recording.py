"""``Recording``: the spans of one trace, and which trace the running code belongs to."""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from agentlightning.store.base import LightningStore
from agentlightning.types import Span
from agentlightning.types.plain_spans import PlainSpan, SpanOrPlain

_numbers = itertools.count()
_logger = logging.getLogger(__name__)


class Recording:
    """The spans of one trace, from the moment they end until the store has them.

    Taking a span is one append: nothing is converted, locked or waited for in the agent's thread.

    Args:
        convert: makes our span of what ended, a rollout id and an attempt id.
        store: where the spans go; None: nowhere.
        rollout_id, attempt_id: the attempt of the spans; empty where there is no rollout.
        name: name of the trace in logs and errors.
        size_bytes: about how large the spans are; 0: small.
    """

    def __init__(
        self,
        convert: Callable[[Any, str, str], PlainSpan],
        store: LightningStore | None,
        rollout_id: str,
        attempt_id: str,
        name: str | None = None,
        *,
        size_bytes: int = 0,
    ) -> None:
        self.store = store
        self.rollout_id = rollout_id
        self.attempt_id = attempt_id
        self.name = name or rollout_id or "a trace without a rollout"
        self.size_bytes = size_bytes
        self.number = next(_numbers)
        """Differs between all recordings of this process."""
        self.closed_at: float | None = None
        """When the trace was closed, in Unix seconds; None while it is open."""
        self.outer: Recording | None = None
        """The trace that was open in this context before."""
        self.on_late: Callable[[Recording], None] | None = None
        """Called with this recording for each span that ends after the trace was closed."""
        self.on_forked: Callable[[Recording, PlainSpan], None] | None = None
        """Takes the spans that end in a forked child of the process, whose copy of this recording nobody sends."""
        self.is_ending = False
        """Whether the agent has returned: no model call follows the spans that come now."""
        self.settled = 0
        """How many of the spans are in the store, or were lost because they could not be converted."""
        self.has_refused = False
        """Whether the store refused one of the spans, so that it is lost, or stored in another form."""
        self._convert = convert
        self.taken: list[Any] = []
        """All spans: as they ended, then converted in their places; None in place of one that cannot be."""
        self._converted = 0
        self._pid = os.getpid()
        self._lock = threading.Lock()

    @property
    def is_here(self) -> bool:
        """Whether this process made it: not a forked child, whose copy nobody sends."""
        return self._pid == os.getpid()

    @property
    def closed(self) -> bool:
        """Whether the trace was closed. Its spans that end later are still sent."""
        return self.closed_at is not None

    def add(self, span: Any) -> None:
        """Take a span that has ended."""
        if self._pid != os.getpid() and self.on_forked is not None:
            self.on_forked(self, self._convert(span, self.rollout_id, self.attempt_id))
            return
        self.taken.append(span)
        if self.closed_at is not None and self.on_late is not None:
            self.on_late(self)

    def spans(self) -> list[Span]:
        """All spans so far, in the order in which they ended. Their attributes are those that are sent: do not change
        them."""
        return [span.to_span() for span in self._converted_from(0)[0]]

    def unsent(self, limit: int | None = None) -> tuple[Sequence[SpanOrPlain], int]:
        """The spans that are not marked as stored, at most ``limit``, as the store takes them; and the position behind
        the last one."""
        spans, end = self._converted_from(None, limit)
        if self.store is None or self.store.capabilities.get("plain_spans", False):
            return spans, end
        return [span.to_span() for span in spans], end

    def _converted_from(self, start: int | None, limit: int | None = None) -> tuple[list[PlainSpan], int]:
        """The spans from ``start`` on; None: from the first that is not marked as stored."""
        spans, convert = self.taken, self._convert
        with self._lock:
            end = len(spans)
            for position in range(self._converted, end):
                if type(spans[position]) is PlainSpan:  # a forked child converted it
                    continue
                try:
                    spans[position] = convert(spans[position], self.rollout_id, self.attempt_id)
                except Exception:
                    _logger.exception("span %r of %s cannot be converted, and is lost", spans[position].name, self.name)
                    spans[position] = None
            self._converted = end
            start = self.settled if start is None else start
            part = spans[start : end if limit is None else min(end, start + limit)]
            return part if None not in part else [span for span in part if span is not None], start + len(part)

    def mark_stored(self, end: int) -> None:
        """The store has the spans before this position. Two senders may say so of the same spans, in any order."""
        with self._lock:
            self.settled = max(self.settled, end)


current: ContextVar[Recording | None] = ContextVar("agentlightning_recording", default=None)
"""The open trace of the running code."""

last: ContextVar[Recording | None] = ContextVar("agentlightning_last_recording", default=None)
"""The trace that the running code closed last."""
