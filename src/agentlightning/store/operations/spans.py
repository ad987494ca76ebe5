"""Store spans and issue their sequence ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from msgspec.structs import replace

from agentlightning.lifecycle import attempts
from agentlightning.lifecycle.deadlines import attempt_throttle
from agentlightning.lifecycle.records import AttemptRow, Pair, SpanRow
from agentlightning.lifecycle.rollouts import Change
from agentlightning.store.backend import Transaction
from agentlightning.store.operations.rows import attempt_of, load_rollout, save


class SpanDraft(NamedTuple):
    """A span that a caller gives, checked and encoded."""

    rollout_id: str
    attempt_id: str
    sequence_id: int
    """0: to be issued."""
    span_id: str
    body: bytes


async def add_spans(tx: Transaction, drafts: Sequence[SpanDraft]) -> list[int]:
    """Store spans; returns the ``sequence_id`` of each, 0 for one that was stored before.

    Raises:
        NotFound: a rollout or attempt is unknown.
    """
    by_attempt: dict[tuple[str, str], list[int]] = {}
    for position, draft in enumerate(drafts):
        by_attempt.setdefault((draft.rollout_id, draft.attempt_id), []).append(position)
    issued = [0] * len(drafts)
    for (rollout_id, attempt_id), positions in by_attempt.items():
        attempt = await attempt_of(tx, rollout_id, attempt_id)
        of_attempt, counter = await insert_spans(tx, attempt, [drafts[i] for i in positions])
        for position, sequence_id in zip(positions, of_attempt, strict=True):
            issued[position] = sequence_id
        await _hear_from(tx, attempt, counter)
    return issued


async def insert_spans(tx: Transaction, attempt: AttemptRow, drafts: Sequence[SpanDraft]) -> tuple[list[int], int]:
    """Store spans of one attempt without writing its row: (the ``sequence_id`` of each as in ``add_spans``, the
    attempt's ``span_sequence`` after them)."""
    rows, counter = _numbered(attempt, drafts)
    fresh = await tx.insert_spans(rows)
    stored = sum(fresh)
    if not stored:
        return [0] * len(rows), attempt.span_sequence
    size = sum(len(row.body) for row, new in zip(rows, fresh, strict=True) if new)
    tx.count({"spans": stored, "span_bytes": size})
    return [row.sequence_id if new else 0 for row, new in zip(rows, fresh, strict=True)], counter


async def issue_sequence_ids(tx: Transaction, wanted: Sequence[tuple[str, str]]) -> list[int]:
    """One span sequence id for each (rollout_id, attempt_id).

    Raises:
        NotFound: a rollout or attempt is unknown.
    """
    issued: list[int] = []
    for rollout_id, attempt_id in wanted:
        attempt = await attempt_of(tx, rollout_id, attempt_id)
        counter = attempt.span_sequence + 1
        await tx.put(attempt, replace(attempt, span_sequence=counter))
        issued.append(counter)
    return issued


def _numbered(attempt: AttemptRow, drafts: Sequence[SpanDraft]) -> tuple[list[SpanRow], int]:
    """The rows to store, and the attempt's counter after. A given id is kept and pushes the counter up."""
    counter = attempt.span_sequence
    rows: list[SpanRow] = []
    for draft in drafts:
        given = draft.sequence_id > 0
        sequence_id = draft.sequence_id if given else counter + 1
        counter = max(counter, sequence_id)
        rows.append(
            SpanRow(
                attempt.seq,
                draft.rollout_id,
                draft.attempt_id,
                sequence_id,
                not given,
                draft.span_id,
                draft.body,
            )
        )
    return rows, counter


async def _hear_from(tx: Transaction, attempt: AttemptRow, counter: int) -> None:
    """A span is a sign of life of an attempt that still holds its rollout."""
    now = tx.now()
    rollout = await load_rollout(tx, attempt.rollout_id)
    if attempts.steady(attempt):
        heard = attempts.touch(attempt, now, counter)
        await tx.touch(attempt, heard, attempt_throttle(rollout.policy, heard))
        return
    after = attempts.run(Pair(rollout, attempt), now)
    heard = after.attempt
    if heard.span_sequence != counter:
        heard = replace(heard, span_sequence=counter)
    await save(tx, Change(rollout, attempt), Change(after.rollout, heard))
