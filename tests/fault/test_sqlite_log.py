"""The write-ahead log stays small, however long writers write and readers read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import apsw
import pytest

from agentlightning import SqliteLightningStore
from agentlightning.store.engine import EngineStore
from agentlightning.store.sources import SystemClock, TimeOrderedIds
from agentlightning.store.sqlite import backend
from agentlightning.store.sqlite.backend import FileBackend
from agentlightning.store.sqlite.connections import open_reader
from scenes import span_of
from store_state import assert_sound

PAGE_BYTES = 8192
MEGABYTE = 2**20
CHECKPOINT_PAGES = 50
SLACK_PAGES = 60
"""What one group of writes may add before anybody looks at the size."""


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def store(database: Path) -> EngineStore:
    clock = SystemClock()
    rows = FileBackend(database, "full", clock, checkpoint_pages=CHECKPOINT_PAGES)
    return EngineStore(rows, TimeOrderedIds(clock.wall))


def log_pages(database: Path) -> int:
    return Path(f"{database}-wal").stat().st_size // PAGE_BYTES


@contextmanager
def snapshot(database: Path) -> Iterator[apsw.Connection]:
    """A reader that keeps the log back as long as the block lasts."""
    with closing(open_reader(str(database), vfs=None)) as connection:
        connection.execute("BEGIN")
        connection.execute("SELECT count(*) FROM rollouts").fetchall()
        yield connection
        connection.execute("ROLLBACK")


async def test_the_log_is_copied_in_step_with_the_writes(database: Path) -> None:
    """At the size that users get, after many times as much was written."""
    largest = 0
    async with SqliteLightningStore(database, durability="process") as store:
        attempted = await store.start_rollout("input", rollout_id="ro-1", attempt_id="at-1")
        for number in range(30):
            spans = [span_of(attempted, span_id=f"{number}-{n}", attributes={"k": "x" * MEGABYTE}) for n in range(2)]
            await store.add_many_spans(spans)
            await store.query_spans("ro-1", limit=1)
            largest = max(largest, Path(f"{database}-wal").stat().st_size)
    measure = backend._CHECKPOINT_PAGES * PAGE_BYTES
    assert measure <= largest <= measure + 4 * MEGABYTE
    assert database.stat().st_size > 60 * MEGABYTE
    assert measure <= 32 * MEGABYTE
    assert not Path(f"{database}-wal").exists()


async def test_short_readers_do_not_keep_it_from_being_copied(store: EngineStore, database: Path) -> None:
    largest = 0
    stop = False

    async def read() -> None:
        while not stop:
            await store.verify()  # in a thread of its own
            await store.get_rollout_by_id("ro-1")

    async with store:
        await store.enqueue_rollout("input", rollout_id="ro-1")
        readers = [asyncio.create_task(read()) for _ in range(3)]
        for _ in range(150):
            await asyncio.gather(*(store.enqueue_rollout("x" * 5_000) for _ in range(8)))
            largest = max(largest, log_pages(database))
        stop = True
        await asyncio.gather(*readers)
        await assert_sound(store)
    assert largest <= 20 * CHECKPOINT_PAGES  # of some 4,000 written


async def test_a_reader_that_stays_makes_the_log_longer_and_holds_nobody_up(store: EngineStore, database: Path) -> None:
    async with store:
        await store.enqueue_rollout("input", rollout_id="ro-1")
        with snapshot(database) as reader:
            written = waits = 0
            while log_pages(database) <= 12 * CHECKPOINT_PAGES:
                began = time.monotonic()
                await store.enqueue_rollout("x" * 5_000)
                waits += time.monotonic() - began > 0.2
                written += 1
            assert waits <= 3 + written // 10  # once for each four measures of growth, and what else the machine does
            assert reader.execute("SELECT count(*) FROM rollouts").fetchall() == [(1,)]
        longest = log_pages(database)
        for _ in range(40):
            await asyncio.gather(*(store.enqueue_rollout("x" * 5_000) for _ in range(8)))
            assert log_pages(database) <= longest + SLACK_PAGES
        assert (await store.query_rollouts(limit=1)).total == written + 321
        await assert_sound(store)
