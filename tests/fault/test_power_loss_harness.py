"""The power-loss harness, tried on plain SQLite, whose promises are known.

A harness that finds nothing proves nothing, so the negative controls come first in importance: with
`synchronous=NORMAL` and `OFF` it must be seen to lose acknowledged transactions, which `FULL` must never lose.
"""

from __future__ import annotations

import random
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import apsw
import pytest

from power_loss import (
    SECTOR_BYTES,
    Crash,
    CrashWalker,
    Created,
    Deleted,
    DirectorySynced,
    Entry,
    Found,
    Marked,
    RecordingVFS,
    Synced,
    Truncated,
    Wrote,
    crash_image,
    crashes,
    ram_disk,
    restored,
    write_image,
)

DATABASE = "ledger.db"
ROWS_PER_GROUP = 3
SETUP_DONE = "the schema is there"

SCHEMA = """
CREATE TABLE IF NOT EXISTS entry (id INTEGER PRIMARY KEY, grp INTEGER NOT NULL, payload BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS entry_grp ON entry (grp);
CREATE TABLE IF NOT EXISTS counter (id INTEGER PRIMARY KEY, groups INTEGER NOT NULL);
INSERT OR IGNORE INTO counter VALUES (1, 0);
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder to record in, on the RAM disk: real syncs would only make the recording slow."""
    with tempfile.TemporaryDirectory(prefix="power-loss-recorded-", dir=ram_disk()) as path:
        yield Path(path)


# The workload: groups of rows, each group one transaction that also raises a counter, so that every write is one of
# a new row and one in place. What a group holds follows from its number, so that any damage is seen.


def connect(path: Path, recording: RecordingVFS, synchronous: str = "FULL") -> apsw.Connection:
    connection = apsw.Connection(str(path), vfs=recording.name)
    connection.set_busy_timeout(60_000)
    connection.pragma("page_size", 8192)
    connection.pragma("journal_mode", "wal")
    connection.pragma("synchronous", synchronous)
    connection.wal_autocheckpoint(40)
    return connection


def set_up(connection: apsw.Connection, recording: RecordingVFS) -> None:
    with connection:
        connection.execute(SCHEMA)
    recording.mark(SETUP_DONE)


@cache
def payload_of(row: int) -> bytes:
    return random.Random(row).randbytes(100 + row * 131 % 1900)


def add_group(connection: apsw.Connection, group: int) -> None:
    with connection:
        for row in range(group * ROWS_PER_GROUP, (group + 1) * ROWS_PER_GROUP):
            connection.execute("INSERT INTO entry VALUES (?, ?, ?)", (row, group, payload_of(row)))
        connection.execute("UPDATE counter SET groups = ? WHERE id = 1", (group + 1,))


def record_groups(path: Path, synchronous: str, groups: int) -> list[Entry]:
    """Record a set-up that is safe in any case, then `groups` transactions, each marked when COMMIT returned."""
    with RecordingVFS() as recording:
        connection = connect(path, recording)
        set_up(connection, recording)
        connection.pragma("synchronous", synchronous)
        for group in range(groups):
            add_group(connection, group)
            recording.mark(group)
        log = list(recording.log)
        connection.close()
    return log


def set_up_end(log: Sequence[Entry]) -> int:
    """The position after the set-up was acknowledged."""
    return log.index(Marked(SETUP_DONE)) + 1


# The check after a crash.


@dataclass(frozen=True)
class Survivors:
    """What SQLite finds after recovery: the groups that are whole, or None if the file is damaged."""

    groups: int | None


def survivors(path: Path) -> Survivors:
    """Open a crashed database with plain SQLite and count the groups, which must be whole and without a gap."""
    try:
        with closing(apsw.Connection(str(path))) as connection:
            if connection.execute("PRAGMA integrity_check").get != "ok":
                return Survivors(None)
            rows = connection.execute("SELECT id, grp, payload FROM entry ORDER BY id").fetchall()
            counter = connection.execute("SELECT groups FROM counter").get
    except apsw.Error:
        return Survivors(None)
    assert isinstance(counter, int)
    whole = [(row, row // ROWS_PER_GROUP, payload_of(row)) for row in range(counter * ROWS_PER_GROUP)]
    return Survivors(counter if rows == whole else None)


@dataclass
class Tally:
    """What came of many crashes."""

    crashes: int = 0
    damaged: int = 0
    losing: int = 0
    lost_groups: int = 0

    def add(self, crash: Crash) -> None:
        acknowledged = sum(mark != SETUP_DONE for mark in crash.marks)
        with restored(crash.image) as folder:
            found = survivors(folder / DATABASE)
        self.crashes += 1
        self.damaged += found.groups is None
        lost = max(0, acknowledged - (found.groups or 0))
        self.losing += lost > 0
        self.lost_groups += lost


def tally(log: Sequence[Entry], count: int, seed: int) -> Tally:
    """Crash `count` times after the set-up."""
    result = Tally()
    for crash in crashes(log, count, random.Random(seed), start=set_up_end(log)):
        result.add(crash)
    return result


# SQLite's promises, and the negative controls.


def test_full_never_loses_an_acknowledged_transaction(folder: Path) -> None:
    log = record_groups(folder / DATABASE, "FULL", groups=120)
    assert checkpoints(log) >= 3
    assert tally(log, 1500, seed=1) == Tally(crashes=1500)


def test_normal_is_seen_to_lose_but_never_to_damage(folder: Path) -> None:
    log = record_groups(folder / DATABASE, "NORMAL", groups=120)
    assert checkpoints(log) >= 3
    result = tally(log, 500, seed=2)
    assert result.damaged == 0
    assert result.losing > 50
    assert result.lost_groups > result.losing


def test_off_is_seen_to_lose_and_to_damage(folder: Path) -> None:
    log = record_groups(folder / DATABASE, "OFF", groups=120)
    result = tally(log, 200, seed=3)
    assert result.damaged > 0
    assert result.losing > 20
    assert result.lost_groups > result.losing


def test_acknowledging_before_the_commit_is_seen_to_lose(folder: Path) -> None:
    with RecordingVFS() as recording, closing(connect(folder / DATABASE, recording)) as connection:
        set_up(connection, recording)
        for group in range(20):
            recording.mark(group)
            add_group(connection, group)
        log = list(recording.log)
    result = tally(log, 200, seed=10)
    assert result.damaged == 0
    assert result.losing > 20


def test_a_crash_during_set_up_leaves_nothing_or_a_valid_database(folder: Path) -> None:
    log = record_groups(folder / DATABASE, "FULL", groups=1)
    log = log[: set_up_end(log)]
    seen_without_file = seen_whole = False
    for crash in crashes(log, 400, random.Random(4)):
        with restored(crash.image) as found, RecordingVFS() as recording:
            seen_without_file |= not crash.image.get(str(folder / DATABASE))
            connection = connect(found / DATABASE, recording)
            assert connection.execute("PRAGMA integrity_check").get == "ok"
            tables = connection.execute("SELECT count(*) FROM sqlite_schema WHERE type = 'table'").get
            assert tables == 2 or (tables == 0 and SETUP_DONE not in crash.marks)
            seen_whole |= tables == 2
            # Whatever was left: setting up again works.
            assert connection.pragma("journal_mode") == "wal"
            set_up(connection, recording)
            add_group(connection, 0)
            connection.close()
            assert survivors(found / DATABASE) == Survivors(1)
    assert seen_without_file
    assert seen_whole


def test_a_second_crash_during_recovery_loses_nothing_either(folder: Path) -> None:
    log = record_groups(folder / DATABASE, "FULL", groups=20)
    rng = random.Random(5)
    result = Tally()
    for crash in crashes(log, 40, rng, start=set_up_end(log)):
        with restored(crash.image) as found, RecordingVFS() as recording:
            connection = connect(found / DATABASE, recording)
            for group in (before := [mark for mark in crash.marks if mark != SETUP_DONE]):
                recording.mark(group)
            first = connection.execute("SELECT groups FROM counter").get
            assert isinstance(first, int)
            for group in range(len(before), first):
                recording.mark(group)  # it survived a crash, and was read: from now on it must stay
            for group in range(first, first + 5):
                add_group(connection, group)
                recording.mark(group)
            connection.close()
            # The position after the last mark of what the first crash left.
            start = recording.log.index(Marked(len(before) - 1)) + 1 if before else len(recording.log)
            for second in crashes(recording.log, 20, rng, start=start):
                result.add(second)
    assert result == Tally(crashes=800)


def test_connections_in_several_threads_share_the_wal(folder: Path) -> None:
    """One writes, one checkpoints, one reads, all at once, on a disk so slow that writes overlap with syncs."""
    path = folder / DATABASE
    stop = threading.Event()
    seen_groups: list[int] = []
    failures: list[BaseException] = []

    def checkpoint(connection: apsw.Connection) -> None:
        # A passive checkpoint never waits, whatever the busy timeout: with a reader about it is refused now and then,
        # through SQLite's own VFS as well.
        with suppress(apsw.BusyError):
            connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)

    def read(connection: apsw.Connection) -> None:
        groups, rows = connection.execute("SELECT groups, (SELECT count(*) FROM entry) FROM counter").get
        assert rows == groups * ROWS_PER_GROUP
        seen_groups.append(groups)

    def repeat(work: Callable[[apsw.Connection], None]) -> None:
        try:
            with closing(connect(path, recording)) as connection:
                while not stop.is_set():
                    work(connection)
        except BaseException as error:
            failures.append(error)
            raise

    with RecordingVFS(sync_seconds=0.001) as recording, closing(connect(path, recording)) as writer:
        writer.wal_autocheckpoint(0)
        set_up(writer, recording)
        threads = [threading.Thread(target=repeat, args=(work,)) for work in (checkpoint, read)]
        for thread in threads:
            thread.start()
        group = 0
        while not failures and (group < 60 or checkpoints(recording.log) < 10 or len(set(seen_groups)) < 10):
            add_group(writer, group)
            recording.mark(group)
            group += 1
        stop.set()
        for thread in threads:
            thread.join()
        log = list(recording.log)
    assert not failures
    assert seen_groups == sorted(seen_groups)
    assert any(isinstance(entry, Synced) and entry.covers < position for position, entry in enumerate(log))
    assert tally(log, 500, seed=6) == Tally(crashes=500)


def checkpoints(log: Sequence[Entry]) -> int:
    """How often the database file itself was synced."""
    return sum(isinstance(entry, Synced) and entry.path.endswith(DATABASE) for entry in log)


# The recording.


def test_replaying_the_log_gives_the_real_files(folder: Path) -> None:
    """Nothing goes past the recording: with every write kept, the log yields the files as they are."""
    path = folder / DATABASE
    with RecordingVFS() as recording:
        connection = connect(path, recording)
        set_up(connection, recording)
        for group in range(30):
            add_group(connection, group)
        connection.execute("DELETE FROM entry WHERE grp < 20")
        connection.execute("VACUUM")
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        add_group(connection, 30)
        log = list(recording.log)
        assert any(isinstance(entry, Truncated) for entry in log)
        for name in (DATABASE, DATABASE + "-wal"):
            inode = next(e.inode for e in log if isinstance(e, Created) and e.path == str(folder / name))
            walker = CrashWalker([*log, Synced(str(folder / name), inode, 2, covers=len(log))])
            walker.advance(len(log) + 1)
            assert walker.image(random.Random(0))[str(folder / name)] == (folder / name).read_bytes()
        connection.close()


def test_a_file_that_was_there_before_counts_as_durable(folder: Path) -> None:
    record_groups(folder / DATABASE, "FULL", groups=5)
    content = (folder / DATABASE).read_bytes()
    with RecordingVFS() as recording:
        connection = connect(folder / DATABASE, recording)
        assert connection.execute("SELECT groups FROM counter").get == 5
        connection.close()
    assert recording.log[0] == Found(str(folder / DATABASE), 0, content)
    assert crash_image(recording.log, 1, random.Random(0)) == {str(folder / DATABASE): content}


def test_a_leftover_deleted_unseen_may_be_back(folder: Path) -> None:
    leftover = folder / f"{DATABASE}-wal"
    leftover.write_bytes(OLD)
    with RecordingVFS() as recording, closing(connect(folder / DATABASE, recording)):
        log = list(recording.log)
    deleted = log.index(Deleted(str(leftover), False)) + 1
    assert contents(log[:deleted], str(leftover)) == {None, OLD}


def test_a_delete_journal_works_through_it_too(folder: Path) -> None:
    """Nothing in the harness is about WAL alone. EXTRA, since FULL leaves the journal's deletion unsynced."""
    path = folder / DATABASE
    with RecordingVFS() as recording:
        connection = connect(path, recording, "EXTRA")
        connection.pragma("journal_mode", "delete")
        set_up(connection, recording)
        for group in range(10):
            add_group(connection, group)
            recording.mark(group)
        connection.close()
    assert tally(recording.log, 300, seed=7) == Tally(crashes=300)


# The model, on logs made by hand.

A, B = "/disk/a", "/disk/b"
OLD, NEW = b"o" * SECTOR_BYTES * 2, b"n" * SECTOR_BYTES * 2


def contents(log: Sequence[Entry], path: str = A, draws: int = 600) -> set[bytes | None]:
    """All contents that `path` is found with at the end of `log`."""
    walker = CrashWalker(log)
    walker.advance(len(log))
    rng = random.Random(8)
    return {walker.image(rng).get(path) for _ in range(draws)}


def test_a_synced_write_is_there() -> None:
    log = [Created(A, 0), Wrote(A, 0, 0, NEW), Synced(A, 0, 2, covers=2)]
    assert contents(log) == {NEW}


def test_an_unsynced_write_is_kept_dropped_or_torn_by_sectors() -> None:
    log = [Found(A, 0, OLD), Wrote(A, 0, 0, NEW)]
    half = SECTOR_BYTES
    assert contents(log) == {OLD, NEW, NEW[:half] + OLD[half:], OLD[:half] + NEW[half:]}


def test_a_write_never_harms_the_bytes_beside_it() -> None:
    log = [Found(A, 0, OLD), Wrote(A, 0, 10, b"n" * 20), Wrote(A, 0, len(OLD), b"grown")]
    for content in contents(log):
        assert content is not None
        assert content[:10] == OLD[:10]
        assert content[10:30] in (OLD[10:30], b"n" * 20)
        assert content[30 : len(OLD)] == OLD[30:]


def test_growth_without_data_is_zeros_or_garbage() -> None:
    found = contents([Found(A, 0, b""), Wrote(A, 0, 0, NEW)])
    assert {b"", NEW, bytes(len(NEW))} <= found
    assert any(content and len(content) == len(NEW) and content[0] not in b"\0n" for content in found)


def test_later_writes_can_be_there_without_earlier_ones() -> None:
    log = [Found(A, 0, OLD), Wrote(A, 0, 0, NEW[:SECTOR_BYTES]), Wrote(A, 0, SECTOR_BYTES, NEW[SECTOR_BYTES:])]
    assert OLD[:SECTOR_BYTES] + NEW[SECTOR_BYTES:] in contents(log)


def test_an_unsynced_truncate_may_or_may_not_have_happened() -> None:
    assert contents([Found(A, 0, OLD), Truncated(A, 0, 5)]) == {OLD, OLD[:5]}
    assert contents([Found(A, 0, OLD), Truncated(A, 0, 5), Synced(A, 0, 2, covers=2)]) == {OLD[:5]}


def test_a_sync_does_not_cover_what_was_written_after_it_began() -> None:
    log = [Found(A, 0, OLD), Wrote(A, 0, 0, b"1"), Wrote(A, 0, 1, b"2"), Synced(A, 0, 2, covers=2)]
    assert contents(log) == {b"1o" + OLD[2:], b"12" + OLD[2:]}


def test_a_sync_does_not_cover_another_file() -> None:
    log = [Found(A, 0, OLD), Found(B, 1, OLD), Wrote(A, 0, 0, NEW), Wrote(B, 1, 0, NEW), Synced(B, 1, 2, covers=4)]
    assert OLD in contents(log, A)
    assert contents(log, B) == {NEW}


def test_a_new_file_may_be_missing_until_it_or_its_folder_is_synced() -> None:
    assert contents([Created(A, 0)]) == {None, b""}
    assert contents([Created(A, 0), Synced(A, 0, 2, covers=1)]) == {b""}
    assert contents([Created(A, 0), DirectorySynced("/disk", covers=1)]) == {b""}
    assert contents([Created(A, 0), DirectorySynced("/elsewhere", covers=1)]) == {None, b""}


def test_a_deleted_file_may_be_back_until_its_folder_is_synced() -> None:
    log: list[Entry] = [Found(A, 0, OLD), Deleted(A, False)]
    assert contents(log) == {None, OLD}
    assert contents([*log, DirectorySynced("/disk", covers=2)]) == {None}
    assert contents([*log, DirectorySynced("/disk", covers=1)]) == {None, OLD}


def test_a_path_used_again_may_lead_to_the_file_before() -> None:
    log: list[Entry] = [Found(A, 0, OLD), Deleted(A, False), Created(A, 1), Wrote(A, 1, 0, b"1")]
    assert {None, OLD, b"", b"1"} <= contents(log)
    assert contents([*log, Synced(A, 1, 2, covers=4)]) == {b"1"}


def test_every_position_is_crashed_at_and_marks_are_those_before_it() -> None:
    log: list[Entry] = [Found(A, 0, OLD), Marked("first"), Wrote(A, 0, 0, NEW), Marked("second")]
    seen = [(crash.at, crash.marks) for crash in crashes(log, 5, random.Random(0))]
    assert seen == [(0, ()), (1, ()), (2, ("first",)), (3, ("first",)), (4, ("first", "second"))]
    assert [crash.at for crash in crashes(log, 3, random.Random(0), start=2)] == [2, 3, 4]


def test_the_same_seed_gives_the_same_images() -> None:
    log = [Found(A, 0, OLD), *(Wrote(A, 0, n * 700, NEW) for n in range(20))]
    first, second = ([crash.image for crash in crashes(log, 50, random.Random(9))] for _ in range(2))
    assert first == second
    assert len({crash[A] for crash in first if A in crash}) > 20


def test_a_walker_does_not_go_back() -> None:
    walker = CrashWalker([Marked("a"), Marked("b")])
    walker.advance(1)
    with pytest.raises(ValueError, match="from log position 1 to 0"):
        walker.advance(0)
    with pytest.raises(ValueError, match="ends at 2"):
        walker.advance(3)


def test_an_image_is_not_mixed_with_other_files(tmp_path: Path) -> None:
    write_image({A: b"a", B: b"b"}, tmp_path / "image")
    assert (tmp_path / "image" / "a").read_bytes() == b"a"
    with pytest.raises(ValueError, match="not empty"):
        write_image({A: b"a"}, tmp_path / "image")
    with pytest.raises(ValueError, match="same name"):
        write_image({A: b"a", "/other/a": b"b"}, tmp_path / "other")
