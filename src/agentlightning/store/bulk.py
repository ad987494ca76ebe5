"""The methods whose calls may be about very many rows. A large call is carried out in slices.

A slice is one transaction and takes a few milliseconds, so that the writes of others go between. What keeps the
guarantees: a call returns after its last slice is durable, and a repeat of an interrupted call skips what is there and
adds the rest. What a large call asks for is checked in the whole before its first slice, so that one that is refused
has changed nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import get_args

from agentlightning.errors import AgentLightningError, InvalidValue, RefusedSpan
from agentlightning.lifecycle import reasons
from agentlightning.lifecycle.records import AttemptRow, Pair, WorkerRow
from agentlightning.lifecycle.rollouts import Change
from agentlightning.store.arguments import check_batch, check_ids, check_pairs, draft_of, span_drafts
from agentlightning.store.backend import ReadTransaction, Transaction
from agentlightning.store.base import JsonObject
from agentlightning.store.core import Core
from agentlightning.store.operations import (
    attempts as attempt_ops,
    rollouts as rollout_ops,
    spans as span_ops,
    workers as worker_ops,
)
from agentlightning.store.operations.attempts import ClaimRequest
from agentlightning.store.operations.rollouts import Draft
from agentlightning.store.operations.spans import SpanDraft
from agentlightning.store.reading import ReadingStore
from agentlightning.store.records import stored_span
from agentlightning.store.refusals import refusal_of
from agentlightning.store.slices import ATTEMPTS, IDS, ROLLOUTS, SPANS, sized_slices, slices
from agentlightning.store.sources import IdSource
from agentlightning.store.validation import (
    canonical,
    check_finite,
    check_id,
    check_one_of,
    check_text,
    encode_required,
    reason_of,
)
from agentlightning.types import UNSET, Attempt, EnqueueRolloutRequest, Rollout, Unset, Worker, WorkerDirective
from agentlightning.types.plain_spans import AnySpan


class BulkStore(ReadingStore):
    """A store's methods that write many rows.

    Args:
        core: runs the operations.
        ids: makes the ids that callers do not give.
    """

    def __init__(self, core: Core, ids: IdSource) -> None:
        super().__init__(core)
        self._ids = ids

    def _mint_attempt_id(self) -> str:
        return self._ids.mint("at-")

    # --- Rollouts and attempts -------------------------------------------------------------------

    async def enqueue_many_rollouts(self, rollouts: Sequence[EnqueueRolloutRequest]) -> Sequence[Rollout]:
        check_batch(rollouts, "rollouts")
        parts = list(sized_slices([draft_of(request, self._ids) for request in rollouts], ROLLOUTS))
        resources = await self._check_drafts(parts) if len(parts) > 1 else None
        done = [each for part in parts for each in await self._enqueue(part, resources)]
        if self._core.claims.held:
            self._core.claims.release()
        return self._shown.views(done, self._shown.rollout_view)

    async def _enqueue(self, drafts: Sequence[Draft], resources: rollout_ops.Newest | None) -> list[Change]:
        async def enqueue(tx: Transaction) -> list[Change]:
            done = await rollout_ops.enqueue(tx, drafts, resources)
            for wanted in self._core.claims.offer(tx, len(done)):
                await attempt_ops.claim_for_waiter(tx, wanted, self._mint_attempt_id)
            return done

        return await self._core.write(enqueue)

    async def _check_drafts(self, parts: Sequence[Sequence[Draft]]) -> rollout_ops.Newest:
        """The newest resources that these rollouts name, which all of them are to run with. Raises as ``enqueue``."""
        resources: rollout_ops.Newest = {}
        rollout_ops.check_equal(chain.from_iterable(parts))
        for part in parts:

            async def check(tx: ReadTransaction, drafts: Sequence[Draft] = part) -> None:
                await rollout_ops.check(tx, drafts, resources)

            await self._core.read(check, rows=len(part))
        return resources

    async def _claim_in_slices(self, wanted: ClaimRequest, mint: Callable[[], str]) -> list[Pair] | None:
        """``attempt_ops.claim``. What a second slice gets belongs to the same ``request_id``, so a repeat gets all."""
        if wanted.limit <= ATTEMPTS:
            return await self._core.write(lambda tx: attempt_ops.claim(tx, wanted, mint))

        async def first(tx: Transaction) -> tuple[list[Pair] | None, bool]:
            held = await attempt_ops.claimed_before(tx, wanted)
            if held is not None:
                return held or None, False
            return await attempt_ops.claim_new(tx, wanted._replace(limit=ATTEMPTS), mint), True

        claimed, is_new = await self._core.write(first)
        if claimed is None or not is_new:
            return claimed
        while len(claimed) % ATTEMPTS == 0 and 0 < len(claimed) < wanted.limit:
            left = wanted._replace(limit=min(ATTEMPTS, wanted.limit - len(claimed)))
            more = await self._core.write(lambda tx, left=left: attempt_ops.claim_more(tx, left, mint))
            if not more:
                break
            claimed += more
        return claimed

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
        """Store spans that are checked and encoded already, as by ``arguments.span_drafts``.

        Returns:
            The sequence id of each; 0 for one that was stored before.

        Raises:
            NotFound: a rollout or attempt is unknown.
        """
        parts = list(sized_slices(drafts, SPANS))
        if len(parts) == 1:  # as nearly always
            return await self._core.write(lambda tx: span_ops.add_spans(tx, drafts))
        await self._check_spans(parts)
        return await self._add_slices(parts)

    async def _add_slices(self, parts: Sequence[Sequence[SpanDraft]]) -> list[int]:
        issued: list[int] = []
        for part in parts:
            try:
                issued += await self._core.write(lambda tx, part=part: span_ops.add_spans(tx, part))
            except AgentLightningError as error:
                error.refused_spans = [each._replace(place=len(issued) + each.place) for each in error.refused_spans]
                raise
        return issued

    async def _check_spans(self, parts: Sequence[Sequence[SpanDraft]]) -> None:
        """Raise as ``add_spans`` would in one of these slices."""
        refused: list[RefusedSpan] = []
        seen: dict[tuple[str, str, str], SpanDraft] = {}
        place = 0
        for part in parts:

            async def check(
                tx: ReadTransaction, some: Sequence[SpanDraft] = part, first: int = place
            ) -> list[RefusedSpan]:
                return await span_ops.find_refused(tx, some, first, seen)

            refused += await self._core.read(check, rows=len(part))
            place += len(part)
        if refused:
            raise refusal_of(refused)

    async def _store_all_but_last(self, drafts: Sequence[SpanDraft]) -> tuple[list[int], Sequence[SpanDraft]]:
        """Store spans of one attempt but for the last slice: (the sequence ids of those stored, the last slice)."""
        parts = list(sized_slices(drafts, SPANS))
        if len(parts) <= 1:
            return [], drafts
        await self._check_spans(parts)
        return await self._add_slices(parts[:-1]), parts[-1]

    async def get_many_span_sequence_ids(self, rollout_attempt_ids: Sequence[tuple[str, str]]) -> Sequence[int]:
        issued: list[int] = []
        for part in slices(check_pairs(rollout_attempt_ids), IDS):
            issued += await self._core.write(lambda tx, part=part: span_ops.issue_sequence_ids(tx, part))
        return issued

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
        said = worker_ops.Beat(stats, listed[:IDS], listed, lease, told)
        row, stale, more = await self._core.write(lambda tx: worker_ops.beat(tx, worker_id, said))
        while more:
            row, stale, more = await self._core.write(lambda tx: worker_ops.beat(tx, worker_id, said))
        for part in slices(listed[IDS:], IDS):
            rest = worker_ops.Beat(attempt_ids=part)
            row, gone, _ = await self._core.write(lambda tx, rest=rest: worker_ops.beat(tx, worker_id, rest))
            stale += gone
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
        lost: list[AttemptRow] = []
        more = True
        while more:
            some, more = await self._core.write(lambda tx: worker_ops.lose(tx, worker_id, reason, at_work))
            lost += some
        return self._shown.views(lost, self._shown.attempt_view)

    async def direct_workers(
        self, directive: WorkerDirective | None, *, worker_ids: Sequence[str] | None = None
    ) -> Sequence[Worker]:
        if directive is not None:
            check_one_of(directive, get_args(WorkerDirective), "directive")
        rows: list[WorkerRow] = []
        if worker_ids is None:
            of_few = await self._core.write(lambda tx: worker_ops.direct_few(tx, directive))
            if of_few is not None:
                return self._shown.views(of_few, self._shown.worker_view)
            for part in await self._all_workers():
                rows += await self._core.write(lambda tx, part=part: worker_ops.direct_known(tx, directive, part))
            return self._shown.views(rows, self._shown.worker_view)
        check_ids(worker_ids, "worker_ids")
        parts = list(slices(list(dict.fromkeys(worker_ids)), IDS))
        for part in parts if len(parts) > 1 else ():
            await self._core.read(lambda tx, part=part: worker_ops.check(tx, part), rows=len(part))
        for part in parts:
            rows += await self._core.write(lambda tx, part=part: worker_ops.direct(tx, directive, part))
        return self._shown.views(rows, self._shown.worker_view)

    async def delete_workers(self, worker_ids: Sequence[str]) -> Sequence[str]:
        check_ids(worker_ids, "worker_ids")
        deleted: list[str] = []
        for part in slices(worker_ids, IDS):
            deleted += await self._core.write(lambda tx, part=part: worker_ops.delete(tx, part))
        return deleted

    async def _all_workers(self) -> list[list[str]]:
        """The ids of all workers, in slices."""
        found: list[list[str]] = []
        after = 0
        while rows := await self._core.read(lambda tx, after=after: tx.scan("workers", after, IDS), rows=IDS):
            found.append([each.worker_id for each in rows if isinstance(each, WorkerRow)])
            after = rows[-1].seq
        return found
