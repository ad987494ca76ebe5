"""The consistency check: every rule that the stored rows must obey, and which rows break one.

It reads one snapshot in slices. Memory grows with the number of attempts that have spans
(some 100 bytes each), and with nothing else.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, NamedTuple, get_args

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


class _Spans(NamedTuple):
    """What the spans of one attempt come to."""

    last_issued: int
    highest: int


class _Check:
    """One run of the consistency check."""

    def __init__(self, tx: ReadTransaction) -> None:
        self._tx = tx
        self.violations: list[Violation] = []
        self._complete = True
        self.counted: dict[str, int] = {}
        self._spans: dict[int, _Spans] = {}
        self._versions: dict[str, int] = {}

    async def run(self) -> VerificationReport:
        for damage in await self._tx.integrity():
            self._report("database_intact", "database", damage)
        try:
            await self._check_rows()
        except (TypeError, AttributeError) as error:  # a value of another type than its column's
            if not self.violations:
                raise
            self._report("row_readable", "database", f"the rest cannot be checked: {error}")
        checked = {name: self._count(name) for name in ("attempts", "spans", "resources", "workers")}
        checked["rollouts"] = sum(count for name, count in self.counted.items() if name.startswith("rollouts."))
        return VerificationReport(checked=checked, violations=self.violations, complete=self._complete)

    async def _check_rows(self) -> None:
        await self._check_spans()
        await self._check_resources()
        await self._check_rollouts()
        for attempt_seq in self._spans:
            self._report(
                "span_has_attempt", f"attempt row {attempt_seq}", "spans are stored for an attempt that is not"
            )
        await self._check_workers()
        await self._check_counters()

    # --- Spans and resources ---------------------------------------------------------------------

    async def _check_spans(self) -> None:
        async for seq, attempt_seq, sequence_id, issued, span_id, body in self._scan("spans"):
            self._add("spans", 1)
            self._add("span_bytes", len(body))
            self._check_span_body(f"span row {seq}", span_id, body)
            before = self._spans.get(attempt_seq, _Spans(0, 0))
            if issued and sequence_id <= before.last_issued:
                self._report(
                    "span_sequence_increases",
                    f"span row {seq}",
                    f"was issued sequence id {sequence_id} after {before.last_issued} in the same attempt",
                )
            last = max(before.last_issued, sequence_id) if issued else before.last_issued
            self._spans[attempt_seq] = _Spans(last, max(before.highest, sequence_id))

    def _check_span_body(self, name: str, span_id: str, body: bytes) -> None:
        try:
            found = Span.model_validate_json(span_json("", "", 0, body)).span_id
        except ValueError as error:
            self._report("span_readable", name, f"its body is not a span: {error}")
        else:
            if found != span_id:
                self._report("span_readable", name, f"is stored as {span_id!r} and says {found!r}")

    async def _check_resources(self) -> None:
        async for row in self._scan("resources"):
            resources: ResourcesRow = row
            name = f"resources {resources.resources_id} version {resources.version}"
            expected = self._versions.get(resources.resources_id, 0) + 1
            if resources.version != expected:
                self._report("versions_dense", name, f"the next version should have been {expected}")
            if expected == 1:
                self._add("resources", 1)
            self._add("resources_versions", 1)
            self._versions[resources.resources_id] = resources.version
            try:
                RECORDS.resources_view(resources)
            except ValueError as error:
                self._report("resources_readable", name, f"cannot be read: {error}")

    # --- Rollouts and attempts -------------------------------------------------------------------

    async def _check_rollouts(self) -> None:
        batch: list[RolloutRow] = []
        async for row in self._scan("rollouts"):
            batch.append(row)
            if len(batch) == _SLICE:
                await self._check_batch(batch)
                batch = []
        await self._check_batch(batch)
        await self._check_orphans()

    async def _check_batch(self, batch: list[RolloutRow]) -> None:
        of_batch = Filter("rollout_id", "within", [row.rollout_id for row in batch])
        attempts: dict[str, list[AttemptRow]] = {row.rollout_id: [] for row in batch}
        query = PageQuery("attempts", (of_batch,), sort_by="sequence_id")
        for attempt in (await self._tx.page(query)).rows:
            attempts[attempt.rollout_id].append(attempt)
        for rollout in batch:
            self._check_rollout(rollout, attempts[rollout.rollout_id])

    def _check_rollout(self, rollout: RolloutRow, attempts: list[AttemptRow]) -> None:
        name = f"rollout {rollout.rollout_id}"
        self._add(f"rollouts.{rollout.status}", 1)
        if rollout.status not in ROLLOUT_MOVES:
            self._report("known_state", name, f"has the unknown status {rollout.status!r}")
        numbers = [attempt.sequence_id for attempt in attempts]
        if numbers != list(range(1, rollout.attempts + 1)):
            self._report("attempts_numbered", name, f"should have attempts 1..{rollout.attempts}, has {numbers[:20]}")
        newest = attempts[-1].attempt_id if attempts else None
        if rollout.latest_attempt_id != newest:
            self._report("latest_attempt", name, f"names {rollout.latest_attempt_id!r} as latest; it is {newest!r}")
        if min(rollout.redeliveries, rollout.releases, rollout.counted_attempts) < 0:
            detail = (
                f"{rollout.redeliveries} redelivered and {rollout.releases} released of {rollout.attempts} attempts"
            )
            self._report("redeliveries_counted", name, detail)
        self._check_holder(name, rollout, attempts)
        self._check_end(name, rollout.final, rollout.end_time, rollout.reason_code)
        if rollout.resources_id is not None and not (
            1 <= (rollout.resources_version or 0) <= self._versions.get(rollout.resources_id, 0)
        ):
            self._report(
                "resources_exist", name, f"runs with {rollout.resources_id!r} version {rollout.resources_version}"
            )
        self._check_json(name, "input", rollout.input)
        self._check_json(name, "metadata", rollout.metadata)
        for attempt in attempts:
            self._check_attempt(rollout, attempt)

    def _check_holder(self, name: str, rollout: RolloutRow, attempts: list[AttemptRow]) -> None:
        live = [attempt for attempt in attempts if attempt.live]
        if len(live) > 1:
            self._report("one_live_attempt", name, f"{len(live)} attempts are live")
        if live and live[-1].attempt_id != rollout.latest_attempt_id:
            self._report("live_is_latest", name, f"attempt {live[-1].attempt_id!r} is live and not the latest")
        expected = {attempt.status for attempt in live}
        held = {rollout.status} if rollout.status in ("preparing", "running") else set[str]()
        if held != expected:
            self._report(
                "status_agrees", name, f"is {rollout.status} while its live attempts are {sorted(expected) or 'none'}"
            )
        if rollout.status == "queuing" and attempts:
            self._report("status_agrees", name, "is queuing and has attempts")
        if rollout.status == "requeuing" and not attempts:
            self._report("status_agrees", name, "is requeuing and has no attempt")

    def _check_attempt(self, rollout: RolloutRow, attempt: AttemptRow) -> None:
        name = f"attempt {attempt.attempt_id}"
        self._add("attempts", 1)
        if attempt.status not in ATTEMPT_MOVES:
            self._report("known_state", name, f"has the unknown status {attempt.status!r}")
        self._check_end(name, not attempt.live, attempt.end_time, attempt.reason_code)
        self._check_json(name, "metadata", attempt.metadata)
        due = attempt_deadline(rollout.policy, attempt) if attempt.live else None
        if (attempt.deadline is None) != (due is None) or (
            due is not None and attempt.deadline is not None and attempt.deadline > due
        ):
            self._report("deadline_known", name, f"expires at {due}, and the store looks at {attempt.deadline}")
        if not attempt.live and attempt.confirm_seconds is not None:
            self._report("deadline_known", name, "has ended and still waits to be confirmed")
        spans = self._spans.pop(attempt.seq, _Spans(0, 0))
        # The row of a live attempt need not be written with each span: its counter is recovered from the spans.
        if not attempt.live and attempt.span_sequence < spans.highest:
            self._report(
                "span_sequence_increases",
                name,
                f"would issue {attempt.span_sequence + 1} next, and has a span with {spans.highest}",
            )

    async def _check_orphans(self) -> None:
        async for row in self._scan("attempts"):
            attempt: AttemptRow = row
            self._spans.pop(attempt.seq, None)
            try:
                missing = await self._tx.get(RolloutRow, attempt.rollout_id) is None
            except (TypeError, ValueError):  # it is there, though damaged, and has been named
                missing = False
            if missing:
                self._add("attempts", 1)
                self._report("attempt_has_rollout", f"attempt {attempt.attempt_id}", "its rollout does not exist")

    # --- Workers and counters --------------------------------------------------------------------

    async def _check_workers(self) -> None:
        async for row in self._scan("workers"):
            worker: WorkerRow = row
            name = f"worker {worker.worker_id}"
            self._add("workers", 1)
            if worker.status not in get_args(WorkerStatus):
                self._report("known_state", name, f"has the unknown status {worker.status!r}")
            self._check_json(name, "heartbeat_stats", worker.heartbeat_stats)
            self._check_json(name, "registration", worker.registration)
            if worker.directive is not None and worker.directive not in get_args(WorkerDirective):
                self._report("known_state", name, f"has the unknown directive {worker.directive!r}")
            due = worker_due(worker)
            if worker.deadline is not None and (due is None or worker.deadline > due):
                self._report("deadline_known", name, f"expires at {due}, and the store looks at {worker.deadline}")

    async def _check_counters(self) -> None:
        stored = await self._tx.counters()
        for name in sorted(stored.keys() | self.counted.keys()):
            if stored.get(name, 0) != self.counted.get(name, 0):
                self._report(
                    "counters_true",
                    f"counter {name}",
                    f"says {stored.get(name, 0)}, counted {self.counted.get(name, 0)}",
                )

    # --- Helpers ---------------------------------------------------------------------------------

    async def _scan(self, table: Table) -> AsyncIterator[Any]:
        after = 0
        while rows := await self._tx.scan(table, after, _SLICE):
            for row in rows:
                if isinstance(row, Unreadable):
                    self._report("row_readable", f"{table} row {row.seq}", row.detail)
                else:
                    yield row
            after = rows[-1][0] if table == "spans" else rows[-1].seq

    def _check_end(self, name: str, ended: bool, end_time: float | None, reason_code: str | None) -> None:
        if ended != (end_time is not None) or ended != (reason_code is not None):
            state = "has ended" if ended else "has not ended"
            self._report("end_is_told", name, f"{state}, with end_time {end_time} and reason {reason_code!r}")

    def _check_json(self, name: str, field: str, encoded: bytes | None) -> None:
        if encoded is not None:
            try:
                msgspec.json.decode(encoded)
            except msgspec.DecodeError as error:
                self._report("json_valid", name, f"{field} is not JSON: {error}")

    def _report(self, rule: str, record: str, detail: str) -> None:
        if len(self.violations) < _VIOLATION_LIMIT:
            self.violations.append(Violation(rule=rule, record=record, detail=detail))
        else:
            self._complete = False

    def _add(self, name: str, number: int) -> None:
        self.counted[name] = self.counted.get(name, 0) + number

    def _count(self, name: str) -> int:
        return self.counted.get(name, 0)


async def verify(tx: ReadTransaction) -> VerificationReport:
    """Check everything that a store holds, on one snapshot. At most 1,000 violations are named."""
    return await _Check(tx).run()
