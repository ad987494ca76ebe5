"""Everything that a server answers besides the store's routes: health, metrics, OTLP, the OpenAPI document.

``app`` checks the caller's access before a request comes here.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version as installed_version
from inspect import getdoc
from typing import Any, Literal, cast, get_args

from pydantic import BaseModel, TypeAdapter

from agentlightning.errors import AgentLightningError, NoSuchRoute
from agentlightning.http.codec import Problem, encode_json_value
from agentlightning.http.routes import DIALECTS, OTLP_TRACES_PATH, ROUTES, Dialect, Route
from agentlightning.http.server.app import Operation, StoreApp
from agentlightning.http.server.exchange import Exchange, Reply
from agentlightning.http.server.hosts import host_measures
from agentlightning.http.server.otlp import answer_traces
from agentlightning.store.base import LightningStore
from agentlightning.telemetry.metrics import METRICS_TYPE, Measure, render_metrics
from agentlightning.telemetry.process import ProcessMeter
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
        self._process = ProcessMeter()

    def by_path(self) -> Mapping[str, Operation]:
        """All of them."""
        found = {
            "/metrics": Operation(_GET, "read", self.metrics),
            OTLP_TRACES_PATH: Operation(("POST",), "run", self.traces),
            f"{OTLP_TRACES_PATH}/": Operation(("POST",), "run", self.traces),  # as some exporters spell it
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

    async def detail(self, exchange: Exchange) -> Reply:
        """What the server works on, how much its store holds, and why the caller may not run rollouts, if so."""
        status, detail = await self._readiness()
        load = self._app.load
        shown: dict[str, Any] = {
            "version": installed_version("agentlightning"),
            "run_id": self._run_id,
            "instance": self._instance,
            "status": {"status": status} if detail is None else {"status": status, "detail": detail},
            "uptime_seconds": time.monotonic() - self._since,
            "requests_in_progress": load.requests,
            "bytes_in_progress": load.bytes,
            "open_connections": self._app.open_connections(),
            "store": None if status == "unavailable" else dict(await self._store.statistics()),
        }
        refusal = self._app.access.refusal(exchange, "run")
        if refusal is not None:
            shown["refusal"] = refusal
        return Reply(200, encode_json_value(shown))

    async def metrics(self, _: Exchange) -> Reply:
        """All numbers of the server and its store. For a store that does not answer, ``agl_store_up`` is 0."""
        store, load = self._store, self._app.load
        found = [
            Measure("agl_http_in_progress", "Requests being worked on.", load.requests),
            Measure("agl_http_in_progress_bytes", "Bytes of their bodies.", load.bytes),
            Measure("agl_http_connections", "Open connections.", self._app.open_connections()),
            Measure("agl_draining", "1 while the server is stopping.", float(load.draining)),
            Measure("agl_uptime_seconds", "Seconds since the server was made.", time.monotonic() - self._since),
            *self._process.measures(),
        ]
        up = 1.0
        try:
            found += await _counts(store)
        except AgentLightningError:
            up = 0.0
        found.append(Measure("agl_store_up", "1 while the store answers.", up))
        found.append(Measure("agl_store_stopped", "1 when a fault has ended all writing.", float(store.stopped)))
        found += store.measures()
        return Reply(200, render_metrics(self._app.meter, found), content_type=METRICS_TYPE.encode())

    async def traces(self, exchange: Exchange) -> Reply:
        """Store spans sent by an OpenTelemetry exporter."""
        return await answer_traces(self._store, self._app.load, self._app.decoder, exchange)

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


async def _counts(store: LightningStore) -> Sequence[Measure]:
    statistics = await store.statistics()
    by_status = statistics.get("rollouts_by_status", {})
    workers = {
        state: float((await store.query_workers(status_in=[state], limit=1)).total) for state in get_args(WorkerStatus)
    }
    waiting = by_status.get("queuing", 0) + by_status.get("requeuing", 0)
    free = statistics.get("host", {}).get("disk_free_bytes")
    return [
        Measure("agl_queue_depth", "Rollouts that wait to be claimed.", waiting),
        Measure("agl_rollouts", "Rollouts by status.", {key: float(n) for key, n in by_status.items()}, label="status"),
        Measure("agl_attempts", "Attempts stored.", statistics.get("total_attempts", 0)),
        Measure("agl_spans", "Spans stored.", statistics.get("total_spans", 0)),
        Measure("agl_span_bytes", "Bytes of all spans.", statistics.get("total_span_bytes", 0)),
        *([] if free is None else [Measure("agl_store_disk_free_bytes", "Free bytes on the disk of the store.", free)]),
        Measure("agl_workers", "Workers by status.", workers, label="status"),
        *await host_measures(store),
    ]


async def _live(_: Exchange) -> Reply:
    return Reply(200, b'{"status":"ok"}')


async def _document(_: Exchange) -> Reply:
    return Reply(200, _encoded_document())


@cache
def _encoded_document() -> bytes:
    return encode_json_value(openapi_document(installed_version("agentlightning")))


async def _refuse_signal(exchange: Exchange) -> Reply:
    """Refuse metrics and logs, which no store keeps. 501 makes exporters drop them instead of retrying."""
    known = NoSuchRoute(
        f"this server takes no {exchange.path.rpartition('/')[2]} by OTLP, only spans, at {OTLP_TRACES_PATH}; "
        "turn that exporter off"
    )
    return exchange.problem(known, 501)


# --- The OpenAPI document, made from the table of routes ----------------------------------------------

_REFERENCES = "#/components/schemas/{model}"
_REFUSALS: Mapping[str, str] = {
    "400": "Not a request that this server understands.",
    "401": "The API key is missing or wrong.",
    "403": "The host name or the web page is not allowed.",
    "404": "Something that the request names is unknown.",
    "409": "The state of a record does not allow this, it is stale, or an id was used for something else.",
    "413": "Too large.",
    "415": "Not JSON.",
    "422": "Not valid.",
    "429": "Overloaded. Nothing was done; retry after `Retry-After`.",
    "503": "Not available now. Retry after `Retry-After`.",
    "507": "The disk is full.",
}


class HealthStatus(BaseModel):
    """The server answers."""

    status: Literal["ok"]


class Readiness(BaseModel):
    """Whether the server takes requests, and why not."""

    status: Literal["ready", "draining", "unavailable"]
    detail: str | None = None


def openapi_document(version: str) -> dict[str, Any]:
    """The document for all routes, below every prefix, as OpenAPI 3.1 has it."""
    schemas: dict[str, Any] = {}
    problem = {"application/problem+json": {"schema": _schema(Problem, schemas, "serialization")}}
    refusals = {status: {"description": text, "content": problem} for status, text in _REFUSALS.items()}
    paths: dict[str, Any] = {}
    for dialect in DIALECTS:
        for route in ROUTES:
            operation = _operation(route, dialect, schemas)
            operation["responses"] |= refusals
            paths.setdefault(dialect.prefix + route.path, {})[route.verb.lower()] = operation
        for path, model, text in (
            ("/health", HealthStatus, "The server answers."),
            ("/health/live", HealthStatus, "The server answers."),
            ("/health/ready", Readiness, "The server takes requests."),
        ):
            content = {"application/json": {"schema": _schema(model, schemas, "serialization")}}
            answers = {"503": {"description": "Not now.", "content": content}}
            answers |= {status: refusals[status] for status in ("400", "403")}
            path = dialect.prefix + path
            paths[path] = {"get": {**_plain("GET", path, text, content, answers), "security": [{}]}}
        for path, text, media in (
            (f"{dialect.prefix}/health/detail", "What the server works on, and its store holds.", "application/json"),
            ("/metrics", "Metrics in the text format of Prometheus.", "text/plain"),
        ):
            answers = {status: {"description": words} for status, words in _REFUSALS.items()}
            paths[path] = {"get": _plain("GET", path, text, {media: {}}, answers)}
    paths[OTLP_TRACES_PATH] = {"post": _otlp(problem)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Agent Lightning store",
            "version": version,
            "description": "Queue of rollouts, record of attempts, log of spans, versions of resources.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "basic": {"type": "http", "scheme": "basic"},
            },
        },
        "security": [{}, {"bearer": []}, {"basic": []}],
    }


def _operation(route: Route, dialect: Dialect, schemas: dict[str, Any]) -> dict[str, Any]:
    text = getdoc(getattr(LightningStore, route.method)) or ""
    reply: Any = route.reply | None if route.unknown_is_none and dialect.unknown_is_null else route.reply
    content = {"application/json": {"schema": _schema(reply, schemas, "serialization")}}
    id_schema = {"type": "string", "minLength": 1, "maxLength": 128, "pattern": r"^[A-Za-z0-9._~:@\-]+$"}
    ids = [{"name": name, "in": "path", "required": True, "schema": id_schema} for name in route.in_path]
    operation: dict[str, Any] = {
        "operationId": _operation_id(route.verb, dialect.prefix + route.path),
        "summary": text.split("\n", 1)[0],
        "description": text,
        "tags": [route.path.split("/")[1]],
        "x-permission": route.permission,
        "parameters": [*ids, *_query_parameters(route, schemas)],
        "responses": {str(route.status): {"description": "Done.", "content": content}},
    }
    if route.method == "dequeue_many_rollouts":
        operation["responses"]["200"]["headers"] = {
            "Agl-Directive": {
                "description": "What the worker has been asked to do.",
                "schema": {"type": "string", "enum": ["drain", "stop"]},
            }
        }
    if route.body is not None:
        operation["requestBody"] = {
            "required": not route.body_optional,
            "content": {"application/json": {"schema": _schema(route.body, schemas, "validation")}},
        }
    return operation


def _query_parameters(route: Route, schemas: dict[str, Any]) -> list[dict[str, Any]]:
    if route.query is None:
        return []
    model = _schema(route.query, schemas, "validation", inline=True)
    required = cast("list[str]", model.get("required", []))
    parameters: list[dict[str, Any]] = []
    for name, schema in cast("dict[str, dict[str, Any]]", model["properties"]).items():
        choices = [each for each in schema.get("anyOf", ()) if each != {"type": "null"}]
        shown = {**schema, **choices[0]} if choices else dict(schema)
        shown.pop("anyOf", None)
        if shown.get("default", 0) is None:
            del shown["default"]  # a query cannot carry null, which is what an absent parameter means
        parameters.append({"name": name, "in": "query", "required": name in required, "schema": shown})
    return parameters


def _plain(verb: str, path: str, text: str, content: dict[str, Any], answers: dict[str, Any]) -> dict[str, Any]:
    return {
        "operationId": _operation_id(verb, path),
        "summary": text,
        "tags": ["health"],
        "responses": {"200": {"description": text, "content": content}, **answers},
    }


def _otlp(problem: dict[str, Any]) -> dict[str, Any]:
    media: dict[str, Any] = {"application/x-protobuf": {}, "application/json": {"schema": {"type": "object"}}}
    refusals = {status: {"description": words, "content": {**media, **problem}} for status, words in _REFUSALS.items()}
    return {
        "operationId": "add_otlp_traces",
        "summary": "Store spans sent by an OpenTelemetry exporter (OTLP/HTTP).",
        "description": "The attributes `agentlightning.rollout_id` and `agentlightning.attempt_id` name the attempt of "
        "a span; spans without them, and spans that the store refuses, are counted in `partial_success`.",
        "tags": ["spans"],
        "x-permission": "run",
        "requestBody": {"required": False, "content": media},
        "responses": {
            "200": {"description": "Stored, but for those that `partial_success` counts.", "content": media},
            **refusals,
        },
    }


def _schema(kind: Any, schemas: dict[str, Any], mode: Any, *, inline: bool = False) -> dict[str, Any]:
    """The schema of a type. Schemas that it refers to are added to ``schemas``; so is its own unless ``inline``."""
    schema = TypeAdapter[Any](kind).json_schema(ref_template=_REFERENCES, mode=mode)
    schemas.update(schema.pop("$defs", {}))
    title = schema.get("title")
    if inline or schema.get("type") != "object" or not isinstance(kind, type) or not title:
        return schema
    schemas[title] = schema
    return {"$ref": _REFERENCES.format(model=title)}


def _operation_id(verb: str, path: str) -> str:
    return f"{verb.lower()}{path}".translate({ord("/"): "_", ord("."): "_", ord("{"): "", ord("}"): ""})
