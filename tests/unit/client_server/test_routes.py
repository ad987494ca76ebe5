"""The table of routes: every method of the contract, all its arguments, and nothing that shadows anything."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from agentlightning.errors import AgentLightningError, NotFound, Overloaded, StoreUnavailable, error_classes
from agentlightning.http.codec import decode_error, encode_problem
from agentlightning.http.routes import CLIENT_ROUTES, DIALECTS, ROUTES, SHED_ORDER, Dialect, Route
from agentlightning.http.server.admin import openapi_document
from agentlightning.http.server.endpoints import Endpoints
from agentlightning.store.base import LightningStore
from agentlightning.store.sqlite.store import InMemoryLightningStore
from asgi_calls import AsgiCalls
from every_method import READS, WRITES

_MADE_OF_OTHERS = {"enqueue_rollout", "dequeue_rollout", "add_otel_span", "otlp_traces_endpoint"}
"""Methods that call another one."""
_OLD_NAMES = {"status", "rollout_ids"}
"""Arguments of `query_rollouts` that have a new name, which is the one on the wire."""


def _id(route: Route) -> str:
    return f"{route.verb} {route.path}"


def test_every_method_of_the_contract_has_a_route() -> None:
    assert {route.method for route in ROUTES} == (READS.keys() | WRITES.keys()) - _MADE_OF_OTHERS
    assert CLIENT_ROUTES.keys() == {route.method for route in ROUTES}
    twice = {route.method for route in ROUTES if sum(each.method == route.method for each in ROUTES) > 1}
    assert {CLIENT_ROUTES[method].path.rpartition("/")[2] for method in twice} == {"search"}


@pytest.mark.parametrize("route", ROUTES, ids=_id)
def test_all_arguments_of_the_method_travel(route: Route) -> None:
    wanted = set(inspect.signature(getattr(LightningStore, route.method)).parameters) - {"self"}
    if route.method == "query_rollouts":
        wanted -= _OLD_NAMES
    names = re.findall(r"{(\w+)}", route.path)
    if route.query is not None:
        names += route.query.model_fields
    if route.body_argument is not None:
        names.append(route.body_argument)
    elif route.body is not None:
        names += route.body.model_fields
    assert sorted(names) == sorted(wanted)


@pytest.mark.parametrize("route", ROUTES, ids=_id)
def test_a_request_finds_its_own_route(route: Route) -> None:
    table = Endpoints(InMemoryLightningStore())
    path = re.sub(r"{(\w+)}", lambda name: f"x-{name[1]}", route.path)
    for dialect in DIALECTS:
        found = table.find(route.verb, dialect.prefix + path)
        assert found is not None
        assert (found.endpoint.route, found.endpoint.dialect) == (route, dialect)
        assert found.ids == {name: f"x-{name}" for name in re.findall(r"{(\w+)}", route.path)}


def test_only_reserved_ids_are_written_out_where_an_id_may_stand() -> None:
    for route in ROUTES:
        for other in ROUTES:
            parts, others = route.path.split("/"), other.path.split("/")
            if len(parts) != len(others) or route.verb != other.verb:
                continue
            for number, (part, hole) in enumerate(zip(parts, others, strict=True)):
                if hole.startswith("{") and not part.startswith("{") and parts[:number] == others[:number]:
                    assert part in ("latest", "search", "bulk"), f"{_id(route)} shadows an id in {_id(other)}"


def test_each_priority_is_shed_once() -> None:
    assert {route.priority for route in ROUTES} <= set(SHED_ORDER)
    assert SHED_ORDER[-2:] == ("completion", "heartbeat")


def test_every_error_crosses_and_comes_back() -> None:
    for code, kind in error_classes().items():
        error = kind("what was wrong")
        back = decode_error(error.status, encode_problem(error, "rq-1"))
        assert (type(back), back.code, back.message) == (kind, code, "what was wrong")


@pytest.mark.parametrize(
    ("status", "content", "expected"),
    [
        (404, b"<html>", "bad_request"),
        (502, b"<html>", "store_unavailable"),
        (429, b"slow down", "store_unavailable"),
        (409, b'{"title":"x","status":409,"code":"of_tomorrow","detail":"d","request_id":"r"}', "bad_request"),
        (503, b'{"title":"x","status":503,"code":"of_tomorrow","detail":"d","request_id":"r"}', "store_unavailable"),
    ],
)
def test_what_a_proxy_or_a_newer_server_says_becomes_an_error_too(status: int, content: bytes, expected: str) -> None:
    error = decode_error(status, content)
    assert (isinstance(error, AgentLightningError), error.code) == (True, expected)


def test_not_found_and_load_are_what_callers_look_for() -> None:
    assert isinstance(decode_error(404, encode_problem(NotFound("x"), "r")), ValueError)
    assert isinstance(decode_error(503, encode_problem(Overloaded("x"), "r", status=503)), StoreUnavailable)


# --- The OpenAPI document ----------------------------------------------------------------------------


def test_the_document_has_every_route_and_refers_to_nothing_missing() -> None:
    document = openapi_document("1")
    for dialect in DIALECTS:
        for route in ROUTES:
            operation = document["paths"][dialect.prefix + route.path][route.verb.lower()]
            assert operation["x-permission"] == route.permission
            assert str(route.status) in operation["responses"]
    references = set(re.findall(r"'\$ref': '#/components/schemas/([^']+)'", repr(document)))
    assert references <= document["components"]["schemas"].keys()
    ids = [each["operationId"] for path in document["paths"].values() for each in path.values()]
    assert len(ids) == len(set(ids))


async def test_the_document_says_the_same_as_the_server() -> None:
    async with InMemoryLightningStore() as store:
        answer = await AsgiCalls(store).call("GET", "/agl/v1/openapi.json")
    assert TypeAdapter[Any](dict[str, Any]).validate_json(answer.body)["openapi"] == "3.1.0"


def test_the_page_for_people_has_every_route() -> None:
    page = (Path(__file__).parents[3] / "docs" / "rest.md").read_text(encoding="utf-8")
    rows = {(verb, path) for verb, path in re.findall(r"^\| (\w+) `([^`]+)` \|.+\| `\w+` \|$", page, re.MULTILINE)}
    assert rows == {(route.verb, route.path) for route in ROUTES}
    for route in ROUTES:
        row = next(line for line in page.splitlines() if line.startswith(f"| {route.verb} `{route.path}` |"))
        assert f"| {route.status} |" in row
        assert f"| {route.permission} |" in row
        assert f"`{route.method}`" in row


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("path", "body", "name", "waits"),
    [
        ("/waits/rollouts", b'{"rollout_ids":["ro-1"]}', "timeout", 60.0),
        ("/waits/rollouts", b'{"rollout_ids":["ro-1"],"timeout":null}', "timeout", 60.0),
        ("/waits/rollouts", b'{"rollout_ids":["ro-1"],"timeout":1e9}', "timeout", 60.0),
        ("/waits/rollouts", b'{"rollout_ids":["ro-1"],"timeout":20.0}', "timeout", 20.0),
        ("/queues/rollouts/dequeue", b'{"wait_seconds":3600.0}', "wait_seconds", 60.0),
        ("/queues/rollouts/dequeue", b'{"wait_seconds":-1.0}', "wait_seconds", -1.0),
        ("/queues/rollouts/dequeue", b"", "wait_seconds", 0.0),
    ],
)
def test_no_request_waits_for_longer_than_a_minute(
    dialect: Dialect, path: str, body: bytes, name: str, waits: float
) -> None:
    found = Endpoints(InMemoryLightningStore()).find("POST", dialect.prefix + path)
    assert found is not None
    arguments = found.endpoint.intake.arguments(found.ids, b"", body)
    assert arguments[name] == waits
    assert found.endpoint.waits(arguments) == (waits > 0)
