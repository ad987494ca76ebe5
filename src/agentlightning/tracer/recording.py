"""One trace: the spans of one attempt, from the moment they end until the store has them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from threading import Lock
from typing import TYPE_CHECKING

from agentlightning.store.base import LightningStore
from agentlightning.types import Span

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan


_logger = logging.getLogger(__name__)


class Recording:
    """Takes spans from the threads of an agent, and gives them, converted, to those who read or send them.

    Taking a span is one append; nothing is converted, locked or waited for in the agent's thread.

    Args:
        convert: makes a span of ours from one of the SDK, a rollout id and an attempt id.
        store: where the spans go; None: nowhere.
        rollout_id, attempt_id: whose spans they are; empty where there is no rollout.
        name: what the trace is called in logs and errors.
    """

    def __init__(
        self,
        convert: Callable[[ReadableSpan, str, str], Span],
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
        """The trace that this one interrupts."""
        self.on_late: Callable[[Recording], None] | None = None
        """Called with the recording for each span that ends when the trace is over."""
        self._convert = convert
        self._ended: deque[ReadableSpan] = deque()
        self._spans: list[Span] = []
        self._handed = 0
        self._failed = 0
        self._lock = Lock()

    def add(self, span: ReadableSpan) -> None:
        """Take a span that has ended."""
        self._ended.append(span)
        if self.closed and self.on_late is not None:
            self.on_late(self)

    def add_own(self, span: Span) -> None:
        """Take a span that no OpenTelemetry tracer made."""
        with self._lock:
            self._take_ended()
            self._spans.append(span)

    def spans(self) -> list[Span]:
        """All spans up to now, in the order in which they ended. These very ones are sent: do not change them."""
        with self._lock:
            self._take_ended()
            return list(self._spans)

    def unsent(self, limit: int) -> list[Span]:
        """The next spans, at most ``limit``, that were not handed over yet."""
        with self._lock:
            self._take_ended()
            return self._spans[self._handed : self._handed + limit]

    def hand_over(self, count: int) -> None:
        """So many of the ``unsent`` spans are in the store."""
        with self._lock:
            self._handed += count

    @property
    def total(self) -> int:
        """How many spans were taken."""
        with self._lock:
            return len(self._spans) + len(self._ended) + self._failed

    @property
    def handed(self) -> int:
        """How many of them are in the store, or will never be because they could not be converted."""
        with self._lock:
            return self._handed + self._failed

    def _take_ended(self) -> None:
        ended, spans, convert = self._ended, self._spans, self._convert
        while ended:
            try:
                spans.append(convert(ended[0], self.rollout_id, self.attempt_id))
            except Exception:
                _logger.exception("span %r of %s cannot be converted, and is lost", ended[0].name, self.name)
                self._failed += 1
            ended.popleft()


current: ContextVar[Recording | None] = ContextVar("agentlightning_recording", default=None)
"""The trace that the running code belongs to."""

last: ContextVar[Recording | None] = ContextVar("agentlightning_last_recording", default=None)
"""The trace that the running code has ended last."""
