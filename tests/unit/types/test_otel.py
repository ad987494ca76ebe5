"""Spans of the real OpenTelemetry SDK, and odd values it may hold."""

from __future__ import annotations

import json
import math
import pickle
import time
from collections.abc import Mapping
from enum import IntEnum, StrEnum
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, strategies as st
from opentelemetry import trace as api
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.trace import StatusCode

from agentlightning.errors import InvalidValue
from agentlightning.types.attributes import convert_attributes
from agentlightning.types.spans import Span, SpanContext, convert_timestamp, extract_extra_fields

START, END = 1_700_000_000_123_456_789, 1_700_000_001_500_000_000


def make_provider() -> TracerProvider:
    return TracerProvider(resource=Resource({"service.name": "agent", "ports": (1, 2)}, "https://schema/1"))


def make_span(**attributes: Any) -> ReadableSpan:
    span = make_provider().get_tracer("test").start_span("n", attributes=attributes)
    span.end()
    assert isinstance(span, ReadableSpan)
    return span


class Colour(StrEnum):
    RED = "red"


class Level(IntEnum):
    HIGH = 3


class TestARealSpan:
    @pytest.fixture
    def both(self) -> tuple[ReadableSpan, Span]:
        tracer = make_provider().get_tracer("test")
        state = api.TraceState([("vendor", "value")])
        remote = api.SpanContext(0xABC, 0xDEF, is_remote=True, trace_flags=api.TraceFlags(1), trace_state=state)
        within = api.set_span_in_context(api.NonRecordingSpan(remote))
        linked = api.SpanContext(0x1, 0x2, is_remote=False)
        source = tracer.start_span(
            "call",
            context=within,
            links=[api.Link(linked, {"why": "cause"})],
            attributes={"s": "x", "b": True, "i": 1, "f": 0.5, "list": ("a", "b")},
            start_time=START,
        )
        source.add_event("tick", {"n": (1, 2)}, timestamp=START + 500_000_000)
        try:
            raise RuntimeError("boom")
        except RuntimeError as error:
            source.record_exception(error)
            source.set_status(StatusCode.ERROR, "boom")
        source.end(END)
        assert isinstance(source, ReadableSpan)
        return source, Span.from_opentelemetry(source, "ro-1", "at-1", 4)

    def test_belongs_to_the_attempt(self, both: tuple[ReadableSpan, Span]) -> None:
        _, span = both
        assert (span.rollout_id, span.attempt_id, span.sequence_id) == ("ro-1", "at-1", 4)

    def test_ids_are_hexadecimal(self, both: tuple[ReadableSpan, Span]) -> None:
        source, span = both
        context = source.get_span_context()
        assert context is not None
        assert span.trace_id == f"{0xABC:032x}" == api.format_trace_id(context.trace_id)
        assert span.span_id == api.format_span_id(context.span_id)
        assert span.context == SpanContext(
            trace_id=span.trace_id, span_id=span.span_id, is_remote=False, trace_state={"vendor": "value"}
        )

    def test_parent(self, both: tuple[ReadableSpan, Span]) -> None:
        _, span = both
        assert span.parent_id == f"{0xDEF:016x}"
        assert span.parent == SpanContext(
            trace_id=f"{0xABC:032x}", span_id=f"{0xDEF:016x}", is_remote=True, trace_state={"vendor": "value"}
        )

    def test_times_are_seconds(self, both: tuple[ReadableSpan, Span]) -> None:
        _, span = both
        assert span.start_time == pytest.approx(1_700_000_000.123456789, abs=1e-6)
        assert span.end_time == 1_700_000_001.5
        assert span.events[0].timestamp == pytest.approx(1_700_000_000.623456789, abs=1e-6)

    def test_attributes_are_plain(self, both: tuple[ReadableSpan, Span]) -> None:
        _, span = both
        assert span.attributes == {"s": "x", "b": True, "i": 1, "f": 0.5, "list": ["a", "b"]}
        assert type(span.attributes) is dict
        assert type(span.attributes["list"]) is list

    def test_events_and_the_exception(self, both: tuple[ReadableSpan, Span]) -> None:
        _, span = both
        tick, exception = span.events
        assert (tick.name, tick.attributes) == ("tick", {"n": [1, 2]})
        assert exception.name == "exception"
        assert exception.attributes["exception.type"] == "RuntimeError"
        assert exception.attributes["exception.message"] == "boom"
        assert "raise RuntimeError" in str(exception.attributes["exception.stacktrace"])

    def test_status(self, both: tuple[ReadableSpan, Span]) -> None:
        _, span = both
        assert (span.status.status_code, span.status.description) == ("ERROR", "boom")

    def test_links(self, both: tuple[ReadableSpan, Span]) -> None:
        _, span = both
        (link,) = span.links
        assert (link.context.trace_id, link.context.span_id) == (f"{1:032x}", f"{2:016x}")
        assert link.attributes == {"why": "cause"}

    def test_resource(self, both: tuple[ReadableSpan, Span]) -> None:
        _, span = both
        assert span.resource.attributes == {"service.name": "agent", "ports": [1, 2]}
        assert span.resource.schema_url == "https://schema/1"

    def test_nothing_of_the_sdk_comes_along(self, both: tuple[ReadableSpan, Span]) -> None:
        _, span = both
        assert span.model_extra == {}
        assert Span.model_validate_json(span.model_dump_json()) == span
        assert pickle.loads(pickle.dumps(span)) == span


def test_a_root_span_that_is_still_open() -> None:
    source = make_provider().get_tracer("test").start_span("n")
    assert isinstance(source, ReadableSpan)
    span = Span.from_opentelemetry(source, "r", "a", 0)
    assert (span.parent, span.parent_id, span.end_time) == (None, None, None)
    assert span.status.status_code == "UNSET"
    assert span.start_time == pytest.approx(time.time(), abs=5)


def test_a_span_without_a_context_is_refused() -> None:
    with pytest.raises(InvalidValue, match="'bare' has no span context"):
        Span.from_opentelemetry(ReadableSpan("bare"), "r", "a", 1)


def test_a_link_without_attributes() -> None:
    tracer = make_provider().get_tracer("test")
    context = api.SpanContext(1, 2, is_remote=False)
    source = tracer.start_span("n", links=[api.Link(context), api.Link(context, {})])
    assert isinstance(source, ReadableSpan)
    assert [link.attributes or {} for link in Span.from_opentelemetry(source, "r", "a", 1).links] == [{}, {}]


def test_non_finite_attributes_of_the_sdk() -> None:
    span = Span.from_opentelemetry(make_span(a=math.nan, b=(1.0, math.inf)), "r", "a", 1)
    assert json.loads(span.model_dump_json())["attributes"] == {"a": "NaN", "b": [1.0, "Infinity"]}


def test_public_extras_of_other_implementations_are_kept() -> None:
    source = make_span()
    source.cost = 0.25  # type: ignore[attr-defined]
    source.client = object()  # type: ignore[attr-defined]
    span = Span.from_opentelemetry(source, "r", "a", 1)
    assert span.model_extra == {"cost": 0.25}


class TestConvertAttributes:
    @pytest.mark.parametrize("nothing", [None, {}])
    def test_none_at_all(self, nothing: dict[str, Any] | None) -> None:
        assert convert_attributes(nothing) == {}

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ((), []),
            (("a",), ["a"]),
            ((True, False), [True, False]),
            ((1, 2), [1, 2]),
            ((1, 2.5), [1.0, 2.5]),
            ((10**400, 0.5), f"[{10**400},0.5]"),
            (None, ""),
            (b"\x00\xff", "AP8="),
            (bytearray(b"\x00\xff"), "AP8="),
            (("a", None), '["a",null]'),
            (("a", 1), '["a",1]'),
            ((True, 1), "[true,1]"),
            (((1,), (2,)), "[[1],[2]]"),
            ({"k": ("ä", None)}, '{"k":["ä",null]}'),
            (({"k": b"\x00\xff"}, math.nan, math.inf, -math.inf), '[{"k":"AP8="},"NaN","Infinity","-Infinity"]'),
            ({1: {2: object}}, '{"1":{"2":"' + str(object) + '"}}'),
            (Colour.RED, "red"),
            (Level.HIGH, 3),
            ({"k": Colour.RED}, '{"k":"red"}'),
            (frozenset({1}), "frozenset({1})"),
        ],
    )
    def test_odd_values(self, value: Any, expected: Any) -> None:
        converted = convert_attributes({"a": value})["a"]
        assert converted == expected
        assert type(converted) is type(expected)

    def test_a_float_of_a_subclass(self) -> None:
        class Precise(float):
            pass

        assert type(convert_attributes({"a": Precise(1.5)})["a"]) is float

    def test_shares_nothing_with_the_source(self) -> None:
        items = ["a"]
        converted = convert_attributes({"a": items})
        items.append("b")
        assert converted == {"a": ["a"]}

    @given(
        st.dictionaries(
            st.text(min_size=1),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
                lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(min_size=1), inner, max_size=4),
                max_leaves=8,
            ),
            max_size=4,
        )
    )
    def test_whatever_the_sdk_takes_becomes_a_span_that_travels(self, attributes: Mapping[str, Any]) -> None:
        source = ReadableSpan("n", context=api.SpanContext(1, 2, is_remote=False), attributes=dict(attributes))
        span = Span.from_opentelemetry(source, "r", "a", 1)
        assert set(span.attributes) == set(attributes)
        text = span.model_dump_json()
        assert Span.model_validate_json(text).model_dump_json() == text


class TestConvertTimestamp:
    @pytest.mark.parametrize(
        ("timestamp", "seconds"),
        [
            (None, None),
            (0, 0.0),
            (1_700_000_000, 1_700_000_000.0),
            (1_700_000_000.25, 1_700_000_000.25),
            (START, 1_700_000_000.1234567),
            (END, 1_700_000_001.5),
            (1_000_000_000_000, 1000.0),
        ],
    )
    def test_nanoseconds_become_seconds(self, timestamp: float | None, seconds: float | None) -> None:
        converted = convert_timestamp(timestamp)
        assert converted == (None if seconds is None else pytest.approx(seconds, abs=1e-6))
        assert converted is None or type(converted) is float

    @given(st.integers(min_value=1_000_000_000, max_value=4_000_000_000))
    def test_converting_twice_changes_nothing(self, second: int) -> None:
        once = convert_timestamp(second * 10**9)
        assert once == second
        assert convert_timestamp(once) == once


class TestExtractExtraFields:
    def test_takes_public_attributes_that_json_can_hold(self) -> None:
        source = SimpleNamespace(name="n", kind="CLIENT", tags=["a"], _private=1, lock=object(), cycle=None)
        source.cycle = [source]
        assert extract_extra_fields(source, ["name"]) == {"kind": "CLIENT", "tags": ["a"]}

    def test_of_a_list_in_itself(self) -> None:
        knot: list[Any] = []
        knot.append(knot)
        assert extract_extra_fields(SimpleNamespace(knot=knot), []) == {}

    def test_of_an_object_without_attributes(self) -> None:
        assert extract_extra_fields((1, 2), []) == {}
