"""The half of the client that asks questions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from agentlightning.errors import InvalidValue, StoreUnavailable
from agentlightning.http.client.cache import ResourceCache
from agentlightning.http.client.calls import Caller, given, optional_id, worker_beat
from agentlightning.store.arguments import check_batch
from agentlightning.store.base import JsonObject, LightningStore, LightningStoreStatistics
from agentlightning.store.queries import Paging, contains, either, equals, paged, within
from agentlightning.store.validation import (
    check_finite,
    check_id,
    check_one_of,
    check_text,
    check_version,
    encode_resources,
    reason_of,
)
from agentlightning.types import (
    UNSET,
    Attempt,
    NamedResources,
    PaginatedResult,
    ResourcesUpdate,
    Rollout,
    RolloutStatus,
    Span,
    Unset,
    VerificationReport,
    Worker,
    WorkerDirective,
    WorkerStatus,
)

LONGEST_SLICE_SECONDS = 20.0
"""How long one request may wait for something to happen; longer waits are made of several."""

_ROLLOUT_STATES = get_args(RolloutStatus)
_WORKER_STATES = get_args(WorkerStatus)
_LONG_ANSWER_SECONDS = 600.0
"""How long the answer may take to a question about everything that is stored."""


def ended_early(slice_seconds: float, took_seconds: float) -> bool:
    """Whether the server answered before the time was up that it was given to wait: then it had a reason."""
    return took_seconds < 0.9 * slice_seconds


class ReadingClient(LightningStore):
    """Questions to a server.

    Args:
        caller: makes the calls.
        cache: resources on this machine's disk, for when the server is out of reach; None: there is none.
        cache_after_seconds: how long the server is asked before the copy is taken.
        on_cached_resources: hears of the age in seconds of resources that came from the disk, None when they did not.
    """

    def __init__(
        self,
        caller: Caller,
        cache: ResourceCache | None,
        cache_after_seconds: float,
        on_cached_resources: Callable[[float | None], None],
    ) -> None:
        self._caller = caller
        self._cache = cache
        self._cache_after_seconds = cache_after_seconds
        self._on_cached_resources = on_cached_resources

    async def statistics(self) -> LightningStoreStatistics:
        return await self._caller.call("statistics", {})

    async def get_rollout_by_id(self, rollout_id: str) -> Rollout | None:
        return await self._caller.call("get_rollout_by_id", {"rollout_id": check_id(rollout_id, "rollout_id")})

    async def get_latest_attempt(self, rollout_id: str) -> Attempt | None:
        return await self._caller.call("get_latest_attempt", {"rollout_id": check_id(rollout_id, "rollout_id")})

    async def query_rollouts(
        self,
        *,
        status_in: Sequence[RolloutStatus] | None = None,
        rollout_id_in: Sequence[str] | None = None,
        rollout_id_contains: str | None = None,
        filter_logic: Literal["and", "or"] = "and",
        sort_by: str | None = None,
        sort_order: Literal["asc", "desc"] = "asc",
        limit: int = -1,
        offset: int = 0,
        status: Sequence[RolloutStatus] | None = None,
        rollout_ids: Sequence[str] | None = None,
    ) -> PaginatedResult[Rollout]:
        states = within("status", either("status_in", status_in, "status", status), _ROLLOUT_STATES)
        ids = within("rollout_id", either("rollout_id_in", rollout_id_in, "rollout_ids", rollout_ids))
        contains("rollout_id", rollout_id_contains)
        paged("rollouts", Paging(sort_by, sort_order, limit, offset), logic=filter_logic)
        asked = given(
            status_in=states and states.value,
            rollout_id_in=ids and ids.value,
            rollout_id_contains=rollout_id_contains,
            filter_logic=filter_logic,
            sort_by=sort_by,
            sort_order=sort_order,
            limit=limit,
            offset=offset,
        )
        return await self._page("query_rollouts", asked)

    async def query_attempts(
        self,
        rollout_id: str,
        *,
        sort_by: str | None = "sequence_id",
        sort_order: Literal["asc", "desc"] = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[Attempt]:
        check_id(rollout_id, "rollout_id")
        paged("attempts", Paging(sort_by, sort_order, limit, offset))
        asked = given(rollout_id=rollout_id, sort_order=sort_order, limit=limit, offset=offset)
        return await self._page("query_attempts", {**asked, "sort_by": sort_by})

    async def wait_for_rollouts(self, *, rollout_ids: Sequence[str], timeout: float | None = None) -> list[Rollout]:
        wanted = within("rollout_id", rollout_ids)
        if wanted is None:
            raise InvalidValue("rollout_ids is None; give the ids of the rollouts to wait for")
        ids: list[str] = list(dict.fromkeys(wanted.value))
        started = time.monotonic()
        left = None if timeout is None else max(check_finite(timeout, "timeout"), 0.0)
        ended: dict[str, Rollout] = {}
        while True:
            slice_seconds = LONGEST_SLICE_SECONDS if left is None else min(left, LONGEST_SLICE_SECONDS)
            asked_at = time.monotonic()
            waiting = [each for each in ids if each not in ended]
            found: list[Rollout] = await self._caller.call(
                "wait_for_rollouts",
                {"rollout_ids": waiting, "timeout": slice_seconds},
                timeout_seconds=self._caller.timeout_seconds + slice_seconds,
                long_poll=slice_seconds > 0,
            )
            ended.update((rollout.rollout_id, rollout) for rollout in found)
            now = time.monotonic()
            if timeout is not None:
                left = max(timeout - (now - started), 0.0)
            # The server waits no longer than it must: if it did not wait, those that are missing are unknown to it.
            if len(ended) == len(ids) or left == 0.0 or ended_early(slice_seconds, now - asked_at):
                return [ended[each] for each in ids if each in ended]

    async def query_spans(
        self,
        rollout_id: str,
        attempt_id: str | Literal["latest"] | None = None,
        *,
        trace_id: str | None = None,
        trace_id_contains: str | None = None,
        span_id: str | None = None,
        span_id_contains: str | None = None,
        parent_id: str | None = None,
        parent_id_contains: str | None = None,
        name: str | None = None,
        name_contains: str | None = None,
        filter_logic: Literal["and", "or"] = "and",
        limit: int = -1,
        offset: int = 0,
        sort_by: str | None = "sequence_id",
        sort_order: Literal["asc", "desc"] = "asc",
    ) -> PaginatedResult[Span]:
        check_id(rollout_id, "rollout_id")
        if attempt_id is not None and attempt_id != "latest":
            check_id(attempt_id, "attempt_id")
        exact = {"trace_id": trace_id, "span_id": span_id, "parent_id": parent_id, "name": name}
        parts = {
            "trace_id": trace_id_contains,
            "span_id": span_id_contains,
            "parent_id": parent_id_contains,
            "name": name_contains,
        }
        for field in exact:
            equals(field, exact[field])
            contains(field, parts[field])
        paged("spans", Paging(sort_by, sort_order, limit, offset), logic=filter_logic)
        asked = given(
            rollout_id=rollout_id,
            attempt_id=attempt_id,
            **exact,
            **{f"{field}_contains": part for field, part in parts.items()},
            filter_logic=filter_logic,
            limit=limit,
            offset=offset,
            sort_order=sort_order,
        )
        return await self._page("query_spans", {**asked, "sort_by": sort_by})

    async def get_resources_by_id(self, resources_id: str, *, version: int | None = None) -> ResourcesUpdate | None:
        check_id(resources_id, "resources_id")
        if version is not None:
            check_version(version)
        asked = given(resources_id=resources_id, version=version)
        return await self._resources("get_resources_by_id", asked, resources_id, version)

    async def get_latest_resources(self) -> ResourcesUpdate | None:
        return await self._resources("get_latest_resources", {}, None, None)

    async def query_resources(
        self,
        *,
        resources_id: str | None = None,
        resources_id_contains: str | None = None,
        sort_by: str | None = None,
        sort_order: Literal["asc", "desc"] = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[ResourcesUpdate]:
        equals("resources_id", resources_id)
        contains("resources_id", resources_id_contains)
        paged("resources", Paging(sort_by, sort_order, limit, offset))
        asked = given(
            resources_id=resources_id,
            resources_id_contains=resources_id_contains,
            sort_by=sort_by,
            sort_order=sort_order,
            limit=limit,
            offset=offset,
        )
        return await self._page("query_resources", asked)

    async def query_resource_versions(
        self, resources_id: str, *, sort_order: Literal["asc", "desc"] = "asc", limit: int = -1, offset: int = 0
    ) -> PaginatedResult[ResourcesUpdate]:
        check_id(resources_id, "resources_id")
        paged("resources", Paging("version", sort_order, limit, offset))
        asked = given(resources_id=resources_id, sort_order=sort_order, limit=limit, offset=offset)
        return await self._page("query_resource_versions", asked)

    async def get_worker_by_id(self, worker_id: str) -> Worker | None:
        return await self._caller.call("get_worker_by_id", {"worker_id": check_id(worker_id, "worker_id")})

    async def query_workers(
        self,
        *,
        status_in: Sequence[WorkerStatus] | None = None,
        worker_id_contains: str | None = None,
        filter_logic: Literal["and", "or"] = "and",
        sort_by: str | None = None,
        sort_order: Literal["asc", "desc"] = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[Worker]:
        states = within("status", status_in, _WORKER_STATES)
        contains("worker_id", worker_id_contains)
        paged("workers", Paging(sort_by, sort_order, limit, offset), logic=filter_logic)
        asked = given(
            status_in=states and states.value,
            worker_id_contains=worker_id_contains,
            filter_logic=filter_logic,
            sort_by=sort_by,
            sort_order=sort_order,
            limit=limit,
            offset=offset,
        )
        return await self._page("query_workers", asked)

    async def verify(self) -> VerificationReport:
        return await self._caller.call(
            "verify", {}, timeout_seconds=_LONG_ANSWER_SECONDS, patience_seconds=_LONG_ANSWER_SECONDS
        )

    async def _page(self, method: str, asked: dict[str, Any]) -> PaginatedResult[Any]:
        """One page; a long one may take as long as the caller's patience lasts."""
        return await self._caller.call(method, asked, timeout_seconds=self._caller.patience_seconds)

    async def _resources(
        self, method: str, asked: dict[str, Any], resources_id: str | None, version: int | None
    ) -> ResourcesUpdate | None:
        """What the server says; what it said last, when it cannot be asked."""
        cache = self._cache
        if cache is None:
            return await self._caller.call(method, asked)
        kept = cache.has(resources_id, version)
        patience = self._cache_after_seconds if kept else self._caller.patience_seconds
        try:
            found: ResourcesUpdate | None = await self._caller.call(method, asked, patience_seconds=patience)
        except StoreUnavailable:
            cached = cache.read(resources_id, version) if kept else None
            if cached is None:
                raise
            self._on_cached_resources(cached.age_seconds)
            return cached
        self._on_cached_resources(None)
        if found is not None:
            cache.keep(found, resources_id, version)
        elif kept:
            cache.forget(resources_id, version)
        return found


# --- The part of the client that changes resources and workers ---


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
