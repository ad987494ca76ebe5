"""Steering a proxy that is a program of its own: pause, resume, and the version of the weights, by HTTP.

Agents have the proxy's key, so steering it has a key of its own; without one, these routes do not exist.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Request

from agentlightning.proxy.exchange import Exchange
from agentlightning.proxy.refusals import Refused
from agentlightning.security.keys import ApiKey

__all__ = ["control_routes"]

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
