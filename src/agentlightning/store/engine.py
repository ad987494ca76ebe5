"""The one implementation of the store: validate the arguments, run the operation, convert the result.

``store.operations`` has the operations, ``lifecycle`` decides what may happen to a record, the backend stores rows,
and ``reading`` has the methods that only read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, Literal, Self, get_args

from agentlightning.errors import InvalidValue
from agentlightning.lifecycle import reasons
from agentlightning.lifecycle.records import Claim
from agentlightning.lifecycle.rollouts import Change
from agentlightning.store.arguments import (
    check_batch,
    check_claim_limit,
    check_ids,
    check_pairs,
    check_spans_of,
    digest_of,
    draft_of,
    edit_of,
    final_report_of,
    report_of,
    span_drafts,
)
from agentlightning.store.backend import Backend, Measure, Transaction
from agentlightning.store.base import JsonObject, enqueue_request
from agentlightning.store.core import Alarm, Core
from agentlightning.store.operations import (
    attempts as attempt_ops,
    resources as resources_ops,
    rollouts as rollout_ops,
    spans as span_ops,
    workers as worker_ops,
)
from agentlightning.store.operations.attempts import ClaimRequest
from agentlightning.store.operations.spans import SpanDraft
from agentlightning.store.reading import ReadingStore
from agentlightning.store.records import JSON, stored_span
from agentlightning.store.sources import IdSource
from agentlightning.store.validation import (
    canonical,
    check_finite,
    check_id,
    check_one_of,
    check_text,
    check_version,
    encode_required,
    encode_resources,
    reason_of,
)
from agentlightning.types import (
    UNSET,
    Attempt,
    AttemptedRollout,
    AttemptEnd,
    AttemptStatus,
    EnqueueRolloutRequest,
    FinishedAttempt,
    ResourcesUpdate,
    ResourceUnion,
    Rollout,
    RolloutConfig,
    RolloutMode,
    RolloutStatus,
    Span,
    TaskInput,
    Unset,
    Worker,
    WorkerDirective,
)
from agentlightning.types.plain_spans import AnySpan, PlainSpan

_CONFIRM_SECONDS = 10.0


class EngineStore(ReadingStore):
    """A ``LightningStore`` on a backend.

    Args:
        backend: where rows live; opened by the first call, or by ``async with``.
        ids: makes the ids that callers do not give.
        confirm_seconds: how long a claim with a ``request_id`` may stay unconfirmed.
        alarm: makes what rings when something may have expired.
    """

    def __init__(
        self,
        backend: Backend,
        ids: IdSource,
        *,
        confirm_seconds: float = _CONFIRM_SECONDS,
        alarm: Callable[..., Alarm] = Alarm,
    ) -> None:
        super().__init__(Core(backend, alarm))
        self._ids = ids
        self._confirm_seconds = confirm_seconds

    async def __aenter__(self) -> Self:
        self._core.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Finish what was accepted and let go of the data; idempotent."""
        await self._core.close()

    def hold_claims(self) -> None:
        self._core.claims.held = True

    def answering_in_json(self) -> Any:
        same = copy(self)
        same._shown = JSON
        return same

    @property
    def stopped(self) -> bool:
        return self._core.backend.stopped

    def measures(self) -> Sequence[Measure]:
        return [*self._core.tally.measures(), *self._core.backend.measures()]

    # --- Rollouts and attempts -------------------------------------------------------------------

    async def enqueue_many_rollouts(self, rollouts: Sequence[EnqueueRolloutRequest]) -> Sequence[Rollout]:
        check_batch(rollouts, "rollouts")
        drafts = [draft_of(request, self._ids) for request in rollouts]
        claims = self._core.claims

        async def enqueue(tx: Transaction) -> list[Change]:
            done = await rollout_ops.enqueue(tx, drafts)
            for wanted in claims.offer(tx, len(done)):
                await attempt_ops.claim_for_waiter(tx, wanted, self._mint_attempt_id)
            return done

        done = await self._core.write(enqueue)
        if claims.held:
            claims.release()
        return [self._shown.rollout_view(*each) for each in done]

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
        request = enqueue_request(input, mode, resources_id, config, metadata, priority, rollout_id)
        draft = draft_of(request, self._ids, started=True)
        claim = self._claim(worker_id, attempt_id)
        if draft.repeatable or attempt_id is not None:
            told = repr(("start_rollout", worker_id, attempt_id)).encode()
            claim = claim._replace(digest=digest_of(draft.row.digest, told))
        return self._shown.rollout_view(*await self._core.write(lambda tx: attempt_ops.start_rollout(tx, draft, claim)))

    async def dequeue_many_rollouts(
        self,
        *,
        limit: int = 1,
        worker_id: str | None = None,
        request_id: str | None = None,
        wait_seconds: float = 0.0,
    ) -> Sequence[AttemptedRollout]:
        check_claim_limit(limit)
        wait_seconds = check_finite(wait_seconds, "wait_seconds")
        wanted = self._claim_request(limit, worker_id, request_id)
        minted: list[str] = []

        def mint() -> str:
            minted.append(self._mint_attempt_id())
            return minted[-1]

        def abandon() -> None:
            self._core.write_unattended(lambda tx: attempt_ops.abandon(tx, request_id, minted))

        async def claim(waited: bool) -> Sequence[AttemptedRollout] | None:
            now = wanted._replace(waited=waited)
            try:
                claimed = await self._core.write(lambda tx: attempt_ops.claim(tx, now, mint))
            except asyncio.CancelledError:
                abandon()
                raise
            return None if claimed is None else [self._shown.rollout_view(*pair) for pair in claimed]

        self._core.open()
        return await self._core.claims.claim_or_wait(claim, wanted, wait_seconds, abandon)

    async def start_attempt(
        self, rollout_id: str, worker_id: str | None = None, *, attempt_id: str | None = None
    ) -> AttemptedRollout:
        check_id(rollout_id, "rollout_id")
        claim = self._claim(worker_id, attempt_id)
        if attempt_id is not None:
            claim = claim._replace(digest=digest_of(repr(("start_attempt", rollout_id, worker_id)).encode()))
        return self._shown.rollout_view(
            *await self._core.write(lambda tx: attempt_ops.start_attempt(tx, rollout_id, claim))
        )

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
        check_id(rollout_id, "rollout_id")
        fields = {
            "input": input,
            "mode": mode,
            "resources_id": resources_id,
            "config": config,
            "metadata": metadata,
        }
        edit = edit_of(fields, status, reason_code, reason_message)
        return self._shown.rollout_view(*await self._core.write(lambda tx: rollout_ops.edit(tx, rollout_id, edit)))

    async def cancel_rollout(self, rollout_id: str, *, message: str | None = None) -> Rollout:
        check_id(rollout_id, "rollout_id")
        why = "cancelled by a caller" if message is None else check_text(message, "message")
        return self._shown.rollout_view(*await self._core.write(lambda tx: rollout_ops.cancel(tx, rollout_id, why)))

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
        check_id(rollout_id, "rollout_id")
        if attempt_id != "latest":
            check_id(attempt_id, "attempt_id")
        said = report_of(status, worker_id, last_heartbeat_time, metadata, reason_code, reason_message, retry)
        return self._shown.attempt_view(
            await self._core.write(lambda tx: attempt_ops.report(tx, rollout_id, attempt_id, said))
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
        retry: bool | None = None,
        claim_limit: int = 0,
        worker_id: str | None = None,
        request_id: str | None = None,
    ) -> FinishedAttempt:
        check_id(rollout_id, "rollout_id")
        check_id(attempt_id, "attempt_id")
        said = final_report_of(status, metadata, reason_code, reason_message, retry)
        drafts = span_drafts(spans)
        check_spans_of(spans, rollout_id, attempt_id)
        check_claim_limit(claim_limit, least=0, what="claim_limit")
        wanted = self._claim_request(claim_limit, worker_id, request_id)
        claim = wanted if claim_limit and not self._core.claims.held else None
        done = await self._core.write(
            lambda tx: attempt_ops.finish(tx, rollout_id, attempt_id, drafts, said, claim, self._mint_attempt_id)
        )
        if done.refused is not None:
            raise done.refused
        return self._shown.finished_view(done.attempt, done.sequence_ids, done.claimed)

    async def release_attempt(self, rollout_id: str, attempt_id: str) -> Attempt:
        check_id(rollout_id, "rollout_id")
        check_id(attempt_id, "attempt_id")
        return self._shown.attempt_view(
            await self._core.write(lambda tx: attempt_ops.release(tx, rollout_id, attempt_id))
        )

    async def delete_finished_rollouts(self, *, older_than_seconds: float) -> int:
        age = check_finite(older_than_seconds, "older_than_seconds")
        if age < 0:
            raise InvalidValue(f"older_than_seconds {age:g} is not valid; give 0 or more")
        deleted = 0
        while True:
            gone, more = await self._core.write(lambda tx: rollout_ops.delete_slice(tx, tx.now().wall - age))
            self._core.finishes.deleted(gone)
            deleted += len(gone)
            if not more:
                return deleted

    # --- Spans -----------------------------------------------------------------------------------

    async def add_many_spans(self, spans: Sequence[AnySpan]) -> Sequence[AnySpan]:
        issued = await self.add_span_drafts(span_drafts(spans))
        return [stored_span(span, number) for span, number in zip(spans, issued, strict=True) if number]

    async def add_span_drafts(self, drafts: Sequence[SpanDraft]) -> Sequence[int]:
        """Store spans that are checked and encoded already, as by ``requests.span_drafts``.

        Returns:
            The sequence id of each; 0 for one that was stored before.

        Raises:
            NotFound: a rollout or attempt is unknown.
        """
        return await self._core.write(lambda tx: span_ops.add_spans(tx, drafts)) if drafts else ()

    async def get_many_span_sequence_ids(self, rollout_attempt_ids: Sequence[tuple[str, str]]) -> Sequence[int]:
        wanted = check_pairs(rollout_attempt_ids)
        return await self._core.write(lambda tx: span_ops.issue_sequence_ids(tx, wanted))

    # --- Resources -------------------------------------------------------------------------------

    async def add_resources(
        self, resources: Mapping[str, ResourceUnion], *, resources_id: str | None = None
    ) -> ResourcesUpdate:
        new_id = self._ids.mint("rs-") if resources_id is None else check_id(resources_id, "resources_id")
        content = encode_resources(resources)
        return self._shown.resources_view(
            await self._core.write(lambda tx: resources_ops.add(tx, new_id, content, digest_of(canonical(content))))
        )

    async def update_resources(
        self, resources_id: str, resources: Mapping[str, ResourceUnion], *, request_id: str | None = None
    ) -> ResourcesUpdate:
        check_id(resources_id, "resources_id")
        request = None if request_id is None else check_id(request_id, "request_id")
        content = encode_resources(resources)
        return self._shown.resources_view(
            await self._core.write(
                lambda tx: resources_ops.update(tx, resources_id, content, digest_of(canonical(content)), request)
            )
        )

    async def rollback_resources(
        self, resources_id: str, version: int, *, request_id: str | None = None
    ) -> ResourcesUpdate:
        check_id(resources_id, "resources_id")
        check_version(version)
        request = None if request_id is None else check_id(request_id, "request_id")
        return self._shown.resources_view(
            await self._core.write(lambda tx: resources_ops.roll_back(tx, resources_id, version, request))
        )

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
        stats = None if heartbeat_stats is UNSET else encode_required(heartbeat_stats, "heartbeat_stats")
        told = None if registration is UNSET else canonical(encode_required(registration, "registration"))
        listed = () if attempt_ids is UNSET else check_ids(attempt_ids, "attempt_ids")
        lease = None if lease_seconds is UNSET else check_finite(lease_seconds, "lease_seconds", above=0)
        said = worker_ops.Beat(stats, listed, lease, told)
        row, stale = await self._core.write(lambda tx: worker_ops.beat(tx, worker_id, said))
        return self._shown.worker_view(row, None if attempt_ids is UNSET else stale)

    async def report_worker_lost(
        self,
        worker_id: str,
        *,
        message: str,
        reason_code: str | None = None,
        attempt_ids: Sequence[str] | Unset = UNSET,
    ) -> Sequence[Attempt]:
        check_id(worker_id, "worker_id")
        check_text(message, "message")
        at_work = None if attempt_ids is UNSET else frozenset(check_ids(attempt_ids, "attempt_ids"))
        reason = reason_of(reason_code, message, reasons.WORKER_LOST)
        assert reason is not None  # there is a message
        lost = await self._core.write(lambda tx: worker_ops.lose(tx, worker_id, reason, at_work))
        return [self._shown.attempt_view(each) for each in lost]

    async def direct_workers(
        self, directive: WorkerDirective | None, *, worker_ids: Sequence[str] | None = None
    ) -> Sequence[Worker]:
        if directive is not None:
            check_one_of(directive, get_args(WorkerDirective), "directive")
        if worker_ids is not None:
            check_ids(worker_ids, "worker_ids")
        rows = await self._core.write(lambda tx: worker_ops.direct(tx, directive, worker_ids))
        return [self._shown.worker_view(row) for row in rows]

    async def delete_workers(self, worker_ids: Sequence[str]) -> Sequence[str]:
        check_batch(worker_ids, "worker_ids")
        for each in worker_ids:
            check_id(each, "worker_id")
        return await self._core.write(lambda tx: worker_ops.delete(tx, worker_ids))

    def _mint_attempt_id(self) -> str:
        return self._ids.mint("at-")

    def _claim_request(self, limit: int, worker_id: str | None, request_id: str | None) -> ClaimRequest:
        for what, value in (("worker_id", worker_id), ("request_id", request_id)):
            if value is not None:
                check_id(value, what)
        digest = b"" if request_id is None else digest_of(repr(("claim", worker_id, limit)).encode())
        return ClaimRequest(limit, worker_id, request_id, digest, self._confirm_seconds)

    def _claim(self, worker_id: str | None, attempt_id: str | None) -> Claim:
        if worker_id is not None:
            check_id(worker_id, "worker_id")
        new_id = self._mint_attempt_id() if attempt_id is None else check_id(attempt_id, "attempt_id")
        return Claim(new_id, worker_id)
