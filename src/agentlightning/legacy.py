"""The interface of v0.1, for scripts that still use it: a server that hands out tasks over HTTP, and its client.

Everything is in memory and there is no authentication. New code uses a ``LightningStore``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

from agentlightning.errors import InvalidValue, StoreUnavailable
from agentlightning.security.hosts import is_loopback, require_key
from agentlightning.security.keys import ApiKey
from agentlightning.serving.server import ThreadedServer, untraced_app
from agentlightning.settings import LightningEnvVar, resolve_str_env_var
from agentlightning.types import (
    GenericResponse,
    ResourcesUpdate,
    ResourceUnion,
    RolloutLegacy,
    RolloutMode,
    Task,
    TaskIfAny,
    TaskInput,
)

if TYPE_CHECKING:
    from fastapi import FastAPI

_logger = logging.getLogger(__name__)


class AgentLightningServer:
    """Hands out tasks to v0.1 clients and collects what they report.

    Args:
        host: address to listen on. One that other machines can reach needs a key.
        port: 0 for any free one; ``endpoint`` says which after ``start``.
        task_timeout_seconds: a task that is claimed and not reported for longer is handed out again.
        api_key: what every request has to show, as a bearer token. Default: ``AGL_API_KEY``, except on loopback.

    Raises:
        InvalidValue: the key is not usable.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 8000,
        task_timeout_seconds: float = 300.0,
        *,
        api_key: str | None = None,
    ) -> None:
        self.host = host
        self.port = port
        key = api_key if is_loopback(host) else resolve_str_env_var(LightningEnvVar.AGL_API_KEY, api_key)
        self._key = ApiKey(key) if key else None
        self._task_timeout_seconds = task_timeout_seconds
        self._server: ThreadedServer | None = None
        self._was_started = False
        self._lock = threading.Lock()  # requests are answered in a thread of their own
        self._waiting = deque[Task]()
        self._claimed: dict[str, Task] = {}
        self._reports: dict[str, RolloutLegacy] = {}
        self._resources: dict[str, ResourcesUpdate] = {}
        self._latest: ResourcesUpdate | None = None
        self._next_report: Future[None] = Future()
        """Done when the next report comes; then there is another one."""

    @property
    def endpoint(self) -> str:
        """The URL that clients take."""
        return f"http://{self.host}:{self.port}"

    async def start(self) -> None:
        """Serve until ``stop``; nothing happens if the server runs already. What was queued before a stop is kept.

        Raises:
            StoreUnavailable: the address cannot be bound.
            InvalidValue: others could reach the server, and there is no key.
        """
        if self._server is not None:
            return
        require_key(self.host, self._key is not None, "Set AGL_API_KEY, or api_key=, on both sides")
        self._was_started = True
        # Assigned before it runs, so that `stop` also ends a server whose start was cancelled.
        server = self._server = ThreadedServer(
            partial(nullcontext, self._make_app()), self.host, self.port, name="agl-v0.1"
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
        self._check_started()
        task = Task(
            rollout_id=f"rollout-{uuid.uuid4()}",
            input=sample,
            mode=mode,
            resources_id=resources_id,
            create_time=time.time(),
            num_claims=0,
            metadata=metadata or {},
        )
        self._waiting.append(task)
        return task.rollout_id

    async def update_resources(self, resources: Mapping[str, ResourceUnion]) -> str:
        """Publish resources, which are the latest from now on; returns their id."""
        self._check_started()
        update = _first_version(f"res-{uuid.uuid4()}", resources)
        self._resources[update.resources_id] = self._latest = update
        return update.resources_id

    async def get_completed_rollout(self, rollout_id: str) -> RolloutLegacy | None:
        """Return the report of a rollout, once; None if there is none yet."""
        self._check_started()
        return self._reports.pop(rollout_id, None)

    async def poll_completed_rollout(self, rollout_id: str, timeout: float | None = None) -> RolloutLegacy | None:
        """Wait for the report of a rollout, for ``timeout`` seconds or without limit; None if it did not come."""
        self._check_started()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while True:
                    next_report = self._next_report  # read first, or a report that comes meanwhile would be missed
                    report = self._reports.pop(rollout_id, None)
                    if report is not None:
                        return report
                    # Shielded, because others wait for the same future, which a timeout here would cancel.
                    await asyncio.shield(asyncio.wrap_future(next_report))
        return None

    async def retrieve_completed_rollouts(self) -> list[RolloutLegacy]:
        """Return all reports that have come, once."""
        self._check_started()
        with self._lock:
            taken, self._reports = self._reports, {}
        return list(taken.values())

    def _check_started(self) -> None:
        if not self._was_started:
            raise RuntimeError("the server has not been started; await server.start() first")

    def _next_task(self, now: float) -> Task | None:
        """Put back the tasks that took too long, and claim the first task; None if there is none."""
        with self._lock:
            timeout = self._task_timeout_seconds
            late = [each for each in self._claimed.values() if now - (each.last_claim_time or 0.0) > timeout]
            self._waiting.extend(self._claimed.pop(task.rollout_id) for task in late)
            if not self._waiting:
                return None
            first = self._waiting.popleft()
            claimed = first.model_copy(update={"last_claim_time": now, "num_claims": (first.num_claims or 0) + 1})
            self._claimed[claimed.rollout_id] = claimed
            return claimed

    def _make_app(self) -> FastAPI:
        """The application: plain functions run in worker threads of FastAPI, so these are coroutines to stay cheap."""
        from fastapi import Depends, HTTPException, Request

        async def let_in(request: Request) -> None:
            shown = request.headers.get("authorization")
            if self._key is not None and not self._key.opens(None if shown is None else shown.encode("latin-1")):
                raise HTTPException(401, "this server wants an API key; set AGL_API_KEY")

        # FastAPI looks up annotations among the names of the module, where this one is not.
        let_in.__annotations__["request"] = Request
        app = untraced_app(title="Agent Lightning, v0.1 interface", dependencies=[Depends(let_in)])

        @app.get("/task")
        async def next_task() -> TaskIfAny:  # pyright: ignore[reportUnusedFunction]
            task = self._next_task(time.time())
            return TaskIfAny(is_available=task is not None, task=task)

        @app.get("/resources/{resources_id}")
        async def resources(resources_id: str) -> ResourcesUpdate:  # pyright: ignore[reportUnusedFunction]
            update = self._latest if resources_id == "latest" else self._resources.get(resources_id)
            if update is None:
                raise HTTPException(404, f"there are no resources {resources_id!r}")
            return update

        @app.post("/rollout")
        async def finish(rollout: RolloutLegacy) -> GenericResponse:  # pyright: ignore[reportUnusedFunction]
            """Keep a report, also one of an unknown id; a later report of an id replaces the earlier one."""
            with self._lock:
                self._claimed.pop(rollout.rollout_id, None)
                self._reports[rollout.rollout_id] = rollout
                arrived, self._next_report = self._next_report, Future()
            arrived.set_result(None)
            return GenericResponse(status="ok", message=f"Rollout {rollout.rollout_id} received and stored.")

        return app


def _first_version(resources_id: str, resources: Mapping[str, ResourceUnion]) -> ResourcesUpdate:
    now = time.time()
    return ResourcesUpdate(
        resources_id=resources_id, create_time=now, update_time=now, version=1, resources=dict(resources)
    )


class AgentLightningClient:
    """Talks to an ``AgentLightningServer``.

    Args:
        endpoint: the server's URL, ``http://host:port``.
        poll_interval: seconds between two requests for a task while there is none.
        timeout: seconds for one request.
        api_key: what the server asks for. Default: ``AGL_API_KEY``.
    """

    def __init__(
        self, endpoint: str, poll_interval: float = 5.0, timeout: float = 10.0, *, api_key: str | None = None
    ) -> None:
        self.endpoint = endpoint.rstrip("/")
        self.poll_interval = poll_interval
        self.timeout = timeout
        key = resolve_str_env_var(LightningEnvVar.AGL_API_KEY, api_key)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def poll_next_task(self) -> Task | None:
        """Wait for a task without a limit, also while the server is unreachable."""
        while True:
            task = self._ask_for_task()
            if task is not None:
                return task
            time.sleep(self.poll_interval)

    async def poll_next_task_async(self) -> Task | None:
        """``poll_next_task``, in a coroutine."""
        while True:
            task = await asyncio.to_thread(self._ask_for_task)
            if task is not None:
                return task
            await asyncio.sleep(self.poll_interval)

    def get_resources_by_id(self, resource_id: str) -> ResourcesUpdate | None:
        """The resources with an id; None if the server does not know it.

        Raises:
            StoreUnavailable: the server does not answer.
        """
        return self._resources(f"/resources/{quote(resource_id, safe='')}")

    def get_latest_resources(self) -> ResourcesUpdate | None:
        """The latest resources; None if there are none. Raises as ``get_resources_by_id``."""
        return self._resources("/resources/latest")

    def post_rollout(self, rollout: RolloutLegacy) -> dict[str, Any] | None:
        """Report a rollout; returns the server's reply.

        Raises:
            StoreUnavailable: the server does not answer, or refuses the report.
        """
        return self._request("/rollout", rollout.model_dump_json().encode())

    async def get_resources_by_id_async(self, resource_id: str) -> ResourcesUpdate | None:
        """``get_resources_by_id``, in a coroutine."""
        return await asyncio.to_thread(self.get_resources_by_id, resource_id)

    async def get_latest_resources_async(self) -> ResourcesUpdate | None:
        """``get_latest_resources``, in a coroutine."""
        return await asyncio.to_thread(self.get_latest_resources)

    async def post_rollout_async(self, rollout: RolloutLegacy) -> dict[str, Any] | None:
        """``post_rollout``, in a coroutine."""
        return await asyncio.to_thread(self.post_rollout, rollout)

    def _ask_for_task(self) -> Task | None:
        try:
            reply = self._request("/task")
        except StoreUnavailable as error:
            _logger.warning("no task for the moment: %s", error)
            return None
        return TaskIfAny.model_validate(reply).task

    def _resources(self, path: str) -> ResourcesUpdate | None:
        reply = self._request(path)
        return None if reply is None else ResourcesUpdate.model_validate(reply)

    def _request(self, path: str, body: bytes | None = None) -> dict[str, Any] | None:
        """Send one request; return None for 404."""
        request = urllib.request.Request(
            self.endpoint + path,
            data=body,
            headers={"Content-Type": "application/json", "X-AgentLightning-Client": "true", **self._headers},
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                return cast("dict[str, Any]", json.loads(reply.read()))
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 404:
                    return None
                raise StoreUnavailable(f"{request.full_url} answered {error.code}") from error
        except (OSError, ValueError) as error:
            raise StoreUnavailable(f"{request.full_url} does not answer: {error}") from error


class DevTaskLoader(AgentLightningClient):
    """A client without a server: it repeats its own tasks for ever, and keeps what is reported in ``rollouts``.

    Args:
        tasks: inputs, or ``Task`` records; not both.
        resources: what every task uses.
        kwargs: for ``AgentLightningClient``; no request is sent to its endpoint.

    Raises:
        InvalidValue: there are no tasks, or tasks of both kinds. (It is a ``ValueError``, too.)
    """

    def __init__(
        self,
        tasks: list[TaskInput] | list[Task],
        resources: Mapping[str, ResourceUnion] | ResourcesUpdate,
        **kwargs: Any,
    ) -> None:
        super().__init__(kwargs.pop("endpoint", "local://"), **kwargs)
        if not tasks:
            raise InvalidValue("tasks is empty; give at least one")
        records = [each for each in cast("list[Any]", tasks) if isinstance(each, Task)]
        if records and len(records) != len(tasks):
            raise InvalidValue("tasks has both Task records and plain inputs; give one kind")
        if not isinstance(resources, ResourcesUpdate):
            resources = _first_version("local", resources)
        self._resources_update = resources
        self._tasks = cycle(
            records
            or [
                Task(rollout_id=f"local_task_{number:03}", input=sample, resources_id=resources.resources_id)
                for number, sample in enumerate(cast("list[Any]", tasks), start=1)
            ]
        )
        self.rollouts: list[RolloutLegacy] = []
        """Everything reported so far."""

    def poll_next_task(self) -> Task | None:
        return next(self._tasks)

    async def poll_next_task_async(self) -> Task | None:
        return self.poll_next_task()

    def get_resources_by_id(self, resource_id: str) -> ResourcesUpdate | None:
        """The resources.

        Raises:
            InvalidValue: they have another id. (It is a ``ValueError``, too.)
        """
        if resource_id != self._resources_update.resources_id:
            raise InvalidValue(f"the resources are {self._resources_update.resources_id!r}, not {resource_id!r}")
        return self._resources_update

    def get_latest_resources(self) -> ResourcesUpdate | None:
        return self._resources_update

    def post_rollout(self, rollout: RolloutLegacy) -> dict[str, Any] | None:
        self.rollouts.append(rollout)
        return {"status": "success", "message": f"Rollout {rollout.rollout_id} kept.", "data": None}
