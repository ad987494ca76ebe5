"""Spans: the trace events of an attempt.

The models are plain on purpose. Spans are the hottest path there is, so what they promise is
said by their types alone, and nothing is checked twice. All times are seconds since the Unix
epoch, as floats. All ids are hexadecimal text, as W3C Trace Context writes them.

Floats that are not finite travel through JSON as the texts ``"NaN"``, ``"Infinity"`` and
``"-Infinity"`` (as protobuf's JSON has them), and an attribute that was one is read back as
that text. pydantic takes this setting from the outermost model: a model or `TypeAdapter` that
contains spans has to set ``ser_json_inf_nan="strings"`` itself, or it writes null.
"""

from __future__ import annotations

import secrets
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, Union

from pydantic import BaseModel, ConfigDict

from agentlightning.errors import InvalidValue
from agentlightning.semconv import LightningSpanAttributes
from agentlightning.types.attributes import (
    Attributes,
    convert_attributes,
    convert_timestamp,
    dropped_parts,
    extract_extra_fields,
    format_span_id,
    format_trace_id,
)

if TYPE_CHECKING:
    from opentelemetry import trace as otel
    from opentelemetry.sdk import trace as otel_sdk
    from opentelemetry.sdk.resources import Resource as OtelSdkResource
    from opentelemetry.sdk.trace import ReadableSpan


TraceState: TypeAlias = dict[str, str]
"""What tracing systems pass along with a trace, by system (W3C Trace Context)."""

StatusCode: TypeAlias = Literal["UNSET", "OK", "ERROR"]
"""How the work that a span stands for ended, in OpenTelemetry's words. `UNSET`: nobody said."""


class SpanNames(StrEnum):
    """Names of the spans that agentlightning 0.2 made."""

    REWARD = "agentlightning.reward"
    MESSAGE = "agentlightning.message"
    OBJECT = "agentlightning.object"
    EXCEPTION = "agentlightning.exception"
    VIRTUAL = "agentlightning.virtual"


class SpanAttributeNames(StrEnum):
    """Names of the attributes that agentlightning 0.2 wrote."""

    MESSAGE = "message"
    OBJECT = "object"


class SpanContext(BaseModel):
    """What identifies a span in all the world. May carry extra fields."""

    model_config = ConfigDict(extra="allow")

    trace_id: str
    """32 hexadecimal digits."""
    span_id: str
    """16 hexadecimal digits."""
    is_remote: bool
    """Whether it came from another process."""
    trace_state: TraceState

    @classmethod
    def from_opentelemetry(cls, src: otel.SpanContext) -> SpanContext:
        """Return the same context as a record of ours."""
        state = dict(src.trace_state) if src.trace_state else {}
        ids = {"trace_id": format_trace_id(src.trace_id), "span_id": format_span_id(src.span_id)}
        return cls(**ids, is_remote=src.is_remote, trace_state=state, **extract_extra_fields(src, [*cls.model_fields]))


class TraceStatus(BaseModel):
    """How the work that a span stands for ended. May carry extra fields."""

    model_config = ConfigDict(extra="allow")

    status_code: StatusCode
    description: str | None = None
    """What went wrong, with `ERROR`."""

    @classmethod
    def from_opentelemetry(cls, src: otel.Status) -> TraceStatus:
        """Return the same status as a record of ours."""
        extra = extract_extra_fields(src, [*cls.model_fields])
        return cls(status_code=src.status_code.name, description=src.description, **extra)


class Event(BaseModel):
    """Something that happened at one moment of a span, such as an exception. May carry extra fields."""

    model_config = ConfigDict(extra="allow", ser_json_inf_nan="strings")

    name: str
    attributes: Attributes
    timestamp: float | None = None

    @classmethod
    def from_opentelemetry(cls, src: otel_sdk.Event) -> Event:
        """Return the same event as a record of ours."""
        attributes, timestamp = convert_attributes(src.attributes), convert_timestamp(src.timestamp)
        extra = extract_extra_fields(src, [*cls.model_fields])
        return cls(name=src.name, attributes=attributes, timestamp=timestamp, **extra)


class Link(BaseModel):
    """A pointer from a span to another that is not its parent. May carry extra fields."""

    model_config = ConfigDict(extra="allow", ser_json_inf_nan="strings")

    context: SpanContext
    attributes: Attributes | None = None

    @classmethod
    def from_opentelemetry(cls, src: otel.Link) -> Link:
        """Return the same link as a record of ours."""
        attributes = None if src.attributes is None else convert_attributes(src.attributes)
        extra = extract_extra_fields(src, [*cls.model_fields])
        return cls(context=SpanContext.from_opentelemetry(src.context), attributes=attributes, **extra)


class OtelResource(BaseModel):
    """What made a span: the service, its version, its process. OpenTelemetry's word; not one of our resources."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    attributes: Attributes
    schema_url: str

    @classmethod
    def from_opentelemetry(cls, src: OtelSdkResource) -> OtelResource:
        """Return the same resource as a record of ours."""
        return cls(attributes=convert_attributes(src.attributes), schema_url=src.schema_url or "")


class SpanCoreFields(BaseModel):
    """What a tracer knows of a span before it knows whose it is."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    name: str
    status: TraceStatus
    attributes: Attributes
    start_time: float | None
    end_time: float | None


class SpanRecordingContext(Protocol):
    """A span that is still open, as a tracer hands it out."""

    def record_exception(self, exception: BaseException) -> None:
        """Add the exception to the span, and set its status to `ERROR`."""
        ...

    def record_attributes(self, attributes: Attributes) -> None:
        """Add attributes to the span. One of the same name is replaced."""
        ...

    def record_status(self, status_code: StatusCode, description: str | None = None) -> None:
        """Set how the work ended. The last call counts."""
        ...

    def get_recorded_span(self) -> SpanCoreFields:
        """Return what was recorded up to now."""
        ...


class Span(BaseModel):
    """One trace event of an attempt. May carry extra fields."""

    model_config = ConfigDict(extra="allow", ser_json_inf_nan="strings")

    rollout_id: str
    attempt_id: str
    sequence_id: int
    """Orders the spans of an attempt. 0: the store gives it the next one when it takes the span."""
    trace_id: str
    span_id: str
    parent_id: str | None
    """The `span_id` of the parent. `None`: it has none."""
    name: str
    status: TraceStatus
    attributes: Attributes
    events: list[Event]
    links: list[Link]
    start_time: float | None
    end_time: float | None
    context: SpanContext | None
    parent: SpanContext | None
    resource: OtelResource
    """What made the span. Not one of our resources."""

    @classmethod
    def from_opentelemetry(cls, src: ReadableSpan, rollout_id: str, attempt_id: str, sequence_id: int) -> Span:
        """Return a span of the OpenTelemetry SDK as one of ours, under the given attempt.

        Nothing is lost but the kind and the instrumentation scope, and nothing is shared with `src`.

        Raises:
            InvalidValue: `src` has no span context, and so no ids.
        """
        context = src.get_span_context()
        if context is None:
            raise InvalidValue(f"the span {src.name!r} has no span context; only a span that a tracer made can be kept")
        own_context = SpanContext.from_opentelemetry(context)
        parent = None if src.parent is None else SpanContext.from_opentelemetry(src.parent)
        attributes = convert_attributes(src.attributes)
        cut = dropped_parts(src.dropped_attributes, src.dropped_events)
        if cut:
            attributes[LightningSpanAttributes.CUT.value] = cut
        return cls(
            rollout_id=rollout_id,
            attempt_id=attempt_id,
            sequence_id=sequence_id,
            trace_id=own_context.trace_id,
            span_id=own_context.span_id,
            parent_id=None if parent is None else parent.span_id,
            name=src.name,
            status=TraceStatus.from_opentelemetry(src.status),
            attributes=attributes,
            events=[Event.from_opentelemetry(event) for event in src.events],
            links=[Link.from_opentelemetry(link) for link in src.links],
            start_time=convert_timestamp(src.start_time),
            end_time=convert_timestamp(src.end_time),
            context=own_context,
            parent=parent,
            resource=OtelResource.from_opentelemetry(src.resource),
            **extract_extra_fields(src, [*cls.model_fields]),
        )

    @classmethod
    def from_attributes(
        cls,
        *,
        attributes: Attributes,
        rollout_id: str | None = None,
        attempt_id: str | None = None,
        sequence_id: int | None = None,
        name: str | None = None,
        trace_id: str | None = None,
        span_id: str | None = None,
        parent_id: str | None = None,
        start_time: float | None = None,
        end_time: float | None = None,
        resource: OtelResource | None = None,
        status: TraceStatus | None = None,
    ) -> Span:
        """Return a span that no tracer made, from its attributes and whatever else is known.

        What is not given is filled in: empty rollout and attempt ids, sequence id 0, random trace
        and span ids, the name `agentlightning.virtual`, status `OK`, the current time, an empty
        resource. It never ends before it starts, unless both times say so.

        Raises:
            pydantic.ValidationError: An attribute is not an `AttributeValue`.
        """
        now = time.time()
        if start_time is None:
            start_time = now if end_time is None else min(now, end_time)
        if end_time is None:
            end_time = max(now, start_time)
        trace_id = trace_id or secrets.token_hex(16)
        span_id = span_id or secrets.token_hex(8)
        return cls(
            rollout_id=rollout_id or "",
            attempt_id=attempt_id or "",
            sequence_id=sequence_id or 0,
            trace_id=trace_id,
            span_id=span_id,
            parent_id=parent_id,
            name=name or SpanNames.VIRTUAL.value,
            status=status or TraceStatus(status_code="OK"),
            attributes=attributes,
            events=[],
            links=[],
            start_time=start_time,
            end_time=end_time,
            context=_local_context(trace_id, span_id),
            parent=_local_context(trace_id, parent_id) if parent_id else None,
            resource=resource or OtelResource(attributes={}, schema_url=""),
        )

    @classmethod
    def from_core_fields(
        cls,
        core: SpanCoreFields,
        *,
        rollout_id: str | None = None,
        attempt_id: str | None = None,
        sequence_id: int | None = None,
    ) -> Span:
        """Return a full span from what a tracer recorded. The rest is filled in as by `from_attributes`."""
        known: dict[str, Any] = {name: getattr(core, name) for name in SpanCoreFields.model_fields}
        return cls.from_attributes(**known, rollout_id=rollout_id, attempt_id=attempt_id, sequence_id=sequence_id)


# Quoted, and so left unresolved when the program runs: importing OpenTelemetry takes longer than the rest of us.
SpanLike: TypeAlias = Union["ReadableSpan", Span]
"""A span, of the OpenTelemetry SDK or ours."""


def _local_context(trace_id: str, span_id: str) -> SpanContext:
    return SpanContext(trace_id=trace_id, span_id=span_id, is_remote=False, trace_state={})
