"""The v0.1 client, which takes tasks from the v0.1 server and reports rollouts; and a loader that needs no server."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, cast
from urllib.parse import quote

from agentlightning.errors import InvalidValue, StoreUnavailable
from agentlightning.types import ResourcesUpdate, ResourceUnion, RolloutLegacy, Task, TaskIfAny, TaskInput

_logger = logging.getLogger(__name__)


class AgentLightningClient:
    """Talks to an ``AgentLightningServer``.

    Args:
        endpoint: the server's URL, ``http://host:port``.
        poll_interval: seconds between two requests for a task while there is none.
        timeout: seconds for one request.
    """

    def __init__(self, endpoint: str, poll_interval: float = 5.0, timeout: float = 10.0) -> None:
        self.endpoint = endpoint.rstrip("/")
        self.poll_interval = poll_interval
        self.timeout = timeout

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
            headers={"Content-Type": "application/json", "X-AgentLightning-Client": "true"},
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
            now = time.time()
            resources = ResourcesUpdate(
                resources_id="local", create_time=now, update_time=now, version=1, resources=dict(resources)
            )
        self._resources_update = resources
        self._tasks = records or [
            Task(rollout_id=f"local_task_{number:03}", input=sample, resources_id=resources.resources_id)
            for number, sample in enumerate(cast("list[Any]", tasks), start=1)
        ]
        self._handed_out = 0
        self._rollouts: list[RolloutLegacy] = []

    @property
    def rollouts(self) -> list[RolloutLegacy]:
        """Everything reported so far."""
        return self._rollouts

    def poll_next_task(self) -> Task | None:
        task = self._tasks[self._handed_out % len(self._tasks)]
        self._handed_out += 1
        return task

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
        self._rollouts.append(rollout)
        return {"status": "success", "message": f"Rollout {rollout.rollout_id} kept.", "data": None}
