"""Power loss at any instant: what the store acknowledged is there afterwards.

A run of the store is recorded by `power_loss.RecordingVFS`, with a mark in the log after every acknowledgement.
At many positions of the log the machine loses power, the file is opened as it may be found, and every promise
made before is looked up. With full durability none is ever broken; with less the same check must see some broken.
"""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import apsw
import pytest

from agentlightning import PromptTemplate, SqliteLightningStore
from agentlightning.store.base import LightningStore
from agentlightning.store.engine import EngineStore
from agentlightning.store.sources import SystemClock, TimeOrderedIds
from agentlightning.store.sqlite.backend import FileBackend
from agentlightning.store.sqlite.connections import Durability
from agentlightning.types import AttemptedRollout, Span
from power_loss import Entry, RecordingVFS, crashes, ram_disk, restored

DATABASE = "store.db"
OPENED = "opened"
TASKS = 6
PROGRESS = {"queuing": 0, "preparing": 1, "requeuing": 1, "running": 2, "succeeded": 3}
CRASHES = 20_000 if os.environ.get("CI") else 1_000
LAST_SPAN = 1_000
"""The number of the first of the spans that are stored together with the end of their attempt."""
CHECKPOINT_PAGES = 60
"""Small, so that the log is copied into the database several times in a short run."""


@dataclass(frozen=True)
class HasRollout:
    """A rollout exists, and has come at least this far."""

    rollout_id: str
    status: str


@dataclass(frozen=True)
class HasSpan:
    """A span exists under this sequence id."""

    attempt_id: str
    span_id: str
    sequence_id: int


@dataclass(frozen=True)
class HasResources:
    """A version of resources exists."""

    resources_id: str
    version: int


@dataclass(frozen=True)
class HasReleased:
    """An attempt was given back."""

    attempt_id: str


@dataclass
class Found:
    """What a database holds after a crash."""

    rollouts: dict[str, str] = field(default_factory=dict[str, str])
    spans: set[HasSpan] = field(default_factory=set[HasSpan])
    resources: set[HasResources] = field(default_factory=set[HasResources])
    released: set[str] = field(default_factory=set[str])
    torn: int = 0
    """Attempts that have their last spans, and have not ended."""

    def keeps(self, promise: object) -> bool:
        """Whether a promise still holds."""
        match promise:
            case HasRollout(rollout_id, status):
                found = self.rollouts.get(rollout_id)
                return found is not None and PROGRESS[found] >= PROGRESS[status]
            case HasSpan():
                return promise in self.spans
            case HasResources():
                return promise in self.resources
            case HasReleased(attempt_id):
                return attempt_id in self.released
            case _:
                return promise == OPENED


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder to record in, on the RAM disk where there is one."""
    with tempfile.TemporaryDirectory(prefix="power-loss-recorded-", dir=ram_disk()) as path:
        yield Path(path)


def span_of(rollout_id: str, attempt_id: str, number: int) -> Span:
    attributes = {"text": "x" * (number * 397 % 2_000), "number": number}
    return Span.from_attributes(
        rollout_id=rollout_id, attempt_id=attempt_id, span_id=f"{number:016x}", attributes=attributes
    )


Work = Callable[[EngineStore, Callable[[object], None], int], Awaitable[None]]


async def work(store: EngineStore, promise: Callable[[object], None], rollouts: int) -> None:
    """Take rollouts through their life, and promise each step when it was acknowledged."""
    ahead: list[AttemptedRollout] = []
    for number in range(rollouts):
        enqueued = await store.enqueue_rollout({"number": number})
        promise(HasRollout(enqueued.rollout_id, "queuing"))
        request_id = f"claim-{enqueued.rollout_id}"
        claimed = ahead.pop() if ahead else await store.dequeue_rollout(worker_id="worker", request_id=request_id)
        if claimed is None:  # another task has claimed it ahead
            continue
        rollout_id, attempt_id = claimed.rollout_id, claimed.attempt.attempt_id
        promise(HasRollout(rollout_id, "preparing"))
        for span in await store.add_many_spans([span_of(rollout_id, attempt_id, n) for n in range(number % 4 + 1)]):
            promise(HasSpan(attempt_id, span.span_id, span.sequence_id))
        promise(HasRollout(rollout_id, "running"))
        resources = await store.update_resources("rs-prompt", {"p": PromptTemplate(template="{q}", engine="f-string")})
        promise(HasResources(resources.resources_id, resources.version))
        if number % 2:
            await store.update_attempt(rollout_id, attempt_id, "succeeded")
        else:
            ahead = await finish(store, promise, rollout_id, attempt_id)
        promise(HasRollout(rollout_id, "succeeded"))
    for each in ahead:
        await store.release_attempt(each.rollout_id, each.attempt.attempt_id)
        promise(HasReleased(each.attempt.attempt_id))


async def finish(
    store: EngineStore, promise: Callable[[object], None], rollout_id: str, attempt_id: str
) -> list[AttemptedRollout]:
    """End an attempt together with its last spans and the next claim; returns what was claimed."""
    spans = [span_of(rollout_id, attempt_id, LAST_SPAN + n) for n in range(2)]
    done = await store.finish_attempt(
        rollout_id, attempt_id, "succeeded", spans, claim_limit=1, worker_id="worker", request_id=f"next-{attempt_id}"
    )
    for span, sequence_id in zip(spans, done.sequence_ids, strict=True):
        promise(HasSpan(attempt_id, span.span_id, sequence_id))
    for each in done.claimed:
        promise(HasRollout(each.rollout_id, "preparing"))
    return done.claimed


async def finish_in_parts(store: EngineStore, promise: Callable[[object], None], rollouts: int) -> None:
    """A negative control: the last spans and the end are written one after the other."""
    for _ in range(rollouts * 5):
        started = await store.start_rollout("input")
        rollout_id, attempt_id = started.rollout_id, started.attempt.attempt_id
        spans = [span_of(rollout_id, attempt_id, LAST_SPAN + n) for n in range(2)]
        await LightningStore.finish_attempt(store, rollout_id, attempt_id, "succeeded", spans)
        promise(HasRollout(rollout_id, "succeeded"))


async def promise_too_early(store: EngineStore, promise: Callable[[object], None], rollouts: int) -> None:
    """A negative control: each promise is made before the write that it is about."""
    for number in range(rollouts * 5):
        rollout_id = f"ro-{id(asyncio.current_task())}-{number}"
        promise(HasRollout(rollout_id, "queuing"))
        await store.enqueue_rollout({"number": number}, rollout_id=rollout_id)


def record(folder: Path, durability: Durability, *, rollouts: int = 6, work: Work = work) -> list[Entry]:
    """Record a run of several tasks."""

    async def run(recording: RecordingVFS) -> list[Entry]:
        backend = FileBackend(folder / DATABASE, durability, SystemClock(), recording.name, CHECKPOINT_PAGES)
        async with EngineStore(backend, TimeOrderedIds()) as store:
            recording.mark(OPENED)
            await asyncio.gather(*(work(store, recording.mark, rollouts) for _ in range(TASKS)))
            return list(recording.log)

    with RecordingVFS(sync_seconds=0.0005) as recording:
        return asyncio.run(run(recording))


def found_in(path: Path) -> Found | None:
    """What plain SQLite finds after recovery; None if the file is damaged or not even set up."""
    found = Found()
    try:
        with closing(apsw.Connection(str(path))) as connection:
            if connection.execute("PRAGMA integrity_check").get != "ok":
                return None
            rollouts = connection.execute("SELECT rollout_id, status FROM rollouts").fetchall()
            found.rollouts = {str(rollout_id): str(status) for rollout_id, status in rollouts}
            spans = connection.execute(
                "SELECT a.attempt_id, s.span_id, s.sequence_id FROM spans s JOIN attempts a ON a.seq = s.attempt_seq"
            )
            found.spans = {HasSpan(*row) for row in spans}
            released = connection.execute("SELECT attempt_id FROM attempts WHERE reason_code = 'released'")
            found.released = {row[0] for row in released}
            found.torn = connection.execute(
                "SELECT count(*) FROM spans s JOIN attempts a ON a.seq = s.attempt_seq WHERE a.live AND s.span_id >= ?",
                (f"{LAST_SPAN:016x}",),
            ).get
            versions = connection.execute("SELECT resources_id, version FROM resources")
            found.resources = {HasResources(*row) for row in versions}
    except apsw.Error:
        return None
    return found


@dataclass
class Tally:
    """What came of many crashes."""

    crashes: int = 0
    damaged: int = 0
    torn: int = 0
    losing: int = 0
    broken_promises: int = 0


def tally(log: Sequence[Entry], count: int, seed: int) -> Tally:
    """Lose power `count` times after the store had opened, and look up every promise made before."""
    result = Tally()
    start = next(n for n, entry in enumerate(log) if getattr(entry, "obj", None) == OPENED) + 1
    for crash in crashes(log, count, random.Random(seed), start=start):
        with restored(crash.image) as folder:
            found = found_in(folder / DATABASE)
        result.crashes += 1
        result.damaged += found is None
        result.torn += found is not None and found.torn > 0
        broken = sum(found is None or not found.keeps(promise) for promise in crash.marks)
        result.losing += broken > 0
        result.broken_promises += broken
    return result


@pytest.mark.timeout(600)  # 20,000 crashes with CI
def test_full_durability_keeps_every_promise(folder: Path) -> None:
    log = record(folder, "full")
    assert tally(log, CRASHES, seed=1) == Tally(crashes=CRASHES)


@pytest.mark.slow
def test_full_durability_keeps_every_promise_long_form(folder: Path) -> None:
    log = record(folder, "full", rollouts=12)
    assert tally(log, 20_000, seed=random.randrange(2**32)) == Tally(crashes=20_000)


def test_process_durability_is_seen_to_lose_but_never_to_damage(folder: Path) -> None:
    result = tally(record(folder, "process"), 200, seed=2)
    assert result.damaged == 0
    assert result.losing > 20


def test_no_durability_is_seen_to_lose(folder: Path) -> None:
    result = tally(record(folder, "none"), 200, seed=3)
    assert result.losing > 20


def test_acknowledging_too_early_is_seen_to_lose(folder: Path) -> None:
    result = tally(record(folder, "full", work=promise_too_early), 200, seed=4)
    assert result.damaged == 0
    assert result.losing > 20


def test_a_finish_in_several_writes_is_seen_to_be_torn(folder: Path) -> None:
    result = tally(record(folder, "full", work=finish_in_parts), 200, seed=6)
    assert result.damaged == 0
    assert result.torn > 20


def test_a_store_opens_after_a_crash_at_any_point_and_obeys_every_rule(folder: Path) -> None:
    """From before the file exists to the end, through the store itself."""

    async def reopen(path: Path) -> None:
        async with SqliteLightningStore(path) as store:
            report = await store.verify()
            assert report.ok, report.violations
            await store.enqueue_rollout("life goes on")

    log = record(folder, "full", rollouts=3)
    for crash in crashes(log, 60, random.Random(5)):
        with restored(crash.image) as found:
            asyncio.run(reopen(found / DATABASE))
