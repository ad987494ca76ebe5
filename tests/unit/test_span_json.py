"""The plain span struct accepts and refuses what the pydantic record does, and gives the same values and bytes."""

from __future__ import annotations

import datetime
import decimal
import enum
import json
import math
import time

import pytest
from hypothesis import given, strategies as st

from agentlightning.errors import InvalidId, InvalidValue, NotJson, TooLarge
from agentlightning.store.arguments import span_drafts
from agentlightning.store.span_json import encode_any_body, encode_quickly, encode_span, read_span, span_json
from agentlightning.types import Event, Link, OtelResource, Span, SpanContext, TraceStatus
from agentlightning.types.plain_spans import (
    PlainSpan,
    PlainStatus,
    count_keys,
    decode_plain,
    encode_plain,
    plain_of,
)

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
    body = encode_any_body(span)
    slow = span_json(span.rollout_id, span.attempt_id, span.sequence_id, body)
    fast = encode_quickly(span)
    assert fast is None or json.loads(fast) == json.loads(slow)
    whole = fast or slow
    again = Span.model_validate_json(whole)
    assert again.model_dump_json() == span.model_dump_json()
    quick = read_span(whole)
    assert (
        quick.model_dump_json() == again.model_dump_json()
    )  # a list with "NaN" is read as numbers, and NaN is not NaN
    assert quick.model_fields_set == again.model_fields_set
    assert quick.__pydantic_extra__ == again.__pydantic_extra__


@given(spans)
def test_a_plain_span_is_the_record_in_another_form(span: Span) -> None:
    plain = plain_of(span)
    if plain is None:
        return
    whole = encode_plain(plain)
    assert plain.to_span() == span
    assert plain_of(plain) == plain
    assert decode_plain(whole) == plain
    assert json.loads(whole) == json.loads(span.model_dump_json())
    assert count_keys(plain) == _keys(json.loads(whole))
    [draft], [other] = span_drafts([plain]), span_drafts([span])
    assert draft == other


def _keys(value: object) -> int:
    if isinstance(value, dict):
        return len(value) + sum(map(_keys, value.values()))
    return sum(map(_keys, value)) if isinstance(value, list) else 0


class _Text(str):
    pass


class _Number(enum.IntEnum):
    ONE = 1


class _Word(enum.StrEnum):
    A = "a"


class _Any(enum.Enum):
    A = "a"


@pytest.mark.parametrize(
    "value",
    [
        _Text("a"),
        _Number.ONE,
        _Word.A,
        _Any.A,
        (1, 2),
        {1},
        frozenset("a"),
        b"x",
        bytearray(b"x"),
        datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
        decimal.Decimal("1.5"),
        [decimal.Decimal("1.5")],
        [b"x"],
        [_Word.A],
        None,
        {},
        {"a": 1},
        [1, 2.5],
        [True, 1],
        ["a", 1],
        [None],
        [[1]],
        [math.nan],
        range(3),
        1 + 2j,
        2**63,
        -(2**63) - 1,
        [2**63],
        2**63 - 1,
        -(2**63),
    ],
    ids=repr,
)
@pytest.mark.parametrize("place", ["attributes", "resource", "event", "link", "key"])
def test_odd_values_fare_as_with_pydantic(value: object, place: str) -> None:
    if place == "key":
        try:
            attributes: dict[object, object] = {value: 1}
        except TypeError:
            return
        span = plain(attributes=attributes)
    elif place == "attributes":
        span = plain(attributes={"a": value})
    elif place == "resource":
        span = plain(resource=OtelResource.model_construct(attributes={"a": value}, schema_url=""))
    elif place == "event":
        span = plain(events=[Event.model_construct(name="e", attributes={"a": value}, timestamp=None)])
    else:
        context = SpanContext(trace_id="a", span_id="b", is_remote=False, trace_state={})
        span = plain(links=[Link.model_construct(context=context, attributes={"a": value})])
    try:
        expected = json.loads(encode_any_body(span))
    except (NotJson, InvalidValue) as error:
        with pytest.raises(type(error)):
            encode_span(span)
    else:
        assert {**json.loads(encode_span(span)), **expected} == json.loads(encode_span(span))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": 1},
        {"name": b"x"},
        {"parent_id": 3},
        {"attributes": {"a": object()}},
        {"attributes": {"a": "\ud800"}},
        {"attributes": {"a": 2**63}},
        {"attributes": [1]},
        {"start_time": "now"},
        {"events": None},
        {"status": "OK"},
        {"resource": None},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_a_plain_span_that_could_not_be_read_back_is_refused(changes: dict[str, object]) -> None:
    """A struct checks no type when it is made, so the store does."""
    span = plain_of(plain())
    assert isinstance(span, PlainSpan)
    for name, value in changes.items():
        setattr(span, name, value)
    with pytest.raises(NotJson, match=span.span_id):
        encode_span(span)


def test_what_pydantic_would_change_is_not_plain() -> None:
    whole = json.loads(plain().model_dump_json())
    for path, value in (
        ("is_remote", "yes"),
        ("trace_state", {"a": 1}),
        ("span_id", None),
    ):
        assert decode_plain(json.dumps({**whole, "context": {**whole["context"], path: value}}).encode()) is None
    assert decode_plain(json.dumps({**whole, "start_time": "1.5"}).encode()) is None
    assert decode_plain(json.dumps({**whole, "more": 1}).encode()) is None
    assert decode_plain(b"[]") is None
    assert decode_plain(b"[" * 100_000) is None


def test_non_finite_numbers_of_a_plain_span_become_texts() -> None:
    span = plain_of(plain())
    assert span is not None
    span.attributes = {"a": math.nan, "b": [math.inf, 1.0]}
    assert json.loads(encode_span(span))["attributes"] == {"a": "NaN", "b": ["Infinity", 1.0]}
    span.status = PlainStatus("ERROR", "x")
    assert json.loads(encode_span(span))["status"] == {"status_code": "ERROR", "description": "x"}


@given(st.dictionaries(texts, scalars, max_size=4))
def test_scalar_attributes_take_the_fast_way(attributes: dict[str, str | bool | int | float]) -> None:
    assert encode_quickly(plain(attributes=attributes)) is not None


def test_token_ids_and_a_parent_take_the_fast_way() -> None:
    parent = SpanContext(trace_id="a", span_id="b", is_remote=False, trace_state={})
    attributes = {"ids": [1, 2], "logprobs": [-0.5, 0.0], "names": ["a"], "flags": [True], "none": []}
    span = plain(attributes=attributes, parent=parent, parent_id="b")
    fast = encode_quickly(span)
    assert fast is not None
    assert json.loads(fast) == json.loads(span_json("ro-1", "at-1", 0, encode_any_body(span)))


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
    assert plain_of(span) is None or encode_quickly(span) is None
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
