"""The end of a run, for those who work elsewhere: they are told through the store, and waited for."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection

from agentlightning.errors import AgentLightningError, NotFound
from agentlightning.store.base import LightningStore
from agentlightning.types import Worker, WorkerDirective

__all__ = ["dismiss", "say_goodbye", "stranded"]

_log = logging.getLogger(__name__)
_LOOK_SECONDS = 0.05
_MOST_LOOK_SECONDS = 0.5
_GOODBYE_SECONDS = 2.0


async def dismiss(store: LightningStore, directive: WorkerDirective, seconds: float) -> list[str]:
    """Ask all workers to drain or to stop, and wait until they have left.

    A worker has left when it has said goodbye, or its lease has run out. Workers without a lease (of 0.3)
    neither hear nor leave, and are not waited for. Those that come meanwhile are sent away, too.

    Returns:
        The names of those that are still there after ``seconds``.
    """
    await store.direct_workers(directive)
    until, pause = time.monotonic() + seconds, _LOOK_SECONDS
    while True:
        left = await _present(store)
        late = [worker.worker_id for worker in left if worker.directive != directive]
        if late:
            await store.direct_workers(directive, worker_ids=late)
        remaining = until - time.monotonic()
        if not left or remaining <= 0:
            return [worker.worker_id for worker in left]
        await asyncio.sleep(min(pause, remaining))
        pause = min(pause * 1.5, _MOST_LOOK_SECONDS)


async def say_goodbye(store: LightningStore, worker_id: str, error: BaseException | None = None) -> None:
    """A worker's runner has ended: whatever it still holds is lost, and nobody need wait for its lease.

    A store that cannot be told learns it from the lease.

    Args:
        error: what the runner ended with, if it failed.
    """
    message = "its runner has ended" if error is None else f"its runner failed: {type(error).__name__}: {error}"
    reason_code = "resource_exhausted" if isinstance(error, MemoryError) else None
    try:
        async with asyncio.timeout(_GOODBYE_SECONDS):
            await store.report_worker_lost(worker_id, message=_plain(message), reason_code=reason_code)
    except NotFound:
        return  # it never came to introduce itself
    except (TimeoutError, AgentLightningError, NotImplementedError) as error:
        _log.debug("%s could not say goodbye: %s", worker_id, error)


def _plain(text: str) -> str:
    """Without what a store would not take: NUL and lone surrogates."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


async def stranded(store: LightningStore) -> int:
    """How many rollouts wait while no worker is there to take them; 0 if one is."""
    statistics = await store.statistics()
    by_status = statistics.get("rollouts_by_status", {})
    waiting = by_status.get("queuing", 0) + by_status.get("requeuing", 0)
    if not waiting or (await store.query_workers(status_in=["idle", "busy"], limit=1)).items:
        return 0
    return waiting


async def _present(store: LightningStore) -> Collection[Worker]:
    workers = await store.query_workers(status_in=["idle", "busy"])
    return [worker for worker in workers if worker.lease_seconds is not None]
