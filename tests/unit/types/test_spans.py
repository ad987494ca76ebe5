from __future__ import annotations

import json
import math
import pickle
import time
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from agentlightning.types.spans import (
    Event,
    Link,
    OtelResource,
    Span,
    SpanAttributeNames,
    SpanContext,
    SpanCoreFields,
    SpanNames,
    TraceStatus,
)

NON_FINITE = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": [1.0, math.nan], "e": [math.inf, -math.inf]}
NON_FINITE_JSON = {
    "a": "NaN",
    "b": "Infinity",
    "c": "-Infinity",
    "d": [1.0, "NaN"],
    "e": ["Infinity", "-Infinity"],
}


class TestFromAttributes:
    def test_fills_what_is_not_given(self) -> None:
        before = time.time()
        span = Span.from_attributes(attributes={"a": 1})
        after = time.time()
        assert (span.rollout_id, span.attempt_id, span.sequence_id) == ("", "", 0)
        assert span.name == SpanNames.VIRTUAL == "agentlightning.virtual"
        assert type(span.name) is str
        assert span.status == TraceStatus(status_code="OK")
        assert span.attributes == {"a": 1}
        assert (span.events, span.links, span.parent_id, span.parent) == ([], [], None, None)
        assert span.start_time == span.end_time
        assert span.start_time is not None
        assert before <= span.start_time <= after
        assert span.resource == OtelResource(attributes={}, schema_url="")

    def test_makes_ids_of_the_right_shape_that_are_new_each_time(self) -> None:
        spans = [Span.from_attributes(attributes={}) for _ in range(100)]
        for span in spans:
            assert len(bytes.fromhex(span.trace_id)) == 16
            assert len(bytes.fromhex(span.span_id)) == 8
            assert span.context == SpanContext(
                trace_id=span.trace_id, span_id=span.span_id, is_remote=False, trace_state={}
            )
        assert len({span.trace_id for span in spans}) == len({span.span_id for span in spans}) == 100

    def test_keeps_what_is_given(self) -> None:
        given: dict[str, Any] = {
            "rollout_id": "ro",
            "attempt_id": "at",
            "sequence_id": 7,
            "name": "n",
            "trace_id": "0" * 31 + "1",
            "span_id": "0" * 15 + "2",
            "parent_id": "0" * 15 + "3",
            "start_time": 1.0,
            "end_time": 2.0,
            "resource": OtelResource(attributes={"service.name": "s"}, schema_url="u"),
            "status": TraceStatus(status_code="ERROR", description="no"),
        }
        span = Span.from_attributes(attributes={}, **given)
        for name, value in given.items():
            assert getattr(span, name) == value
        assert span.parent is not None
        assert (span.parent.trace_id, span.parent.span_id) == (span.trace_id, span.parent_id)

    def test_never_ends_before_it_starts(self) -> None:
        now = time.time()
        past, future = now - 100, now + 100
        assert Span.from_attributes(attributes={}, end_time=past).start_time == past
        assert Span.from_attributes(attributes={}, start_time=future).end_time == future
        open_end = Span.from_attributes(attributes={}, start_time=past).end_time
        assert open_end is not None
        assert now <= open_end < future

    def test_shares_no_attributes_with_the_caller(self) -> None:
        attributes: dict[str, Any] = {"a": 1}
        span = Span.from_attributes(attributes=attributes)
        attributes["b"] = 2
        assert span.attributes == {"a": 1}

    @pytest.mark.parametrize("value", [None, {"k": 1}, ["a", 1], [None], object()])
    def test_what_is_no_attribute_is_refused(self, value: Any) -> None:
        with pytest.raises(ValidationError):
            Span.from_attributes(attributes={"a": value})


class TestFromCoreFields:
    def test_takes_over_what_was_recorded(self) -> None:
        core = SpanCoreFields(
            name="n",
            status=TraceStatus(status_code="UNSET"),
            attributes={"a": [1, 2]},
            start_time=1.0,
            end_time=2.0,
        )
        span = Span.from_core_fields(core, rollout_id="ro", attempt_id="at", sequence_id=3)
        assert (span.name, span.attributes, span.start_time, span.end_time) == ("n", {"a": [1, 2]}, 1.0, 2.0)
        assert span.status.status_code == "UNSET"
        assert (span.rollout_id, span.attempt_id, span.sequence_id) == ("ro", "at", 3)

    def test_fills_in_the_rest(self) -> None:
        core = SpanCoreFields(
            name="n", status=TraceStatus(status_code="OK"), attributes={}, start_time=None, end_time=None
        )
        span = Span.from_core_fields(core)
        assert (span.rollout_id, span.attempt_id, span.sequence_id) == ("", "", 0)
        assert span.start_time is not None
        assert span.start_time == span.end_time


class TestJson:
    def test_a_span_round_trips(self) -> None:
        span = Span.from_attributes(
            attributes={
                "s": "x",
                "b": True,
                "i": 1,
                "f": 1.5,
                "ss": ["x"],
                "bs": [True, False],
                "is": [1],
                "fs": [0.5],
            },
            parent_id="0" * 16,
        )
        again = Span.model_validate_json(span.model_dump_json())
        assert again == span
        assert [type(value) for value in again.attributes.values()] == [str, bool, int, float, list, list, list, list]
        assert [type(item) for item in again.attributes["bs"]] == [bool, bool]  # type: ignore[union-attr]

    @pytest.mark.parametrize(
        "build",
        [
            lambda: Span.from_attributes(attributes=NON_FINITE),
            lambda: Event(name="e", attributes=NON_FINITE),
            lambda: Link(
                context=SpanContext(trace_id="t", span_id="s", is_remote=False, trace_state={}), attributes=NON_FINITE
            ),
            lambda: OtelResource(attributes=NON_FINITE, schema_url=""),
            lambda: SpanCoreFields(
                name="n",
                status=TraceStatus(status_code="OK"),
                attributes=NON_FINITE,
                start_time=None,
                end_time=None,
            ),
        ],
    )
    def test_non_finite_floats_travel_as_text(self, build: Any) -> None:
        record = build()
        first = record.model_dump_json()
        assert json.loads(first)["attributes"] == NON_FINITE_JSON
        again = type(record).model_validate_json(first)
        assert again.model_dump_json() == first
        assert (again.attributes["a"], again.attributes["b"], again.attributes["c"]) == ("NaN", "Infinity", "-Infinity")
        assert math.isnan(again.attributes["d"][1])

    def test_and_so_they_do_deep_inside_a_span(self) -> None:
        span = Span.from_attributes(attributes={}, resource=OtelResource(attributes=NON_FINITE, schema_url=""))
        span.events.append(Event(name="e", attributes=NON_FINITE))
        body = json.loads(span.model_dump_json())
        assert body["resource"]["attributes"] == body["events"][0]["attributes"] == NON_FINITE_JSON

    def test_the_outermost_model_decides(self) -> None:
        # Why the module's docstring warns: this is what pydantic does with a container of spans.
        span = Span.from_attributes(attributes={"a": math.nan})
        assert b'"attributes":{"a":null}' in TypeAdapter(list[Span]).dump_json([span])

    def test_extra_fields_are_kept_where_they_may_be(self) -> None:
        status = {"status_code": "OK", "why": 1}
        context = {"trace_id": "t", "span_id": "s", "is_remote": False, "trace_state": {}, "flags": 1}
        event = {"name": "e", "attributes": {}, "timestamp": None, "id": 1}
        link = {"context": context, "attributes": None, "kind": "x"}
        body = json.loads(Span.from_attributes(attributes={}).model_dump_json())
        body |= {"kind": "CLIENT", "status": status | {"description": None}, "context": context}
        body |= {"events": [event], "links": [link]}
        assert json.loads(Span.model_validate(body).model_dump_json()) == body

    def test_but_not_in_a_resource_or_in_core_fields(self) -> None:
        resource = OtelResource.model_validate({"attributes": {}, "schema_url": "", "more": 1})
        assert "more" not in resource.model_dump()

    @pytest.mark.parametrize("field", ["parent_id", "context", "parent", "resource", "start_time", "end_time"])
    def test_fields_that_may_be_null_have_to_be_there(self, field: str) -> None:
        body = Span.from_attributes(attributes={}).model_dump()
        del body[field]
        with pytest.raises(ValidationError, match=field):
            Span.model_validate(body)

    def test_only_the_three_status_codes_exist(self) -> None:
        with pytest.raises(ValidationError):
            TraceStatus.model_validate({"status_code": "FINE"})


def test_a_span_survives_pickle() -> None:
    span = Span.model_validate(Span.from_attributes(attributes={"a": [1]}).model_dump() | {"kind": "CLIENT"})
    again = pickle.loads(pickle.dumps(span))
    assert again == span
    assert again.kind == "CLIENT"


def test_names_are_plain_text() -> None:
    assert f"{SpanNames.REWARD}" == str(SpanNames.REWARD) == "agentlightning.reward"
    assert {name.name: name.value for name in SpanNames} == {
        "REWARD": "agentlightning.reward",
        "MESSAGE": "agentlightning.message",
        "OBJECT": "agentlightning.object",
        "EXCEPTION": "agentlightning.exception",
        "VIRTUAL": "agentlightning.virtual",
    }
    assert {name.value for name in SpanAttributeNames} == {"message", "object"}
