"""Requests that nobody should send: each gets its 4xx, none a 5xx, and the server stays as it was."""

from __future__ import annotations

import gzip
import json
import random
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from agentlightning.errors import error_classes
from agentlightning.http.routes import DIALECTS, ROUTES
from agentlightning.http.server.limits import ServerLimits
from agentlightning.store.sqlite.store import InMemoryLightningStore, SqliteLightningStore
from asgi_calls import Answer, AsgiCalls
from store_state import assert_sound, unchanged

GOOD_SPAN: dict[str, Any] = {
    "rollout_id": "ro-1",
    "attempt_id": "at-1",
    "sequence_id": 0,
    "trace_id": "0" * 32,
    "span_id": "1" * 16,
    "parent_id": None,
    "name": "call",
    "status": {"status_code": "OK", "description": None},
    "attributes": {"a": "x", "b": 1},
    "events": [],
    "links": [],
    "start_time": 1.5,
    "end_time": 2.5,
    "context": None,
    "parent": None,
    "resource": {"attributes": {}, "schema_url": ""},
}

BAD_BODIES: Mapping[str, tuple[int, bytes]] = {
    "NaN": (422, b'{"input": NaN}'),
    "Infinity": (422, b'{"input": Infinity}'),
    "1e999": (422, b'{"input": 1e999}'),
    "lone surrogate": (422, b'{"input": "\\ud800"}'),
    "NUL": (422, b'{"input": "a\\u0000"}'),
    "bad UTF-8": (422, b'{"input": "\xff"}'),
    "UTF-16": (422, '{"input": 1}'.encode("utf-16")),
    "BOM": (422, b'\xef\xbb\xbf{"input": 1}'),
    "depth 100,000": (413, b'{"input":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "10^6 keys": (413, b'{"input":{' + b",".join(b'"%d":1' % n for n in range(10**6)) + b"}}"),
    "duplicate keys": (422, b'{"input": 1, "input": 2}'),
    "5,000-digit integer": (422, b'{"input": ' + b"9" * 5_000 + b"}"),
    "2^63": (422, b'{"input": 9223372036854775808}'),
    "empty": (422, b""),
    "trailing garbage": (422, b'{"input": 1} x'),
    "a list": (422, b"[]"),
    "null": (422, b"null"),
    "no input": (422, b"{}"),
    "wrong type": (422, b'{"input": 1, "metadata": []}'),
    "text for a number": (422, b'{"input": 1, "config": {"max_attempts": "many"}}'),
    "bad enum": (422, b'{"input": 1, "mode": "prod"}'),
    "bad id": (422, b'{"input": 1, "rollout_id": "a/b"}'),
    "reserved id": (422, b'{"input": 1, "rollout_id": "latest"}'),
    "5 MB": (413, b'{"input": "' + b"x" * 5_000_000 + b'"}'),
}

BAD_HEADERS: Mapping[str, tuple[int, dict[str, str]]] = {
    "text": (415, {"content-type": "text/plain"}),
    "form": (415, {"content-type": "application/x-www-form-urlencoded"}),
    "latin-1": (415, {"content-type": "application/json; charset=latin-1"}),
    "packed": (415, {"content-encoding": "gzip"}),
    "a name that is not ours": (403, {"host": "evil.example"}),
    "a name like an address": (403, {"host": "127.0.0.1.evil.example"}),
    "another page": (403, {"origin": "http://evil.example"}),
    "no page": (403, {"origin": "null"}),
    "larger than is taken": (413, {"content-length": "99999999999"}),
}

BAD_TARGETS: Mapping[str, tuple[int, str, str]] = {
    "limit 10^23": (422, "GET", "/rollouts?limit=100000000000000000000000"),
    "limit 0": (422, "GET", "/rollouts?limit=0"),
    "limit text": (422, "GET", "/rollouts?limit=many"),
    "limit twice": (422, "GET", "/rollouts?limit=1&limit=2"),
    "offset -1": (422, "GET", "/rollouts?offset=-1"),
    "sort by nothing": (422, "GET", "/rollouts?sort_by=__class__"),
    "order": (422, "GET", "/rollouts?sort_order=up"),
    "logic": (422, "GET", "/rollouts?filter_logic=xor"),
    "status": (422, "GET", "/rollouts?status_in=done"),
    "not UTF-8": (422, "GET", "/rollouts?rollout_id_contains=%ff"),
    "NUL": (422, "GET", "/rollouts?rollout_id_contains=%00"),
    "no rollout": (422, "GET", "/spans"),
    "age NaN": (422, "DELETE", "/rollouts?older_than_seconds=NaN"),
    "age missing": (422, "DELETE", "/rollouts"),
    "version 2^63": (422, "GET", "/resources/rs-1?version=9223372036854775808"),
    "dots": (422, "GET", "/rollouts/.."),
    "space": (422, "GET", "/rollouts/a b"),
    "129 characters": (422, "GET", "/rollouts/" + "x" * 129),
    "replacement character": (422, "GET", "/rollouts/\ufffd"),
    "deeper": (404, "GET", "/rollouts/../../etc/passwd"),
    "double slash": (404, "GET", "//rollouts"),
    "trailing slash": (422, "GET", "/rollouts/"),
    "nothing": (404, "GET", "/nothing"),
    "verb": (405, "DELETE", "/spans"),
    "made-up verb": (405, "BREW", "/rollouts"),
    "unknown": (404, "GET", "/rollouts/ro-unknown"),
}


@asynccontextmanager
async def _serving() -> AsyncIterator[tuple[InMemoryLightningStore, AsgiCalls]]:
    """A store with one attempt in progress, and its server."""
    async with InMemoryLightningStore() as store:
        await store.start_rollout(1, rollout_id="ro-1", attempt_id="at-1", worker_id="w-1")
        await store.add_resources({}, resources_id="rs-1")
        yield store, AsgiCalls(store)
        await assert_sound(store)


def _check_problem(answer: Answer, status: int) -> None:
    """A refusal says what is wrong, under a stable code, and nothing of the server's inside."""
    assert answer.status == status, answer
    assert answer.headers[b"content-type"] == b"application/problem+json"
    problem = json.loads(answer.body)
    assert problem["status"] == status
    assert problem["code"] in error_classes()
    assert 5 < len(problem["detail"]) < 700
    assert problem["request_id"].encode() == answer.headers[b"x-request-id"]
    assert b"Traceback" not in answer.body
    assert b'File "' not in answer.body


@pytest.mark.parametrize("name", BAD_BODIES)
async def test_bad_bodies(name: str) -> None:
    status, body = BAD_BODIES[name]
    async with _serving() as (store, server), unchanged(store):
        for dialect in DIALECTS:
            _check_problem(await server.call("POST", f"{dialect.prefix}/rollouts", body), status)
            hot = body if name in ("empty", "a list", "null") else b'{"rollouts":[' + body + b"]}"
            if name not in ("BOM", "UTF-16", "trailing garbage", "no input"):
                _check_problem(await server.call("POST", f"{dialect.prefix}/queues/rollouts/enqueue", hot), status)


@pytest.mark.parametrize("name", BAD_HEADERS)
async def test_bad_headers(name: str) -> None:
    status, headers = BAD_HEADERS[name]
    async with _serving() as (store, server), unchanged(store):
        for path in ("/rollouts", "/queues/rollouts/enqueue", "/spans"):
            _check_problem(await server.call("POST", f"/agl/v1{path}", b'{"input":1}', headers), status)


@pytest.mark.parametrize("name", BAD_TARGETS)
async def test_bad_targets(name: str) -> None:
    status, method, target = BAD_TARGETS[name]
    async with _serving() as (store, server), unchanged(store):
        _check_problem(await server.call(method, f"/agl/v1{target}"), status)


async def test_a_packed_body_that_unpacks_to_very_much_is_not_unpacked() -> None:
    bomb = gzip.compress(gzip.compress(b"\0" * 200_000_000))
    plain_bomb = gzip.compress(b"\0" * 100_000_000)
    headers = {"content-type": "application/x-protobuf", "content-encoding": "gzip"}
    async with _serving() as (store, server), unchanged(store):
        before = psutil.Process().memory_info().rss
        for _ in range(5):
            assert (await server.call("POST", "/v1/traces", plain_bomb, headers)).status == 413
            assert (await server.call("POST", "/v1/traces", bomb, headers)).status == 400
        assert (await server.call("POST", "/v1/traces", b"not gzip", headers)).status == 400
        assert psutil.Process().memory_info().rss - before < 160_000_000


async def test_good_ones_are_taken_all_the_same() -> None:
    """The tests above would also pass if everything were refused."""
    async with _serving() as (_, server):
        for dialect in DIALECTS:
            answer = await server.call(
                "POST", f"{dialect.prefix}/queues/rollouts/enqueue", b'{"rollouts":[{"input":1}]}'
            )
            assert (answer.status, len(json.loads(answer.body))) == (201, 1)
        assert (await server.call("POST", "/agl/v1/spans", json.dumps(GOOD_SPAN).encode())).status == 201
        assert (await server.call("GET", "/agl/v1/rollouts?limit=1&status_in=queuing&status_in=running")).status == 200
        own = {"host": "127.0.0.1:80", "origin": "http://127.0.0.1:80"}
        assert (await server.call("GET", "/agl/v1/statistics", headers=own)).status == 200


# --- Very many ---------------------------------------------------------------------------------------

_BODIES: Mapping[str, Any] = {
    "enqueue_many_rollouts": {"rollouts": [{"input": {"a": 1}, "mode": "train", "config": {"max_attempts": 2}}]},
    "dequeue_many_rollouts": {"limit": 1, "worker_id": "w-1", "request_id": "rq-1", "wait_seconds": 0.0},
    "start_rollout": {"input": 1, "resources_id": None, "metadata": {"k": "v"}, "rollout_id": "ro-2"},
    "start_attempt": {"worker_id": "w-1"},
    "update_rollout": {"metadata": {"k": 1}, "status": "running"},
    "cancel_rollout": {"message": "why"},
    "update_attempt": {"status": "running", "metadata": None, "last_heartbeat_time": 1.5},
    "finish_attempt": {"status": "succeeded", "spans": [GOOD_SPAN], "claim_limit": 1, "worker_id": "w-1"},
    "query_rollouts": {"status_in": ["queuing"], "limit": 5, "sort_by": "start_time"},
    "query_attempts": {"limit": 5},
    "wait_for_rollouts": {"rollout_ids": ["ro-1"], "timeout": 0},
    "add_span": GOOD_SPAN,
    "add_many_spans": {"spans": [GOOD_SPAN]},
    "query_spans": {"rollout_id": "ro-1", "name_contains": "c", "limit": 3},
    "get_next_span_sequence_id": {"rollout_id": "ro-1", "attempt_id": "at-1"},
    "get_many_span_sequence_ids": {"rollout_attempt_ids": [["ro-1", "at-1"]]},
    "add_resources": {"p": {"resource_type": "prompt_template", "template": "x", "engine": "jinja"}},
    "update_resources": {"m": {"resource_type": "llm", "endpoint": "e", "model": "m"}},
    "rollback_resources": {"version": 1},
    "query_resources": {"resources_id_contains": "rs"},
    "query_resource_versions": {"sort_order": "desc"},
    "query_workers": {"status_in": ["busy"]},
    "update_worker": {"heartbeat_stats": {"load": 1}, "attempt_ids": ["at-1"], "lease_seconds": 5.0},
    "report_worker_lost": {"message": "gone"},
    "direct_workers": {"directive": None, "worker_ids": ["w-1"]},
    "delete_workers": {"worker_ids": ["w-1"]},
}
_PIECES: tuple[bytes, ...] = (
    b"",
    b"null",
    b"-1",
    b"1e999",
    b"9223372036854775808",
    b'"',
    b"\\u0000",
    b"\\ud800",
    b"\xff",
    b"{}",
    b"[]",
    b"[[[[",
    b'"latest"',
    b'"a/b"',
    b"true",
    b"0.1",
    b",",
    b":",
    b'{"a":1,"a":2}',
    b" " * 50,
    b"x" * 200,
)
_PATH_PIECES = (
    *("ro-1", "at-1", "rs-1", "w-1", "latest", "search", "bulk"),
    *("..", "%2e%2e", "", "x" * 200, "é", "a b", "\ufffd"),
)
_QUERY_VALUES = (
    *("1", "-1", "0", "ro-1", "at-1", "asc", "and", "queuing"),
    *("1e400", "%00", "%ff", "", "x" * 300, "9" * 30),
)


def _mutated(body: bytes, dice: random.Random) -> bytes:
    """The body with a few pieces cut out, put in, or doubled."""
    for _ in range(dice.choice((0, 1, 1, 1, 2, 4))):
        start = dice.randrange(len(body) + 1)
        end = min(len(body), start + dice.choice((0, 1, 1, 3, 10)))
        body = body[:start] + dice.choice((*_PIECES, body[start : start + 20] * 2)) + body[end:]
    return body


def _request(dice: random.Random) -> tuple[str, str, bytes, dict[str, str]]:
    route, dialect = dice.choice(ROUTES), dice.choice(DIALECTS)
    path = "/".join(
        dice.choice(_PATH_PIECES) if part.startswith("{") or dice.random() < 0.02 else part
        for part in route.path.split("/")
    )
    query = ""
    if route.query is not None and dice.random() < 0.8:
        names = [*route.query.model_fields, "unknown"]
        query = "?" + "&".join(f"{dice.choice(names)}={dice.choice(_QUERY_VALUES)}" for _ in range(dice.randrange(4)))
    body = b""
    if route.body is not None:
        body = _mutated(json.dumps(_BODIES[route.method]).encode(), dice)
    method = route.verb if dice.random() < 0.98 else dice.choice(("GET", "POST", "PUT", "OPTIONS", "HEAD"))
    bad = [each for _, headers in BAD_HEADERS.values() for each in headers.items()]
    headers = {} if dice.random() < 0.95 else dict([dice.choice(bad)])
    return method, dialect.prefix + path + query, body, headers


async def _bombard(server: AsgiCalls, number: int, seed: int) -> dict[int, int]:
    """Send so many mutated requests; returns how many got which status."""
    dice = random.Random(seed)
    seen: dict[int, int] = {}
    for _ in range(number):
        method, target, body, headers = _request(dice)
        answer = await server.call(method, target, body, headers)
        seen[answer.status] = seen.get(answer.status, 0) + 1
        if answer.status >= 500:
            assert answer.status in (503, 507), (method, target, body, headers, answer)
            assert b"retry-after" in answer.headers
    return seen


async def test_no_mutated_request_is_answered_by_a_failure_of_ours() -> None:
    async with _serving() as (_, server):
        seen = await _bombard(server, 2_500, seed=1)
    assert {200, 201, 404, 405, 409, 413, 415, 422} - {413} <= seen.keys(), seen


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_100_000_mutated_requests_leave_nothing_behind(tmp_path: Path) -> None:
    async with SqliteLightningStore(tmp_path / "s.db", "process") as store:
        await store.start_rollout(1, rollout_id="ro-1", attempt_id="at-1", worker_id="w-1")
        await store.add_resources({}, resources_id="rs-1")
        server = AsgiCalls(store)
        await _bombard(server, 10_000, seed=2)
        before = psutil.Process().memory_info().rss
        await _bombard(server, 100_000, seed=3)
        assert psutil.Process().memory_info().rss - before < 32_000_000
        await assert_sound(store)


async def test_an_unexpected_failure_is_a_500_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async with _serving() as (store, server):

        async def broken() -> None:
            raise ZeroDivisionError("secret detail")

        server.app._endpoints._store.statistics = broken
        answer = await server.call("GET", "/agl/v1/statistics")
        _check_problem(answer, 500)
        assert b"secret" not in answer.body
        assert b"ZeroDivision" not in answer.body
        assert "secret detail" in caplog.text
        assert (await store.statistics())["total_rollouts"] == 1


# --- Load --------------------------------------------------------------------------------------------


async def test_load_is_shed_in_order_and_heartbeats_last() -> None:
    async with _serving() as (_, server):
        load = server.load
        refused: dict[str, list[str]] = {}
        for fullness in (0.55, 0.75, 0.95, 0.999):
            load.requests = int(ServerLimits().requests * fullness)
            refused[str(fullness)] = []
            for name, method, path, body in (
                ("read", "GET", "/statistics", b""),
                ("write", "POST", "/queues/rollouts/enqueue", b'{"rollouts":[]}'),
                ("claim", "POST", "/queues/rollouts/dequeue", b"{}"),
                ("span", "POST", "/spans/bulk", b'{"spans":[]}'),
                ("completion", "POST", "/rollouts/ro-1/attempts/at-1", b'{"status":"running"}'),
                ("heartbeat", "POST", "/workers/w-1", b"{}"),
            ):
                answer = await server.call(method, f"/agl/v1{path}", body)
                if answer.status == 429:
                    assert answer.headers[b"retry-after"] == b"1"
                    refused[str(fullness)].append(name)
        load.requests = 0
    assert refused == {
        "0.55": ["read"],
        "0.75": ["read", "write", "claim"],
        "0.95": ["read", "write", "claim", "span", "completion"],
        "0.999": ["read", "write", "claim", "span", "completion"],
    }
    assert all("heartbeat" not in each for each in refused.values())


async def test_clients_of_0_3_are_told_503_under_load() -> None:
    async with _serving() as (_, server):
        server.load.requests = ServerLimits().requests
        answer = await server.call("GET", "/v1/agl/statistics")
        assert (answer.status, answer.headers[b"retry-after"]) == (503, b"1")
        assert json.loads(answer.body)["code"] == "overloaded"
        assert (await server.call("GET", "/v1/agl/health")).status == 200
        server.load.requests = 0


async def test_the_bodies_of_all_requests_together_are_bounded() -> None:
    limits = ServerLimits(in_flight_bytes=1_000_000)
    async with InMemoryLightningStore() as store:
        server = AsgiCalls(store, limits=limits)
        body = b'{"rollouts":[{"input":"' + b"x" * 800_000 + b'"}]}'
        assert (await server.call("POST", "/agl/v1/queues/rollouts/enqueue", body)).status == 429
        assert (await server.call("POST", "/agl/v1/queues/rollouts/enqueue", body[:100] + b'"}]}')).status == 201
        assert (server.load.requests, server.load.bytes) == (0, 0)


@pytest.mark.parametrize(
    ("target", "body"),
    [
        ("/agl/v1/spans/bulk", {"spans": [{}] * 10_000}),
        ("/agl/v1/queues/rollouts/enqueue", {"rollouts": [{"config": 1, "mode": 2, "priority": "x"}] * 10_000}),
        ("/agl/v1/waits/rollouts", {"rollout_ids": [1] * 10_000}),
        ("/agl/v1/rollouts/search", {"rollout_id_in": [1] * 10_000, "status_in": ["x"] * 10_000}),
        ("/agl/v1/spans/next/bulk", {"rollout_attempt_ids": [[1, 2, 3]] * 10_000}),
        ("/agl/v1/workers/w-1", {"attempt_ids": [1] * 10_000}),
        ("/agl/v1/spans", {}),
        ("/agl/v1/spans", {"attributes": {str(number): [1, "a"] for number in range(20_000)}}),
        ("/agl/v1/spans", {"resource": {"attributes": {str(number): {} for number in range(20_000)}}}),
        ("/agl/v1/spans", {"events": [{}] * 50_000}),
        ("/agl/v1/spans/bulk", {"spans": [{"links": [{"attributes": {"a": None}}] * 20_000}]}),
    ],
)
async def test_very_many_wrong_items_are_refused_in_few_words(target: str, body: dict[str, Any]) -> None:
    async with _serving() as (_, server):
        began = time.process_time()
        answer = await server.call("POST", target, json.dumps(body).encode())
        assert time.process_time() - began < 1.0
        _check_problem(answer, 422)
        problem = json.loads(answer.body)
        named = len(json.dumps(problem.pop("refused_spans", [])))
        assert named < 256 * 200
        assert len(json.dumps(problem)) < 4000
        assert len(problem.get("errors", ())) <= 10
