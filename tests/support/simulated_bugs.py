"""Faults of the kind that a simulation is to find, each put into the product for a while: the controls of the harness.

A fault is a few lines at a seam that the guarantee depends on. ``planted`` puts one in for a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from msgspec.structs import replace

from agentlightning.http.client.retry import Retrying
from agentlightning.http.client.span_delivery import SpanDelivery
from agentlightning.http.client.spool import Batch, Spool
from agentlightning.lifecycle import attempts, records
from agentlightning.lifecycle.records import AttemptRow, Pair
from agentlightning.runner import attempt as runner_attempt
from agentlightning.store.core import Alarm
from agentlightning.store.operations import (
    attempts as attempt_ops,
    rollouts as rollout_ops,
    spans as span_ops,
    workers as worker_ops,
)
from agentlightning.store.operations.rollouts import Draft, existing
from agentlightning.store.operations.spans import SpanDraft
from agentlightning.store.sqlite import connections
from agentlightning.store.sqlite.backend import SqliteBackend
from agentlightning.store.sqlite.group_commit import GroupCommit
from agentlightning.store.sqlite.transaction import SqliteTransaction

__all__ = ["BUGS", "planted"]

Seam = tuple[Any, str, Any]
"""An object, the name of an attribute, and what is put there."""


def _repeats_enqueue_again() -> Iterator[Seam]:
    """A repeated enqueue makes another rollout."""
    plain = rollout_ops.enqueue

    async def enqueue(tx: Any, drafts: Sequence[Draft]) -> Any:
        fresh = list[Draft]()
        for draft in drafts:
            row = draft.row
            while await existing(tx, draft._replace(row=row)) is not None:
                row = replace(row, rollout_id=f"{row.rollout_id}-again")
            fresh.append(draft._replace(row=row))
        return await plain(tx, fresh)

    yield rollout_ops, "enqueue", enqueue


def _repeats_claim_again() -> Iterator[Seam]:
    """A claim whose reply was lost claims other rollouts when it is repeated."""

    async def claimed_before(*_: Any) -> None:
        return None

    yield attempt_ops, "claimed_before", claimed_before


def _fence_is_open() -> Iterator[Seam]:
    """An attempt that was lost may report, whoever has taken over."""

    def standing(pair: Pair) -> Literal["live", "revivable", "stale"]:
        if pair.attempt.live:
            return "live"
        return "revivable" if pair.attempt.status == "unresponsive" and not pair.rollout.final else "stale"

    for module in (attempts, attempt_ops, worker_ops):
        yield module, "standing", standing


def _standstill_expires() -> Iterator[Seam]:
    """A server that stood still does not renew the leases."""
    yield Alarm, "stood_still", lambda _: 0.0


def _restart_expires() -> Iterator[Seam]:
    """A server that starts does not renew the leases."""
    yield connections, "rebase_leases", lambda *_: None


def _leases_follow_wall_clock() -> Iterator[Seam]:
    """Leases are counted on the clock that somebody may set."""
    yield SqliteBackend, "lease_now", lambda self: self._clock.wall()
    yield SqliteBackend, "moment", lambda self: records.Moment(self._clock.wall(), self._clock.wall())


def _requeued_is_forgotten() -> Iterator[Seam]:
    """A rollout that is to be tried again is not handed out."""
    plain = SqliteTransaction.next_claimable

    async def next_claimable(self: SqliteTransaction, limit: int) -> Any:
        return [each for each in await plain(self, limit) if each.status != "requeuing"]

    yield SqliteTransaction, "next_claimable", next_claimable


def _answers_before_commit() -> Iterator[Seam]:
    """Callers get their results before these are durable."""
    plain = GroupCommit._execute_waiting  # pyright: ignore[reportPrivateUsage]

    def execute(self: Any) -> Any:
        jobs, transaction = plain(self)
        self._wake_waiting(jobs)
        return jobs, transaction

    yield GroupCommit, "_execute_waiting", execute


def _repeats_store_spans_again() -> Iterator[Seam]:
    """A span that arrives twice is stored twice."""
    plain = span_ops.insert_spans

    async def insert(tx: Any, attempt: AttemptRow, drafts: Sequence[SpanDraft]) -> Any:
        fresh = list[SpanDraft]()
        for draft in drafts:
            span_id = draft.span_id
            while await tx.span_bodies(attempt, [span_id]):
                span_id += "-again"
            fresh.append(draft._replace(span_id=span_id))
        return await plain(tx, attempt, fresh)

    for module in (span_ops, attempt_ops):
        yield module, "insert_spans", insert


def _spool_forgets_early() -> Iterator[Seam]:
    """Spans leave the disk before the server has them."""
    plain = Spool.next_batch

    def next_batch(self: Spool, *limits: Any) -> Batch | None:
        batch = plain(self, *limits)
        if batch is not None:
            self.acknowledge(batch)
        return batch

    yield Spool, "next_batch", next_batch


def _ends_overtake_spans() -> Iterator[Seam]:
    """The end of an attempt is reported although spans of it still wait on the disk."""

    async def settle(*_: Any) -> None: ...

    yield SpanDelivery, "settle", settle


def _reports_are_given_up() -> Iterator[Seam]:
    """A runner reports the end of an attempt once, and works on without an answer."""

    async def delay(*_: Any) -> None: ...

    yield Retrying, "_delay", delay
    yield runner_attempt, "REPORT_TRIES", 1


BUGS: Mapping[str, Callable[[], Iterator[Seam]]] = {
    each.__name__.lstrip("_"): each
    for each in (
        _repeats_enqueue_again,
        _repeats_claim_again,
        _fence_is_open,
        _standstill_expires,
        _restart_expires,
        _leases_follow_wall_clock,
        _requeued_is_forgotten,
        _answers_before_commit,
        _repeats_store_spans_again,
        _spool_forgets_early,
        _ends_overtake_spans,
        _reports_are_given_up,
    )
}
"""By name."""


@contextmanager
def planted(name: str | None) -> Iterator[None]:
    """In the block the product has this fault; None: none."""
    before = list[Seam]()
    try:
        if name is not None:
            for place, attribute, value in BUGS[name]():
                before.append((place, attribute, vars(place)[attribute]))
                setattr(place, attribute, value)
        yield
    finally:
        for place, attribute, value in reversed(before):
            setattr(place, attribute, value)
