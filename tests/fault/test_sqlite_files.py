"""Files that are not what they should be: each a clear error that names the file, and no harm done to it."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import apsw
import msgspec
import pytest

import store_programs
from agentlightning import SqliteLightningStore
from agentlightning.errors import (
    AgentLightningError,
    CorruptStore,
    DiskFull,
    ForeignFile,
    NewerSchema,
    StoreStopped,
    StoreUnavailable,
)
from agentlightning.store.sqlite.connections import APPLICATION_ID, MIGRATIONS
from agentlightning.store.sqlite.faults import FAULTS, translate
from every_method import READS
from fresh_process import run_fresh
from scenes import finish, prompt, span_of
from store_state import assert_sound

PAGE_BYTES = 8192


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that has something on every kind of page."""
    original = tmp_path_factory.mktemp("original") / "original.db"

    async def work(store: SqliteLightningStore, number: int) -> None:
        attempted = await store.start_rollout(
            {"n": number}, rollout_id=f"ro-{number}", attempt_id=f"at-{number}", worker_id=f"worker-{number}"
        )
        await store.add_many_spans([span_of(attempted, span_id=f"{number}-{n}") for n in range(4)])
        await finish(store, attempted)

    async def fill() -> None:
        async with SqliteLightningStore(original) as store:
            await asyncio.gather(*(work(store, number) for number in range(200)))

    asyncio.run(fill())
    return original


@pytest.fixture
def filled(original: Path, database: Path) -> Path:
    """A copy of it."""
    shutil.copy(original, database)
    return database


# --- Files of others -------------------------------------------------------------------------------


def text(file: Path) -> None:
    file.write_text("This is not a database, but somebody's novel.\n" * 1000)


def short_text(file: Path) -> None:
    file.write_text("hello")


def zeros(file: Path) -> None:
    file.write_bytes(bytes(3 * PAGE_BYTES))


def another_program(file: Path) -> None:
    with closing(apsw.Connection(str(file))) as connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT); INSERT INTO bookmarks VALUES ('about:blank')")


def another_program_with_its_id(file: Path) -> None:
    with closing(apsw.Connection(str(file))) as connection:
        connection.execute("PRAGMA application_id = 252006673; PRAGMA user_version = 1")


def another_program_in_wal_mode(file: Path) -> None:
    another_program(file)
    with closing(apsw.Connection(str(file))) as connection:
        connection.pragma("journal_mode", "wal")
        connection.execute("INSERT INTO bookmarks VALUES ('about:mozilla')")


def another_program_with_a_version_only(file: Path) -> None:
    with closing(apsw.Connection(str(file))) as connection:
        connection.execute("PRAGMA user_version = 7")


@pytest.mark.parametrize(
    "make",
    [
        text,
        short_text,
        zeros,
        another_program,
        another_program_with_its_id,
        another_program_in_wal_mode,
        another_program_with_a_version_only,
    ],
)
async def test_a_foreign_file_is_refused_and_left_as_it_is(database: Path, make: Callable[[Path], None]) -> None:
    make(database)
    before = database.read_bytes()
    store = SqliteLightningStore(database)
    for _ in range(2):
        with pytest.raises(ForeignFile, match=r"store\.db.*another path"):
            await store.enqueue_rollout("input")
    await store.close()
    assert database.read_bytes() == before
    assert left_behind(database) <= {"store.db", "store.db-owner"}


async def test_a_newer_schema_is_refused_and_left_as_it_is(filled: Path) -> None:
    newest = len(MIGRATIONS)
    with closing(apsw.Connection(str(filled))) as connection:
        connection.pragma("user_version", newest + 1)
    before = filled.read_bytes()
    with pytest.raises(NewerSchema, match=rf"store\.db.* {newest + 1}.* {newest}.*upgrade"):
        await SqliteLightningStore(filled).enqueue_rollout("input")
    assert filled.read_bytes() == before


async def test_an_empty_file_becomes_a_store(database: Path) -> None:
    database.touch()
    async with SqliteLightningStore(database) as store:
        await store.enqueue_rollout("input")
        await assert_sound(store)
    with closing(apsw.Connection(str(database))) as connection:
        assert connection.pragma("application_id") == APPLICATION_ID
        assert connection.pragma("user_version") == len(MIGRATIONS)
        assert connection.pragma("page_size") == PAGE_BYTES


def left_behind(database: Path) -> set[str]:
    return {each.name for each in database.parent.iterdir()}


# --- Places where no file can be -------------------------------------------------------------------


async def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match=r"Is a directory"):
        await SqliteLightningStore(tmp_path).statistics()


async def test_a_missing_folder_is_refused_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match=r"missing/store\.db.*No such file or directory"):
        await SqliteLightningStore(tmp_path / "missing" / "store.db").statistics()
    assert not (tmp_path / "missing").exists()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter, which those of pytest are not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


async def test_a_folder_that_may_not_be_written_is_refused(open_folder: Path) -> None:
    os.chmod(open_folder, 0o555)
    (said,) = run_fresh(store_programs.open_as_nobody, open_folder / "store.db")
    assert said.startswith("store_unavailable cannot open")
    assert "store.db" in said
    assert "Permission denied" in said
    assert list(open_folder.iterdir()) == []


async def test_a_file_that_may_not_be_written_is_refused(original: Path, open_folder: Path) -> None:
    database = Path(shutil.copy(original, open_folder / "store.db"))
    os.chmod(open_folder, 0o777)
    os.chmod(database, 0o444)
    before = database.read_bytes()
    (said,) = run_fresh(store_programs.open_as_nobody, database)
    assert said.startswith("store_unavailable cannot open")
    assert "Permission denied" in said
    assert database.read_bytes() == before
    async with SqliteLightningStore(database) as store:  # nobody holds it
        await assert_sound(store)


# --- Who may read ----------------------------------------------------------------------------------


async def test_only_the_owner_may_read_what_the_store_writes(database: Path) -> None:
    before = os.umask(0)
    try:
        async with SqliteLightningStore(database) as store:
            await store.enqueue_rollout("a secret")
            await store.verify()
            await store.backup(database.with_name("backup.db"))
            await SqliteLightningStore.restore(database.with_name("backup.db"), database.with_name("restored.db"))
            modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in database.parent.iterdir()}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(
        ["store.db", "store.db-wal", "store.db-shm", "store.db-owner", "backup.db", "restored.db"], 0o600
    )


# --- Damage ----------------------------------------------------------------------------------------


def root_page(database: Path, name: str) -> int:
    with closing(apsw.Connection(str(database), flags=apsw.SQLITE_OPEN_READONLY)) as connection:
        page = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (name,)).fetchall()[0][0]
    assert isinstance(page, int)
    return page


def scribble(database: Path, start: int, length: int) -> None:
    """Overwrite a part of a file with garbage."""
    with database.open("r+b") as file:
        file.seek(start)
        file.write(random.Random(start).randbytes(length))


@pytest.mark.parametrize("name", ["rollouts", "rollouts_by_id"])
async def test_a_damaged_page_stops_the_store_when_it_is_read(filled: Path, name: str) -> None:
    scribble(filled, (root_page(filled, name) - 1) * PAGE_BYTES, PAGE_BYTES)
    store = SqliteLightningStore(filled)
    with pytest.raises(CorruptStore, match=r"store\.db.*Restore a backup"):
        await store.get_rollout_by_id("ro-7")
    with pytest.raises(CorruptStore):
        await store.enqueue_rollout("input")
    assert (await store.statistics())["total_rollouts"] == 200  # what can be read is read
    assert (await store.query_attempts("ro-7")).total == 1
    await store.close()


@pytest.mark.parametrize("name", ["rollouts", "rollouts_by_id"])
async def test_a_damaged_page_stops_the_store_when_it_is_to_be_written(filled: Path, name: str) -> None:
    scribble(filled, (root_page(filled, name) - 1) * PAGE_BYTES, PAGE_BYTES)
    store = SqliteLightningStore(filled)
    sharing = [store.update_worker(f"worker-{n}", {"n": n}) for n in range(5)] + [store.enqueue_rollout("input")]
    for outcome in await asyncio.gather(*sharing, return_exceptions=True):
        assert isinstance(outcome, CorruptStore)
    with pytest.raises(CorruptStore):
        await store.update_worker("worker-1")
    await store.close()


@pytest.mark.parametrize(
    ("damage", "read"),
    [
        ("UPDATE rollouts SET input = x'7b'", "get_rollout_by_id"),
        ("UPDATE rollouts SET policy = x'00'", "query_rollouts"),
        ("UPDATE attempts SET metadata = x'ff'", "query_attempts"),
        ("UPDATE attempts SET worker_id = CAST(x'ff' AS TEXT)", "get_latest_attempt"),
        ("UPDATE spans SET body = x'7b7d'", "query_spans"),
        ("UPDATE workers SET heartbeat_stats = x'7b'", "get_worker_by_id"),
        ("UPDATE workers SET heartbeat_stats = x'7b'", "query_workers"),
        ("UPDATE resources SET resources = x'7b2261223a317d'", "get_latest_resources"),
        ("UPDATE resources SET resources = x'7b'", "query_resource_versions"),
    ],
)
async def test_a_damaged_value_that_the_database_does_not_see_stops_the_store(
    database: Path, damage: str, read: str
) -> None:
    async with SqliteLightningStore(database) as before:
        await before.update_resources("rs-1", {"main": prompt("one")})
        attempted = await before.start_rollout("i", rollout_id="ro-1", attempt_id="at-1", worker_id="worker-1")
        await before.add_span(span_of(attempted))
    with closing(apsw.Connection(str(database))) as connection:
        connection.execute(damage)
    store = SqliteLightningStore(database)
    with pytest.raises(CorruptStore, match=r"(?s)store\.db.*Restore a backup"):
        await READS[read](store)
    with pytest.raises(CorruptStore):
        await store.enqueue_rollout("input")
    await store.close()


@pytest.mark.parametrize("name", ["spans", "attempts_of_rollout", "counters"])
async def test_verify_finds_a_damaged_page(filled: Path, name: str) -> None:
    scribble(filled, (root_page(filled, name) - 1) * PAGE_BYTES, PAGE_BYTES)
    store = SqliteLightningStore(filled)
    try:
        report = await store.verify()
    except CorruptStore:
        pass  # the rest of it cannot be read
    else:
        assert "database_intact" in {each.rule for each in report.violations}
    await store.close()


@pytest.mark.parametrize("length", [16, 100, PAGE_BYTES])
async def test_a_destroyed_header_is_refused_and_the_file_left_as_it_is(filled: Path, length: int) -> None:
    scribble(filled, 0, length)
    before = filled.read_bytes()
    with pytest.raises((CorruptStore, ForeignFile), match=r"store\.db"):
        await SqliteLightningStore(filled).statistics()
    assert filled.read_bytes() == before


@pytest.mark.parametrize("seed", range(20))
async def test_damage_anywhere_gives_errors_of_ours_and_nothing_else(filled: Path, seed: int) -> None:
    rng = random.Random(seed)
    size = filled.stat().st_size
    for _ in range(rng.choice((1, 3, 10))):
        length = rng.choice((1, 40, 5000))
        scribble(filled, rng.randrange(size - length), length)
    if seed % 4 == 3:
        os.truncate(filled, rng.randrange(size))
    store = SqliteLightningStore(filled)
    for call in READS.values():
        with suppress_known_errors():
            await call(store)
    await store.close()
    restored = filled.with_name("restored.db")
    with suppress_known_errors():
        await SqliteLightningStore.restore(filled, restored)
        await assert_sound(SqliteLightningStore(restored))
    assert not [name for name in left_behind(filled) if "partial" in name or "restoring" in name]


@pytest.mark.parametrize(
    ("fault", "meaning"),
    [
        (apsw.CorruptError("database disk image is malformed"), CorruptStore),
        (apsw.TooBigError("string or blob too big"), CorruptStore),  # a length that damage has made up
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), CorruptStore),
        (msgspec.DecodeError("JSON is malformed"), CorruptStore),
        (apsw.FullError("database or disk is full"), DiskFull),
        (apsw.IOError("disk I/O error"), StoreStopped),
        (apsw.ReadOnlyError("attempt to write a readonly database"), StoreStopped),
        (apsw.NotADBError("file is not a database"), ForeignFile),
        (apsw.BusyError("database is locked"), StoreUnavailable),
        (apsw.LockedError("database table is locked"), StoreUnavailable),
        (apsw.CantOpenError("unable to open database file"), StoreUnavailable),
        (apsw.PermissionsError("access permission denied"), StoreUnavailable),
        (apsw.AuthError("authorization denied"), StoreUnavailable),
        (apsw.SQLError("no such table: rollouts"), AgentLightningError),
        (apsw.ConstraintError("UNIQUE constraint failed"), AgentLightningError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_each_fault_of_the_database_has_its_meaning(fault: Exception, meaning: type[AgentLightningError]) -> None:
    known = translate(fault, "store.db")
    assert type(known) is meaning
    assert isinstance(fault, FAULTS)
    assert str(fault) in known.message or meaning in (DiskFull, ForeignFile)
    assert ("store.db" in known.message) == (meaning is not AgentLightningError)


@contextmanager
def suppress_known_errors() -> Iterator[None]:
    """Errors that say what is the matter with a file."""
    try:
        yield
    except (StoreStopped, ForeignFile, NewerSchema):
        pass
    except AgentLightningError as error:
        assert isinstance(error.__cause__, apsw.SQLError)  # the text of the schema is damaged


# --- Files that go away ----------------------------------------------------------------------------


async def test_a_deleted_file_is_not_made_again_by_a_read_and_answers_are_never_empty(filled: Path) -> None:
    store = SqliteLightningStore(filled)
    assert await store.get_rollout_by_id("ro-1") is not None
    filled.unlink()
    for _ in range(3):
        # More reads at once than there are connections at hand, so that new ones are opened.
        reads = (store.query_rollouts() for _ in range(8))
        for outcome in await asyncio.gather(*reads, return_exceptions=True):
            if isinstance(outcome, BaseException):
                assert isinstance(outcome, StoreUnavailable)
                assert "store.db" in outcome.message
            else:
                assert outcome.total == 200
    assert not filled.exists()
    await store.close()


async def test_a_store_reads_its_own_file_when_the_process_changes_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    async with SqliteLightningStore("store.db") as store:
        await store.enqueue_rollout("input", rollout_id="ro-1")
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert await store.get_rollout_by_id("ro-1") is not None
        assert (await store.verify()).checked["rollouts"] == 1
    assert list((tmp_path / "elsewhere").iterdir()) == []
