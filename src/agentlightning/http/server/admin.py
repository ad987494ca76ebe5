"""Everything that a server answers besides the store's routes: health, metrics, OTLP, the OpenAPI document.

This is the FastAPI application behind the dispatcher in ``app``. Access is checked there, before a request comes here.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import version
from typing import Any, Protocol, get_args

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from agentlightning.errors import AgentLightningError, BadRequest, NoSuchRoute, StoreUnavailable, TooLarge
from agentlightning.http.codec import PROBLEM_TYPE, encode_problem
from agentlightning.http.routes import DIALECTS, OTLP_TRACES_PATH
from agentlightning.http.server.limits import Load, ServerLimits
from agentlightning.http.server.openapi import OPENAPI_PATHS, HealthStatus, Readiness, openapi_document
from agentlightning.http.server.otlp import (
    JSON_MEDIA,
    PROTOBUF_MEDIA,
    encode_outcome,
    encode_refusal,
    inflate,
    store_traces,
)
from agentlightning.serving.server import untraced_app
from agentlightning.store.base import LightningStore
from agentlightning.telemetry.metrics import METRICS_TYPE, Gauge, RequestMeter, render_metrics
from agentlightning.types import WorkerStatus

# --- Metrics of the server and its store ------------------------------------------------------------


async def measure(store: LightningStore, serving: Serving) -> Sequence[Gauge]:
    """All numbers of the server and its store. For a store that does not answer, ``agl_store_up`` is 0."""
    gauges = [
        Gauge("agl_http_in_progress", "Requests being worked on.", serving.load.requests),
        Gauge("agl_http_in_progress_bytes", "Bytes of their bodies.", serving.load.bytes),
        Gauge("agl_http_connections", "Open connections.", serving.open_connections),
        Gauge("agl_draining", "1 while the server is stopping.", float(serving.draining)),
    ]
    try:
        gauges += [*await _counts(store), Gauge("agl_store_up", "1 while the store answers.", 1.0)]
    except AgentLightningError:
        gauges.append(Gauge("agl_store_up", "1 while the store answers.", 0.0))
    gauges.append(Gauge("agl_store_stopped", "1 when a fault has ended all writing.", float(store.stopped)))
    gauges += [Gauge(f"agl_store_{each.name}", each.help, each.value, counter=each.grows) for each in store.measures()]
    return gauges


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


# --- The application -------------------------------------------------------------------------------

_READY_TIMEOUT_SECONDS = 5.0
_OTLP_OTHERS = ("/v1/metrics", "/v1/logs")
"""What exporters of OpenTelemetry send besides traces."""
_CLIENT_GONE = 499
_OK = HealthStatus(status="ok").model_dump_json()


class Serving(Protocol):
    """The running server, as health and metrics see it."""

    @property
    def meter(self) -> RequestMeter:
        """Counts its requests."""
        ...

    @property
    def load(self) -> Load:
        """The requests that it works on now."""
        ...

    @property
    def draining(self) -> bool:
        """Whether it is stopping and takes no new requests."""
        ...

    @property
    def open_connections(self) -> int:
        """How many connections are open."""
        ...


def build_operations(
    store: LightningStore, limits: ServerLimits, serving: Callable[[], Serving], run_id: str | None = None
) -> FastAPI:
    """The application.

    Args:
        store: what is served.
        limits: bounds on bodies.
        serving: the server, once it runs.
        run_id: the run that is served; runners compare it with theirs before they join.
    """
    app = untraced_app(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_exception_handler(HTTPException, _refuse)
    app.add_exception_handler(AgentLightningError, _refuse)
    app.add_exception_handler(Exception, _fail)
    health = _HealthRoutes(store, serving, run_id)
    for dialect in DIALECTS:
        app.add_route(f"{dialect.prefix}/health", health.live, ["GET"])
        app.add_route(f"{dialect.prefix}/health/live", health.live, ["GET"])
        app.add_route(f"{dialect.prefix}/health/ready", health.ready, ["GET"])
        app.add_route(f"{dialect.prefix}/health/detail", health.detail, ["GET"])
    app.add_route("/metrics", health.metrics, ["GET"])
    for path in OPENAPI_PATHS:
        app.add_route(path, _document_route(), ["GET"])
    app.add_route(OTLP_TRACES_PATH, _traces_route(store, limits, serving), ["POST"])
    for path in _OTLP_OTHERS:
        app.add_route(path, _refuse_signal, ["POST"])
    return app


class _HealthRoutes:
    """Health probes and metrics."""

    def __init__(self, store: LightningStore, serving: Callable[[], Serving], run_id: str | None) -> None:
        self._store = store
        self._serving = serving
        self._run_id = run_id
        self._instance = secrets.token_hex(8)
        self._since = time.monotonic()

    async def live(self, _: Request) -> Response:
        return Response(_OK, media_type="application/json")

    async def ready(self, _: Request) -> Response:
        readiness = await self._readiness()
        status = 200 if readiness.status == "ready" else 503
        headers = {} if status == 200 else {"retry-after": "1"}
        return Response(readiness.model_dump_json(), status, headers, "application/json")

    async def detail(self, _: Request) -> Response:
        serving, readiness = self._serving(), await self._readiness()
        statistics: Any = None
        if readiness.status != "unavailable":
            statistics = dict(await self._store.statistics())
        return _json(
            {
                "version": version("agentlightning"),
                "run_id": self._run_id,
                "instance": self._instance,
                "status": readiness.model_dump(exclude_none=True),
                "uptime_seconds": time.monotonic() - self._since,
                "requests_in_progress": serving.load.requests,
                "bytes_in_progress": serving.load.bytes,
                "open_connections": serving.open_connections,
                "store": statistics,
            }
        )

    async def metrics(self, _: Request) -> Response:
        gauges = await measure(self._store, self._serving())
        return Response(render_metrics(self._serving().meter, gauges), headers={"content-type": METRICS_TYPE})

    async def _readiness(self) -> Readiness:
        if self._serving().draining:
            return Readiness(status="draining", detail="the server is stopping")
        try:
            async with asyncio.timeout(_READY_TIMEOUT_SECONDS):
                await self._store.statistics()
        except (AgentLightningError, TimeoutError) as error:
            return Readiness(status="unavailable", detail=str(error) or "the store does not answer")
        if self._store.stopped:
            return Readiness(status="unavailable", detail="a fault has ended all writing: see the log, and restart")
        return Readiness(status="ready")


def _document_route() -> Callable[[Request], Awaitable[Response]]:
    made: list[Response] = []

    async def document(_: Request) -> Response:
        if not made:
            made.append(_json(openapi_document(version("agentlightning"))))
        return made[0]

    return document


def _traces_route(
    store: LightningStore, limits: ServerLimits, serving: Callable[[], Serving]
) -> Callable[[Request], Awaitable[Response]]:
    async def traces(request: Request) -> Response:
        media = request.headers.get("content-type", "").split(";")[0].strip().lower().encode()
        answered_as = media if media in (PROTOBUF_MEDIA, JSON_MEDIA) else JSON_MEDIA
        load, held = serving().load, int(request.headers.get("content-length", 0))
        try:
            if serving().draining:
                raise StoreUnavailable("the server is stopping; retry at its successor")
            if held > limits.body_bytes:
                raise _too_large(limits.body_bytes)
            load.take("span", held)
        except AgentLightningError as error:
            return _otlp_refusal(answered_as, error)

        def grow(total: int) -> None:
            nonlocal held
            if total > held:
                load.grow("span", total - held)
                held = total

        try:
            content = await _content(request, limits.body_bytes, grow)
            outcome = await store_traces(store, media, content)
        except AgentLightningError as error:
            return _otlp_refusal(answered_as, error)
        except ClientDisconnect:
            return Response(status_code=_CLIENT_GONE)
        finally:
            load.give_back(held)
        return Response(encode_outcome(answered_as, outcome), media_type=answered_as.decode())

    return traces


async def _content(request: Request, limit: int, grow: Callable[[int], None]) -> bytes:
    """The body of a request, unpacked. ``grow`` is called with its size so far and raises if that is too much."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        grow(size)
        parts.append(part)
    raw = b"".join(parts)
    match request.headers.get("content-encoding", "identity").lower():
        case "identity":
            return raw
        case "gzip":
            content = await asyncio.to_thread(inflate, raw, limit)
            grow(size + len(content))
            return content
        case other:
            raise BadRequest(f"the body is encoded as {other[:80]!r}; send it as it is, or gzip")


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body has more than {limit:,} bytes; send fewer spans at a time")


async def _refuse_signal(request: Request) -> Response:
    """Refuse metrics and logs, which no store keeps. 501 makes exporters drop them instead of retrying."""
    known = NoSuchRoute(
        f"this server takes no {request.url.path.rpartition('/')[2]} by OTLP, only spans, at {OTLP_TRACES_PATH}; "
        "turn that exporter off"
    )
    return Response(encode_problem(known, _request_id(request), status=501), 501, media_type=PROBLEM_TYPE)


def _otlp_refusal(media: bytes, error: AgentLightningError) -> Response:
    """A refusal. Exporters retry after 429 and 503 with ``Retry-After``, and drop the spans after any other status."""
    headers = {"retry-after": "1"} if error.status in (429, 503, 507) else {}
    status = 400 if error.status == 422 else error.status
    return Response(encode_refusal(media, error), status, headers, media.decode())


async def _refuse(request: Request, error: Exception) -> Response:
    """Answer an error of this application by a problem document."""
    headers: dict[str, str] = {}
    match error:
        case AgentLightningError():
            known, status = error, error.status
        case HTTPException(status_code=404):
            known, status = NoSuchRoute(f"there is nothing under {request.url.path[:200]!r} on this server"), 404
        case HTTPException(status_code=status):
            known = BadRequest(f"{request.method} is not possible on this path")
            headers = dict(error.headers or {})
        case _:
            raise error
    if status in (429, 503, 507):
        headers["retry-after"] = "1"
    return Response(encode_problem(known, _request_id(request), status=status), status, headers, PROBLEM_TYPE)


async def _fail(request: Request, _: Exception) -> Response:
    """Answer an unexpected exception without its details, which only the log has."""
    hidden = AgentLightningError("the server failed; its log says why, under this request_id")
    return Response(encode_problem(hidden, _request_id(request), status=500), 500, media_type=PROBLEM_TYPE)


def _request_id(request: Request) -> str:
    return request.scope["state"]["request_id"]


def _json(value: Any) -> Response:
    import json

    return Response(json.dumps(value, allow_nan=False).encode(), media_type="application/json")
