"""A store that is another one: every call goes there."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

from agentlightning.store.base import JsonObject, LightningStore, LightningStoreStatistics
from agentlightning.types import (
    UNSET,
    Attempt,
    AttemptedRollout,
    AttemptEnd,
    AttemptStatus,
    EnqueueRolloutRequest,
    FinishedAttempt,
    NamedResources,
    PaginatedResult,
    ResourcesUpdate,
    Rollout,
    RolloutConfig,
    RolloutMode,
    RolloutStatus,
    Span,
    TaskInput,
    Unset,
    VerificationReport,
    Worker,
    WorkerDirective,
    WorkerStatus,
)
from agentlightning.types.plain_spans import AnySpan, PlainSpan


class DelegatingStore(LightningStore):
    """Calls another store, which may be another one each time."""

    @abstractmethod
    def _target(self) -> LightningStore:
        """The store that is called."""

    async def statistics(self) -> LightningStoreStatistics:
        return await self._target().statistics()

    # --- Rollouts and attempts --------------------------------------------------------------------------

    async def enqueue_many_rollouts(self, rollouts: Sequence[EnqueueRolloutRequest]) -> Sequence[Rollout]:
        return await self._target().enqueue_many_rollouts(rollouts)

    async def start_rollout(
        self,
        input: TaskInput,
        mode: RolloutMode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: JsonObject | None = None,
        worker_id: str | None = None,
        *,
        priority: int = 0,
        rollout_id: str | None = None,
        attempt_id: str | None = None,
    ) -> AttemptedRollout:
        return await self._target().start_rollout(
            input,
            mode,
            resources_id,
            config,
            metadata,
            worker_id,
            priority=priority,
            rollout_id=rollout_id,
            attempt_id=attempt_id,
        )

    async def dequeue_many_rollouts(
        self, *, limit: int = 1, worker_id: str | None = None, request_id: str | None = None, wait_seconds: float = 0.0
    ) -> Sequence[AttemptedRollout]:
        return await self._target().dequeue_many_rollouts(
            limit=limit, worker_id=worker_id, request_id=request_id, wait_seconds=wait_seconds
        )

    async def start_attempt(
        self, rollout_id: str, worker_id: str | None = None, *, attempt_id: str | None = None
    ) -> AttemptedRollout:
        return await self._target().start_attempt(rollout_id, worker_id, attempt_id=attempt_id)

    async def update_rollout(
        self,
        rollout_id: str,
        input: TaskInput | Unset = UNSET,
        mode: RolloutMode | None | Unset = UNSET,
        resources_id: str | None | Unset = UNSET,
        status: RolloutStatus | Unset = UNSET,
        config: RolloutConfig | Unset = UNSET,
        metadata: JsonObject | None | Unset = UNSET,
        *,
        reason_code: str | None = None,
        reason_message: str | None = None,
    ) -> Rollout:
        return await self._target().update_rollout(
            rollout_id,
            input,
            mode,
            resources_id,
            status,
            config,
            metadata,
            reason_code=reason_code,
            reason_message=reason_message,
        )

    async def cancel_rollout(self, rollout_id: str, *, message: str | None = None) -> Rollout:
        return await self._target().cancel_rollout(rollout_id, message=message)

    async def update_attempt(
        self,
        rollout_id: str,
        attempt_id: str | Literal["latest"],
        status: AttemptStatus | Unset = UNSET,
        worker_id: str | Unset = UNSET,
        last_heartbeat_time: float | Unset = UNSET,
        metadata: JsonObject | None | Unset = UNSET,
        *,
        reason_code: str | None = None,
        reason_message: str | None = None,
    ) -> Attempt:
        return await self._target().update_attempt(
            rollout_id,
            attempt_id,
            status,
            worker_id,
            last_heartbeat_time,
            metadata,
            reason_code=reason_code,
            reason_message=reason_message,
        )

    async def finish_attempt(
        self,
        rollout_id: str,
        attempt_id: str,
        status: AttemptEnd,
        spans: Sequence[Span | PlainSpan] = (),
        *,
        metadata: JsonObject | None | Unset = UNSET,
        reason_code: str | None = None,
        reason_message: str | None = None,
        claim_limit: int = 0,
        worker_id: str | None = None,
        request_id: str | None = None,
    ) -> FinishedAttempt:
        return await self._target().finish_attempt(
            rollout_id,
            attempt_id,
            status,
            spans,
            metadata=metadata,
            reason_code=reason_code,
            reason_message=reason_message,
            claim_limit=claim_limit,
            worker_id=worker_id,
            request_id=request_id,
        )

    async def release_attempt(self, rollout_id: str, attempt_id: str) -> Attempt:
        return await self._target().release_attempt(rollout_id, attempt_id)

    async def get_rollout_by_id(self, rollout_id: str) -> Rollout | None:
        return await self._target().get_rollout_by_id(rollout_id)

    async def get_latest_attempt(self, rollout_id: str) -> Attempt | None:
        return await self._target().get_latest_attempt(rollout_id)

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
        return await self._target().query_rollouts(
            status_in=status_in,
            rollout_id_in=rollout_id_in,
            rollout_id_contains=rollout_id_contains,
            filter_logic=filter_logic,
            sort_by=sort_by,
            sort_order=sort_order,
            limit=limit,
            offset=offset,
            status=status,
            rollout_ids=rollout_ids,
        )

    async def query_attempts(
        self,
        rollout_id: str,
        *,
        sort_by: str | None = "sequence_id",
        sort_order: Literal["asc", "desc"] = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[Attempt]:
        return await self._target().query_attempts(
            rollout_id, sort_by=sort_by, sort_order=sort_order, limit=limit, offset=offset
        )

    async def wait_for_rollouts(self, *, rollout_ids: Sequence[str], timeout: float | None = None) -> list[Rollout]:
        return await self._target().wait_for_rollouts(rollout_ids=rollout_ids, timeout=timeout)

    async def delete_finished_rollouts(self, *, older_than_seconds: float) -> int:
        return await self._target().delete_finished_rollouts(older_than_seconds=older_than_seconds)

    async def add_span(self, span: AnySpan) -> AnySpan | None:
        return await self._target().add_span(span)

    # --- Spans ------------------------------------------------------------------------------------------

    async def add_many_spans(self, spans: Sequence[AnySpan]) -> Sequence[AnySpan]:
        return await self._target().add_many_spans(spans)

    async def get_many_span_sequence_ids(self, rollout_attempt_ids: Sequence[tuple[str, str]]) -> Sequence[int]:
        return await self._target().get_many_span_sequence_ids(rollout_attempt_ids)

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
        return await self._target().query_spans(
            rollout_id,
            attempt_id,
            trace_id=trace_id,
            trace_id_contains=trace_id_contains,
            span_id=span_id,
            span_id_contains=span_id_contains,
            parent_id=parent_id,
            parent_id_contains=parent_id_contains,
            name=name,
            name_contains=name_contains,
            filter_logic=filter_logic,
            limit=limit,
            offset=offset,
            sort_by=sort_by,
            sort_order=sort_order,
        )

    # --- Resources --------------------------------------------------------------------------------------

    async def add_resources(self, resources: NamedResources, *, resources_id: str | None = None) -> ResourcesUpdate:
        return await self._target().add_resources(resources, resources_id=resources_id)

    async def update_resources(
        self, resources_id: str, resources: NamedResources, *, request_id: str | None = None
    ) -> ResourcesUpdate:
        return await self._target().update_resources(resources_id, resources, request_id=request_id)

    async def rollback_resources(
        self, resources_id: str, version: int, *, request_id: str | None = None
    ) -> ResourcesUpdate:
        return await self._target().rollback_resources(resources_id, version, request_id=request_id)

    async def get_resources_by_id(self, resources_id: str, *, version: int | None = None) -> ResourcesUpdate | None:
        return await self._target().get_resources_by_id(resources_id, version=version)

    async def get_latest_resources(self) -> ResourcesUpdate | None:
        return await self._target().get_latest_resources()

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
        return await self._target().query_resources(
            resources_id=resources_id,
            resources_id_contains=resources_id_contains,
            sort_by=sort_by,
            sort_order=sort_order,
            limit=limit,
            offset=offset,
        )

    async def query_resource_versions(
        self, resources_id: str, *, sort_order: Literal["asc", "desc"] = "asc", limit: int = -1, offset: int = 0
    ) -> PaginatedResult[ResourcesUpdate]:
        return await self._target().query_resource_versions(
            resources_id, sort_order=sort_order, limit=limit, offset=offset
        )

    # --- Workers ----------------------------------------------------------------------------------------

    async def update_worker(
        self,
        worker_id: str,
        heartbeat_stats: JsonObject | Unset = UNSET,
        *,
        attempt_ids: Sequence[str] | Unset = UNSET,
        lease_seconds: float | Unset = UNSET,
        registration: JsonObject | Unset = UNSET,
    ) -> Worker:
        return await self._target().update_worker(
            worker_id, heartbeat_stats, attempt_ids=attempt_ids, lease_seconds=lease_seconds, registration=registration
        )

    async def report_worker_lost(
        self, worker_id: str, *, message: str, reason_code: str | None = None
    ) -> Sequence[Attempt]:
        return await self._target().report_worker_lost(worker_id, message=message, reason_code=reason_code)

    async def direct_workers(
        self, directive: WorkerDirective | None, *, worker_ids: Sequence[str] | None = None
    ) -> Sequence[Worker]:
        return await self._target().direct_workers(directive, worker_ids=worker_ids)

    async def get_worker_by_id(self, worker_id: str) -> Worker | None:
        return await self._target().get_worker_by_id(worker_id)

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
        return await self._target().query_workers(
            status_in=status_in,
            worker_id_contains=worker_id_contains,
            filter_logic=filter_logic,
            sort_by=sort_by,
            sort_order=sort_order,
            limit=limit,
            offset=offset,
        )

    # --- Upkeep -----------------------------------------------------------------------------------------

    async def verify(self) -> VerificationReport:
        return await self._target().verify()
