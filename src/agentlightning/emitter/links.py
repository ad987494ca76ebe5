"""Tags, and links from one span to others by what they say, as attributes for any emitter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from agentlightning.semconv import LightningSpanAttributes, LinkPydanticModel
from agentlightning.types import Span, SpanLike
from agentlightning.types.attributes import filter_and_unflatten_attributes, flatten_attributes
from agentlightning.types.otel import format_span_id, format_trace_id

__all__ = [
    "extract_links_from_attributes",
    "extract_tags_from_attributes",
    "make_link_attributes",
    "make_tag_attributes",
    "query_linked_spans",
]

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
    """The attributes that link a span to those whose attribute (or ``trace_id``, ``span_id``) has the given value."""
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
    """Those of the spans that all of the links point to, in their order."""
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
