"""A runner process is killed on purpose, in the middle of its work, to show that nothing is lost by it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from contextlib import suppress

from agentlightning.runner.identity import process_space
from agentlightning.store.base import LightningStore
from agentlightning.types import Worker

__all__ = ["Sabotage"]

_SETTLE_SECONDS = 0.05
"""How long requests that a stopped process has sent may still be on their way."""


class Sabotage:
    """Kills one runner process with SIGKILL while it holds a rollout.

    Args:
        store: where workers and their attempts are seen.
    """

    def __init__(self, store: LightningStore) -> None:
        self._store = store
        self.worker_id: str | None = None
        """Whom it hit; None so far."""
        self.rollout_id: str | None = None
        """A rollout that the worker held when it died."""

    async def strike(self) -> bool:
        """Kill a worker of this machine that is at work; whether there was one.

        The process is halted first (SIGSTOP), so that what it holds cannot be finished between looking and killing.
        """
        for worker in _local(await self._store.query_workers(status_in=["busy"])):
            assert worker.registration is not None  # it has told its process
            pid: int = worker.registration["pid"]
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                await asyncio.sleep(_SETTLE_SECONDS)
                rollout_id = await self._working_on(worker.worker_id)
                if rollout_id is None:
                    os.kill(pid, signal.SIGCONT)
                    continue
                os.kill(pid, signal.SIGKILL)
                self.worker_id, self.rollout_id = worker.worker_id, rollout_id
                return True
        return False

    async def _working_on(self, worker_id: str) -> str | None:
        """A rollout that the worker has begun and not ended."""
        worker = await self._store.get_worker_by_id(worker_id)
        if worker is None or worker.current_rollout_id is None:
            return None
        attempt = await self._store.get_latest_attempt(worker.current_rollout_id)
        is_begun = attempt is not None and attempt.worker_id == worker_id and attempt.status == "running"
        return worker.current_rollout_id if is_begun else None


def _local(workers: Sequence[Worker]) -> list[Worker]:
    """Those whose process id means something here."""
    here = process_space()
    return [
        worker
        for worker in workers
        if worker.registration is not None
        and here is not None
        and worker.registration.get("process_space") == here
        and type(worker.registration.get("pid")) is int
    ]
