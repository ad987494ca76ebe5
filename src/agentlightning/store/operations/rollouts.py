"""Enqueue, change, cancel and delete rollouts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from msgspec.structs import replace

from agentlightning.errors import IdReused, NotFound
from agentlightning.lifecycle import rollouts
from agentlightning.lifecycle.records import AttemptRow, Reason, RolloutPolicy, RolloutRow
from agentlightning.lifecycle.rollouts import Change
from agentlightning.store.backend import Filter, PageQuery, ReadTransaction, ResourcesBy, Transaction
from agentlightning.store.operations.rows import insert_rollout, load_change, save
from agentlightning.types import RolloutStatus

_SPANS_PER_SLICE = 2_000
_ROLLOUTS_PER_SLICE = 50


class Draft(NamedTuple):
    """A rollout that a caller asks for, checked and encoded."""

    row: RolloutRow
    repeatable: bool
    """Whether the caller gave the id, so that it may exist already."""

    @property
    def size(self) -> int:
        """The bytes of what the caller gave."""
        return len(self.row.input) + len(self.row.metadata or b"")


class Edit(NamedTuple):
    """What a caller wants changed about a rollout; only what is in ``fields`` and ``status`` changes."""

    fields: dict[Literal["input", "mode", "resources_id", "config", "metadata"], Any]
    status: RolloutStatus | None
    reason: Reason | None


Newest = dict[str | None, tuple[str | None, int | None]]
"""Which resources rollouts get, as id and version, by the ``resources_id`` that they name, or None for the latest."""


async def enqueue(tx: Transaction, drafts: Sequence[Draft], newest: Newest | None = None) -> list[Change]:
    """Put rollouts into the queue; one that is there already, by the same request, stays as it is.

    Args:
        drafts: the rollouts.
        newest: the resources they get; None: those that are the newest now.
    """
    now = tx.now()
    resources = {} if newest is None else newest
    done: list[Change] = []
    for draft in drafts:
        known = await existing(tx, draft)
        if known is not None:
            done.append(known)
            continue
        named = draft.row.resources_id
        if named not in resources:
            resources[named] = await _newest_resources(tx, named)
        resources_id, version = resources[named]
        row = replace(draft.row, start_time=now.wall, resources_id=resources_id, resources_version=version)
        done.append(Change(await insert_rollout(tx, row), None))
    return done


async def check(tx: ReadTransaction, drafts: Sequence[Draft], newest: Newest) -> None:
    """Raise as ``enqueue``; adds the resources that rollouts name, as they are now, to ``newest``."""
    for draft in drafts:
        await existing(tx, draft)
        named = draft.row.resources_id
        if named not in newest:
            newest[named] = await _newest_resources(tx, named)


def check_equal(drafts: Iterable[Draft]) -> None:
    """Raise ``IdReused`` if two of them have one id and differ otherwise."""
    digests: dict[str, bytes] = {}
    for draft in drafts:
        if draft.repeatable and digests.setdefault(draft.row.rollout_id, draft.row.digest) != draft.row.digest:
            raise _reused(draft.row.rollout_id)


async def existing(tx: ReadTransaction, draft: Draft) -> Change | None:
    """The rollout that an earlier, equal request made, with its latest attempt.

    Raises:
        IdReused: the id belongs to a rollout that was asked for differently.
    """
    if not draft.repeatable:
        return None
    row = await tx.get(RolloutRow, draft.row.rollout_id)
    if row is None:
        return None
    if row.digest != draft.row.digest:
        raise _reused(row.rollout_id)
    latest = None if row.latest_attempt_id is None else await tx.get(AttemptRow, row.latest_attempt_id)
    return Change(row, latest)


async def with_resources(tx: Transaction, row: RolloutRow) -> RolloutRow:
    """The row with the resources that it is to run with, as they stand now.

    Raises:
        NotFound: the ``resources_id`` that it names is unknown.
    """
    resources_id, version = await _newest_resources(tx, row.resources_id)
    return replace(row, resources_id=resources_id, resources_version=version)


async def edit(tx: Transaction, rollout_id: str, change: Edit) -> Change:
    """Apply a caller's changes.

    Raises:
        NotFound: the rollout, or its new resources, are unknown.
        IllegalMove: there is no such move, or the rollout has ended.
    """
    before = await load_change(tx, rollout_id)
    after = before
    for field, value in change.fields.items():
        after = await _set_field(tx, after, field, value)
    if change.status is not None:
        after = rollouts.set_status(after, change.status, change.reason, tx.now())
    return await save(tx, before, after)


async def cancel(tx: Transaction, rollout_id: str, message: str) -> Change:
    """End a rollout that nobody wants any more. Raises as ``edit``."""
    before = await load_change(tx, rollout_id)
    return await save(tx, before, rollouts.cancel(before, message, tx.now()))


async def delete_slice(tx: Transaction, ended_before: float) -> tuple[list[Change], bool]:
    """Delete some of the rollouts that ended before a wall time: (those deleted, whether there may be more)."""
    old = PageQuery(
        "rollouts",
        (Filter("end_time", "below", ended_before),),
        sort_by="end_time",
        limit=_ROLLOUTS_PER_SLICE,
        with_total=False,
    )
    budget = _SPANS_PER_SLICE
    deleted: list[Change] = []
    for rollout, latest in (await tx.page(old)).rows:
        of_rollout = PageQuery("attempts", (Filter("rollout_id", "equals", rollout.rollout_id),))
        for attempt in (await tx.page(of_rollout)).rows:
            spans, size = await tx.delete_spans(attempt, budget)
            tx.count({"spans": -spans, "span_bytes": -size})
            budget -= spans
            if budget <= 0:
                return deleted, True
        attempts = await tx.delete_rollout(rollout)
        tx.count({f"rollouts.{rollout.status}": -1, "attempts": -attempts})
        deleted.append(Change(rollout, latest))
    return deleted, len(deleted) == _ROLLOUTS_PER_SLICE


def _reused(rollout_id: str) -> IdReused:
    return IdReused(
        f"rollout {rollout_id!r} exists already with other content; a repeat must be equal, "
        "a new rollout needs a new id"
    )


async def _newest_resources(tx: ReadTransaction, resources_id: str | None) -> tuple[str | None, int | None]:
    row = await tx.get_resources(ResourcesBy(resources_id))
    if row is not None:
        return row.resources_id, row.version
    if resources_id is not None:
        raise NotFound(f"there are no resources {resources_id!r} in this store; add them first")
    return None, None


async def _set_field(tx: Transaction, before: Change, field: str, value: Any) -> Change:
    rollout, attempt = before
    match field:
        case "metadata":
            return Change(replace(rollout, metadata=value), attempt)
        case "config":
            policy: RolloutPolicy = value
            if policy == rollout.policy:
                return before
            rollouts.check_editable(rollout, "config")
            return rollouts.set_policy(before, policy)
        case "resources_id":
            if value == rollout.resources_id:
                return before
            rollouts.check_editable(rollout, "resources_id")
            resources_id, version = (None, None) if value is None else await _newest_resources(tx, value)
            return Change(replace(rollout, resources_id=resources_id, resources_version=version), attempt)
        case "input" if value != rollout.input:
            rollouts.check_editable(rollout, "input")
            return Change(replace(rollout, input=value), attempt)
        case "mode" if value != rollout.mode:
            rollouts.check_editable(rollout, "mode")
            return Change(replace(rollout, mode=value), attempt)
        case _:
            return before
