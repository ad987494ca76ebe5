"""The numbers that a server shows of its store and of itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from agentlightning.errors import AgentLightningError
from agentlightning.store.base import LightningStore
from agentlightning.store.engine import EngineStore
from agentlightning.telemetry.metrics import Gauge
from agentlightning.types import WorkerStatus

if TYPE_CHECKING:
    from agentlightning.store.client_server.server.operations import Serving

__all__ = ["measure"]


async def measure(store: LightningStore, serving: Serving) -> Sequence[Gauge]:
    """Everything there is to show; of a store that does not answer, only that it does not."""
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
    if isinstance(store, EngineStore):
        gauges.append(Gauge("agl_store_stopped", "1 when a fault has ended all writing.", float(store.stopped)))
        gauges += [
            Gauge(f"agl_store_{each.name}", each.help, each.value, counter=each.grows) for each in store.measures()
        ]
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
