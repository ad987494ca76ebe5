"""Emit text, and read it again."""

from __future__ import annotations

from typing import Any

from agentlightning.emitter.emitting import as_attributes, emit
from agentlightning.semconv import AGL_MESSAGE, LightningSpanAttributes
from agentlightning.types import SpanAttributeNames, SpanCoreFields, SpanLike

__all__ = ["emit_message", "get_message_value"]

_BODY = LightningSpanAttributes.MESSAGE_BODY.value


def emit_message(message: str, attributes: dict[str, Any] | None = None, propagate: bool = True) -> SpanCoreFields:
    """Put a text into the trace.

    Args:
        message: the text.
        attributes: more to say beside it; nested values are flattened.
        propagate: whether it gets into the trace; otherwise it is only returned.

    Raises:
        TypeError: ``message`` is no string.
        RuntimeError: no tracer is active.
    """
    if not isinstance(message, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"the message {message!r} is a {type(message).__name__}; give a string, or use emit_object")
    return emit(AGL_MESSAGE, as_attributes(attributes) | {_BODY: message}, propagate)


def get_message_value(span: SpanLike) -> str | None:
    """The text of a message span; None for other spans."""
    if span.name != AGL_MESSAGE:
        return None
    attributes = span.attributes or {}
    text = attributes.get(_BODY, attributes.get(SpanAttributeNames.MESSAGE.value))
    return text if isinstance(text, str) else None
