"""Makes the spans of all emitters."""

from __future__ import annotations

import logging
from typing import Any

from agentlightning.settings import LightningEnvVar, resolve_bool_env_var
from agentlightning.tracer.active import get_active_tracer
from agentlightning.tracer.base import Tracer
from agentlightning.tracer.dummy import DummyTracer
from agentlightning.types import Attributes, SpanCoreFields, TraceStatus
from agentlightning.types.attributes import flatten_attributes, sanitize_attributes

__all__ = ["as_attributes", "emit", "tracer_for"]

_PLAIN: frozenset[type[Any]] = frozenset({str, bool, float})
"""Values that nothing has to be done to; integers may be too large."""
_logger = logging.getLogger(__name__)


def emit(name: str, attributes: Attributes, propagate: bool, status: TraceStatus | None = None) -> SpanCoreFields:
    """Make a span that says something, under the span that is open here.

    With ``AGL_EMITTER_DEBUG`` set it is logged, too.

    Args:
        name: of the span.
        attributes: what it says.
        propagate: whether it gets into the trace; otherwise it is only returned.
        status: default: ``OK``.

    Raises:
        RuntimeError: no tracer is active, or this thread does not know which rollout it works for.
    """
    span = tracer_for(propagate).create_span(name, attributes, status=status)
    if resolve_bool_env_var(LightningEnvVar.AGL_EMITTER_DEBUG, fallback=False):
        _logger.warning("emitted %s: %s%s", name, attributes, "" if propagate else " (not into the trace)")
    return span


def tracer_for(propagate: bool) -> Tracer:
    """The tracer that records what is emitted here; one that records nothing if it shall not ``propagate``.

    Raises:
        RuntimeError: no tracer is active.
    """
    if not propagate:
        return DummyTracer()
    tracer = get_active_tracer()
    if tracer is None:
        raise RuntimeError(
            "no tracer is active here, so there is no trace to emit into; run the agent by a runner or Trainer, "
            "or inside of `with tracer.lifespan():`, or pass propagate=False to only get the span back"
        )
    return tracer


def as_attributes(given: dict[str, Any] | None) -> Attributes:
    """What callers give beside the main thing, flattened, as attributes.

    Raises:
        TypeError: it is no dict with string keys.
    """
    if given is None:
        return {}
    if not isinstance(given, dict):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{given!r} is a {type(given).__name__}; give a dict with string keys")
    if _PLAIN.issuperset(map(type, given.values())) and all(type(key) is str for key in given):
        return given.copy()
    return sanitize_attributes(flatten_attributes(given))
