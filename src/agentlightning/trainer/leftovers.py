"""What an earlier start of a run has left behind: workers whose processes are gone, and which did not say so."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

import psutil

from agentlightning.runner.identity import process_space
from agentlightning.store.base import LightningStore
from agentlightning.types import Worker, WorkerStatus

__all__ = ["end_leftovers", "watch_leftovers"]

_logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
_ALIVE: Sequence[WorkerStatus] = ("busy", "idle")


async def watch_leftovers(store: LightningStore, *, patience_seconds: float = 60.0) -> None:
    """Call ``end_leftovers`` as long as something may be left of an earlier start.

    Runners whose parent was killed notice that within seconds, so they may outlive it, and see this start.

    Args:
        store: where the workers are.
        patience_seconds: when to leave those that still live to their leases.
    """
    until = time.monotonic() + patience_seconds
    left = {worker.worker_id for worker in await store.query_workers(status_in=_ALIVE)}
    while left and time.monotonic() < until:
        left &= await end_leftovers(store)
        await asyncio.sleep(_LOOK_SECONDS)


async def end_leftovers(store: LightningStore) -> set[str]:
    """End the attempts of workers that certainly are dead, so that a resumed run need not wait for their leases.

    Those are workers that registered in the same process space as ours (the same boot of this machine, the same PID
    namespace) and whose process id is nobody's now. All others are left to their leases.

    Returns:
        The ids of the workers that are not dead, as far as is known.
    """
    alive: set[str] = set()
    for worker in await store.query_workers(status_in=_ALIVE):
        if not _is_gone(worker):
            alive.add(worker.worker_id)
            continue
        attempts = await store.report_worker_lost(
            worker.worker_id, message="its process was gone when the run was taken up again"
        )
        _logger.info("worker %s of an earlier start is gone; %d attempts ended", worker.worker_id, len(attempts))
    return alive


def _is_gone(worker: Worker) -> bool:
    told = worker.registration or {}
    here, pid = process_space(), told.get("pid")
    return here is not None and told.get("process_space") == here and type(pid) is int and not psutil.pid_exists(pid)
