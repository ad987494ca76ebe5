"""The one implementation of the store: validate the arguments, run the operation, convert the result.

``store.operations`` has the operations, ``lifecycle`` decides what may happen to a record, the backend stores rows,
and ``reading`` has the methods that only read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, Literal, Self

from agentlightning.lifecycle.records import Claim
from agentlightning.store.arguments import (
    check_claim_limit,
    check_spans_of,
    digest_of,
    draft_of,
    edit_of,
    final_report_of,
    report_of,
    span_drafts,
)
from agentlightning.store.backend import Backend, Measure
from agentlightning.store.base import JsonObject, enqueue_request
from agentlightning.store.bulk import BulkStore
from agentlightning.store.core import Alarm, Core
from agentlightning.store.operations import (
    attempts as attempt_ops,
    resources as resources_ops,
    rollouts as rollout_ops,
)
from agentlightning.store.operations.attempts import ClaimRequest
from agentlightning.store.records import JSON
from agentlightning.store.slices import ATTEMPTS
from agentlightning.store.sources import IdSource
from agentlightning.store.validation import (
    canonical,
    check_finite,
    check_id,
    check_text,
    check_version,
    encode_resources,
)
from agentlightning.types import (
    UNSET,
    Attempt,
    AttemptedRollout,
    AttemptEnd,
    AttemptStatus,
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
)
from agentlightning.types.plain_spans import PlainSpan

_CONFIRM_SECONDS = 10.0


class EngineStore(BulkStore):
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
        super().__init__(Core(backend, alarm), ids)
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
            try:
                claimed = await self._claim_in_slices(wanted._replace(waited=waited), mint)
            except asyncio.CancelledError:
                abandon()
                raise
            return None if claimed is None else self._shown.views(claimed, self._shown.rollout_view)

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
        wanted = self._claim_request(claim_limit, worker_id, request_id)._replace(limit=min(claim_limit, ATTEMPTS))
        claim = wanted if claim_limit and not self._core.claims.held else None
        issued, last = await self._store_all_but_last(drafts)
        done = await self._core.write(
            lambda tx: attempt_ops.finish(tx, rollout_id, attempt_id, last, said, claim, self._mint_attempt_id)
        )
        if done.refused is not None:
            raise done.refused
        return self._shown.finished_view(done.attempt, [*issued, *done.sequence_ids], done.claimed)

    async def release_attempt(self, rollout_id: str, attempt_id: str) -> Attempt:
        check_id(rollout_id, "rollout_id")
        check_id(attempt_id, "attempt_id")
        return self._shown.attempt_view(
            await self._core.write(lambda tx: attempt_ops.release(tx, rollout_id, attempt_id))
        )

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
