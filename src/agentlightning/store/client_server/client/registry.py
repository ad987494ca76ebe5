"""The part of the client that changes resources and workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from agentlightning.store.base import JsonObject
from agentlightning.store.client_server.client.arguments import given, optional_id, worker_beat
from agentlightning.store.client_server.client.reads import ReadingClient
from agentlightning.store.door import check_id, check_one_of, check_text, check_version, encode_resources, reason_of
from agentlightning.store.requests import check_batch
from agentlightning.types import UNSET, Attempt, NamedResources, ResourcesUpdate, Unset, Worker, WorkerDirective

__all__ = ["RegistryClient"]


class RegistryClient(ReadingClient):
    """Questions to a server, and changes of what is registered with it: resources and workers."""

    # --- Resources -------------------------------------------------------------------------------

    async def add_resources(self, resources: NamedResources, *, resources_id: str | None = None) -> ResourcesUpdate:
        chosen = given(resources_id=optional_id(resources_id, "resources_id"))
        return await self._caller.call("add_resources", {"resources": encode_resources(resources), **chosen})

    async def update_resources(
        self, resources_id: str, resources: NamedResources, *, request_id: str | None = None
    ) -> ResourcesUpdate:
        check_id(resources_id, "resources_id")
        arguments = given(
            resources_id=resources_id,
            resources=encode_resources(resources),
            request_id=optional_id(request_id, "request_id"),
        )
        return await self._caller.call("update_resources", arguments)

    async def rollback_resources(
        self, resources_id: str, version: int, *, request_id: str | None = None
    ) -> ResourcesUpdate:
        arguments = given(
            resources_id=check_id(resources_id, "resources_id"),
            version=check_version(version),
            request_id=optional_id(request_id, "request_id"),
        )
        return await self._caller.call("rollback_resources", arguments)

    # --- Workers ---------------------------------------------------------------------------------

    async def update_worker(
        self,
        worker_id: str,
        heartbeat_stats: JsonObject | Unset = UNSET,
        *,
        attempt_ids: Sequence[str] | Unset = UNSET,
        lease_seconds: float | Unset = UNSET,
        registration: JsonObject | Unset = UNSET,
    ) -> Worker:
        check_id(worker_id, "worker_id")
        beat = worker_beat(heartbeat_stats, attempt_ids, lease_seconds, registration)
        return await self._caller.call("update_worker", {"worker_id": worker_id, **beat})

    async def report_worker_lost(
        self, worker_id: str, *, message: str, reason_code: str | None = None
    ) -> Sequence[Attempt]:
        check_id(worker_id, "worker_id")
        check_text(message, "message")
        reason_of(reason_code, message, "worker_lost")
        arguments = given(worker_id=worker_id, message=message, reason_code=reason_code)
        return await self._caller.call("report_worker_lost", arguments)

    async def direct_workers(
        self, directive: WorkerDirective | None, *, worker_ids: Sequence[str] | None = None
    ) -> Sequence[Worker]:
        if directive is not None:
            check_one_of(directive, get_args(WorkerDirective), "directive")
        arguments: dict[str, Any] = {"directive": directive}
        if worker_ids is not None:
            check_batch(worker_ids, "worker_ids")
            arguments["worker_ids"] = [check_id(each, "worker_id") for each in worker_ids]
        return await self._caller.call("direct_workers", arguments)
