"""Everything that a server answers besides the store's routes: health, metrics, OTLP, the OpenAPI document.

``app`` checks the caller's access before a request comes here.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any, get_args

from agentlightning.errors import AgentLightningError, NoSuchRoute
from agentlightning.http.codec import encode_json_value
from agentlightning.http.routes import DIALECTS, OTLP_TRACES_PATH
from agentlightning.http.server.app import Operation, StoreApp
from agentlightning.http.server.exchange import Exchange, Reply
from agentlightning.http.server.openapi import openapi_document
from agentlightning.http.server.otlp import answer_traces
from agentlightning.store.base import LightningStore
from agentlightning.telemetry.metrics import METRICS_TYPE, Gauge, render_metrics
from agentlightning.types import WorkerStatus

_READY_TIMEOUT_SECONDS = 5.0
_OTLP_OTHERS = ("/v1/metrics", "/v1/logs")
"""What exporters of OpenTelemetry send besides traces."""
_GET = ("GET", "HEAD")


class Operations:
    """What a server answers about itself, and for OpenTelemetry.

    Args:
        store: what is served.
        app: the server.
        run_id: the run that is served; runners compare it with theirs before they join.
    """

    def __init__(self, store: LightningStore, app: StoreApp, run_id: str | None = None) -> None:
        self._store = store
        self._app = app
        self._run_id = run_id
        self._instance = secrets.token_hex(8)
        self._since = time.monotonic()

    def by_path(self) -> Mapping[str, Operation]:
        """All of them."""
        found = {
            "/metrics": Operation(_GET, "read", self.metrics),
            OTLP_TRACES_PATH: Operation(("POST",), "run", self.traces),
        }
        for path in _OTLP_OTHERS:
            found[path] = Operation(("POST",), "read", _refuse_signal)
        for dialect in DIALECTS:
            found |= {
                f"{dialect.prefix}/health": Operation(_GET, None, _live),
                f"{dialect.prefix}/health/live": Operation(_GET, None, _live),
                f"{dialect.prefix}/health/ready": Operation(_GET, None, self.ready),
                f"{dialect.prefix}/health/detail": Operation(_GET, "read", self.detail),
                f"{dialect.prefix}/openapi.json": Operation(_GET, "read", _document),
            }
        return found

    async def ready(self, _: Exchange) -> Reply:
        """Whether the server takes requests."""
        status, detail = await self._readiness()
        body = encode_json_value({"status": status, "detail": detail})
        return Reply(200, body) if status == "ready" else Reply(503, body, [(b"retry-after", b"1")])

    async def detail(self, _: Exchange) -> Reply:
        """What the server works on, and how much its store holds."""
        status, detail = await self._readiness()
        load = self._app.load
        shown: dict[str, Any] = {
            "version": version("agentlightning"),
            "run_id": self._run_id,
            "instance": self._instance,
            "status": {"status": status} if detail is None else {"status": status, "detail": detail},
            "uptime_seconds": time.monotonic() - self._since,
            "requests_in_progress": load.requests,
            "bytes_in_progress": load.bytes,
            "open_connections": self._app.open_connections(),
            "store": None if status == "unavailable" else dict(await self._store.statistics()),
        }
        return Reply(200, encode_json_value(shown))

    async def metrics(self, _: Exchange) -> Reply:
        """All numbers of the server and its store. For a store that does not answer, ``agl_store_up`` is 0."""
        store, load = self._store, self._app.load
        gauges = [
            Gauge("agl_http_in_progress", "Requests being worked on.", load.requests),
            Gauge("agl_http_in_progress_bytes", "Bytes of their bodies.", load.bytes),
            Gauge("agl_http_connections", "Open connections.", self._app.open_connections()),
            Gauge("agl_draining", "1 while the server is stopping.", float(load.draining)),
        ]
        try:
            gauges += [*await _counts(store), Gauge("agl_store_up", "1 while the store answers.", 1.0)]
        except AgentLightningError:
            gauges.append(Gauge("agl_store_up", "1 while the store answers.", 0.0))
        gauges.append(Gauge("agl_store_stopped", "1 when a fault has ended all writing.", float(store.stopped)))
        for each in store.measures():
            gauges.append(Gauge(f"agl_store_{each.name}", each.help, each.value, counter=each.grows))
        return Reply(200, render_metrics(self._app.meter, gauges), content_type=METRICS_TYPE.encode())

    async def traces(self, exchange: Exchange) -> Reply:
        """Store spans sent by an OpenTelemetry exporter."""
        return await answer_traces(self._store, self._app.load, exchange)

    async def _readiness(self) -> tuple[str, str | None]:
        """Whether requests are taken, and why not."""
        if self._app.load.draining:
            return "draining", "the server is stopping"
        try:
            async with asyncio.timeout(_READY_TIMEOUT_SECONDS):
                await self._store.statistics()
        except (AgentLightningError, TimeoutError) as error:
            return "unavailable", str(error) or "the store does not answer"
        if self._store.stopped:
            return "unavailable", "a fault has ended all writing: see the log, and restart"
        return "ready", None


async def _counts(store: LightningStore) -> Sequence[Gauge]:
    statistics = await store.statistics()
    by_status = statistics.get("rollouts_by_status", {})
    workers = {
        state: float((await store.query_workers(status_in=[state], limit=1)).total) for state in get_args(WorkerStatus)
    }
    waiting = by_status.get("queuing", 0) + by_status.get("requeuing", 0)
    return [
        Gauge("agl_queue_depth", "Rollouts that wait to be claimed.", waiting),
        Gauge("agl_rollouts", "Rollouts by status.", {key: float(value) for key, value in by_status.items()}, "status"),
        Gauge("agl_attempts", "Attempts stored.", statistics.get("total_attempts", 0)),
        Gauge("agl_spans", "Spans stored.", statistics.get("total_spans", 0)),
        Gauge("agl_span_bytes", "Bytes of all spans.", statistics.get("total_span_bytes", 0)),
        Gauge("agl_workers", "Workers by status.", workers, "status"),
    ]


async def _live(_: Exchange) -> Reply:
    return Reply(200, b'{"status":"ok"}')


async def _document(_: Exchange) -> Reply:
    return Reply(200, _encoded_document())


@cache
def _encoded_document() -> bytes:
    return encode_json_value(openapi_document(version("agentlightning")))


async def _refuse_signal(exchange: Exchange) -> Reply:
    """Refuse metrics and logs, which no store keeps. 501 makes exporters drop them instead of retrying."""
    known = NoSuchRoute(
        f"this server takes no {exchange.path.rpartition('/')[2]} by OTLP, only spans, at {OTLP_TRACES_PATH}; "
        "turn that exporter off"
    )
    return exchange.problem(known, 501)
