"""The fast way to encode a span gives what pydantic gives, and takes only what pydantic takes."""

from __future__ import annotations

import json
import math
import time

import pytest
from hypothesis import given, strategies as st

from agentlightning.errors import InvalidId, InvalidValue, NotJson, TooLarge
from agentlightning.store.span_json import encode_any, encode_plain, encode_span, span_json
from agentlightning.types import Event, Link, OtelResource, Span, SpanContext, TraceStatus

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
scalars = st.one_of(
    texts, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False)
)
values = st.one_of(scalars, st.lists(texts, max_size=3), st.lists(st.floats(), max_size=3), st.floats())
times = st.none() | st.floats(0, 2e9)
contexts = st.builds(
    SpanContext,
    trace_id=texts,
    span_id=texts,
    is_remote=st.booleans(),
    trace_state=st.dictionaries(texts, texts, max_size=1),
)
statuses = st.builds(TraceStatus, status_code=st.sampled_from(["UNSET", "OK", "ERROR"]), description=st.none() | texts)
spans = st.builds(
    Span,
    rollout_id=st.just("ro-1"),
    attempt_id=st.just("at-1"),
    sequence_id=st.integers(0, 100),
    trace_id=texts,
    span_id=st.just("s-1"),
    parent_id=st.none() | texts,
    name=texts,
    status=statuses,
    attributes=st.dictionaries(
        texts.filter(lambda name: not name.startswith(("reward", "agentl"))), values, max_size=4
    ),
    events=st.lists(st.builds(Event, name=texts, attributes=st.dictionaries(texts, scalars, max_size=2)), max_size=1),
    links=st.lists(st.builds(Link, context=contexts), max_size=1),
    start_time=times,
    end_time=times,
    context=st.none() | contexts,
    parent=st.none() | contexts,
    resource=st.builds(OtelResource, attributes=st.dictionaries(texts, scalars, max_size=2), schema_url=texts),
)


def plain(**changes: object) -> Span:
    span = Span.from_attributes(rollout_id="ro-1", attempt_id="at-1", attributes={"a": 1})
    return span.model_copy(update=changes)


@given(spans)
def test_both_ways_give_the_same_and_it_reads_back(span: Span) -> None:
    body = encode_any(span)
    fast = encode_plain(span)
    assert fast is None or json.loads(fast) == json.loads(body)
    again = Span.model_validate_json(span_json(span.rollout_id, span.attempt_id, span.sequence_id, fast or body))
    assert again.model_dump_json() == span.model_dump_json()


@given(st.dictionaries(texts, scalars, max_size=4))
def test_scalar_attributes_take_the_fast_way(attributes: dict[str, str | bool | int | float]) -> None:
    assert encode_plain(plain(attributes=attributes)) is not None


def test_token_ids_and_a_parent_take_the_fast_way() -> None:
    parent = SpanContext(trace_id="a", span_id="b", is_remote=False, trace_state={})
    attributes = {"ids": [1, 2], "logprobs": [-0.5, 0.0], "names": ["a"], "flags": [True], "none": []}
    span = plain(attributes=attributes, parent=parent, parent_id="b")
    fast = encode_plain(span)
    assert fast is not None
    assert json.loads(fast) == json.loads(encode_any(span))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": 1},
        {"trace_id": None},
        {"parent_id": 3},
        {"attributes": {"a": object()}},
        {"attributes": {"a": {"b": object()}}},
        {"attributes": {1: "a"}},
        {"attributes": [1]},
        {"attributes": {"a": 2**63}},
        {"attributes": {"a": "\ud800"}},
        {"attributes": {"a": [2**63]}},
        {"attributes": {"a": ["\ud800"]}},
        {"attributes": {"a": [[1]]}},
        {"name": "\ud800"},
        {"status": "OK"},
        {"status": TraceStatus.model_construct(status_code="FINE", description=None)},
        {"resource": None},
        {"resource": OtelResource.model_construct(attributes={"a": object()}, schema_url="")},
        {"events": None},
        {"events": ["x"]},
        {"links": "x"},
        {"parent": 1},
        {"context": 1},
        {"context": SpanContext.model_construct(trace_id=1, span_id="", is_remote=False, trace_state={})},
        {"start_time": "now"},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_a_span_that_could_not_be_read_back_is_refused(changes: dict[str, object]) -> None:
    span = plain(**changes)
    assert encode_plain(span) is None
    with pytest.raises(NotJson, match=span.span_id):
        encode_span(span)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers(value: float) -> None:
    body = encode_span(plain(attributes={"a": value}))
    assert json.loads(body)["attributes"]["a"] == {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)]
    for changes in (
        {"start_time": value},
        {"end_time": value},
        {"attributes": {"agentlightning.reward.0.value": value}},
    ):
        with pytest.raises(InvalidValue, match="finite"):
            encode_span(plain(**changes))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"span_id": "a\0"}, InvalidId),
        ({"span_id": ""}, InvalidId),
        ({"sequence_id": -1}, InvalidValue),
        ({"sequence_id": 2**53}, InvalidValue),
        ({"sequence_id": 1.0}, InvalidValue),
        ({"attributes": {"a": "\0"}}, NotJson),
        ({"attributes": {"a": "x" * 5_000_000}}, TooLarge),
    ],
)
def test_what_no_store_takes(changes: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        encode_span(plain(**changes))


def test_a_backslash_before_u0000_is_no_nul() -> None:
    assert encode_span(plain(attributes={"a": "\\u0000"}))


def test_deep_nesting_in_an_extra_field_is_refused() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    began = time.monotonic()
    with pytest.raises((NotJson, TooLarge)):
        encode_span(Span.model_construct(**{**plain().__dict__, "extra": deep}))
    assert time.monotonic() - began < 5
