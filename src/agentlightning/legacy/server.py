"""The v0.1 server: tasks out at ``GET /task``, rollouts in at ``POST /rollout``."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException

from agentlightning.errors import StoreUnavailable
from agentlightning.legacy.task_queue import TaskQueue
from agentlightning.telemetry.context import untraced_app
from agentlightning.types import (
    GenericResponse,
    NamedResources,
    ResourcesUpdate,
    RolloutLegacy,
    RolloutMode,
    Task,
    TaskIfAny,
)


class AgentLightningServer:
    """Hands out tasks to v0.1 clients and collects what they report.

    Args:
        host: address to bind; the server asks for no key, so keep it on loopback or behind something that does.
        port: 0 for a free one; ``endpoint`` says which.
        task_timeout_seconds: a task that is claimed and not reported for longer is handed out again.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 8000, task_timeout_seconds: float = 300.0) -> None:
        self.host = host
        self.port = port
        self._task_timeout_seconds = task_timeout_seconds
        self._queue: TaskQueue | None = None
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None

    @property
    def endpoint(self) -> str:
        """The URL that clients take."""
        return f"http://{self.host}:{self.port}"

    async def start(self) -> None:
        """Serve, until ``stop``. What was queued before a stop is still there.

        Raises:
            StoreUnavailable: the address cannot be bound.
        """
        if self._serving is not None:
            return
        self._queue = self._queue or TaskQueue(self._task_timeout_seconds)
        try:
            listening = socket.create_server((self.host, self.port))
        except OSError as error:
            raise StoreUnavailable(f"cannot bind {self.endpoint}: {error.strerror}; give another port") from error
        self.port = listening.getsockname()[1]
        server = _Server(uvicorn.Config(_app(self._queue), log_level="warning", lifespan="off"))
        self._server, self._serving = server, asyncio.create_task(server.serve(sockets=[listening]))
        await server.is_up.wait()

    async def stop(self) -> None:
        """End serving; idempotent."""
        serving, self._serving = self._serving, None
        if serving is not None and self._server is not None:
            self._server.should_exit = True
            await serving

    async def run_forever(self) -> None:
        """Serve until the caller is cancelled."""
        await self.start()
        try:
            if self._serving is not None:
                await asyncio.shield(self._serving)
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

    async def update_resources(self, resources: NamedResources) -> str:
        """Publish resources; returns their id. They are the latest after."""
        return self._started().set_resources(resources)

    async def get_completed_rollout(self, rollout_id: str) -> RolloutLegacy | None:
        """Hand over the report of a rollout, once; None if there is none yet."""
        return self._started().take(rollout_id)

    async def poll_completed_rollout(self, rollout_id: str, timeout: float | None = None) -> RolloutLegacy | None:
        """Wait for the report of a rollout, for ``timeout`` seconds or for ever; None if it did not come."""
        return await self._started().wait_for(rollout_id, timeout)

    async def retrieve_completed_rollouts(self) -> list[RolloutLegacy]:
        """Hand over all reports that have come, once."""
        return self._started().take_all()

    def _started(self) -> TaskQueue:
        if self._queue is None:
            raise RuntimeError("the server has not been started; await server.start() first")
        return self._queue


class _Server(uvicorn.Server):
    """Says when it answers; leaves signals to the program that it is part of."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = asyncio.Event()

    async def startup(self, sockets: list[Any] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()

    async def serve(self, sockets: list[Any] | None = None) -> None:
        await self._serve(sockets)


def _app(queue: TaskQueue) -> FastAPI:
    app = untraced_app(title="Agent Lightning, v0.1 interface")

    @app.get("/task")
    async def next_task() -> TaskIfAny:  # pyright: ignore[reportUnusedFunction]
        task: Task | None = queue.next_task()
        return TaskIfAny(is_available=task is not None, task=task)

    @app.get("/resources/latest")
    async def latest_resources() -> ResourcesUpdate:  # pyright: ignore[reportUnusedFunction]
        return _found(queue.resources(None), "no resources have been set")

    @app.get("/resources/{resources_id}")
    async def resources(resources_id: str) -> ResourcesUpdate:  # pyright: ignore[reportUnusedFunction]
        return _found(queue.resources(resources_id), f"there are no resources {resources_id!r}")

    @app.post("/rollout")
    async def finish(rollout: RolloutLegacy) -> GenericResponse:  # pyright: ignore[reportUnusedFunction]
        await queue.finish(rollout)
        return GenericResponse(status="ok", message=f"Rollout {rollout.rollout_id} received and stored.")

    return app


def _found(update: ResourcesUpdate | None, message: str) -> ResourcesUpdate:
    if update is None:
        raise HTTPException(404, message)
    return update
