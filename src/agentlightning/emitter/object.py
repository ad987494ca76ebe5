"""Emit values, and read them again."""

from __future__ import annotations

import json
from typing import Any, cast

from agentlightning.emitter.emitting import as_attributes, emit
from agentlightning.semconv import AGL_OBJECT, LightningSpanAttributes
from agentlightning.types import SpanAttributeNames, SpanCoreFields, SpanLike
from agentlightning.types.attributes import full_qualified_name

__all__ = ["emit_object", "encode_object", "get_object_value"]

_TYPE = LightningSpanAttributes.OBJECT_TYPE.value
_LITERAL = LightningSpanAttributes.OBJECT_LITERAL.value
_JSON = LightningSpanAttributes.OBJECT_JSON.value


def emit_object(object: Any, attributes: dict[str, Any] | None = None, propagate: bool = True) -> SpanCoreFields:
    """Put a value into the trace: a scalar as it is, everything else as JSON.

    Args:
        object: a value that JSON can hold, or a pydantic model.
        attributes: more to say beside it; nested values are flattened.
        propagate: whether it gets into the trace; otherwise it is only returned.

    Raises:
        RuntimeError: JSON cannot hold it, or no tracer is active.
    """
    return emit(AGL_OBJECT, as_attributes(attributes) | encode_object(object), propagate)


def encode_object(object: Any) -> dict[str, Any]:
    """The attributes that carry a value: its type, and itself as a literal or as JSON.

    Raises:
        RuntimeError: JSON cannot hold it.
    """
    cls = cast("type[Any]", type(object))
    kind = {_TYPE: full_qualified_name(cls)}
    if cls in (str, bool, int, float):
        return kind | {_LITERAL: object}
    plain = object.model_dump(mode="json") if hasattr(cls, "model_dump") else object
    try:
        return kind | {_JSON: json.dumps(plain, ensure_ascii=False)}
    except (TypeError, ValueError, RecursionError) as error:
        raise RuntimeError(
            f"a {kind[_TYPE]} cannot be emitted, since it is not JSON ({error}); convert it to dicts, lists, strings "
            "and numbers first"
        ) from error


def get_object_value(span: SpanLike) -> Any:
    """The value of an object span, read back from JSON where it was written as such; None for other spans."""
    if span.name != AGL_OBJECT:
        return None
    attributes = span.attributes or {}
    if _LITERAL in attributes:
        return attributes[_LITERAL]
    text = attributes.get(_JSON, attributes.get(SpanAttributeNames.OBJECT.value))
    return json.loads(text) if isinstance(text, str) else None
