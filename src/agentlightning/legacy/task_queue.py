"""What the v0.1 server keeps: tasks, those being worked on, resources, and rollouts that came back."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any

from agentlightning.types import NamedResources, ResourcesUpdate, RolloutLegacy, RolloutMode, Task


class TaskQueue:
    """Tasks in the order in which they came; one that is claimed and not reported in time is handed out again.

    Used from one event loop.

    Args:
        task_timeout_seconds: how long a claimed task may take.
        wall: Unix seconds.
    """

    def __init__(self, task_timeout_seconds: float, wall: Callable[[], float] = time.time) -> None:
        self._timeout = task_timeout_seconds
        self._wall = wall
        self._waiting = deque[Task]()
        self._claimed: dict[str, Task] = {}
        self._finished: dict[str, RolloutLegacy] = {}
        self._resources: dict[str, ResourcesUpdate] = {}
        self._latest: ResourcesUpdate | None = None
        self._arrived = asyncio.Condition()

    def add_task(
        self, sample: Any, mode: RolloutMode | None, resources_id: str | None, metadata: dict[str, Any] | None
    ) -> str:
        """Put a task at the end; returns its rollout id."""
        task = Task(
            rollout_id=f"rollout-{uuid.uuid4()}",
            input=sample,
            mode=mode,
            resources_id=resources_id,
            create_time=self._wall(),
            num_claims=0,
            metadata=metadata or {},
        )
        self._waiting.append(task)
        return task.rollout_id

    def next_task(self) -> Task | None:
        """Claim the first task, after putting back those that took too long; None if there is none."""
        now = self._wall()
        for task in [each for each in self._claimed.values() if now - (each.last_claim_time or 0.0) > self._timeout]:
            self._waiting.append(self._claimed.pop(task.rollout_id))
        if not self._waiting:
            return None
        waiting = self._waiting.popleft()
        claimed = waiting.model_copy(update={"last_claim_time": now, "num_claims": (waiting.num_claims or 0) + 1})
        self._claimed[claimed.rollout_id] = claimed
        return claimed

    def set_resources(self, resources: NamedResources) -> str:
        """Store resources under a new id; they are the latest after."""
        now = self._wall()
        update = ResourcesUpdate(
            resources_id=f"res-{uuid.uuid4()}", create_time=now, update_time=now, version=1, resources=resources
        )
        self._resources[update.resources_id] = self._latest = update
        return update.resources_id

    def resources(self, resources_id: str | None) -> ResourcesUpdate | None:
        """The resources of an id; the latest for None."""
        return self._latest if resources_id is None else self._resources.get(resources_id)

    async def finish(self, rollout: RolloutLegacy) -> None:
        """Keep what a client reports, whatever its id; a later report of an id replaces the earlier one."""
        self._claimed.pop(rollout.rollout_id, None)
        async with self._arrived:
            self._finished[rollout.rollout_id] = rollout
            self._arrived.notify_all()

    def take(self, rollout_id: str) -> RolloutLegacy | None:
        """Hand over a report, which is kept no longer; None if it has not come."""
        return self._finished.pop(rollout_id, None)

    def take_all(self) -> list[RolloutLegacy]:
        """Hand over all reports there are."""
        taken = list(self._finished.values())
        self._finished.clear()
        return taken

    async def wait_for(self, rollout_id: str, timeout: float | None) -> RolloutLegacy | None:
        """Hand over a report as soon as it comes; None after ``timeout`` seconds without it."""
        try:
            async with asyncio.timeout(timeout), self._arrived:
                await self._arrived.wait_for(lambda: rollout_id in self._finished)
                return self._finished.pop(rollout_id)
        except TimeoutError:
            return None
