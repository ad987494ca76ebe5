"""Emit exceptions."""

from __future__ import annotations

from typing import Any

from agentlightning.emitter.emitting import as_attributes, emit
from agentlightning.semconv import AGL_EXCEPTION
from agentlightning.types import SpanCoreFields, TraceStatus
from agentlightning.types.attributes import format_exception_attributes

__all__ = ["emit_exception"]


def emit_exception(
    exception: BaseException, attributes: dict[str, Any] | None = None, propagate: bool = True
) -> SpanCoreFields:
    """Put an exception into the trace: its type, message and stack trace. The span's status is ``ERROR``.

    Args:
        exception: raised before, or not.
        attributes: more to say beside it; nested values are flattened.
        propagate: whether it gets into the trace; otherwise it is only returned.

    Raises:
        TypeError: ``exception`` is none.
        RuntimeError: no tracer is active.
    """
    if not isinstance(exception, BaseException):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{exception!r} is a {type(exception).__name__}; give an exception")
    status = TraceStatus(status_code="ERROR", description=f"{type(exception).__name__}: {exception}")
    told = as_attributes(attributes) | format_exception_attributes(exception)
    return emit(AGL_EXCEPTION, told, propagate, status)
