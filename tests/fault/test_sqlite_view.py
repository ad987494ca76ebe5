"""Reading a database beside its owner: a true picture, a whole copy, and no trace of having looked."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from agentlightning import ReadOnlySqliteStore, SqliteLightningStore
from agentlightning.errors import (
    CorruptStore,
    ForeignFile,
    InvalidValue,
    NewerSchema,
    StoreClosed,
    StoreUnavailable,
)
from agentlightning.store.sqlite.connections import APPLICATION_ID, MIGRATIONS
from scenes import claimed, finish, span_of
from store_state import assert_sound, dump

OWNER = """
import asyncio, itertools, sys
from agentlightning import SqliteLightningStore
from scenes import span_of

async def main():
    async with SqliteLightningStore(sys.argv[1]) as store:
        for number in itertools.count():
            attempted = await store.start_rollout({"n": number}, rollout_id=f"ro-{number}", worker_id="w-1")
            await store.add_many_spans([span_of(attempted) for _ in range(3)])
            if number % 2:
                await store.update_attempt(attempted.rollout_id, attempted.attempt.attempt_id, "succeeded")
            print(number, flush=True)

asyncio.run(main())
"""


class Owner:
    """A process that owns a database and writes to it without end."""

    def __init__(self, database: Path) -> None:
        support = Path(__file__).parents[1] / "support"
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(database)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(support)},
        )
        self.acknowledged = -1

    def write_up_to(self, number: int) -> None:
        """Return when this rollout is acknowledged. The owner goes on."""
        assert self.process.stdout is not None
        while self.acknowledged < number:
            self.acknowledged = int(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate(timeout=20)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def owner(database: Path) -> Iterator[Owner]:
    owner = Owner(database)
    try:
        yield owner
    finally:
        owner.kill()


def digests(folder: Path) -> dict[str, str]:
    """What lies there, by name. The index of the log is shared memory that only lives while somebody reads."""
    return {
        each.name: hashlib.sha256(each.read_bytes()).hexdigest()
        for each in folder.iterdir()
        if not each.name.endswith("-shm")
    }


async def made(database: Path) -> None:
    async with SqliteLightningStore(database) as store:
        await store.enqueue_rollout({"n": 1})
        attempted = await claimed(store, "w-1", request_id="q-1")
        await store.add_span(span_of(attempted))


# --- What is seen --------------------------------------------------------------------------------------


async def test_what_another_process_acknowledged_is_seen_at_once(database: Path, owner: Owner) -> None:
    owner.write_up_to(5)
    async with ReadOnlySqliteStore(database) as view:
        for number in (5, 25, 50):
            owner.write_up_to(number)
            ids = {each.rollout_id for each in await view.query_rollouts()}
            assert {f"ro-{each}" for each in range(number + 1)} <= ids
            assert len(await view.query_spans(f"ro-{number}")) == 3
        assert (await view.verify()).ok
    owner.write_up_to(60)  # nobody was held up


async def test_what_a_killed_owner_acknowledged_is_seen_and_left_for_the_next(database: Path, owner: Owner) -> None:
    owner.write_up_to(30)
    owner.kill()
    before = digests(database.parent)
    async with ReadOnlySqliteStore(database) as view:
        assert (await view.statistics())["total_rollouts"] >= 31
        assert (await view.verify()).ok
        seen = await dump(view)
    assert digests(database.parent) == before, "looking copied the log into the database, or changed it"
    async with SqliteLightningStore(database) as store:
        after = await dump(store)
        await assert_sound(store)
    for name in ("rollouts", "resources"):
        assert after[name] == seen[name]


async def test_a_plain_connection_would_leave_a_trace(database: Path, owner: Owner) -> None:
    """The negative control of the test above."""
    owner.write_up_to(30)
    owner.kill()
    before = digests(database.parent)
    plain = apsw.Connection(str(database))
    plain.execute("SELECT count(*) FROM rollouts").fetchall()
    plain.close()
    assert digests(database.parent) != before


async def test_nothing_expires_by_looking(database: Path) -> None:
    """A file without an owner: its leases get a fresh term when it is opened, whenever that is."""
    await made(database)
    async with ReadOnlySqliteStore(database) as view:
        [rollout] = await view.query_rollouts()
        assert rollout.status == "running"


async def test_two_may_look_and_one_own(database: Path) -> None:
    async with SqliteLightningStore(database) as store:
        await store.enqueue_rollout("a")
        async with ReadOnlySqliteStore(database) as one, ReadOnlySqliteStore(database) as two:
            await store.enqueue_rollout("b")
            assert await dump(one) == await dump(two) == await dump(store)


# --- What is refused ---------------------------------------------------------------------------------


async def test_writing_and_waiting_are_refused(database: Path) -> None:
    await made(database)
    async with ReadOnlySqliteStore(database) as view:
        [rollout] = await view.query_rollouts()
        for call in (
            view.enqueue_rollout("x"),
            view.dequeue_rollout("w-2"),
            view.dequeue_rollout("w-2", wait_seconds=60),
            view.update_rollout(rollout.rollout_id, metadata={}),
            view.update_worker("w-1"),
            view.delete_finished_rollouts(older_than_seconds=0),
            view.wait_for_rollouts(rollout_ids=[rollout.rollout_id]),
        ):
            with pytest.raises(StoreUnavailable, match="reading only"):
                await asyncio.wait_for(call, timeout=20)
        assert await view.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=0) == []
    with pytest.raises(StoreClosed):
        await view.statistics()


async def test_a_file_that_cannot_be_read_says_why(database: Path, tmp_path: Path) -> None:
    async def look() -> None:
        async with ReadOnlySqliteStore(database) as view:
            await view.query_rollouts()

    with pytest.raises(InvalidValue, match="there is no database"):
        await look()
    assert not list(tmp_path.iterdir()), "looking made a file"
    database.write_text("no database at all, but long enough to be one" * 100)
    with pytest.raises(ForeignFile):
        await look()


@pytest.mark.parametrize(
    ("version", "error", "words"),
    [(0, StoreUnavailable, "schema version 0"), (len(MIGRATIONS) + 1, NewerSchema, "upgrade")],
)
async def test_other_schemas_are_refused_and_not_migrated(
    database: Path, version: int, error: type[Exception], words: str
) -> None:
    await made(database)
    connection = apsw.Connection(str(database))
    connection.execute(f"PRAGMA user_version = {version}; PRAGMA application_id = {APPLICATION_ID}")
    connection.close()
    with pytest.raises(error, match=words):
        async with ReadOnlySqliteStore(database):
            pass
    connection = apsw.Connection(str(database))
    assert connection.pragma("user_version") == version
    connection.close()


async def test_damage_is_an_error_and_not_an_empty_answer(database: Path) -> None:
    await made(database)
    connection = apsw.Connection(str(database))
    connection.execute("UPDATE rollouts SET input = x'ff00'")
    connection.close()
    async with ReadOnlySqliteStore(database) as view:
        with pytest.raises(CorruptStore, match="damaged"):
            await view.query_rollouts()
        assert not (await view.verify()).ok


# --- Copies ------------------------------------------------------------------------------------------


async def test_a_backup_from_beside_has_all_that_was_acknowledged_before_it(
    database: Path, owner: Owner, tmp_path: Path
) -> None:
    for number in range(3):
        owner.write_up_to(owner.acknowledged + 20)
        promised = owner.acknowledged
        copy = tmp_path / f"backup-{number}.db"
        async with ReadOnlySqliteStore(database) as view:
            await view.backup(copy)
        async with ReadOnlySqliteStore(copy) as backup:
            ids = {each.rollout_id for each in await backup.query_rollouts()}
            assert {f"ro-{each}" for each in range(promised + 1)} <= ids
            assert (await backup.verify()).ok
        assert copy.stat().st_mode & 0o777 == 0o600
    owner.write_up_to(owner.acknowledged + 5)


async def test_a_backup_can_be_made_of_a_backup(database: Path, tmp_path: Path) -> None:
    await made(database)
    async with ReadOnlySqliteStore(database) as view:
        await view.backup(tmp_path / "one.db")
        state = await dump(view)
    async with ReadOnlySqliteStore(tmp_path / "one.db") as one:
        await one.backup(tmp_path / "two.db")
    await SqliteLightningStore.restore(tmp_path / "two.db", tmp_path / "three.db")
    async with ReadOnlySqliteStore(tmp_path / "three.db") as three:
        restored = await dump(three)
    assert restored["rollouts"] == state["rollouts"]


async def test_the_room_on_the_disk_is_told(database: Path) -> None:
    async with SqliteLightningStore(database) as store:
        attempted = await store.start_rollout("x")
        await finish(store, attempted)
        host = (await store.statistics())["host"]
        room = os.statvfs(database.parent)
        assert host["disk_total_bytes"] == room.f_blocks * room.f_frsize
        assert 0 < host["disk_free_bytes"] <= host["disk_total_bytes"]
