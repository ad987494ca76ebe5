"""The parts of the store's contract that ``store.base.LightningStore`` is put together from.

Import everything from ``store.base``: what holds for all methods is said there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

from pydantic import ValidationError

from agentlightning.errors import InvalidId, InvalidValue, NotJson
from agentlightning.types import (
    UNSET,
    Attempt,
    EnqueueRolloutRequest,
    PaginatedResult,
    ResourcesUpdate,
    ResourceUnion,
    Rollout,
    Span,
    Unset,
    Worker,
    WorkerDirective,
    WorkerStatus,
)
from agentlightning.types.plain_spans import AnySpan, PlainSpan

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan


JsonObject = Mapping[str, Any]
"""A JSON object, as callers give it."""


class LightningStoreCapabilities(TypedDict, total=False):
    """What callers may rely on; an absent key means no."""

    thread_safe: bool
    async_safe: bool
    zero_copy: bool
    """Whether copies of the object in several processes are one store, as clients of one server are."""
    otlp_traces: bool
    plain_spans: bool
    """Whether the store takes a ``PlainSpan`` wherever it takes a ``Span``."""


class StoreHost(TypedDict, total=False):
    """The machine that the store runs on, so that a caller can compare clocks and versions; no key means unknown."""

    time: float
    """Its wall clock, in seconds since the Unix epoch."""
    version: str
    """The version of Agent Lightning that it runs."""
    disk_free_bytes: int
    """Free bytes on the disk that holds the database."""
    disk_total_bytes: int


class LightningStoreStatistics(TypedDict, total=False):
    """Counts of everything stored. The store keeps counters, so that none of them costs a scan."""

    name: str
    total_rollouts: int
    total_attempts: int
    total_spans: int
    total_resources: int
    total_workers: int
    uptime: float
    """Seconds since the store was opened."""
    rollouts_by_status: dict[str, int]
    total_span_bytes: int
    host: StoreHost


def is_queuing(rollout: Rollout) -> bool:
    """Whether the rollout waits in the queue, for the first time or to be retried."""
    return rollout.status in ("queuing", "requeuing")


def is_running(rollout: Rollout) -> bool:
    """Whether an attempt holds the rollout."""
    return rollout.status in ("preparing", "running")


def is_finished(rollout: Rollout) -> bool:
    """Whether the rollout has reached its terminal state."""
    return rollout.status in ("succeeded", "failed", "cancelled")


def not_offered(store: object) -> NotImplementedError:
    """The error of a method that a store need not have, because it came after the contract of 0.3."""
    return NotImplementedError(f"{type(store).__name__} does not offer this; it came after the contract of 0.3")


def sequence_ids_of(given: Sequence[Span | PlainSpan], stored: Sequence[Span | PlainSpan]) -> list[int]:
    """The sequence id of each span given; 0 for a span that is not among the new ones.

    Both are in the same order. Of several spans with equal ids, the first is the one that was stored.
    """
    new = {(span.rollout_id, span.attempt_id, span.span_id): span.sequence_id for span in stored}
    return [new.pop((span.rollout_id, span.attempt_id, span.span_id), 0) for span in given]


class SpanMethods(ABC):
    """What a store does with spans."""

    async def add_span(self, span: AnySpan) -> AnySpan | None:
        """Store one span; None if it was stored before. See ``add_many_spans``."""
        stored = await self.add_many_spans([span])
        return stored[0] if stored else None

    @abstractmethod
    async def add_many_spans(self, spans: Sequence[AnySpan]) -> Sequence[AnySpan]:
        """Store spans, all or none; each is a sign of life of its attempt, which becomes ``running``.

        A span is identified by (rollout, attempt, ``span_id``); a repeat is skipped. One without a
        ``sequence_id`` (0) gets the next of its attempt. Spans of an attempt that has ended are stored under it and
        change nothing else. A store whose ``capabilities`` include ``plain_spans`` also takes each span as a
        ``PlainSpan``, and returns that one in the same form.

        Returns:
            The spans that are new, with their sequence ids.

        Raises:
            NotFound: a rollout or attempt is unknown.
            NotJson, TooLarge, InvalidValue: a span is not valid; the message names its ``span_id``.
            IdReused: the ``span_id`` is that of another span of the attempt, with other content.
                ``refused_spans`` of the error names the spans that are refused; another call stores the rest.
        """

    async def add_otel_span(
        self, rollout_id: str, attempt_id: str, readable_span: ReadableSpan, sequence_id: int | None = None
    ) -> Span | None:
        """Convert an OpenTelemetry span and store it. See ``add_many_spans``."""
        return await self.add_span(Span.from_opentelemetry(readable_span, rollout_id, attempt_id, sequence_id or 0))

    async def get_next_span_sequence_id(self, rollout_id: str, attempt_id: str) -> int:
        """Issue the next span sequence id of an attempt, from 1. See ``get_many_span_sequence_ids``."""
        return (await self.get_many_span_sequence_ids([(rollout_id, attempt_id)]))[0]

    @abstractmethod
    async def get_many_span_sequence_ids(self, rollout_attempt_ids: Sequence[tuple[str, str]]) -> Sequence[int]:
        """Issue one span sequence id for each (rollout_id, attempt_id), strictly increasing per attempt.

        Raises:
            NotFound: a rollout or attempt is unknown.
        """

    @abstractmethod
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
        """One page of the spans of a rollout, or of one of its attempts (``latest``: the newest attempt).

        Rollout and attempt always apply; ``filter_logic`` joins the other filters. With ``sort_by="sequence_id"``
        spans are sorted by attempt, then by sequence id, then in the order of insertion.
        """


class ResourceMethods(ABC):
    """What a store does with resources."""

    @abstractmethod
    async def add_resources(
        self, resources: Mapping[str, ResourceUnion], *, resources_id: str | None = None
    ) -> ResourcesUpdate:
        """Store new resources as version 1 of a new id; they are the latest after.

        Raises:
            IdReused: ``resources_id`` exists with other content in version 1.
        """

    @abstractmethod
    async def update_resources(
        self, resources_id: str, resources: Mapping[str, ResourceUnion], *, request_id: str | None = None
    ) -> ResourcesUpdate:
        """Store the next version of an id (version 1 if it is new); it is the latest after.

        Args:
            request_id: makes the call repeatable: a repeat returns the version that the first one made.

        Raises:
            IdReused: ``request_id`` was used for another content or id.
        """

    async def rollback_resources(
        self, resources_id: str, version: int, *, request_id: str | None = None
    ) -> ResourcesUpdate:
        """Store the content of an old version as a new one; it is the latest after.

        Raises:
            NotFound: there is no such version.
        """
        raise not_offered(self)

    @abstractmethod
    async def get_resources_by_id(self, resources_id: str, *, version: int | None = None) -> ResourcesUpdate | None:
        """The newest version of an id, or the one named."""

    @abstractmethod
    async def get_latest_resources(self) -> ResourcesUpdate | None:
        """The version that was stored last, of any id; None if there is none yet."""

    @abstractmethod
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
        """One page of resources: the newest version of each id."""

    async def query_resource_versions(
        self, resources_id: str, *, sort_order: Literal["asc", "desc"] = "asc", limit: int = -1, offset: int = 0
    ) -> PaginatedResult[ResourcesUpdate]:
        """One page of all versions of an id, by version."""
        raise not_offered(self)


class WorkerMethods(ABC):
    """What a store knows of workers, and asks of them."""

    @abstractmethod
    async def update_worker(
        self,
        worker_id: str,
        heartbeat_stats: JsonObject | Unset = UNSET,
        *,
        attempt_ids: Sequence[str] | Unset = UNSET,
        lease_seconds: float | Unset = UNSET,
        registration: JsonObject | Unset = UNSET,
    ) -> Worker:
        """A worker's heartbeat; an unknown worker is registered.

        Args:
            heartbeat_stats: replaces the stored statistics, when given.
            attempt_ids: the attempts it works on; the call is a sign of life of each of them. The reply names those
                that it has lost in ``stale_attempt_ids``.
            lease_seconds: how long the worker may go without a heartbeat or a claim before the store counts it as
                lost and its attempts become ``unresponsive``, ``worker_lost``. Never given: no limit.
            registration: what the worker says about itself when it starts (host, process, versions, labels). A
                registration that differs from the stored one removes the worker's ``directive``, because the worker
                has restarted.

        Returns:
            The worker; its ``directive`` says whether it has been asked to drain or to stop.
        """

    async def report_worker_lost(
        self,
        worker_id: str,
        *,
        message: str,
        reason_code: str | None = None,
        attempt_ids: Sequence[str] | Unset = UNSET,
    ) -> Sequence[Attempt]:
        """End the live attempts of a worker that is known to be dead, without waiting for its lease.

        Args:
            message: what is known about its death.
            reason_code: default ``worker_lost``; ``resource_exhausted`` for a worker that was killed because
                it had used up its memory or another quota; ``worker_left`` for one that has ended in order (attempts
                that it still holds end as ``worker_lost``).
            attempt_ids: the attempts on which it was at work, where that is known. They count as confirmed, and what
                it held besides as given back.

        Returns:
            The attempts that were ended. They are ``unresponsive`` for this reason; or for the reason ``unconfirmed``
            if the worker had not confirmed them, or ``released`` if it is known not to have been at work on them. The
            store hands the rollouts of the last two kinds out again.

        Raises:
            NotFound: the worker is unknown.
        """
        raise not_offered(self)

    async def direct_workers(
        self, directive: WorkerDirective | None, *, worker_ids: Sequence[str] | None = None
    ) -> Sequence[Worker]:
        """Ask workers to drain or to stop, or withdraw that (None).

        From then on their claims return nothing, at once; a claim that waits ends without a result. The reply to each
        of their heartbeats carries the directive. It holds until it is withdrawn or the worker registers again.

        Args:
            directive: ``drain``: finish the attempts that you hold, claim nothing new, then exit; ``stop``: abandon
                the attempts that you hold, then exit.
            worker_ids: which workers; None: all workers that the store knows.

        Returns:
            The workers named, or all.

        Raises:
            NotFound: one of them is unknown; then nothing is changed.
        """
        raise not_offered(self)

    async def delete_workers(self, worker_ids: Sequence[str]) -> Sequence[str]:
        """Forget workers that are gone: those that are ``unknown``, or have no lease, and hold no attempt.

        Others stay, and so do attempts that name a deleted worker. One that is heard of again registers anew.

        Args:
            worker_ids: at most 10,000; those that the store does not know are skipped.

        Returns:
            The ids of those that were deleted.
        """
        raise not_offered(self)

    @abstractmethod
    async def get_worker_by_id(self, worker_id: str) -> Worker | None:
        """One worker."""

    @abstractmethod
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
        """One page of workers."""


class EncodedJson(bytes):
    """A value that was checked and encoded ahead of the call; our stores take it wherever they take the value."""

    canonical: bytes
    """With sorted keys, so that equal values have equal bytes."""


def enqueue_request(*values: Any) -> EnqueueRolloutRequest:
    """The arguments of ``enqueue_rollout`` as a request, in the order of its fields.

    Raises:
        InvalidValue: a field has a wrong type or value; the message names it.
        InvalidId, NotJson: an id is not a string; the metadata are not an object with string keys.
    """
    fields = dict(zip(EnqueueRolloutRequest.model_fields, values, strict=True))
    metadata, encoded = fields["metadata"], None
    if type(metadata) is EncodedJson:
        metadata, encoded, fields["metadata"] = None, metadata, None
    if metadata is not None and not isinstance(metadata, Mapping):
        raise NotJson(f"metadata is a {type(metadata).__name__}; give a dict with string keys")
    try:
        request = EnqueueRolloutRequest(**fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = str(first["loc"][0])
        raise _FIELD_ERRORS.get(field, InvalidValue)(f"{field} is not valid: {first['msg']}") from error
    if encoded is not None:
        request.metadata = cast("Any", encoded)
    return request


_FIELD_ERRORS: Mapping[str, type[InvalidValue]] = {
    "metadata": NotJson,
    "resources_id": InvalidId,
    "rollout_id": InvalidId,
}
"""The error for a field of a wrong type, where it is not plain ``InvalidValue``."""
