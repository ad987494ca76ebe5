"""Servers of our own in the process of an agent leave nothing in its trace."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI

import agentlightning as agl
from agentlightning.serving.server import untraced_app


async def status_of_get(app: FastAPI) -> int:
    """Ask for ``/``, without a socket between."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "raw_path": b"/", "query_string": b"", "headers": []}
    await app({**scope, "http_version": "1.1", "scheme": "http", "server": ("here", 80)}, receive, send)
    return int(sent[0]["status"])


async def names_of_spans(make_app: Callable[[], FastAPI]) -> list[str]:
    """What is in an agent's trace after a request to an application of the same process."""
    app = make_app()

    @app.get("/")
    async def route() -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        return {}

    tracer = agl.OtelTracer()
    async with agl.InMemoryLightningStore() as store:
        rollout = await store.start_rollout("x")
        ids = {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id}
        with tracer.lifespan(store):
            async with tracer.trace_context("agent", store=store, **ids):
                agl.emit_message("the agent's own")
                assert await status_of_get(app) == 200
            return [span.name for span in tracer.get_last_trace()]


async def test_our_servers_leave_no_spans() -> None:
    assert "agentlightning.message" in await names_of_spans(untraced_app)
    assert not [name for name in await names_of_spans(untraced_app) if "GET" in name]


@pytest.mark.skipif(importlib.util.find_spec("fastapi.telemetry") is None, reason="this FastAPI makes no spans")
async def test_others_do() -> None:
    """The negative control."""
    assert [name for name in await names_of_spans(FastAPI) if "GET" in name]
