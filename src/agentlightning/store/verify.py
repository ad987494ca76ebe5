"""The consistency check: every rule that the stored rows must obey, and which rows break one.

It reads one snapshot in slices. Memory grows with the number of attempts that have spans
(some 100 bytes each), and with nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, get_args

import msgspec

from agentlightning.lifecycle.deadlines import attempt_deadline, worker_due
from agentlightning.lifecycle.records import AttemptRow, ResourcesRow, RolloutRow, WorkerRow
from agentlightning.lifecycle.states import ATTEMPT_MOVES, ROLLOUT_MOVES
from agentlightning.store.backend import Filter, PageQuery, ReadTransaction, Table, Unreadable
from agentlightning.store.records import RECORDS
from agentlightning.store.span_json import span_json
from agentlightning.types import Span, VerificationReport, Violation, WorkerDirective, WorkerStatus

_SLICE = 500
_VIOLATION_LIMIT = 1_000

Findings = Iterator[tuple[str, str]]
"""The rules that a record breaks, and what was found."""


class _Check:
    """One run of the consistency check."""

    def __init__(self, tx: ReadTransaction) -> None:
        self._tx = tx
        self._violations: list[Violation] = []
        self._complete = True
        self._counted: Counter[str] = Counter()
        self._spans: dict[int, tuple[int, int]] = {}
        """The highest sequence id of each attempt's spans: of those that were issued, and of all."""
        self._versions: dict[str, int] = {}

    async def run(self) -> VerificationReport:
        self._report("database", (("database_intact", damage) for damage in await self._tx.integrity()))
        try:
            await self._check_spans()
            await self._check_resources()
            await self._check_rollouts()
            await self._check_orphans()
            await self._check_workers()
            await self._check_counters()
        except (TypeError, AttributeError) as error:  # a value of another type than its column's
            if not self._violations:
                raise
            self._report("database", [("row_readable", f"the rest cannot be checked: {error}")])
        checked = {name: self._counted[name] for name in ("attempts", "spans", "resources", "workers")}
        checked["rollouts"] = sum(count for name, count in self._counted.items() if name.startswith("rollouts."))
        return VerificationReport(checked=checked, violations=self._violations, complete=self._complete)

    async def _check_spans(self) -> None:
        async for seq, attempt_seq, sequence_id, issued, span_id, body in self._scan("spans"):
            self._counted["spans"] += 1
            self._counted["span_bytes"] += len(body)
            last, highest = self._spans.get(attempt_seq, (0, 0))
            self._report(f"span row {seq}", _of_span(span_id, body, sequence_id, last if issued else -1))
            self._spans[attempt_seq] = (max(last, sequence_id) if issued else last, max(highest, sequence_id))

    async def _check_resources(self) -> None:
        async for row in self._scan("resources"):
            last = self._versions.get(row.resources_id, 0)
            self._counted["resources"] += last == 0
            self._counted["resources_versions"] += 1
            self._report(f"resources {row.resources_id} version {row.version}", _of_resources(row, last))
            self._versions[row.resources_id] = row.version

    async def _check_rollouts(self) -> None:
        batch: list[RolloutRow] = []
        async for row in self._scan("rollouts"):
            batch.append(row)
            if len(batch) == _SLICE:
                await self._check_batch(batch)
                batch = []
        await self._check_batch(batch)

    async def _check_batch(self, batch: list[RolloutRow]) -> None:
        of_batch = Filter("rollout_id", "within", [row.rollout_id for row in batch])
        attempts: dict[str, list[AttemptRow]] = {row.rollout_id: [] for row in batch}
        query = PageQuery("attempts", (of_batch,), sort_by="sequence_id")
        for attempt in (await self._tx.page(query)).rows:
            attempts[attempt.rollout_id].append(attempt)
        for rollout in batch:
            self._counted[f"rollouts.{rollout.status}"] += 1
            newest_version = self._versions.get(rollout.resources_id or "", 0)
            findings = _of_rollout(rollout, attempts[rollout.rollout_id], newest_version)
            self._report(f"rollout {rollout.rollout_id}", findings)
            for attempt in attempts[rollout.rollout_id]:
                self._counted["attempts"] += 1
                _, highest = self._spans.pop(attempt.seq, (0, 0))
                self._report(f"attempt {attempt.attempt_id}", _of_attempt(rollout, attempt, highest))

    async def _check_orphans(self) -> None:
        async for attempt in self._scan("attempts"):
            self._spans.pop(attempt.seq, None)
            try:
                missing = await self._tx.get(RolloutRow, attempt.rollout_id) is None
            except (TypeError, ValueError):  # it is there, though damaged, and has been named
                missing = False
            if missing:
                self._counted["attempts"] += 1
                self._report(f"attempt {attempt.attempt_id}", [("attempt_has_rollout", "its rollout does not exist")])
        for seq in self._spans:
            self._report(f"attempt row {seq}", [("span_has_attempt", "spans are stored for an attempt that is not")])

    async def _check_workers(self) -> None:
        async for worker in self._scan("workers"):
            self._counted["workers"] += 1
            self._report(f"worker {worker.worker_id}", _of_worker(worker))

    async def _check_counters(self) -> None:
        stored = await self._tx.counters()
        for name in sorted(stored.keys() | self._counted.keys()):
            said, counted = stored.get(name, 0), self._counted[name]
            if said != counted:
                self._report(f"counter {name}", [("counters_true", f"says {said}, counted {counted}")])

    async def _scan(self, table: Table) -> AsyncIterator[Any]:
        after = 0
        while rows := await self._tx.scan(table, after, _SLICE):
            for row in rows:
                if isinstance(row, Unreadable):
                    self._report(f"{table} row {row.seq}", [("row_readable", row.detail)])
                else:
                    yield row
            after = rows[-1][0] if table == "spans" else rows[-1].seq

    def _report(self, record: str, findings: Iterable[tuple[str, str]]) -> None:
        for rule, detail in findings:
            if len(self._violations) < _VIOLATION_LIMIT:
                self._violations.append(Violation(rule=rule, record=record, detail=detail))
            else:
                self._complete = False


async def verify(tx: ReadTransaction) -> VerificationReport:
    """Check everything that a store holds, on one snapshot. At most 1,000 violations are named."""
    return await _Check(tx).run()


# --- The rules -----------------------------------------------------------------------------------


def _of_span(span_id: str, body: bytes, sequence_id: int, last_issued: int) -> Findings:
    """``last_issued``: the one before it in its attempt; -1 if its own was not issued."""
    try:
        found = Span.model_validate_json(span_json("", "", 0, body)).span_id
    except ValueError as error:
        yield "span_readable", f"its body is not a span: {error}"
    else:
        if found != span_id:
            yield "span_readable", f"is stored as {span_id!r} and says {found!r}"
    if sequence_id <= last_issued:
        detail = f"was issued sequence id {sequence_id} after {last_issued} in the same attempt"
        yield "span_sequence_increases", detail


def _of_resources(resources: ResourcesRow, last_version: int) -> Findings:
    if resources.version != last_version + 1:
        yield "versions_dense", f"the next version should have been {last_version + 1}"
    try:
        RECORDS.resources_view(resources)
    except ValueError as error:
        yield "resources_readable", f"cannot be read: {error}"


def _of_rollout(rollout: RolloutRow, attempts: list[AttemptRow], newest_version: int) -> Findings:
    if rollout.status not in ROLLOUT_MOVES:
        yield "known_state", f"has the unknown status {rollout.status!r}"
    numbers = [attempt.sequence_id for attempt in attempts]
    if numbers != list(range(1, rollout.attempts + 1)):
        yield "attempts_numbered", f"should have attempts 1..{rollout.attempts}, has {numbers[:20]}"
    newest = attempts[-1].attempt_id if attempts else None
    if rollout.latest_attempt_id != newest:
        yield "latest_attempt", f"names {rollout.latest_attempt_id!r} as latest; it is {newest!r}"
    if min(rollout.redeliveries, rollout.releases, rollout.counted_attempts) < 0:
        detail = f"{rollout.redeliveries} redelivered and {rollout.releases} released of {rollout.attempts} attempts"
        yield "redeliveries_counted", detail
    live = [attempt for attempt in attempts if attempt.live]
    if len(live) > 1:
        yield "one_live_attempt", f"{len(live)} attempts are live"
    if live and live[-1].attempt_id != rollout.latest_attempt_id:
        yield "live_is_latest", f"attempt {live[-1].attempt_id!r} is live and not the latest"
    expected = {attempt.status for attempt in live}
    held = {rollout.status} if rollout.status in ("preparing", "running") else set[str]()
    if held != expected:
        yield "status_agrees", f"is {rollout.status} while its live attempts are {sorted(expected) or 'none'}"
    if rollout.status == "queuing" and attempts:
        yield "status_agrees", "is queuing and has attempts"
    if rollout.status == "requeuing" and not attempts:
        yield "status_agrees", "is requeuing and has no attempt"
    yield from _of_end(rollout, rollout.final)
    if rollout.resources_id is not None and not 1 <= (rollout.resources_version or 0) <= newest_version:
        yield "resources_exist", f"runs with {rollout.resources_id!r} version {rollout.resources_version}"
    yield from _of_json(rollout, "input", "metadata")


def _of_attempt(rollout: RolloutRow, attempt: AttemptRow, highest_span: int) -> Findings:
    if attempt.status not in ATTEMPT_MOVES:
        yield "known_state", f"has the unknown status {attempt.status!r}"
    yield from _of_end(attempt, not attempt.live)
    yield from _of_json(attempt, "metadata")
    due = attempt_deadline(rollout.policy, attempt) if attempt.live else None
    if attempt.deadline != due and (attempt.deadline is None or due is None or attempt.deadline > due):
        yield "deadline_known", f"expires at {due}, and the store looks at {attempt.deadline}"
    if not attempt.live and attempt.confirm_seconds is not None:
        yield "deadline_known", "has ended and still waits to be confirmed"
    # The row of a live attempt need not be written with each span: its counter is recovered from the spans.
    if not attempt.live and attempt.span_sequence < highest_span:
        detail = f"would issue {attempt.span_sequence + 1} next, and has a span with {highest_span}"
        yield "span_sequence_increases", detail


def _of_worker(worker: WorkerRow) -> Findings:
    if worker.status not in get_args(WorkerStatus):
        yield "known_state", f"has the unknown status {worker.status!r}"
    if worker.directive is not None and worker.directive not in get_args(WorkerDirective):
        yield "known_state", f"has the unknown directive {worker.directive!r}"
    yield from _of_json(worker, "heartbeat_stats", "registration")
    due = worker_due(worker)
    if worker.deadline is not None and (due is None or worker.deadline > due):
        yield "deadline_known", f"expires at {due}, and the store looks at {worker.deadline}"


def _of_end(row: RolloutRow | AttemptRow, ended: bool) -> Findings:
    if ended != (row.end_time is not None) or ended != (row.reason_code is not None):
        state = "has ended" if ended else "has not ended"
        yield "end_is_told", f"{state}, with end_time {row.end_time} and reason {row.reason_code!r}"


def _of_json(row: RolloutRow | AttemptRow | WorkerRow, *fields: str) -> Findings:
    for field in fields:
        encoded: bytes | None = getattr(row, field)
        try:
            msgspec.json.decode(b"null" if encoded is None else encoded)
        except msgspec.DecodeError as error:
            yield "json_valid", f"{field} is not JSON: {error}"
