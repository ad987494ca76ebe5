"""Which request or attempt the current task works for, for log lines; and applications that OpenTelemetry ignores."""

from __future__ import annotations

import re
from contextvars import ContextVar
from typing import Any

from fastapi import FastAPI

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
_NO_TRACE, _NO_SPAN = "0" * 32, "0" * 16


class WorkContext:
    """The ids that log lines of one request or attempt carry.

    Args:
        request_id: the request, by the id that its reply carries too.
        traceparent: the request's header of that name (W3C Trace Context), if it has one.
        ids: what the work is about, by name: ``rollout_id``, ``attempt_id``, ``worker_id`` …
    """

    __slots__ = ("ids", "request_id", "traceparent")

    def __init__(
        self, request_id: str | None = None, traceparent: str | None = None, ids: dict[str, str] | None = None
    ):
        self.request_id = request_id
        self.traceparent = traceparent
        self.ids = ids

    def fields(self) -> dict[str, str]:
        """The fields of a log line. They are computed here, because most requests log nothing."""
        fields = dict(self.ids) if self.ids else {}
        if self.request_id is not None:
            fields["request_id"] = self.request_id
        trace = None if self.traceparent is None else _trace_of(self.traceparent)
        if trace is not None:
            fields["trace_id"], fields["parent_span_id"] = trace
        return fields


def _trace_of(traceparent: str) -> tuple[str, str] | None:
    """Trace id and span id, or None if the header is not valid.

    Later versions may append fields (W3C Trace Context, section 3.2), so only version 00 must end here.
    """
    parts = _TRACEPARENT.fullmatch(traceparent)
    if parts is None:
        return None
    version, trace_id, span_id, more = parts.groups()
    unknown = version == "ff" or (version == "00" and more is not None)
    return None if unknown or trace_id == _NO_TRACE or span_id == _NO_SPAN else (trace_id, span_id)


CURRENT: ContextVar[WorkContext | None] = ContextVar("agentlightning_work", default=None)
"""What the current task works for."""


_NO_TELEMETRY = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}


def untraced_app(**arguments: Any) -> FastAPI:
    """``FastAPI(**arguments)`` that makes no OpenTelemetry spans for its requests.

    A server may run in the process of a runner. From version 0.165 on, FastAPI makes a span for every request with the
    process's tracer, and that span would be recorded as the agent's. Earlier versions ignore the argument.
    """
    return FastAPI(**arguments, telemetry=_NO_TELEMETRY)  # pyright: ignore[reportArgumentType] - not a type of all versions
