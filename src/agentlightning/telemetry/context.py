"""Which request, or which attempt, the code that runs now works for: for log lines."""

from __future__ import annotations

import re
from contextvars import ContextVar

__all__ = ["CURRENT", "WorkContext"]

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")


class WorkContext:
    """What a log line says of the work that it belongs to.

    Args:
        request_id: the request, as the reply names it too.
        traceparent: the header of that name (W3C Trace Context), where there was one.
        ids: ids that the work is about, by name: ``rollout_id``, ``attempt_id``, ``worker_id`` …
    """

    __slots__ = ("ids", "request_id", "traceparent")

    def __init__(
        self, request_id: str | None = None, traceparent: str | None = None, ids: dict[str, str] | None = None
    ):
        self.request_id = request_id
        self.traceparent = traceparent
        self.ids = ids

    def fields(self) -> dict[str, str]:
        """The fields for a log line."""
        fields = dict(self.ids) if self.ids else {}
        if self.request_id is not None:
            fields["request_id"] = self.request_id
        if self.traceparent is not None:
            parts = _TRACEPARENT.fullmatch(self.traceparent)
            if parts is not None:
                fields["trace_id"], fields["parent_span_id"] = parts.groups()
        return fields


CURRENT: ContextVar[WorkContext | None] = ContextVar("agentlightning_work", default=None)
"""The work of this task."""
