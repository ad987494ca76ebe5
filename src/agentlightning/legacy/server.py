"""The v0.1 server: hands out tasks at ``GET /task`` and takes reports at ``POST /rollout``."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

from fastapi import FastAPI, HTTPException

from agentlightning.errors import StoreUnavailable
from agentlightning.serving.server import ThreadedServer, untraced_app
from agentlightning.types import (
    GenericResponse,
    ResourcesUpdate,
    ResourceUnion,
    RolloutLegacy,
    RolloutMode,
    Task,
    TaskIfAny,
)


class TaskQueue:
    """Tasks in the order in which they came, the resources, and the reports that nobody has fetched yet.

    Every method may be called from any thread, because the server answers in a thread of its own.

    Args:
        task_timeout_seconds: a task that is claimed and not reported for longer is handed out again.
        wall: Unix seconds.
    """

    def __init__(self, task_timeout_seconds: float, wall: Callable[[], float] = time.time) -> None:
        self._timeout = task_timeout_seconds
        self._wall = wall
        self._lock = threading.Lock()
        self._waiting = deque[Task]()
        self._claimed: dict[str, Task] = {}
        self._reports: dict[str, RolloutLegacy] = {}
        self._resources: dict[str, ResourcesUpdate] = {}
        self._latest: ResourcesUpdate | None = None
        self._next_report: Future[None] = Future()
        """Done when the next report comes; then there is another one."""

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
        """Put back the tasks that took too long, and claim the first task; None if there is none."""
        now = self._wall()
        with self._lock:
            late = [each for each in self._claimed.values() if now - (each.last_claim_time or 0.0) > self._timeout]
            self._waiting.extend(self._claimed.pop(task.rollout_id) for task in late)
            if not self._waiting:
                return None
            first = self._waiting.popleft()
            claimed = first.model_copy(update={"last_claim_time": now, "num_claims": (first.num_claims or 0) + 1})
            self._claimed[claimed.rollout_id] = claimed
            return claimed

    def set_resources(self, resources: Mapping[str, ResourceUnion]) -> str:
        """Store resources under a new id, which is the latest from now on; returns the id."""
        now = self._wall()
        update = ResourcesUpdate(
            resources_id=f"res-{uuid.uuid4()}", create_time=now, update_time=now, version=1, resources=dict(resources)
        )
        self._resources[update.resources_id] = self._latest = update
        return update.resources_id

    def resources(self, resources_id: str | None) -> ResourcesUpdate | None:
        """The resources with this id; the latest for None."""
        return self._latest if resources_id is None else self._resources.get(resources_id)

    def finish(self, rollout: RolloutLegacy) -> None:
        """Keep a report, also one of an unknown id; a later report of an id replaces the earlier one."""
        with self._lock:
            self._claimed.pop(rollout.rollout_id, None)
            self._reports[rollout.rollout_id] = rollout
            arrived, self._next_report = self._next_report, Future()
        arrived.set_result(None)

    def take(self, rollout_id: str) -> RolloutLegacy | None:
        """Remove and return a report; None if it has not come."""
        return self._reports.pop(rollout_id, None)

    def take_all(self) -> list[RolloutLegacy]:
        """Remove and return all reports."""
        with self._lock:
            taken, self._reports = self._reports, {}
        return list(taken.values())

    async def wait_for(self, rollout_id: str, timeout: float | None) -> RolloutLegacy | None:
        """Remove and return a report as soon as it comes; None after ``timeout`` seconds without it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while True:
                    next_report = self._next_report  # read before `take`, or a report between the two would be missed
                    report = self.take(rollout_id)
                    if report is not None:
                        return report
                    # Shielded, because others wait for the same future, which a timeout here would cancel.
                    await asyncio.shield(asyncio.wrap_future(next_report))
        return None


class AgentLightningServer:
    """Hands out tasks to v0.1 clients and collects what they report.

    Args:
        host: address to listen on. The server asks for no key, so keep it on loopback or behind a proxy that does.
        port: 0 for any free one; ``endpoint`` says which after ``start``.
        task_timeout_seconds: a task that is claimed and not reported for longer is handed out again.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 8000, task_timeout_seconds: float = 300.0) -> None:
        self.host = host
        self.port = port
        self._task_timeout_seconds = task_timeout_seconds
        self._queue: TaskQueue | None = None
        self._server: ThreadedServer | None = None

    @property
    def endpoint(self) -> str:
        """The URL that clients take."""
        return f"http://{self.host}:{self.port}"

    async def start(self) -> None:
        """Serve until ``stop``; nothing happens if the server runs already. What was queued before a stop is kept.

        Raises:
            StoreUnavailable: the address cannot be bound.
        """
        if self._server is not None:
            return
        self._queue = self._queue or TaskQueue(self._task_timeout_seconds)
        # Assigned before it runs, so that `stop` also ends a server whose start was cancelled.
        server = self._server = ThreadedServer(
            partial(nullcontext, _app(self._queue)), self.host, self.port, name="agl-v0.1"
        )
        try:
            await asyncio.to_thread(server.start)
        except OSError as error:
            self._server = None
            raise StoreUnavailable(f"cannot bind {self.endpoint}: {error}") from error
        self.port = server.port

    async def stop(self) -> None:
        """Finish the requests in progress and release the port; idempotent."""
        server, self._server = self._server, None
        if server is not None:
            await asyncio.to_thread(server.stop)

    async def run_forever(self) -> None:
        """Serve until the caller is cancelled."""
        try:
            await self.start()
            await asyncio.get_running_loop().create_future()
        finally:
            await self.stop()

    async def queue_task(
        self,
        sample: Any,
        mode: RolloutMode | None = None,
        resources_id: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> str:
        """Put one task into the queue; returns its rollout id."""
        return self._started().add_task(sample, mode, resources_id, metadata)

    async def update_resources(self, resources: Mapping[str, ResourceUnion]) -> str:
        """Publish resources, which are the latest from now on; returns their id."""
        return self._started().set_resources(resources)

    async def get_completed_rollout(self, rollout_id: str) -> RolloutLegacy | None:
        """Return the report of a rollout, once; None if there is none yet."""
        return self._started().take(rollout_id)

    async def poll_completed_rollout(self, rollout_id: str, timeout: float | None = None) -> RolloutLegacy | None:
        """Wait for the report of a rollout, for ``timeout`` seconds or without limit; None if it did not come."""
        return await self._started().wait_for(rollout_id, timeout)

    async def retrieve_completed_rollouts(self) -> list[RolloutLegacy]:
        """Return all reports that have come, once."""
        return self._started().take_all()

    def _started(self) -> TaskQueue:
        if self._queue is None:
            raise RuntimeError("the server has not been started; await server.start() first")
        return self._queue


def _app(queue: TaskQueue) -> FastAPI:
    """The application: plain functions run in worker threads of FastAPI, so endpoints are coroutines to stay cheap."""
    app = untraced_app(title="Agent Lightning, v0.1 interface")

    @app.get("/task")
    async def next_task() -> TaskIfAny:  # pyright: ignore[reportUnusedFunction]
        task = queue.next_task()
        return TaskIfAny(is_available=task is not None, task=task)

    @app.get("/resources/latest")
    async def latest_resources() -> ResourcesUpdate:  # pyright: ignore[reportUnusedFunction]
        return _found(queue.resources(None), "no resources have been set")

    @app.get("/resources/{resources_id}")
    async def resources(resources_id: str) -> ResourcesUpdate:  # pyright: ignore[reportUnusedFunction]
        return _found(queue.resources(resources_id), f"there are no resources {resources_id!r}")

    @app.post("/rollout")
    async def finish(rollout: RolloutLegacy) -> GenericResponse:  # pyright: ignore[reportUnusedFunction]
        queue.finish(rollout)
        return GenericResponse(status="ok", message=f"Rollout {rollout.rollout_id} received and stored.")

    return app


def _found(update: ResourcesUpdate | None, message: str) -> ResourcesUpdate:
    if update is None:
        raise HTTPException(404, message)
    return update
