"""Requests made up from the OpenAPI document: nothing is answered otherwise than the document says."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, cast

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import content_type_conformance, not_a_server_error
from schemathesis.specs.openapi.checks import (
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from agentlightning.http.server.admin import openapi_document
from agentlightning.http.server.server import LightningStoreServer
from agentlightning.store.sqlite.store import InMemoryLightningStore

SCHEMA = schemathesis.openapi.from_dict(openapi_document("1"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]
SCHEMA = SCHEMA.exclude(path="/v1/traces")  # protobuf, which nobody makes up from a schema: see test_otlp
CANONICAL = SCHEMA.include(path_regex="^/(agl/v1|metrics)")
ALL_HEALTH_CHECKS = cast("list[HealthCheck]", list(HealthCheck))  # its metaclass hides the members' type


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A server with a rollout in it."""
    store = InMemoryLightningStore()
    asyncio.run(store.start_rollout(1, rollout_id="0", attempt_id="0", worker_id="0"))
    server = LightningStoreServer(store, port=0)
    server.start_blocking()
    yield server.endpoint
    server.stop_blocking()
    asyncio.run(store.close())


def _check(case: schemathesis.Case, endpoint: str) -> None:
    body: Any = case.body
    if isinstance(body, dict):  # nobody shall wait here for what never comes
        for name, place in (("wait_seconds", "/dequeue"), ("timeout", "/waits/rollouts")):
            if case.path.endswith(place) and (name in body or name == "timeout"):
                body[name] = 0
    case.call_and_validate(base_url=endpoint, checks=CHECKS)


@CANONICAL.parametrize()
@settings(max_examples=3, deadline=None, suppress_health_check=ALL_HEALTH_CHECKS)
def test_a_few_requests_to_every_route(case: schemathesis.Case, endpoint: str) -> None:
    _check(case, endpoint)


@pytest.mark.slow
@pytest.mark.timeout(900)
@SCHEMA.parametrize()
@settings(max_examples=100, deadline=None, suppress_health_check=ALL_HEALTH_CHECKS)
def test_many_requests_to_every_route(case: schemathesis.Case, endpoint: str) -> None:
    _check(case, endpoint)
