"""The quick way to convert a span gives what the plain way gives, except that it mends what no store takes."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any, cast

import pytest
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.trace import Link, SpanContext, Status, StatusCode, TraceFlags
from opentelemetry.trace.span import TraceState

from agentlightning.store.span_json import encode_quickly, encode_span
from agentlightning.tracer.conversion import SpanConverter
from agentlightning.types import Span


class _Ended(SpanProcessor):
    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self.spans.append(span)


@pytest.fixture
def ended() -> _Ended:
    return _Ended()


@pytest.fixture
def tracer(ended: _Ended) -> trace.Tracer:
    provider = TracerProvider(resource=Resource({"service.name": "test"}), shutdown_on_exit=False)
    provider.add_span_processor(ended)
    return provider.get_tracer("test")


def both(span: ReadableSpan) -> tuple[Span, Span]:
    return SpanConverter().convert(span, "ro-1", "at-1").to_span(), Span.from_opentelemetry(span, "ro-1", "at-1", 0)


def test_the_two_ways_agree(tracer: trace.Tracer, ended: _Ended) -> None:
    remote = SpanContext(7, 8, True, TraceFlags(1), TraceState([("k", "v")]))
    with tracer.start_as_current_span("outer", links=[Link(remote, {"a": 1})]) as outer:
        outer.set_attributes(
            {"s": "text", "i": 1, "f": 0.5, "b": True, "l": [1, 2], "m": ["x"], "non-ascii": "é", "nan": math.nan}
        )
        outer.add_event("event", {"x": 1})
        with pytest.raises(ValueError), tracer.start_as_current_span("inner"):
            raise ValueError("inside")
        with tracer.start_as_current_span("ok") as span:
            span.set_status(Status(StatusCode.OK))
    for each in ended.spans:
        quick, plain = both(each)
        assert quick.model_dump_json() == plain.model_dump_json()
        assert quick.__pydantic_extra__ == plain.__pydantic_extra__
        assert quick.model_fields_set == plain.model_fields_set
        assert Span.model_validate(quick.model_dump()).model_dump_json() == plain.model_dump_json()


def test_the_result_is_a_span_like_any_other(tracer: trace.Tracer, ended: _Ended) -> None:
    with tracer.start_as_current_span("a", attributes={"x": 1}):
        pass
    quick, plain = both(ended.spans[0])
    assert quick == plain
    assert pickle.loads(pickle.dumps(quick)) == quick
    assert quick.model_copy(update={"name": "b"}, deep=True).name == "b"
    quick.more = 1  # pyright: ignore[reportAttributeAccessIssue]
    assert quick.model_dump()["more"] == 1
    another, _ = both(ended.spans[0])
    assert "more" not in another.model_dump()


def test_a_nested_span_is_encoded_the_fast_way(tracer: trace.Tracer, ended: _Ended) -> None:
    with tracer.start_as_current_span("a"), tracer.start_as_current_span("b", attributes={"x": 1}):
        pass
    assert all(encode_quickly(both(span)[0]) is not None for span in ended.spans)


@pytest.mark.parametrize(
    ("name", "attributes", "mended"),
    [
        ("a", {"x": "nul \0"}, ["attributes.x"]),
        ("a", {"x": "lone \ud800"}, ["attributes.x"]),
        ("a", {"x": ["ok", "nul \0"]}, ["attributes.x"]),
        ("a", {"x": 2**63}, ["attributes.x"]),
        ("a", {"x": [2**70, 1]}, ["attributes.x"]),
        ("a", {"nul\0": 1}, ["attributes.nul\ufffd"]),
        ("a\0", {"x": 1}, ["name"]),
        ("a", {"agentlightning.reward.0.value": math.nan}, ["attributes.agentlightning.reward.0.value"]),
        ("a", {"x": "y" * 5_000_000, "small": "kept"}, ["attributes.x"]),
        ("a", {"x": "\x01" * 1_000_000}, ["attributes.x"]),
        ("a", {"x": list(range(600_000))}, ["attributes.x"]),
        ("y" * 5_000_000, {}, ["name"]),
    ],
    ids=range(12),
)
def test_what_no_store_takes_is_mended_and_marked(
    tracer: trace.Tracer, ended: _Ended, name: str, attributes: dict[str, Any], mended: list[str]
) -> None:
    with tracer.start_as_current_span(name, attributes=attributes):
        pass
    span, _ = both(ended.spans[0])
    body = json.loads(encode_span(span))
    assert body["attributes"]["agentlightning.mended"] == mended
    assert body["attributes"].get("small") == attributes.get("small")


LONG = {"prompt_token_ids": list(range(262_144)), "response_logprobs": [-0.12345678901234567] * 32_768}
"""Of the longest prompt and reply, in nearly all of what a span may take."""


@pytest.mark.parametrize("where", ["attributes", "events"])
def test_texts_are_cut_before_numbers(tracer: trace.Tracer, ended: _Ended, where: str) -> None:
    with tracer.start_as_current_span("chat", attributes=LONG | {"texts": ["y" * 900_000] * 2}) as span:
        for _ in range(5):
            span.add_event("a", {"large": "y" * 2_000_000} if where == "events" else {})
        span.set_attribute("large", "y" * 3_000_000)
    converted, _ = both(ended.spans[0])
    encode_span(converted)
    assert {name: converted.attributes[name] for name in LONG} == LONG
    assert converted.attributes["agentlightning.cut"] == converted.attributes["agentlightning.mended"]
    assert "attributes.large" in cast("list[str]", converted.attributes["agentlightning.cut"])


def test_numbers_that_cannot_be_kept_whole_are_not_there(tracer: trace.Tracer, ended: _Ended) -> None:
    ids = list(range(100_000, 800_000))
    with tracer.start_as_current_span("chat", attributes=LONG | {"response_token_ids": ids, "text": "y" * 100_000}):
        pass
    converted, _ = both(ended.spans[0])
    encode_span(converted)
    assert "response_token_ids" not in converted.attributes
    assert {name: converted.attributes[name] for name in LONG} == LONG
    assert "attributes.response_token_ids" in cast("list[str]", converted.attributes["agentlightning.cut"])


def test_what_a_limit_dropped_is_told(tracer: trace.Tracer, ended: _Ended) -> None:
    """By default, OpenTelemetry keeps 128 attributes and 128 events: the newest."""
    with tracer.start_as_current_span("a", attributes={f"a{number}": 1 for number in range(129)}):
        pass
    with tracer.start_as_current_span("b", attributes={f"a{number}": 1 for number in range(128)}) as span:
        for _ in range(129):
            span.add_event("e")
    with tracer.start_as_current_span("c", attributes={f"a{number}": 1 for number in range(128)}):
        pass
    for span, cut in zip(ended.spans, (["attributes"], ["events"], None), strict=True):
        quick, plain = both(span)
        assert quick.model_dump_json() == plain.model_dump_json()
        assert quick.attributes.get("agentlightning.cut") == cut


def test_events_links_and_status_are_mended_too(tracer: trace.Tracer, ended: _Ended) -> None:
    with tracer.start_as_current_span("a", links=[Link(SpanContext(7, 8, False), {"l": "\0"})]) as span:
        span.add_event("e\0", {"x": "\ud800", "large": "y" * 5_000_000})
        span.set_status(StatusCode.ERROR, "bad \0")
    mended, _ = both(ended.spans[0])
    encode_span(mended)
    assert set(cast("list[str]", mended.attributes["agentlightning.mended"])) == {
        "description",
        "events.0.attributes.large",
        "events.0.name",
        "events.0.x",
        "links.0.l",
    }


def test_pairs_of_surrogates_become_the_character_they_mean(tracer: trace.Tracer, ended: _Ended) -> None:
    with tracer.start_as_current_span("a", attributes={"x": "\ud83d\ude00 \udc00"}):
        pass
    assert both(ended.spans[0])[0].attributes["x"] == "\U0001f600 \ufffd"


def test_the_limits_are_needed() -> None:
    """Without mending, these spans are refused: the store's limits are not tighter than those here assume."""
    for attributes in ({"x": "\0"}, {"x": "\ud800"}, {"x": 2**63}, {"x": "y" * 5_000_000}):
        with pytest.raises(ValueError):
            encode_span(
                Span.model_construct(**{**Span.from_attributes(attributes={}).__dict__, "attributes": attributes})
            )
