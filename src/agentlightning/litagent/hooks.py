"""``Hook``: a user's code around each rollout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from agentlightning.types import Rollout, Span
from agentlightning.types.parallel import ParallelWorkerBase

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from agentlightning.litagent.litagent import LitAgent
    from agentlightning.tracer.base import Tracer

__all__ = ["Hook"]


class Hook(ParallelWorkerBase):
    """Called by the runner, for each rollout in this order: ``on_rollout_start``, ``on_trace_start``, the agent,
    ``on_trace_end``, ``on_rollout_end``; then the rollout's end is reported to the store.

    When the agent fails, ``on_trace_end`` is left out, and ``on_rollout_end`` gets no spans. What a hook raises is
    logged and changes nothing else. All arguments are passed by name.
    """

    async def on_rollout_start(self, *, agent: LitAgent[Any], runner: Any, rollout: Rollout) -> None:
        """Before anything else is done for the rollout."""

    async def on_trace_start(self, *, agent: LitAgent[Any], runner: Any, tracer: Tracer, rollout: Rollout) -> None:
        """Inside of the trace, just before the agent is called. Spans made here belong to the attempt."""

    async def on_trace_end(self, *, agent: LitAgent[Any], runner: Any, tracer: Tracer, rollout: Rollout) -> None:
        """Inside of the trace, just after the agent has returned. Rewards emitted here count."""

    async def on_rollout_end(
        self, *, agent: LitAgent[Any], runner: Any, rollout: Rollout, spans: Sequence[ReadableSpan] | Sequence[Span]
    ) -> None:
        """After the trace, before the end is reported; ``spans`` are those of the attempt."""
