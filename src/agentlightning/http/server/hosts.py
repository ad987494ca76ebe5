"""The machines of runners, as their heartbeats describe them: numbers for metrics."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from agentlightning.store.base import LightningStore
from agentlightning.telemetry.metrics import Measure
from agentlightning.types import Worker

_MOST_WORKERS, _AT_ONCE = 2_000, 200
"""Of so many live workers, the newest, the heartbeats are read, and so many at a time."""
_MOST_HOSTS = 100
_NAME_CHARACTERS = 64


class _Figure(NamedTuple):
    name: str
    help: str
    path: tuple[str, ...]
    """Where it stands in a heartbeat's statistics."""
    grows: bool = False


_FIGURES = (
    _Figure("cpu_percent", "Use of all processors.", ("cpu_percent",)),
    _Figure("memory_bytes", "Memory.", ("memory", "total_bytes")),
    _Figure("memory_available_bytes", "Memory that programs can still get.", ("memory", "available_bytes")),
    _Figure("disk_free_bytes", "Free bytes of the root disk.", ("disk", "free_bytes")),
    _Figure("disk_read_bytes", "Bytes read from disks.", ("disk", "read_bytes"), grows=True),
    _Figure("disk_written_bytes", "Bytes written to disks.", ("disk", "written_bytes"), grows=True),
    _Figure("network_received_bytes", "Bytes received, without loopback.", ("network", "received_bytes"), grows=True),
    _Figure("network_sent_bytes", "Bytes sent, without loopback.", ("network", "sent_bytes"), grows=True),
)


async def host_measures(store: LightningStore) -> Sequence[Measure]:
    """What the newest heartbeat from each host of live workers says; what is no number is left out.

    Raises:
        AgentLightningError: the store cannot be read.
    """
    newest: dict[str, Worker] = {}
    for offset in range(0, _MOST_WORKERS, _AT_ONCE):
        page = await store.query_workers(status_in=["idle", "busy"], sort_order="desc", limit=_AT_ONCE, offset=offset)
        _note(newest, page)
        if offset + len(page) >= page.total:
            break
        await asyncio.sleep(0)  # other requests come between two parts
    return [
        Measure(f"agl_host_{figure.name}", f"By host of live runners: {figure.help}", values, figure.grows, "host")
        for figure in _FIGURES
        if (values := _values(newest, figure.path))
    ]


def _note(newest: dict[str, Worker], workers: Iterable[Worker]) -> None:
    for worker in workers:
        host = (worker.registration or {}).get("host")
        if isinstance(host, str) and worker.heartbeat_stats:
            name = host[:_NAME_CHARACTERS]
            known = newest.get(name)
            if known is None and len(newest) >= _MOST_HOSTS:
                continue
            if known is None or (worker.last_heartbeat_time or 0) > (known.last_heartbeat_time or 0):
                newest[name] = worker


def _values(newest: Mapping[str, Worker], path: Sequence[str]) -> dict[str, float]:
    values = {name: _number(worker.heartbeat_stats or {}, path) for name, worker in newest.items()}
    return {name: value for name, value in values.items() if value is not None}


def _number(statistics: Mapping[str, Any], path: Sequence[str]) -> float | None:
    value: Any = statistics
    for name in path:
        value = cast("Mapping[str, Any]", value).get(name) if isinstance(value, dict) else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None
