"""Spans from bytes: the quick way and the way through pydantic accept, refuse and store the same."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, strategies as st
from pydantic import ValidationError

from agentlightning.errors import AgentLightningError, NotJson
from agentlightning.http.codec import decode_strict
from agentlightning.http.server.span_intake import drafts_of, plain_drafts, plain_report
from agentlightning.store.arguments import span_drafts
from agentlightning.store.operations.spans import SpanDraft
from agentlightning.store.span_json import span_json
from agentlightning.types import Span

PLAIN: dict[str, Any] = {
    "rollout_id": "ro-1",
    "attempt_id": "at-1",
    "sequence_id": 0,
    "trace_id": "0" * 32,
    "span_id": "1" * 16,
    "parent_id": None,
    "name": "call é",
    "status": {"status_code": "OK", "description": None},
    "attributes": {"a": "x", "b": 1, "c": 2.5, "d": True, "{": '"}'},
    "events": [],
    "links": [],
    "start_time": 1.5,
    "end_time": None,
    "context": {"trace_id": "0" * 32, "span_id": "1" * 16, "is_remote": False, "trace_state": {}},
    "parent": None,
    "resource": {"attributes": {"service.name": "s"}, "schema_url": ""},
}

Outcome = tuple[str, int, Any] | str


def _by_pydantic(raw: bytes) -> Outcome:
    """What the quick way must agree with."""
    try:
        [draft] = span_drafts([Span.model_validate(decode_strict(raw))])
    except ValidationError:
        return "ValidationError"
    except AgentLightningError as error:
        return type(error).__name__
    return _shown(draft)


def _taken(raw: bytes) -> Outcome:
    try:
        [draft] = drafts_of(raw, many=False)
        return _shown(draft)
    except ValidationError:
        return "ValidationError"
    except AgentLightningError as error:
        return type(error).__name__


def _shown(draft: SpanDraft) -> Outcome:
    whole = span_json(draft.rollout_id, draft.attempt_id, draft.sequence_id, draft.body)
    return draft.span_id, draft.sequence_id, Span.model_validate_json(whole)


def test_a_plain_span_goes_the_quick_way() -> None:
    assert plain_drafts(json.dumps(PLAIN).encode(), many=False) is not None
    assert _taken(json.dumps(PLAIN).encode()) == _by_pydantic(json.dumps(PLAIN).encode())


_odd = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        1,
        2**52,
        2**52 + 1,
        1.0,
        1.5,
        "",
        "1",
        "x" * 129,
        "latest",
        "a/b",
        [],
        ["a"],
        [1, "a"],
        [[1]],
        {},
        {"a": 1},
        {"a": None},
        {"a": {"b": 1}},
        "OK",
        "NaN",
        {"status_code": "OK"},
        {"status_code": "DONE", "description": None},
        {"status_code": "OK", "description": "x", "more": 1},
        {"attributes": {}, "schema_url": ""},
        {"attributes": {"a": [1, 2]}, "schema_url": ""},
        {"attributes": {}, "schema_url": None},
        {"trace_id": "a", "span_id": "b", "is_remote": False, "trace_state": {"k": "v"}},
        {"trace_id": "a", "span_id": "b", "is_remote": "yes", "trace_state": {}},
        [{"name": "e", "attributes": {"a": 1}, "timestamp": 1.0}],
        [{"context": {"trace_id": "a", "span_id": "b", "is_remote": True, "trace_state": {}}}],
    ]
)
_paths = st.sampled_from(
    [
        *((name,) for name in PLAIN),
        ("status", "status_code"),
        ("status", "description"),
        ("attributes", "a"),
        ("attributes", "agentlightning.reward.0.value"),
        ("resource", "schema_url"),
        ("resource", "attributes"),
        ("context", "is_remote"),
        ("context", "trace_state"),
        ("context", "extra"),
        ("extra",),
    ]
)


@given(
    changes=st.lists(st.tuples(_paths, _odd), max_size=3), dropped=st.lists(st.sampled_from(list(PLAIN)), max_size=1)
)
def test_both_ways_agree_on_any_span(changes: list[tuple[tuple[str, ...], Any]], dropped: list[str]) -> None:
    span = copy.deepcopy(PLAIN)
    for path, value in changes:
        target = span
        for name in path[:-1]:
            target = target[name] if isinstance(target.get(name), dict) else {}
        target[path[-1]] = copy.deepcopy(value)  # what is drawn is shared, and later changes would be made in it
    for name in dropped:
        span.pop(name, None)
    raw = json.dumps(span).encode()
    expected = _by_pydantic(raw)
    assert _taken(raw) in (expected, _sooner(span, expected))


def _sooner(span: dict[str, Any], expected: Outcome) -> Outcome:
    """An id of a wrong type is found by pydantic, or by the check of ids; callers see the same code for both."""
    odd = any(not isinstance(span.get(name), str) for name in ("rollout_id", "attempt_id", "span_id"))
    return "InvalidId" if odd and expected == "ValidationError" else expected


def test_one_that_is_not_plain_takes_all_of_its_request_the_other_way() -> None:
    odd = {**PLAIN, "span_id": "2" * 16, "extra": [1], "events": [{"name": "e", "attributes": {}}]}
    drafts = drafts_of(json.dumps({"spans": [PLAIN, odd]}).encode(), many=True)
    assert [draft.span_id for draft in drafts] == ["1" * 16, "2" * 16]
    assert json.loads(drafts[1].body)["extra"] == [1]


@pytest.mark.parametrize("body", [[], {"spans": {}}, {"spans": [5]}, {"spans": [None]}, {}, "spans"])
def test_what_are_no_spans(body: Any) -> None:
    with pytest.raises(ValidationError):
        drafts_of(json.dumps(body).encode(), many=True)


# --- Spans beside other fields: the report that an attempt has ended --------------------------------------

REPORT: dict[str, Any] = {"status": "succeeded", "metadata": {"a": {"b": [1]}}, "claim_limit": 1, "worker_id": "w"}


@pytest.mark.parametrize("spaces", [(",", ":"), (", ", ": ")], ids=["as we write it", "with spaces"])
def test_a_report_is_taken_apart(spaces: tuple[str, str]) -> None:
    body = {"status": REPORT["status"], "spans": [PLAIN, PLAIN | {"span_id": "2" * 16}], **REPORT}
    parts = plain_report(json.dumps(body, separators=spaces, ensure_ascii=False).encode())
    assert parts is not None
    drafts, report = parts
    assert report == REPORT
    assert drafts == span_drafts([Span.model_validate(each) for each in body["spans"]])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"claim_limit":1', '"claim_limit":1,"claim_limit":2'),
        ('"worker_id":"w"', '"worker_id":"w","spans":[]'),
        ('"b":[1]', '"b":[1],"b":[2]'),
        ('"b":1', '"b":1,"b":2'),
        ('"name":"call é"', '"name":"call é","name":"x"'),
        ('"schema_url":""', '"schema_url":"","schema_url":""'),
    ],
)
@pytest.mark.parametrize("first", [True, False], ids=["report first", "spans first"])
def test_a_key_that_stands_twice_in_a_report_is_refused(old: str, new: str, first: bool) -> None:
    body = {**REPORT, "spans": [PLAIN]} if first else {"spans": [PLAIN], **REPORT}
    raw = json.dumps(body, separators=(",", ":"), ensure_ascii=False)
    assert raw.count(old) == 1
    assert plain_report(raw.encode()) is not None
    with pytest.raises(NotJson, match="twice"):
        plain_report(raw.replace(old, new).encode())


@pytest.mark.parametrize("spans", [None, [PLAIN | {"extra": 1}], [PLAIN | {"attributes": {"a": None}}], "x"])
def test_a_report_whose_spans_are_not_plain_is_left_to_pydantic(spans: Any) -> None:
    body = REPORT if spans is None else {**REPORT, "spans": spans}
    assert plain_report(json.dumps(body).encode()) is None
