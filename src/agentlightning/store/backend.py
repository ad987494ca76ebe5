"""What a backend offers: transactions over rows, and nothing that decides.

The engine hands a backend operations, ``async def op(tx)``; the backend runs each in a
transaction of its own (SQLite: many under one commit) and returns its result once the
effects are durable. An operation touches the outside world only through its ``tx``, so a
backend may run it again from the start after a conflict, and may step it to completion
without an event loop: no operation awaits anything but its ``tx``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from agentlightning.errors import AgentLightningError
from agentlightning.lifecycle.records import AttemptRow, Moment, ResourcesRow, RolloutRow, WorkerRow
from agentlightning.telemetry.metrics import Measure as Measure
from agentlightning.types import AttemptStatus, RolloutStatus

T = TypeVar("T")
R = TypeVar("R", RolloutRow, AttemptRow, WorkerRow)
H = TypeVar("H", AttemptRow, WorkerRow)
N = TypeVar("N", RolloutRow, AttemptRow, WorkerRow, ResourcesRow)

SpanValues = tuple[int, int, bool, str, bytes]
"""A span to store: the ``seq`` of its attempt, its ``sequence_id``, whether that was issued, its ``span_id``, its body.
See ``SpanRow``, which would take three times as long to make."""
Row = RolloutRow | AttemptRow | WorkerRow | ResourcesRow
Table = Literal["rollouts", "attempts", "spans", "resources", "workers"]


class Filter(NamedTuple):
    """One condition on one field of the public record."""

    field: str
    test: Literal["equals", "within", "contains", "below"]
    value: Any


class PageQuery(NamedTuple):
    """Which rows, in which order, and which part of them."""

    table: Table
    scope: tuple[Filter, ...] = ()
    """Conditions that always apply."""
    filters: tuple[Filter, ...] = ()
    """Conditions joined by ``logic``."""
    logic: Literal["and", "or"] = "and"
    sort_by: str | None = None
    """A field of the public record; None: the order of insertion."""
    descending: bool = False
    limit: int = -1
    offset: int = 0
    newest_only: bool = False
    """Of resources: only the newest version of each id."""
    with_total: bool = True
    """Whether the total is wanted, which may have to be counted; else it is that of this page."""


class Page(NamedTuple):
    """Rows of one page (rollouts as (rollout, latest attempt or None)) and how many there are in all."""

    rows: list[Any]
    total: int


class ResourcesBy(NamedTuple):
    """Selects one version: by request if given; else without an id the newest of all, without a version the
    newest of the id."""

    resources_id: str | None = None
    version: int | None = None
    request_id: str | None = None


class Finished(NamedTuple):
    """A rollout has reached its terminal state."""

    rollout_id: str
    status: RolloutStatus


class Ended(NamedTuple):
    """An attempt has ended, so long after it began."""

    status: AttemptStatus
    seconds: float


class Waiting(NamedTuple):
    """This many rollouts have become claimable."""

    rollouts: int


class Claimed(NamedTuple):
    """So many rollouts were claimed under this ``request_id``, on behalf of a caller that waits."""

    request_id: str
    rollouts: int


class Deadline(NamedTuple):
    """A row that expires was written: look again at this moment of the lease clock, at the latest."""

    at: float


class Swept(NamedTuple):
    """What was due has been looked at; the next deadline of all rows."""

    next_deadline: float | None


class Renewed(NamedTuple):
    """Every lease has a full new term, because the process had stood still until this moment of ``boot_now``."""

    boot: float


class Directed(NamedTuple):
    """These workers were asked to take no more work."""

    worker_ids: frozenset[str]


class Stopped(NamedTuple):
    """A fault has ended all writing: nothing that anybody waits for will happen any more."""

    error: AgentLightningError


# Events carry ids, states and times only, never rows: a backend of several processes can then deliver them to all.
Event = Finished | Ended | Waiting | Claimed | Deadline | Swept | Renewed | Directed | Stopped


class Unreadable(NamedTuple):
    """A stored row that is not what its table should hold."""

    seq: int
    detail: str


class ReadTransaction(Protocol):
    """Rows as they stand at one moment."""

    def now(self) -> Moment:
        """The backend's clocks, read once per transaction."""
        ...

    async def get(self, kind: type[R], key: str) -> R | None:
        """The rollout, attempt or worker with this id."""
        ...

    async def get_resources(self, selection: ResourcesBy) -> ResourcesRow | None:
        """The version of resources that is selected."""
        ...

    async def span_bodies(self, attempt: AttemptRow, span_ids: Sequence[str]) -> dict[str, bytes]:
        """The stored bodies of these spans of an attempt, by ``span_id``; unknown ones are left out."""
        ...

    async def page(self, query: PageQuery) -> Page:
        """The rows of one page, and the number of rows on all pages."""
        ...

    async def counters(self) -> dict[str, int]:
        """Everything that ``Transaction.count`` ever added up, by name."""
        ...

    async def scan(self, table: Table, after: int, limit: int) -> list[Any]:
        """Up to ``limit`` rows with a ``seq`` above ``after``, in that order.

        A damaged one is, or is preceded by, an ``Unreadable``.

        Spans come as (seq, attempt_seq, sequence_id, issued, span_id, body).
        """
        ...

    async def integrity(self) -> list[str]:
        """What the database itself finds damaged; empty if nothing."""
        ...


class Transaction(ReadTransaction, Protocol):
    """Rows, and changes to them that become durable together or not at all."""

    async def insert(self, row: N) -> N:
        """Store a new row; returns it with the ``seq`` that the backend issued for it."""
        ...

    async def attempts_of_request(self, request_id: str) -> list[AttemptRow]:
        """The attempts that a claim with this ``request_id`` made, the oldest first."""
        ...

    async def live_attempts_of(self, worker_id: str) -> Sequence[str]:
        """The ids of the live attempts that name this worker, the oldest first."""
        ...

    async def newest_live_attempt_of(self, worker_id: str) -> str | None:
        """The last of ``live_attempts_of``."""
        ...

    async def put(self, old: R, new: R) -> R:
        """Replace ``old``, provided that it is still stored as it was read; returns ``new`` with its version."""
        ...

    async def touch(self, old: H, new: H, write_after: float) -> H:
        """Take a sign of life: as ``put``, for a ``new`` that differs only in times of the last sign of life (and in
        the counter of span sequence ids, which can be recovered from the spans).

        It need not become durable before the stored one is ``write_after`` seconds older than it, on the lease clock.
        Every read and every transaction of this process sees it at once.
        """
        ...

    async def save_touched(self) -> None:
        """Make every sign of life durable that ``touch`` took, and visible to what ``page`` filters and sorts by."""
        ...

    async def insert_spans(self, spans: Sequence[SpanValues]) -> list[bool]:
        """Store spans; for each whether it was new. Known is (attempt, ``span_id``)."""
        ...

    async def next_claimable(self, limit: int) -> list[RolloutRow]:
        """Rollouts that wait, higher priority first, then by ``seq``; of large ones fewer, though at least one. The
        caller must claim all of them."""
        ...

    async def due(self, lease: float, limit: int) -> list[AttemptRow | WorkerRow]:
        """Rows whose ``deadline`` is not after ``lease``, the earliest first."""
        ...

    async def next_deadline(self) -> float | None:
        """The earliest ``deadline`` of all rows."""
        ...

    async def renew_leases(self, lost_seconds: float) -> None:
        """Give every lease a full new term, as ``Backend.open`` does. Time-outs do not count the seconds that were
        lost. A repeat at the same moment changes nothing."""
        ...

    async def delete_spans(self, attempt: AttemptRow, limit: int) -> tuple[int, int]:
        """Delete up to ``limit`` spans of an attempt; returns how many, and their bytes."""
        ...

    async def delete_rollout(self, rollout: RolloutRow) -> int:
        """Delete a rollout and its attempts, whose spans are gone already; returns the number of attempts."""
        ...

    async def delete_worker(self, worker: WorkerRow) -> None:
        """Delete a worker that holds no attempt."""
        ...

    def count(self, changes: Mapping[str, int]) -> None:
        """Add to counters, together with the other effects of this transaction."""
        ...

    def publish(self, event: Event) -> None:
        """Tell the engine, once the transaction is durable."""
        ...


class Backend(Protocol):
    """Runs operations in transactions."""

    name: str
    forked: bool
    """Whether this process inherited the data by fork, and must leave them alone."""

    @property
    def stopped(self) -> bool:
        """Whether a fault has ended all writing; reads may go on."""
        ...

    def open(self, publish: Callable[[list[Event]], None]) -> None:
        """Take possession of the data; idempotent.

        Events of committed transactions, and ``Stopped``, go to ``publish``.
        """
        ...

    def lease_now(self) -> float:
        """The lease clock of ``now``, outside a transaction."""
        ...

    def boot_now(self) -> float:
        """``Clock.boot``."""
        ...

    def measures(self) -> Sequence[Measure]:
        """How it is doing; none before it is open."""
        ...

    def disk(self) -> tuple[int, int] | None:
        """Free and total bytes of the disk that holds the data; None if that is not known here."""
        ...

    def write(self, op: Callable[[Transaction], Awaitable[T]]) -> Awaitable[T]:
        """Run ``op`` in a transaction; the result comes when it is durable."""
        ...

    def write_blocking(self, op: Callable[[Transaction], Awaitable[T]]) -> T:
        """``write`` for a thread without an event loop."""
        ...

    async def read(self, op: Callable[[ReadTransaction], Awaitable[T]], *, rows: int = 1) -> T:
        """Run ``op`` on a snapshot. ``rows``: about how many it will read, to choose where it runs."""
        ...

    async def backup(self, target: Path) -> None:
        """Copy the data as they stand into a new file, while writes go on."""
        ...

    async def close(self) -> None:
        """Finish what was accepted, then let go of the data; idempotent."""
        ...
