"""Which request, or which attempt, the code that runs now works for: for log lines."""

from __future__ import annotations

import re
from contextvars import ContextVar
from typing import Any

from fastapi import FastAPI

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
_NO_TRACE, _NO_SPAN = "0" * 32, "0" * 16


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
        trace = None if self.traceparent is None else _trace_of(self.traceparent)
        if trace is not None:
            fields["trace_id"], fields["parent_span_id"] = trace
        return fields


def _trace_of(traceparent: str) -> tuple[str, str] | None:
    """Trace id and span id (W3C Trace Context, section 3.2: later versions may say more behind what there is now)."""
    parts = _TRACEPARENT.fullmatch(traceparent)
    if parts is None:
        return None
    version, trace_id, span_id, more = parts.groups()
    unknown = version == "ff" or (version == "00" and more is not None)
    return None if unknown or trace_id == _NO_TRACE or span_id == _NO_SPAN else (trace_id, span_id)


CURRENT: ContextVar[WorkContext | None] = ContextVar("agentlightning_work", default=None)
"""The work of this task."""


# --- Web applications of our own, which leave no spans in the traces of the agents beside them ---

_NOTHING = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}


def untraced_app(**arguments: Any) -> FastAPI:
    """``FastAPI(**arguments)``, which tells OpenTelemetry nothing of its requests.

    A server may run in the process of a runner. From 0.165 on FastAPI gives every request a span of the process's
    tracer, which would count as the agent's. Earlier versions take the argument and make nothing of it.
    """
    return FastAPI(**arguments, telemetry=_NOTHING)  # pyright: ignore[reportArgumentType] - not a type of all versions
