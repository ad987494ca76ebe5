"""The write-ahead log stays small, however long writers write and readers read."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import apsw
import pytest

from agentlightning import SqliteLightningStore
from agentlightning.store.clock import SystemClock
from agentlightning.store.engine import EngineStore
from agentlightning.store.ids import TimeOrderedIds
from agentlightning.store.sqlite import backend, connections
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
        for _ in range(50):
            await asyncio.gather(*(store.enqueue_rollout("x" * 5_000) for _ in range(8)))
            largest = max(largest, log_pages(database))
        stop = True
        await asyncio.gather(*readers)
        await assert_sound(store)
    assert largest <= 4 * CHECKPOINT_PAGES + SLACK_PAGES


async def test_a_long_reader_makes_writers_wait_before_the_log_grows_without_end(
    store: EngineStore, database: Path
) -> None:
    async with store:
        await store.enqueue_rollout("input", rollout_id="ro-1")
        with snapshot(database) as reader:
            written = 0
            while log_pages(database) <= 4 * CHECKPOINT_PAGES:
                await store.enqueue_rollout("x" * 5_000)
                written += 1
            waiting = asyncio.create_task(store.enqueue_rollout("x" * 5_000))
            await asyncio.wait([waiting], timeout=0.3)
            assert not waiting.done()  # the writers wait for the reader
            assert await store.get_rollout_by_id("ro-1") is not None  # other readers do not
            assert reader.execute("SELECT count(*) FROM rollouts").fetchall() == [(1,)]
        await waiting
        for _ in range(40):
            await asyncio.gather(*(store.enqueue_rollout("x" * 5_000) for _ in range(8)))
            assert log_pages(database) <= 4 * CHECKPOINT_PAGES + SLACK_PAGES
        assert (await store.query_rollouts(limit=1)).total == written + 322
        await assert_sound(store)


async def test_a_reader_that_stays_too_long_holds_nobody_up_for_ever(
    store: EngineStore, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_BUSY_MILLISECONDS", 300)
    async with store:
        await store.enqueue_rollout("input", rollout_id="ro-1")
        with snapshot(database):
            while log_pages(database) <= 4 * CHECKPOINT_PAGES:
                await store.enqueue_rollout("x" * 5_000)
            await asyncio.wait_for(store.enqueue_rollout("x" * 5_000), timeout=30.0)
