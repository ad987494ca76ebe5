"""``LightningStore``: the contract of every store, local or remote.

What holds for all methods:

- Ids are 1 to 128 characters of ``A-Z a-z 0-9 . _ ~ : @ -``, never ``latest``, ``search`` or ``bulk``;
  others raise ``InvalidId``.
- Inputs, metadata and heartbeat statistics are strict JSON values (``NotJson``, ``TooLarge``).
- A write that returned is durable as the store promises; one that raised changed nothing, except
  ``StoreStopped`` and its subclasses, after which the outcome of that write is unknown.
- A write repeated with the same ids has the effect of one and returns the record as it is now;
  the same id with other content raises ``IdReused``. Without caller-minted ids a repeat is a new call.
- Reads of unknown ids return ``None`` or an empty page; writes to unknown ids raise ``NotFound``.
- No read shows an attempt as running whose deadline has passed.
- Returned records are copies: changing them changes nothing in the store.
- Any thread and any event loop may call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from pydantic import ValidationError

from agentlightning.errors import IllegalMove, InvalidId, InvalidValue, NotFound, NotJson, StaleAttempt
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

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan


JsonObject = Mapping[str, Any]
"""A JSON object, as callers give it."""


class LightningStoreCapabilities(TypedDict, total=False):
    """What callers may rely on; an absent key means no."""

    thread_safe: bool
    async_safe: bool
    zero_copy: bool
    otlp_traces: bool
    plain_spans: bool
    """Whether ``PlainSpan`` is taken wherever ``Span`` is."""


class StoreHost(TypedDict, total=False):
    """Where the store runs, for comparison with where it is asked from; an absent key means unknown."""

    time: float
    """Its wall clock, in seconds since the Unix epoch."""
    version: str
    """The version of Agent Lightning that it runs."""
    disk_free_bytes: int
    """Room on the disk that holds the database."""
    disk_total_bytes: int


class LightningStoreStatistics(TypedDict, total=False):
    """Counts of everything stored; none of them costs a scan."""

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


def sequence_ids_of(given: Sequence[Span | PlainSpan], stored: Sequence[Span | PlainSpan]) -> list[int]:
    """The sequence id of each span given; 0 where it is not among those that are new.

    Both in the same order; of spans with equal ids, the first is the one that was stored.
    """
    new = {(span.rollout_id, span.attempt_id, span.span_id): span.sequence_id for span in stored}
    return [new.pop((span.rollout_id, span.attempt_id, span.span_id), 0) for span in given]


class LightningStore(ABC):
    """Queue of rollouts, record of attempts, log of spans, versions of resources."""

    @property
    @abstractmethod
    def capabilities(self) -> LightningStoreCapabilities:
        """What callers may rely on."""

    @abstractmethod
    async def statistics(self) -> LightningStoreStatistics:
        """Counts of everything stored."""

    def otlp_traces_endpoint(self) -> str:
        """URL that takes spans by OTLP/HTTP.

        Raises:
            NotImplementedError: this store has none (``capabilities['otlp_traces']`` says so).
        """
        raise NotImplementedError(f"{type(self).__name__} has no OTLP endpoint; serve it with LightningStoreServer")

    def _not_offered(self) -> NotImplementedError:
        return NotImplementedError(f"{type(self).__name__} does not offer this; it came after the contract of 0.3")

    # --- Rollouts and attempts -------------------------------------------------------------------

    async def enqueue_rollout(
        self,
        input: TaskInput,
        mode: RolloutMode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: JsonObject | None = None,
        *,
        priority: int = 0,
        rollout_id: str | None = None,
    ) -> Rollout:
        """Put one rollout into the queue. See ``enqueue_many_rollouts``."""
        request = enqueue_request(input, mode, resources_id, config, metadata, priority, rollout_id)
        return (await self.enqueue_many_rollouts([request]))[0]

    @abstractmethod
    async def enqueue_many_rollouts(self, rollouts: Sequence[EnqueueRolloutRequest]) -> Sequence[Rollout]:
        """Put rollouts into the queue, all or none.

        They are ``queuing`` after, and are claimed higher ``priority`` first, then in the order in
        which they were enqueued. Each keeps the newest version of ``resources_id`` (or the latest
        resources, when none is named) as it stood at this moment.

        Args:
            rollouts: what to run; a ``rollout_id`` given makes the call repeatable.

        Raises:
            NotFound: a ``resources_id`` is unknown.
            IdReused: a ``rollout_id`` exists with other content.
        """

    @abstractmethod
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
        """Make a rollout together with its first attempt, past the queue. It is ``preparing`` after.

        Raises:
            NotFound: ``resources_id`` is unknown.
            IdReused: ``rollout_id`` or ``attempt_id`` was used for another request. (A repeat of this one
                gets the attempt that it made, even if that has lost its rollout meanwhile.)
        """

    async def dequeue_rollout(
        self, worker_id: str | None = None, *, request_id: str | None = None, wait_seconds: float = 0.0
    ) -> AttemptedRollout | None:
        """Claim one rollout; None if there is none. See ``dequeue_many_rollouts``."""
        claimed = await self.dequeue_many_rollouts(
            limit=1, worker_id=worker_id, request_id=request_id, wait_seconds=wait_seconds
        )
        return claimed[0] if claimed else None

    @abstractmethod
    async def dequeue_many_rollouts(
        self,
        *,
        limit: int = 1,
        worker_id: str | None = None,
        request_id: str | None = None,
        wait_seconds: float = 0.0,
    ) -> Sequence[AttemptedRollout]:
        """Claim up to ``limit`` rollouts; each is ``preparing`` after, with a new attempt.

        Args:
            limit: 1 to 1000.
            worker_id: who claims; its worker record becomes ``busy``, or ``idle`` if there was nothing.
                One that has been asked to drain or stop gets nothing, and does not wait.
            request_id: makes the claim repeatable. A repeat gets those of its attempts that it still has,
                and no others. Such a claim must be confirmed by a sign of life (a span, ``update_attempt``, or a
                heartbeat that lists the attempt) within a short lease; otherwise the rollout is handed out
                again, as a new attempt, without using up ``max_attempts``. Without a ``request_id`` a
                claim follows the rollout's ``RolloutConfig`` alone.
            wait_seconds: how long to wait for the first rollout when the queue is empty. A second
                waiting claim with the same ``request_id`` replaces the first, which gets nothing.

        Raises:
            IdReused: ``request_id`` was used for another worker or limit.
        """

    @abstractmethod
    async def start_attempt(
        self, rollout_id: str, worker_id: str | None = None, *, attempt_id: str | None = None
    ) -> AttemptedRollout:
        """Make a new attempt of a rollout, whatever ``max_attempts`` says; a live one is superseded.

        Raises:
            NotFound: the rollout is unknown.
            IllegalMove: the rollout has ended.
            IdReused: ``attempt_id`` was used for another request.
        """

    @abstractmethod
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
        """Change what is given; ``UNSET`` leaves a field as it is.

        A terminal ``status`` ends a live attempt with the rollout; ``requeuing`` ends it and puts the
        rollout back into the queue; ``running`` starts a ``preparing`` attempt. The status that the
        rollout already has is a repeat. After the end only ``metadata`` may change.

        Raises:
            NotFound: the rollout, or the ``resources_id``, is unknown.
            IllegalMove: there is no such move, or the rollout has ended.
        """

    async def cancel_rollout(self, rollout_id: str, *, message: str | None = None) -> Rollout:
        """End a rollout that nobody wants any more; its live attempt fails with reason ``cancelled``.

        Raises:
            NotFound: the rollout is unknown.
            IllegalMove: it ended otherwise before.
        """
        raise self._not_offered()

    @abstractmethod
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
        """Report where an attempt stands. The call itself is a sign of life.

        When the attempt ends, its rollout succeeds, goes back to the queue if ``retry_condition`` and
        ``max_attempts`` say so, or fails. An ``unresponsive`` attempt that reports again is revived
        while its rollout still waits to be retried. ``last_heartbeat_time`` is data and moves no lease.
        After the end only ``metadata`` may change, and a repeat of the final status is accepted.

        Raises:
            NotFound: the rollout or the attempt is unknown.
            StaleAttempt: the attempt has lost its rollout; stop working on it.
            IllegalMove: a running attempt cannot become ``preparing``.
        """

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
        """Store the last spans of an attempt, end it, and claim the next rollouts, in one durable call.

        The store does all of it or nothing. A repeat, for example after a lost reply, has the effect of one call:
        spans are stored once, the attempt stays as it ended, and a claim with a ``request_id`` gets the same attempts.
        This default calls ``add_many_spans``, ``update_attempt`` and ``dequeue_many_rollouts`` one after the other.

        Args:
            rollout_id: the rollout of the attempt.
            attempt_id: the attempt; not ``latest``.
            status: how it ended.
            spans: its last spans, all of this attempt. See ``add_many_spans``.
            metadata: replaces the attempt's metadata, when given.
            reason_code: why it ended, for programs.
            reason_message: why it ended, for people.
            claim_limit: 0 to 1000: how many rollouts to claim; 0 claims none. The call never waits for some.
            worker_id: who claims. One that has been asked to drain or stop gets nothing.
            request_id: makes the claim repeatable and short-lived, as in ``dequeue_many_rollouts``, which gets the
                same attempts for the same ``request_id``, worker and limit.

        Raises:
            NotFound: the rollout or the attempt is unknown.
            StaleAttempt: the attempt has lost its rollout. Its spans are stored under it; nothing else is done.
            InvalidValue: a span belongs to another attempt, or an argument is not valid.
            IdReused: ``request_id`` was used for another claim.
        """
        stored = await self.add_many_spans(spans) if spans else ()
        attempt = await self.update_attempt(
            rollout_id,
            attempt_id,
            status,
            metadata=metadata,
            reason_code=reason_code,
            reason_message=reason_message,
        )
        claimed: Sequence[AttemptedRollout] = ()
        if claim_limit:
            claimed = await self.dequeue_many_rollouts(limit=claim_limit, worker_id=worker_id, request_id=request_id)
        return FinishedAttempt(attempt=attempt, sequence_ids=sequence_ids_of(spans, stored), claimed=list(claimed))

    async def release_attempt(self, rollout_id: str, attempt_id: str) -> Attempt:
        """Give back a claim whose work has not begun, for example one that a runner holds in advance when it stops.

        The rollout can be claimed again at once, at its old place in the queue. The attempt becomes ``unresponsive``
        with reason ``released``; it counts neither against ``max_attempts`` nor as a redelivery, and cannot be
        revived. A repeat returns it as it is. This default puts the rollout back by ``update_rollout``, where the
        attempt counts.

        Returns:
            The attempt, which has ended.

        Raises:
            NotFound: the rollout or the attempt is unknown.
            StaleAttempt: the attempt has lost its rollout otherwise.
            IllegalMove: its work has begun: it is ``running``.
        """
        attempt = await self.get_latest_attempt(rollout_id)
        if attempt is None:
            raise NotFound(f"rollout {rollout_id!r} has no attempt {attempt_id!r} in this store")
        if attempt.attempt_id != attempt_id:
            raise StaleAttempt(f"attempt {attempt_id!r} of rollout {rollout_id!r} is not its latest; it has ended")
        if attempt.status == "running":
            raise IllegalMove(f"attempt {attempt_id!r} is running; report how it ended instead of releasing it")
        if attempt.status == "preparing":
            await self.update_rollout(rollout_id, status="requeuing", reason_message="given back by its worker")
            attempt = await self.get_latest_attempt(rollout_id) or attempt
        return attempt

    @abstractmethod
    async def get_rollout_by_id(self, rollout_id: str) -> Rollout | None:
        """One rollout, with its latest attempt (then it is an ``AttemptedRollout``) if it has any."""

    @abstractmethod
    async def get_latest_attempt(self, rollout_id: str) -> Attempt | None:
        """The newest attempt of a rollout; None if the rollout is unknown or has none."""

    @abstractmethod
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
        """One page of rollouts, each with its latest attempt if it has any.

        Args:
            status_in, rollout_id_in, rollout_id_contains: filters, joined by ``filter_logic``.
            sort_by: a field of ``Rollout`` with plain values; default: the order of insertion. A missing
                time sorts as later than all, any other missing value as less than all.
            limit: at least 1, or -1 for all.
            offset: rows to pass over.
            status, rollout_ids: old names of ``status_in`` and ``rollout_id_in``.

        Raises:
            InvalidValue: a bad limit, offset, sort field, or both an old and a new name.
        """

    @abstractmethod
    async def query_attempts(
        self,
        rollout_id: str,
        *,
        sort_by: str | None = "sequence_id",
        sort_order: Literal["asc", "desc"] = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[Attempt]:
        """One page of the attempts of a rollout."""

    @abstractmethod
    async def wait_for_rollouts(self, *, rollout_ids: Sequence[str], timeout: float | None = None) -> list[Rollout]:
        """Wait until all of these rollouts have ended, or ``timeout`` seconds have passed.

        Returns those that have ended, in the order of ``rollout_ids``. Unknown ids are passed over.
        ``timeout=None`` waits as long as it takes; 0 looks once.
        """

    async def delete_finished_rollouts(self, *, older_than_seconds: float) -> int:
        """Delete rollouts that ended longer ago, with their attempts and spans; returns how many.

        Works in slices, so other writes go on meanwhile; an interrupted call is finished by the next.
        """
        raise self._not_offered()

    # --- Spans -----------------------------------------------------------------------------------

    async def add_span(self, span: AnySpan) -> AnySpan | None:
        """Store one span; None if it was stored before. See ``add_many_spans``."""
        stored = await self.add_many_spans([span])
        return stored[0] if stored else None

    @abstractmethod
    async def add_many_spans(self, spans: Sequence[AnySpan]) -> Sequence[AnySpan]:
        """Store spans, all or none; each is a sign of life of its attempt, which starts ``running``.

        A store whose ``capabilities`` have ``plain_spans`` also takes them as ``PlainSpan``, and returns those so.

        A span is known by (rollout, attempt, ``span_id``); one that was stored before is passed over.
        One without a ``sequence_id`` (0) gets the next of its attempt. Spans of an attempt that has
        ended are kept under it and change nothing else.

        Returns:
            The spans that are new, with their sequence ids.

        Raises:
            NotFound: a rollout or attempt is unknown.
            NotJson, TooLarge, InvalidValue: a span that no store would take, named by its ``span_id``.
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

        Rollout and attempt always apply; the other filters are joined by ``filter_logic``. By
        ``sequence_id``, spans are sorted by attempt first, and by insertion where ids are equal.
        """

    # --- Resources -------------------------------------------------------------------------------

    @abstractmethod
    async def add_resources(self, resources: NamedResources, *, resources_id: str | None = None) -> ResourcesUpdate:
        """Store new resources as version 1 of a new id; they are the latest after.

        Raises:
            IdReused: ``resources_id`` exists with other content in version 1.
        """

    @abstractmethod
    async def update_resources(
        self, resources_id: str, resources: NamedResources, *, request_id: str | None = None
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
        raise self._not_offered()

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
        self,
        resources_id: str,
        *,
        sort_order: Literal["asc", "desc"] = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[ResourcesUpdate]:
        """One page of all versions of an id, by version."""
        raise self._not_offered()

    # --- Workers ---------------------------------------------------------------------------------

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
            heartbeat_stats: replaces the statistics kept, when given.
            attempt_ids: the attempts it works on; the call is a sign of life of each of them. Those it
                has lost are named in ``stale_attempt_ids`` of the reply.
            lease_seconds: how long the worker may go without a heartbeat or a claim before it counts as
                lost and its attempts become ``unresponsive``, ``worker_lost``. Never given: for ever.
            registration: what the worker says of itself when it begins (host, process, versions, labels).
                One that differs from the one kept takes back the worker's ``directive``: it has begun anew.

        Returns:
            The worker; its ``directive`` says whether it has been asked to drain or to stop.
        """

    async def report_worker_lost(
        self, worker_id: str, *, message: str, reason_code: str | None = None
    ) -> Sequence[Attempt]:
        """End the live attempts of a worker that is known to be dead, without waiting for its lease.

        Args:
            message: what is known about its death.
            reason_code: ``worker_lost`` if not given; ``resource_exhausted`` for one that was killed because
                it had used up its memory or another quota.

        Returns the attempts that were ended: ``unresponsive``, for that reason, or
        ``unconfirmed`` if the worker had not confirmed them; then they are handed out again.

        Raises:
            NotFound: the worker is unknown.
        """
        raise self._not_offered()

    async def direct_workers(
        self, directive: WorkerDirective | None, *, worker_ids: Sequence[str] | None = None
    ) -> Sequence[Worker]:
        """Ask workers to drain or to stop, or take that back (None).

        From then on their claims get nothing, at once, and one that waits ends, empty; the reply to each
        of their heartbeats says what is asked. It holds until it is taken back, or the worker registers anew.

        Args:
            directive: ``drain``: finish what you hold, take nothing new, then end; ``stop``: give up what you
                hold, then end.
            worker_ids: whom; None: all workers that the store knows.

        Returns:
            The workers named, or all.

        Raises:
            NotFound: one of them is unknown; then none is asked.
        """
        raise self._not_offered()

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

    # --- Upkeep ----------------------------------------------------------------------------------

    async def verify(self) -> VerificationReport:
        """Check that everything stored obeys the rules; names every record that breaks one.

        Rules: attempts are numbered 1..n; at most one is live; terminal records are final and say why;
        span sequence ids that the store issued are unique and increasing per attempt; versions are
        dense; counters are true; the queue and the deadlines match the states.
        """
        raise self._not_offered()


def enqueue_request(
    input: TaskInput,
    mode: RolloutMode | None,
    resources_id: str | None,
    config: RolloutConfig | None,
    metadata: JsonObject | None,
    priority: int,
    rollout_id: str | None,
) -> EnqueueRolloutRequest:
    """What a caller gives for one rollout, as a request.

    Raises:
        InvalidValue: a field has a wrong type or value; the message names it.
        InvalidId, NotJson: an id is no string; the metadata are no object with string keys.
    """
    if metadata is not None and not isinstance(metadata, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise NotJson(f"metadata is a {type(metadata).__name__}; give a dict with string keys")
    try:
        return EnqueueRolloutRequest(
            input=input,
            mode=mode,
            resources_id=resources_id,
            config=config,
            metadata=None if metadata is None else dict(metadata),
            priority=priority,
            rollout_id=rollout_id,
        )
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = str(first["loc"][0])
        raise _FIELD_ERRORS.get(field, InvalidValue)(f"{field} is not valid: {first['msg']}") from error


_FIELD_ERRORS: Mapping[str, type[InvalidValue]] = {
    "metadata": NotJson,
    "resources_id": InvalidId,
    "rollout_id": InvalidId,
}
"""What is wrong with a request, where it is more than a bad value."""
