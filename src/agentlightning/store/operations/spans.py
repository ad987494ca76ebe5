"""Store spans and issue their sequence ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from msgspec.structs import replace

from agentlightning.errors import IdReused, NotFound, RefusedSpan
from agentlightning.lifecycle import attempts
from agentlightning.lifecycle.deadlines import attempt_throttle
from agentlightning.lifecycle.records import AttemptRow, Pair
from agentlightning.lifecycle.rollouts import Change
from agentlightning.store.backend import ReadTransaction, SpanValues, Transaction
from agentlightning.store.operations.rows import attempt_of, load_rollout, save
from agentlightning.store.refusals import refusal_of
from agentlightning.store.span_json import same_body


class SpanDraft(NamedTuple):
    """A span that a caller gives, checked and encoded."""

    rollout_id: str
    attempt_id: str
    sequence_id: int
    """0: to be issued."""
    span_id: str
    body: bytes

    @property
    def size(self) -> int:
        """The bytes of what the caller gave."""
        return len(self.body)


async def add_spans(tx: Transaction, drafts: Sequence[SpanDraft]) -> list[int]:
    """Store spans; returns the ``sequence_id`` of each, 0 for one that was stored before.

    Raises:
        NotFound: a rollout or attempt is unknown.
        IdReused: a ``span_id`` exists already, for a span with other content.
            Both name all spans that are refused.
    """
    first = drafts[0]
    of_one = len(drafts) == 1 or all(draft[0] == first[0] and draft[1] == first[1] for draft in drafts)
    if of_one:  # as nearly always
        return await _add_spans_of(tx, first.rollout_id, first.attempt_id, drafts)
    by_attempt: dict[tuple[str, str], list[int]] = {}
    for position, draft in enumerate(drafts):
        by_attempt.setdefault((draft.rollout_id, draft.attempt_id), []).append(position)
    issued = [0] * len(drafts)
    refused: list[RefusedSpan] = []
    for (rollout_id, attempt_id), positions in by_attempt.items():
        try:
            of_attempt = await _add_spans_of(tx, rollout_id, attempt_id, [drafts[i] for i in positions])
        except NotFound as error:
            refused += [RefusedSpan(position, drafts[position].span_id, error) for position in positions]
            continue
        except IdReused as error:
            refused += [each._replace(place=positions[each.place]) for each in error.refused_spans]
            continue
        for position, sequence_id in zip(positions, of_attempt, strict=True):
            issued[position] = sequence_id
    if refused:
        raise refusal_of(refused)
    return issued


async def _add_spans_of(tx: Transaction, rollout_id: str, attempt_id: str, drafts: Sequence[SpanDraft]) -> list[int]:
    attempt = await attempt_of(tx, rollout_id, attempt_id)
    sequence_ids, counter = await insert_spans(tx, attempt, drafts)
    await _hear_from(tx, attempt, counter)
    return sequence_ids


async def insert_spans(tx: Transaction, attempt: AttemptRow, drafts: Sequence[SpanDraft]) -> tuple[list[int], int]:
    """Store spans of one attempt without writing its row.

    A given sequence id is kept and pushes the counter of the attempt up.

    Raises:
        IdReused: a ``span_id`` exists already, for a span with other content. All such spans are named.

    Returns:
        The ``sequence_id`` of each as in ``add_spans``, and the attempt's ``span_sequence`` after them.
    """
    if not drafts:
        return [], attempt.span_sequence
    counter = attempt.span_sequence
    size = 0
    spans: list[SpanValues] = []
    numbers: list[int] = []
    for _, _, given, span_id, body in drafts:
        number = given or counter + 1
        counter = max(counter, number)
        size += len(body)
        numbers.append(number)
        spans.append((attempt.seq, number, not given, span_id, body))
    fresh = await tx.insert_spans(spans)
    if not all(fresh):
        await _check_repeats(tx, attempt, drafts, fresh)
        numbers = [number if new else 0 for number, new in zip(numbers, fresh, strict=True)]
        size = sum([len(draft.body) for draft, new in zip(drafts, fresh, strict=True) if new])
    stored = sum(fresh)
    if not stored:
        return numbers, attempt.span_sequence
    tx.count({"spans": stored, "span_bytes": size})
    return numbers, counter


async def _check_repeats(
    tx: Transaction, attempt: AttemptRow, drafts: Sequence[SpanDraft], fresh: Sequence[bool]
) -> None:
    repeats = [(place, draft) for place, (draft, new) in enumerate(zip(drafts, fresh, strict=True)) if not new]
    stored = await tx.span_bodies(attempt, [draft.span_id for _, draft in repeats])
    refused = [
        RefusedSpan(place, draft.span_id, _id_reused(attempt, draft.span_id))
        for place, draft in repeats
        if not same_body(stored[draft.span_id], draft.body)
    ]
    if refused:
        raise refusal_of(refused)


async def find_refused(
    tx: ReadTransaction, drafts: Sequence[SpanDraft], first_place: int, seen: dict[tuple[str, str, str], SpanDraft]
) -> list[RefusedSpan]:
    """The spans that ``add_spans`` would refuse.

    Args:
        tx: reads.
        drafts: some of the spans of a call.
        first_place: of the first of them.
        seen: those of the same call that were looked at before, by their ids. These are added.

    Raises:
        NotFound: all of them are of one attempt, which is unknown.
    """
    by_attempt: dict[tuple[str, str], list[int]] = {}
    for position, draft in enumerate(drafts):
        by_attempt.setdefault(draft[:2], []).append(position)
    refused: list[RefusedSpan] = []
    for (rollout_id, attempt_id), positions in by_attempt.items():
        try:
            attempt = await attempt_of(tx, rollout_id, attempt_id)
        except NotFound as error:
            if len(by_attempt) == 1:
                raise
            refused += [RefusedSpan(first_place + each, drafts[each].span_id, error) for each in positions]
            continue
        stored = await tx.span_bodies(attempt, [drafts[each].span_id for each in positions])
        for each in positions:
            draft = drafts[each]
            body = stored.get(draft.span_id) or seen.setdefault((*draft[:2], draft.span_id), draft).body
            if not same_body(body, draft.body):
                refused.append(RefusedSpan(first_place + each, draft.span_id, _id_reused(attempt, draft.span_id)))
    return refused


def _id_reused(attempt: AttemptRow, span_id: str) -> IdReused:
    return IdReused(
        f"span {span_id!r} exists in attempt {attempt.attempt_id!r} with other content; give each span an id of its "
        "own (does the program seed the generator that its span ids come from?)"
    )


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
