"""``DummyTracer``: makes spans without storing them."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from agentlightning.store.base import LightningStore
from agentlightning.tracer.base import Tracer, activated
from agentlightning.types import Attributes, Span, SpanCoreFields, StatusCode, TraceStatus
from agentlightning.types.attributes import format_exception_attributes


class DummySpanRecordingContext:
    """An open span in memory."""

    def __init__(self, name: str, attributes: Attributes | None = None, start_time: float | None = None) -> None:
        self._name = name
        self._attributes: Attributes = dict(attributes or {})
        self._status = TraceStatus(status_code="UNSET")
        self._start_time = time.time() if start_time is None else start_time
        self._end_time: float | None = None

    def record_exception(self, exception: BaseException) -> None:
        """Record the exception as attributes, and set the status to ``ERROR``."""
        self.record_attributes(format_exception_attributes(exception))
        self.record_status("ERROR", str(exception))

    def record_attributes(self, attributes: Attributes) -> None:
        """Add attributes; an attribute of the same name is replaced."""
        self._attributes.update(attributes)

    def record_status(self, status_code: StatusCode, description: str | None = None) -> None:
        """Set how the work ended. The last call counts."""
        self._status = TraceStatus(status_code=status_code, description=description)

    def finish(self, end_time: float | None = None) -> None:
        """Set the end time (Unix seconds; default: now), and the status ``OK`` unless one was recorded."""
        self._end_time = time.time() if end_time is None else end_time
        if self._status.status_code == "UNSET":
            self.record_status("OK")

    def get_recorded_span(self) -> SpanCoreFields:
        """Return what was recorded so far."""
        return SpanCoreFields(
            name=self._name,
            status=self._status,
            attributes=dict(self._attributes),
            start_time=self._start_time,
            end_time=self._end_time,
        )


class DummyTracer(Tracer):
    """For runs without traces, and for spans that the caller stores in another way."""

    records = False

    @asynccontextmanager
    async def trace_context(
        self,
        name: str | None = None,
        *,
        store: LightningStore | None = None,
        rollout_id: str | None = None,
        attempt_id: str | None = None,
    ) -> AsyncGenerator[DummyTracer]:
        """Be the active tracer inside the block; no span is stored."""
        with activated(self):
            yield self

    def trace_run(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        with activated(self):
            return func(*args, **kwargs)

    def get_last_trace(self) -> list[Span]:
        """Always empty."""
        return []

    def create_span(
        self,
        name: str,
        attributes: Attributes | None = None,
        timestamp: float | None = None,
        status: TraceStatus | None = None,
    ) -> SpanCoreFields:
        """Make the span without storing it."""
        now = time.time() if timestamp is None else timestamp
        return SpanCoreFields(
            name=name,
            status=status or TraceStatus(status_code="OK"),
            attributes=dict(attributes or {}),
            start_time=now,
            end_time=now,
        )

    @contextmanager
    def operation_context(
        self,
        name: str,
        attributes: Attributes | None = None,
        start_time: float | None = None,
        end_time: float | None = None,
    ) -> Generator[DummySpanRecordingContext]:
        """Make a span of the block without storing it."""
        span = DummySpanRecordingContext(name, attributes, start_time)
        try:
            yield span
        except BaseException as error:
            span.record_exception(error)
            raise
        finally:
            span.finish(end_time)
