"""``LightningStore``: the contract of every store, local or remote.

The signatures and docstrings here are the only place where a method is described. Routes, client, forwarding store and
the queries derive from them: the name of a filter says what it does (``store.queries``). CONTRIBUTING.md says how to
add a method; give it a default here if a store may lack it.

These rules hold for all methods:

- An id has 1 to 128 characters of ``A-Z a-z 0-9 . _ ~ : @ -`` and is not ``latest``, ``search`` or ``bulk``; any
  other id raises ``InvalidId``.
- Inputs, metadata and heartbeat statistics must be strict JSON (``NotJson``, ``TooLarge``).
- A write that returns is as durable as the store promises. A write that raises has changed nothing, with two
  exceptions: after ``StoreStopped`` and its subclasses the outcome is unknown, and ``finish_attempt`` keeps the spans
  of a stale attempt.
- A write that is repeated with the same ids has the effect of one and returns the current record. The same id with
  other content raises ``IdReused``. Without ids from the caller, a repeat is a new call.
- A read of an unknown id returns ``None`` or an empty page. A write to an unknown id raises ``NotFound``.
- No read shows an attempt as running after its deadline.
- A call about very many rows may be stored in slices, so that it does not hold up others. It is checked in the whole
  before the first slice, and returns after the last one is durable. If it is interrupted (the process ends, or another
  call takes one of its ids at that moment), slices may be stored; a repeat skips them and adds the rest.
- Returned records are copies: changing them changes nothing in the store.
- Every method may be called from any thread and any event loop.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from agentlightning.errors import IllegalMove, NotFound, StaleAttempt
from agentlightning.store.contract import (
    JsonObject,
    LightningStoreCapabilities,
    LightningStoreStatistics,
    ResourceMethods,
    SpanMethods,
    StoreHost as StoreHost,
    WorkerMethods,
    enqueue_request,
    is_finished as is_finished,
    is_queuing as is_queuing,
    is_running as is_running,
    not_offered,
    sequence_ids_of as sequence_ids_of,
)
from agentlightning.telemetry.metrics import Measure as Measure
from agentlightning.types import (
    UNSET,
    Attempt,
    AttemptedRollout,
    AttemptEnd,
    AttemptStatus,
    EnqueueRolloutRequest,
    FinishedAttempt,
    PaginatedResult,
    Rollout,
    RolloutConfig,
    RolloutMode,
    RolloutStatus,
    Span,
    TaskInput,
    Unset,
    VerificationReport,
)
from agentlightning.types.plain_spans import PlainSpan


class LightningStore(SpanMethods, ResourceMethods, WorkerMethods):
    """Queue of rollouts, record of attempts, log of spans, versions of resources."""

    # --- The object itself; a store that wraps another passes these on ---

    @property
    @abstractmethod
    def capabilities(self) -> LightningStoreCapabilities:
        """What callers may rely on."""

    @property
    def stopped(self) -> bool:
        """Whether a fault, such as a full disk, has ended all writing for good. Reads may still be answered."""
        return False

    def measures(self) -> Sequence[Measure]:
        """Numbers that say how the store is doing, for metrics."""
        return ()

    def hold_claims(self) -> None:
        """Hand out no rollout until somebody enqueues one or waits for one to end.

        A run that resumes calls this, because the rollouts that its earlier start left in the queue must not be
        claimed before its algorithm has started. The store still takes heartbeats and reports. A store that cannot
        hold claims, for example one that serves other runs too, does nothing.
        """

    def answering_in_json(self) -> Any | None:
        """A view of this store whose methods return each record as its JSON, in bytes; None if there is none.

        A server uses it, because it would only encode the records again. The view also has ``add_span_drafts``.
        """
        return None

    def otlp_traces_endpoint(self) -> str:
        """URL that takes spans by OTLP/HTTP.

        Raises:
            NotImplementedError: this store has none (``capabilities['otlp_traces']`` says so).
        """
        raise NotImplementedError(f"{type(self).__name__} has no OTLP endpoint; serve it with LightningStoreServer")

    @abstractmethod
    async def statistics(self) -> LightningStoreStatistics:
        """Counts of everything stored."""

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

        They are ``queuing`` after the call. Workers claim those with a higher ``priority`` first, and among equals the
        one that was enqueued first. Each keeps the version of its resources that is the newest now: of its
        ``resources_id``, or of the latest resources if it names none.

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
        """Make a rollout together with its first attempt, bypassing the queue. It is ``preparing`` after.

        A repeat returns the attempt that the first call made, even if that attempt has lost its rollout meanwhile.

        Raises:
            NotFound: ``resources_id`` is unknown.
            IdReused: ``rollout_id`` or ``attempt_id`` was used for another request.
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
        self, *, limit: int = 1, worker_id: str | None = None, request_id: str | None = None, wait_seconds: float = 0.0
    ) -> Sequence[AttemptedRollout]:
        """Claim up to ``limit`` rollouts; each is ``preparing`` after, with a new attempt.

        Args:
            limit: 1 to 1000. Of large rollouts a claim may get fewer although more wait: some megabytes at a time.
            worker_id: who claims; its worker record becomes ``busy``, or ``idle`` if there was nothing.
                A worker that has been asked to drain or stop gets nothing, and does not wait.
            request_id: makes the claim repeatable: a repeat gets those of its attempts that are still live, and no
                others. The worker must confirm such a claim within a short lease by a sign of life (a span,
                ``update_attempt``, or a heartbeat that lists the attempt). Otherwise the store hands the rollout out
                again, as a new attempt, without using up ``max_attempts``. A claim without a ``request_id`` has no
                such lease; only the rollout's ``RolloutConfig`` applies.
            wait_seconds: how long to wait for the first rollout when the queue is empty. A second
                waiting claim with the same ``request_id`` replaces the first, which gets nothing.

        Raises:
            IdReused: ``request_id`` was used for another worker or limit.
        """

    @abstractmethod
    async def start_attempt(
        self, rollout_id: str, worker_id: str | None = None, *, attempt_id: str | None = None
    ) -> AttemptedRollout:
        """Make a new attempt of a rollout, ignoring ``max_attempts``; it replaces a live one.

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
        """Change the fields that are given; ``UNSET`` leaves a field as it is.

        A terminal ``status`` also ends the live attempt. ``requeuing`` ends the attempt and puts the rollout back
        into the queue. ``running`` moves a ``preparing`` attempt to ``running``. Setting the status that the rollout
        already has is a repeat. After the rollout has ended, only ``metadata`` may change.

        Raises:
            NotFound: the rollout, or the ``resources_id``, is unknown.
            IllegalMove: there is no such move, or the rollout has ended.
        """

    async def cancel_rollout(self, rollout_id: str, *, message: str | None = None) -> Rollout:
        """End a rollout as ``cancelled``; its live attempt fails with reason ``cancelled``.

        Raises:
            NotFound: the rollout is unknown.
            IllegalMove: it has ended with another status.
        """
        raise not_offered(self)

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
        retry: bool | None = None,
    ) -> Attempt:
        """Report the state of an attempt. The call itself is a sign of life.

        When the attempt ends, its rollout succeeds, goes back to the queue if ``retry_condition`` and
        ``max_attempts`` allow it, or fails. ``retry``, said of one that did not succeed, goes before
        ``retry_condition``: True retries it up to ``max_attempts``, False does not. An ``unresponsive`` attempt that
        reports again is revived if its rollout still waits to be retried. ``last_heartbeat_time`` is stored as
        data; leases follow the store's clock alone.
        After the attempt has ended, only ``metadata`` may change, and a repeat of the final status is accepted.

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
        retry: bool | None = None,
        claim_limit: int = 0,
        worker_id: str | None = None,
        request_id: str | None = None,
    ) -> FinishedAttempt:
        """Store the last spans of an attempt, end it, and claim the next rollouts, in one durable call.

        The store does all of it or nothing. A repeat, for example after a lost reply, has the effect of one call:
        spans are stored once, the attempt stays as it ended, and a claim with a ``request_id`` gets the same attempts.
        A repeat never claims other rollouts, also if the first call found none.
        This default calls ``add_many_spans``, ``update_attempt`` and ``dequeue_many_rollouts`` one after the other.

        Args:
            rollout_id: the rollout of the attempt.
            attempt_id: the attempt; not ``latest``.
            status: how it ended.
            spans: its last spans, all of this attempt. See ``add_many_spans``.
            metadata: replaces the attempt's metadata, when given.
            reason_code: why it ended, for programs.
            reason_message: why it ended, for people.
            retry: of one that failed; see ``update_attempt``.
            claim_limit: 0 to 1000: how many rollouts to claim, of which it gets 128 at most; 0 claims none. The call
                never waits for some.
            worker_id: who claims. One that has been asked to drain or stop gets nothing.
            request_id: makes the claim repeatable and short-lived, as in ``dequeue_many_rollouts``, which gets the
                same attempts for the same ``request_id``, worker and limit.

        Raises:
            NotFound: the rollout or the attempt is unknown.
            StaleAttempt: the attempt has lost its rollout. Its spans are stored under it; nothing else is done.
            InvalidValue: a span belongs to another attempt, or an argument is not valid.
            IdReused: ``request_id`` was used for another claim, or the id of a span for another span.
        """
        stored = await self.add_many_spans(spans) if spans else ()
        told: dict[str, Any] = {"metadata": metadata, "reason_code": reason_code, "reason_message": reason_message}
        if retry is not None:
            told["retry"] = retry
        attempt = await self.update_attempt(rollout_id, attempt_id, status, **told)
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
            sort_by: a field of ``Rollout`` that has plain values; default: the order of insertion. A missing
                time sorts after all others, any other missing value before all others.
            limit: at least 1, or -1 for all.
            offset: how many rows to skip.
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

        Returns those that have ended, in the order of ``rollout_ids``. Unknown ids are skipped.
        ``timeout=None`` waits without a limit; 0 looks once.
        """

    async def delete_finished_rollouts(self, *, older_than_seconds: float) -> int:
        """Delete rollouts that ended before this age, with their attempts and spans; returns how many.

        The store deletes in slices, so that other writes are not blocked. If a call is interrupted, the next one
        deletes the rest.
        """
        raise not_offered(self)

    # --- Upkeep ----------------------------------------------------------------------------------

    async def verify(self) -> VerificationReport:
        """Check the stored data for consistency; the report names every record that breaks a rule.

        Rules: the attempts of a rollout are numbered 1..n and at most one is live; terminal records have a reason;
        span sequence ids that the store issued are unique and increasing per attempt; resources versions have no
        gaps; counters equal what they count; the queue and the deadlines match the states.
        """
        raise not_offered(self)
