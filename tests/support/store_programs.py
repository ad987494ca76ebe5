"""What the fault tests run in a process of its own, by `fresh_process`."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import sys
import threading
from collections.abc import Callable

import apsw

from agentlightning import SqliteLightningStore
from agentlightning.errors import AgentLightningError, StoreForked, StoreOwned, StoreStopped
from agentlightning.store.sqlite.backend import SqliteBackend
from agentlightning.store.sqlite.connections import MIGRATIONS, open_writer
from agentlightning.types import RolloutConfig
from every_method import READS, SQLITE_ONLY, WRITES
from fresh_process import say

NOBODY = 65534


def own(path: str) -> None:
    """Own a store until standard input ends."""

    async def run() -> None:
        async with SqliteLightningStore(path) as store:
            await store.enqueue_rollout("input", rollout_id="ro-1")
            say("ready")
            await asyncio.to_thread(sys.stdin.read)

    asyncio.run(run())


def own_and_fork(path: str) -> None:
    """Own a store, and have a child that lives until standard input ends."""
    store = SqliteLightningStore(path)
    asyncio.run(store.enqueue_rollout("input", rollout_id="ro-1"))
    if os.fork() == 0:
        say("child")
        sys.stdin.read()
        os._exit(0)
    sys.stdin.read()


class ClosesHeard(apsw.VFS):
    """The system's VFS, which says in which process SQLite closes a file."""

    def __init__(self) -> None:
        super().__init__("closes-heard", base="unix")
        self.name = "closes-heard"

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:
        return _ClosesHeard("unix", name, flags)


class _ClosesHeard(apsw.VFSFile):
    def xClose(self) -> None:
        os.write(1, f"closed by {os.getpid()}\n".encode())
        super().xClose()


def fork_and(what: str, path: str) -> None:
    """Fork a process that has a store open and in use; the child does ``what``; the parent goes on working."""
    recording = ClosesHeard()
    store = SqliteLightningStore(path, vfs=recording.name)

    async def prepare() -> None:
        started = await store.start_rollout("input", rollout_id="ro-1", attempt_id="at-1", worker_id="worker-1")
        assert started.attempt.attempt_id == "at-1"
        await store.update_worker("worker-1", lease_seconds=3600.0)  # so that the alarm runs, too
        await store.get_rollout_by_id("ro-1")

    async def work() -> None:
        for number in range(20):
            await store.enqueue_rollout("input", rollout_id=f"ro-after-{number}")
        await store.update_attempt("ro-1", "at-1", "succeeded")
        assert (await store.verify()).violations == []

    asyncio.run(prepare())
    child = os.fork()
    if child == 0:
        say(f"child {os.getpid()}")
        globals()[f"child_that_{what}"](store)
        del store
        gc.collect()
        sys.exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    asyncio.run(work())
    asyncio.run(store.close())


def child_that_calls(store: SqliteLightningStore) -> None:
    """Every method is refused; the error names the file and the process."""

    async def call_all() -> None:
        for name, call in {**WRITES, **READS, **SQLITE_ONLY}.items():
            try:
                await call(store)
            except StoreForked as error:
                assert str(store.path) in error.message, error.message
                assert f"process {os.getpid()} " in error.message, error.message
            else:
                raise AssertionError(f"{name} was not refused")

    asyncio.run(call_all())


def child_that_closes(store: SqliteLightningStore) -> None:
    """Closing, even twice, does nothing."""

    async def close() -> None:
        await store.close()
        await store.close()

    asyncio.run(close())


def child_that_exits(store: SqliteLightningStore) -> None:
    """It just ends, by way of the interpreter's own clean-up."""


def child_that_opens(store: SqliteLightningStore) -> None:
    """The same file is refused, another one is fine."""

    async def open_both() -> None:
        try:
            await SqliteLightningStore(store.path).statistics()
        except StoreOwned as error:
            assert str(os.getppid()) in error.message
        else:
            raise AssertionError("the child became owner, too")
        async with SqliteLightningStore(store.path.with_name("of-the-child.db")) as own_store:
            await own_store.enqueue_rollout("input")
            assert (await own_store.verify()).violations == []

    asyncio.run(open_both())


def fork_in_a_coroutine(path: str) -> None:
    """As a program does that starts processes from its event loop while callers wait."""

    async def run() -> None:
        async with SqliteLightningStore(path) as store:
            await store.enqueue_rollout("input", rollout_id="ro-1")
            waiting = asyncio.create_task(store.wait_for_rollouts(rollout_ids=["ro-1"]))
            await asyncio.sleep(0)
            child = os.fork()
            if child == 0:
                child_that_calls(store)
                child_that_closes(store)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            await store.cancel_rollout("ro-1")
            assert [each.status for each in await waiting] == ["cancelled"]

    asyncio.run(run())


def fork_while_locked(path: str) -> None:
    """Fork at a moment when other threads hold every lock; then they stay locked in the child."""
    store = SqliteLightningStore(path)

    async def prepare() -> None:
        await store.start_rollout("input", rollout_id="ro-1", config=RolloutConfig(timeout_seconds=3600.0))

    asyncio.run(prepare())
    core, files = store._core, store._backend
    assert isinstance(files, SqliteBackend)
    locks = [core._alarm._condition, core.finishes._lock, core.claims._lock, files._opening]
    assert files._writer is not None
    locks += [files._writer._lock, files._writer._turn]
    locked, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            locked.set()
            forked.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    locked.wait()
    child = os.fork()
    if child == 0:
        child_that_calls(store)
        child_that_closes(store)
        del store, core, files
        gc.collect()
        sys.exit(0)
    forked.set()
    holder.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    asyncio.run(store.cancel_rollout("ro-1"))  # pyright: ignore[reportArgumentType]
    asyncio.run(store.close())


def write_until_refused(path: str, megabytes: str) -> None:
    """Write under a limit of the size of files, as a disk quota is; say what was acknowledged, and the errors."""

    async def run() -> None:
        async with SqliteLightningStore(path) as store:
            await store.enqueue_rollout("input", rollout_id="ro-1")
            limit = int(float(megabytes) * 2**20)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            await fill(store)

    asyncio.run(run())


async def fill(store: SqliteLightningStore, report: Callable[[object], None] = say) -> None:
    """Enqueue until the store refuses; report every id that was acknowledged, then what every method does."""
    number = 0
    while True:
        try:
            await store.enqueue_rollout("x" * 20_000, rollout_id=f"ro-fill-{number}")
        except StoreStopped as error:
            report(f"refused {error.code} {error.message}")
            break
        report(f"acknowledged ro-fill-{number}")
        number += 1
    for name, call in WRITES.items():
        try:
            await call(store)
        except AgentLightningError as error:
            report(f"write {name} {error.code}")
        else:
            report(f"write {name} done")
    for name, call in READS.items():
        await call(store)
        report(f"read {name} done")


def open_as_nobody(path: str) -> None:
    """Open a store without root's rights; say which error that gives."""

    async def run() -> None:
        async with SqliteLightningStore(path) as store:
            await store.enqueue_rollout("input")

    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    try:
        asyncio.run(run())
    except AgentLightningError as error:
        say(f"{error.code} {error.message}")
    else:
        say("opened")


SLOW_MIGRATION = """
CREATE TABLE news (seq INTEGER PRIMARY KEY, body BLOB NOT NULL);
INSERT INTO news WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000)
    SELECT i, randomblob(400) FROM n;
CREATE INDEX news_by_body ON news (body);
"""


def migrate_slowly(path: str) -> None:
    """Bring a file of version 1 to a version 2 that takes a while to make."""
    say("migrating")
    open_writer(path, "full", vfs=None, migrations=[*MIGRATIONS, SLOW_MIGRATION]).close()
    say("migrated")
