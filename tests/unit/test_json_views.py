"""Rows as JSON: the same as the JSON of the records."""

from __future__ import annotations

import json

import pytest

from agentlightning.lifecycle.records import (
    AttemptRow,
    Pair,
    ResourcesRow,
    RolloutPolicy,
    RolloutRow,
    SpanRow,
    WorkerRow,
)
from agentlightning.store.records import JSON, RECORDS

ATTEMPT = AttemptRow(
    seq=1,
    version=2,
    rollout_id="ro-1",
    attempt_id="at-1",
    sequence_id=3,
    status="running",
    start_time=1.25,
    end_time=None,
    worker_id="w",
    last_heartbeat_time=2.5,
    metadata=b'{"k":[1,"\xc3\xa9"]}',
    reason_code=None,
    reason_message='quote " and é',
    request_id="rq-1",
    confirm_seconds=10.0,
    started_lease=0.0,
    beaten_lease=0.0,
    deadline=None,
    span_sequence=4,
)
ROLLOUT = RolloutRow(
    seq=1,
    version=2,
    rollout_id="ro-1",
    status="running",
    priority=-5,
    input=b'{"q":null}',
    mode="train",
    resources_id="rs-1",
    resources_version=2,
    policy=RolloutPolicy(timeout_seconds=1.5, max_attempts=3, retry_condition=("failed", "timeout")),
    metadata=None,
    start_time=1.0,
    end_time=None,
    reason_code=None,
    reason_message=None,
    attempts=3,
    redeliveries=0,
    latest_attempt_id="at-1",
    digest=b"",
)
WORKER = WorkerRow(
    seq=1,
    version=1,
    worker_id="w",
    status="busy",
    heartbeat_stats=b'{"load":0.5}',
    registration=b'{"host":"h"}',
    directive="drain",
    lease_seconds=30.0,
)
RESOURCES = ResourcesRow(
    seq=1,
    resources_id="rs-1",
    version=2,
    create_time=1.0,
    update_time=2.0,
    resources=b'{"p":{"resource_type":"prompt_template","template":"x","engine":"jinja"}}',
    request_id=None,
    digest=b"",
)
SPAN = SpanRow(
    1,
    "ro-1",
    "at-1",
    7,
    True,
    "span",
    b'{"trace_id":"t","span_id":"span","parent_id":null,"name":"n","status":{"status_code":"OK","description":null},'
    b'"attributes":{"a":"NaN"},"events":[],"links":[],"start_time":1.0,"end_time":null,"context":null,"parent":null,'
    b'"resource":{"attributes":{},"schema_url":""},"extra":1}',
)


@pytest.mark.parametrize(
    ("view", "arguments"),
    [
        ("attempt_view", (ATTEMPT,)),
        ("rollout_view", (ROLLOUT, None)),
        ("rollout_view", (ROLLOUT, ATTEMPT)),
        ("finished_view", (ATTEMPT, [], [])),
        ("finished_view", (ATTEMPT, [0, 7], [Pair(ROLLOUT, ATTEMPT), Pair(ROLLOUT, ATTEMPT)])),
        ("worker_view", (WORKER,)),
        ("worker_view", (WORKER, ["at-2"])),
        ("resources_view", (RESOURCES,)),
        ("span_view", (SPAN,)),
    ],
)
def test_equal_to_the_json_of_the_record(view: str, arguments: tuple[object, ...]) -> None:
    record = getattr(RECORDS, view)(*arguments)
    shown = getattr(JSON, view)(*arguments)
    assert json.loads(shown) == json.loads(record.model_dump_json())
    assert type(record).model_validate_json(shown) == record
