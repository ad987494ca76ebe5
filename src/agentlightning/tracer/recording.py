"""One trace: the spans of one attempt, from the moment they end until the store has them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from threading import Lock
from typing import TYPE_CHECKING

from agentlightning.store.base import LightningStore
from agentlightning.types import Span
from agentlightning.types.plain_spans import PlainSpan, SpanOrPlain

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan


_logger = logging.getLogger(__name__)


class Recording:
    """Takes ended spans from the threads of an agent, and gives them, converted, to readers and senders.

    Taking a span is one append: nothing is converted, locked or waited for in the agent's thread.

    Args:
        convert: makes our span of one of the SDK's, a rollout id and an attempt id.
        store: where the spans go; None: nowhere.
        rollout_id, attempt_id: the attempt of the spans; empty where there is no rollout.
        name: name of the trace in logs and errors.
    """

    def __init__(
        self,
        convert: Callable[[ReadableSpan, str, str], PlainSpan],
        store: LightningStore | None,
        rollout_id: str,
        attempt_id: str,
        name: str | None = None,
    ) -> None:
        self.store = store
        self.rollout_id = rollout_id
        self.attempt_id = attempt_id
        self.name = name or rollout_id or "a trace without a rollout"
        self.closed = False
        self.outer: Recording | None = None
        """The trace that was open in this context before."""
        self.on_late: Callable[[Recording], None] | None = None
        """Called with this recording for each span that ends after the trace was closed."""
        self._convert = convert
        self._ended: deque[ReadableSpan] = deque()
        self._spans: list[PlainSpan] = []
        self._records: list[Span] = []
        """The same spans as public records, as far as somebody has asked for them."""
        self._store_takes_plain = store is not None and store.capabilities.get("plain_spans", False)
        self._stored = 0
        self._failed = 0
        self._lock = Lock()

    def add(self, span: ReadableSpan) -> None:
        """Take a span that has ended."""
        self._ended.append(span)
        if self.closed and self.on_late is not None:
            self.on_late(self)

    def spans(self) -> list[Span]:
        """All spans so far, in the order in which they ended. Their attributes are those that are sent: do not change
        them."""
        with self._lock:
            return self._as_records(None)

    def unsent(self, limit: int | None = None) -> tuple[Sequence[SpanOrPlain], int]:
        """The next spans, at most ``limit``, that are not marked as stored, and the position behind the last one."""
        with self._lock:
            self._convert_ended()
            end = len(self._spans) if limit is None else min(len(self._spans), self._stored + limit)
            spans = self._spans if self._store_takes_plain else self._as_records(end)
            return spans[self._stored : end], end

    def mark_stored(self, end: int) -> None:
        """The store has the spans before this position. Two senders may say so of the same spans, in any order."""
        with self._lock:
            self._stored = max(self._stored, end)

    @property
    def total(self) -> int:
        """How many spans were taken."""
        with self._lock:
            return len(self._spans) + len(self._ended) + self._failed

    @property
    def settled(self) -> int:
        """How many of them are in the store, or were lost because they could not be converted."""
        with self._lock:
            return self._stored + self._failed

    def _as_records(self, end: int | None) -> list[Span]:
        """The spans before this position as public records, each of which is made once."""
        self._convert_ended()
        records = self._records
        records += [span.to_span() for span in self._spans[len(records) : end]]
        return records[:end]

    def _convert_ended(self) -> None:
        ended, spans, convert = self._ended, self._spans, self._convert
        while ended:
            try:
                spans.append(convert(ended[0], self.rollout_id, self.attempt_id))
            except Exception:
                _logger.exception("span %r of %s cannot be converted, and is lost", ended[0].name, self.name)
                self._failed += 1
            ended.popleft()


current: ContextVar[Recording | None] = ContextVar("agentlightning_recording", default=None)
"""The open trace of the running code."""

last: ContextVar[Recording | None] = ContextVar("agentlightning_last_recording", default=None)
"""The trace that the running code closed last."""
