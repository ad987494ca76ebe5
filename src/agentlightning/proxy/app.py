"""The routes of the proxy: OpenAI's, at the root and below each attempt."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Route

from agentlightning.proxy.calls import ModelCalls
from agentlightning.proxy.errors import Refused
from agentlightning.proxy.session import Exchange
from agentlightning.security.keys import ApiKey
from agentlightning.telemetry.context import untraced_app

_ATTEMPT = "/rollout/{rollout_id}/attempt/{attempt_id}"
_PREFIXES = (_ATTEMPT + "/v1", "/v1", _ATTEMPT, "")
"""Clients have ``/v1`` in their base URL, or not."""


def build_app(exchange: Exchange) -> FastAPI:
    """The ASGI application of a proxy."""
    app = untraced_app(title="Agent Lightning LLM proxy", openapi_url=None)
    calls = {
        "/chat/completions": ModelCalls(exchange, "chat"),
        "/completions": ModelCalls(exchange, "text_completion"),
    }
    listings = _listings(exchange)
    for prefix in _PREFIXES:
        # The calls answer in bytes, as they come, and watch for agents that hang up: plain ASGI.
        app.router.routes.extend(Route(prefix + path, call, methods=["POST"]) for path, call in calls.items())
        app.include_router(listings, prefix=prefix)

    @app.get("/health")
    async def health() -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        """Whether the proxy runs, and how busy it is."""
        return {
            "status": "paused" if exchange.gate.is_paused else "ok",
            "calls_in_flight": exchange.gate.in_flight,
            "spans_waiting": exchange.delivery.waiting,
            "spans_lost": exchange.delivery.lost,
        }

    @app.exception_handler(Refused)
    async def refuse(request: Request, refused: Refused) -> Response:  # pyright: ignore[reportUnusedFunction]
        return Response(refused.body(), refused.status, refused.headers(), "application/json")

    @app.exception_handler(HTTPException)
    async def explain(request: Request, error: HTTPException) -> Response:  # pyright: ignore[reportUnusedFunction]
        refused = Refused(
            error.status_code,
            "unknown_url" if error.status_code == 404 else "wrong_method",
            f"There is no {request.method} {request.url.path} here; the proxy serves POST /v1/chat/completions, "
            "POST /v1/completions and GET /v1/models, also below /rollout/ROLLOUT_ID/attempt/ATTEMPT_ID.",
        )
        return await refuse(request, refused)

    @app.exception_handler(RequestValidationError)
    async def name_field(request: Request, error: RequestValidationError) -> Response:  # pyright: ignore[reportUnusedFunction]
        first: Any = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:])
        return await refuse(
            request, Refused(422, "invalid_value", f"{field or 'the body'}: {first['msg']}", param=field)
        )

    return app


def _listings(exchange: Exchange) -> APIRouter:
    router = APIRouter()

    @router.get("/models")
    async def models(request: Request) -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        """The models that can be named in a call."""
        exchange.access.check(request.headers)
        return JSONResponse({"object": "list", "data": [_model(name) for name in exchange.routing.models()]})

    @router.get("/models/{model:path}")
    async def model(request: Request, model: str) -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        """One model, if it can be named in a call."""
        exchange.access.check(request.headers)
        return JSONResponse(_model(exchange.routing.order(model, None)[0].model_name))

    return router


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "agentlightning"}


# --- Steering a proxy that is a program of its own: pause, resume, and the version of the weigh ---

_Seconds = Annotated[float, Body(ge=0, le=86_400)]


def control_routes(exchange: Exchange, key: ApiKey, versions: MutableMapping[str, str]) -> APIRouter:
    """``POST /control/pause``, ``/control/resume`` and ``/control/model_version``, each with a JSON object.

    Args:
        exchange: the running proxy.
        key: what a request must show.
        versions: by model; the one of ``""`` stands for all others.
    """

    def check(request: Request) -> None:
        shown = request.headers.get("authorization", "").encode("latin-1")
        if not key.opens(shown):
            raise Refused(
                401, "invalid_control_key", "The control key is missing or wrong.", kind="authentication_error"
            )

    router = APIRouter(prefix="/control", dependencies=[Depends(check)])

    @router.post("/pause")
    async def pause(  # pyright: ignore[reportUnusedFunction]
        retry_after_seconds: _Seconds = 1.0,
        hold_seconds: _Seconds = 0.0,
        timeout_seconds: Annotated[float | None, Body(ge=0, le=86_400)] = None,
    ) -> dict[str, Any]:
        """As ``LLMProxy.pause``; answers when calls in flight have ended, or the time is up."""
        exchange.gate.pause(retry_after_seconds, hold_seconds)
        return {"calls_in_flight": await exchange.gate.wait_empty(timeout_seconds)}

    @router.post("/resume")
    async def resume() -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        """As ``LLMProxy.resume``."""
        exchange.gate.resume()
        return {"calls_in_flight": exchange.gate.in_flight}

    @router.post("/model_version")
    async def model_version(  # pyright: ignore[reportUnusedFunction]
        version: Annotated[str, Body(max_length=256)], model: Annotated[str, Body()] = ""
    ) -> dict[str, str]:
        """As ``LLMProxy.set_model_version``."""
        versions[model] = version
        return dict(versions)

    return router
