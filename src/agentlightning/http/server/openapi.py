"""The OpenAPI document, made from the table of routes."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import getdoc
from typing import Any, Literal, cast

from pydantic import BaseModel, TypeAdapter

from agentlightning.http.codec import Problem
from agentlightning.http.routes import DIALECTS, OTLP_TRACES_PATH, ROUTES, Dialect, Route
from agentlightning.store.base import LightningStore

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
