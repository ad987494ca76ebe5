"""Emitters of exceptions, messages, objects, tags and links; ``emit`` makes the spans of all emitters."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

from agentlightning.semconv import AGL_EXCEPTION, AGL_MESSAGE, AGL_OBJECT, LightningSpanAttributes, LinkPydanticModel
from agentlightning.settings import LightningEnvVar, resolve_bool_env_var
from agentlightning.tracer.base import DummyTracer, Tracer, get_active_tracer
from agentlightning.types import Attributes, Span, SpanAttributeNames, SpanCoreFields, SpanLike, TraceStatus
from agentlightning.types.attributes import (
    filter_and_unflatten_attributes,
    flatten_attributes,
    format_exception_attributes,
    format_span_id,
    format_trace_id,
    full_qualified_name,
    sanitize_attributes,
)

_PLAIN: frozenset[type[Any]] = frozenset({str, bool, float})
"""Types that attributes take as they are. Not ``int``: an integer may be too large."""
_logger = logging.getLogger(__name__)


def emit(name: str, attributes: Attributes, propagate: bool, status: TraceStatus | None = None) -> SpanCoreFields:
    """Make a span of no duration, as a child of the span that is open here.

    With ``AGL_EMITTER_DEBUG`` set it is logged as well.

    Args:
        name: name of the span.
        attributes: its attributes.
        propagate: whether the trace gets the span; otherwise it is only returned.
        status: default: ``OK``.

    Raises:
        RuntimeError: no tracer is active, or this thread has no context that says which rollout it works for.
    """
    span = tracer_for(propagate).create_span(name, attributes, status=status)
    if resolve_bool_env_var(LightningEnvVar.AGL_EMITTER_DEBUG, fallback=False):
        _logger.warning("emitted %s: %s%s", name, attributes, "" if propagate else " (not into the trace)")
    return span


def tracer_for(propagate: bool) -> Tracer:
    """The active tracer, or without ``propagate`` one that stores nothing.

    Raises:
        RuntimeError: no tracer is active.
    """
    if not propagate:
        return DummyTracer()
    tracer = get_active_tracer()
    if tracer is None:
        raise RuntimeError(
            "no tracer is active here, so there is no trace to emit into; run the agent by a runner or Trainer, "
            "or inside `with tracer.lifespan():`, or pass propagate=False to only get the span back"
        )
    return tracer


def as_attributes(given: dict[str, Any] | None) -> Attributes:
    """The caller's further attributes, flattened.

    Raises:
        TypeError: it is not a dict with string keys.
    """
    if given is None:
        return {}
    if not isinstance(given, dict):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{given!r} is a {type(given).__name__}; give a dict with string keys")
    if _PLAIN.issuperset(map(type, given.values())) and all(type(key) is str for key in given):
        return given.copy()
    return sanitize_attributes(flatten_attributes(given))


# --- Exceptions --------------------------------------------------------------------------------------


def emit_exception(
    exception: BaseException, attributes: dict[str, Any] | None = None, propagate: bool = True
) -> SpanCoreFields:
    """Record an exception in the trace: its type, message and stack trace. The span's status is ``ERROR``.

    Args:
        exception: the exception; it need not have been raised.
        attributes: further attributes; nested values are flattened.
        propagate: whether the trace gets the span; otherwise it is only returned.

    Raises:
        TypeError: ``exception`` is not an exception.
        RuntimeError: no tracer is active.
    """
    if not isinstance(exception, BaseException):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{exception!r} is a {type(exception).__name__}; give an exception")
    status = TraceStatus(status_code="ERROR", description=f"{type(exception).__name__}: {exception}")
    details = as_attributes(attributes) | format_exception_attributes(exception)
    return emit(AGL_EXCEPTION, details, propagate, status)


# --- Messages ----------------------------------------------------------------------------------------

_BODY = LightningSpanAttributes.MESSAGE_BODY.value


def emit_message(message: str, attributes: dict[str, Any] | None = None, propagate: bool = True) -> SpanCoreFields:
    """Record a text in the trace.

    Args:
        message: the text.
        attributes: further attributes; nested values are flattened.
        propagate: whether the trace gets the span; otherwise it is only returned.

    Raises:
        TypeError: ``message`` is not a string.
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


# --- Objects -----------------------------------------------------------------------------------------

_TYPE = LightningSpanAttributes.OBJECT_TYPE.value
_LITERAL = LightningSpanAttributes.OBJECT_LITERAL.value
_JSON = LightningSpanAttributes.OBJECT_JSON.value


def emit_object(object: Any, attributes: dict[str, Any] | None = None, propagate: bool = True) -> SpanCoreFields:
    """Record a value in the trace: a scalar as it is, everything else as JSON.

    Args:
        object: a value that JSON can represent, or a pydantic model.
        attributes: further attributes; nested values are flattened.
        propagate: whether the trace gets the span; otherwise it is only returned.

    Raises:
        RuntimeError: JSON cannot represent it, or no tracer is active.
    """
    return emit(AGL_OBJECT, as_attributes(attributes) | encode_object(object), propagate)


def encode_object(object: Any) -> dict[str, Any]:
    """The attributes that carry a value: its type, and itself as a literal or as JSON.

    Raises:
        RuntimeError: JSON cannot represent it.
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
    """The value of an object span, decoded where it was written as JSON; None for other spans."""
    if span.name != AGL_OBJECT:
        return None
    attributes = span.attributes or {}
    if _LITERAL in attributes:
        return attributes[_LITERAL]
    text = attributes.get(_JSON, attributes.get(SpanAttributeNames.OBJECT.value))
    return json.loads(text) if isinstance(text, str) else None


# --- Tags and links: attributes for any emitter ------------------------------------------------------

_S = TypeVar("_S", bound=SpanLike)
_TAG = LightningSpanAttributes.TAG.value
_LINK = LightningSpanAttributes.LINK.value


def make_tag_attributes(tags: list[str]) -> dict[str, Any]:
    """The attributes that tag a span."""
    return flatten_attributes({_TAG: tags}, expand_leaf_lists=True)


def extract_tags_from_attributes(attributes: Mapping[str, Any]) -> list[str]:
    """The tags of a span, in order."""
    tags = filter_and_unflatten_attributes(attributes, _TAG)
    return [str(tag) for tag in (tags if isinstance(tags, list) else tags.values())]


def make_link_attributes(links: dict[str, str]) -> dict[str, Any]:
    """Attributes that link a span to all spans whose attribute (or ``trace_id``, ``span_id``) has the given value."""
    matches = [{"key_match": key, "value_match": value} for key, value in links.items()]
    return flatten_attributes({_LINK: matches})


def extract_links_from_attributes(attributes: Mapping[str, Any]) -> list[LinkPydanticModel]:
    """The links of a span, in order.

    Raises:
        pydantic.ValidationError: one lacks its key or its value.
    """
    links = filter_and_unflatten_attributes(attributes, _LINK)
    found = links if isinstance(links, list) else list(links.values())
    return [LinkPydanticModel.model_validate(link) for link in found]


def query_linked_spans(spans: Sequence[_S], links: list[LinkPydanticModel]) -> list[_S]:
    """The spans that all of the links point to, in their order."""
    return [span for span in spans if all(_matches(span, link) for link in links)]


def _matches(span: SpanLike, link: LinkPydanticModel) -> bool:
    if link.key_match in ("trace_id", "span_id"):
        return _id_of(span, link.key_match) == link.value_match
    attributes = span.attributes or {}
    return link.key_match in attributes and str(attributes[link.key_match]) == link.value_match


def _id_of(span: SpanLike, field: str) -> str | None:
    if isinstance(span, Span):
        return span.trace_id if field == "trace_id" else span.span_id
    context = span.get_span_context()
    if context is None:
        return None
    return format_trace_id(context.trace_id) if field == "trace_id" else format_span_id(context.span_id)
