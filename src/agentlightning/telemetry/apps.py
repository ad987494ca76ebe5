"""Web applications of our own, which leave no spans in the traces of the agents beside them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

__all__ = ["untraced_app"]

_NOTHING = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}


def untraced_app(**arguments: Any) -> FastAPI:
    """``FastAPI(**arguments)``, which tells OpenTelemetry nothing of its requests.

    A server may run in the process of a runner. From 0.165 on FastAPI gives every request a span of the process's
    tracer, which would count as the agent's. Earlier versions take the argument and make nothing of it.
    """
    return FastAPI(**arguments, telemetry=_NOTHING)  # pyright: ignore[reportArgumentType] - not a type of all versions
