"""Algorithms, runners and whole runs for the tests of execution: importable, so that they can be sent to any process.

They tell the test what they do by files in the folder that ``AGL_TEST_FOLDER`` names.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from agentlightning.execution.process_tree import descendants, snapshot
from agentlightning.store.base import LightningStore

__all__ = [
    "MISBEHAVIOURS",
    "Fails",
    "alive",
    "ends_at_once",
    "enqueue_and_wait",
    "folder",
    "misbehave",
    "noted",
    "register",
    "wait_until",
    "works",
]

PATIENCE_SECONDS = 30.0


def folder() -> Path:
    """Where this run leaves its notes."""
    return Path(os.environ["AGL_TEST_FOLDER"])


def note(name: str, pid: int | None = None) -> None:
    """Leave a note: this process, or another one, is there under this name."""
    number = os.getpid() if pid is None else pid
    started = snapshot()[number].started
    (folder() / f"{name}.{number}.{started}").touch()


def noted(where: Path, name: str = "") -> list[tuple[str, int, float]]:
    """The notes in a folder: name, process, and when that began. With a name only those."""
    notes = [each.name.split(".", 2) for each in where.iterdir() if each.name.count(".") >= 2]
    return [(who, int(pid), float(started)) for who, pid, started in notes if who.startswith(name)]


def alive(where: Path) -> list[str]:
    """Names of the noted processes that have not ended."""
    now = snapshot()
    return [who for who, pid, started in noted(where) if pid in now and now[pid].started == started]


def wait_until(met: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Wait for something that happens in another process."""
    until = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < until, f"not within {seconds:g} s: {what}"
        time.sleep(0.01)


def descendants_of(pid: int) -> set[tuple[int, float]]:
    """The processes below one: number, and when it began."""
    now = snapshot()
    return {(each, now[each].started) for each in descendants(now, pid)}


def living(known: set[tuple[int, float]]) -> set[tuple[int, float]]:
    """Those of these processes that have not ended."""
    return known & {(each.pid, each.started) for each in snapshot().values()}


async def until(met: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> None:
    """The same, in a coroutine."""
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


# --- Runners that do as they are told ----------------------------------------------------------------


async def register(store: LightningStore, **more: Any) -> str:
    """Introduce this process's worker to the store; its name."""
    name = os.environ["AGL_WORKER_NAME"]
    await store.update_worker(name, lease_seconds=10, registration={"pid": os.getpid(), **more})
    return name


async def works(store: LightningStore, worker_id: int, event: Any) -> None:
    """Finish one rollout after the other. One whose input says so ends the process in some way, the first time."""
    name = await register(store, index=worker_id)
    note(f"runner-{worker_id}")
    while not event.is_set():
        claimed = await store.dequeue_rollout(name, request_id=os.urandom(8).hex(), wait_seconds=1)
        if claimed is None:
            if (await store.update_worker(name)).directive is not None:
                return
            continue
        await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, "running")
        if isinstance(claimed.input, dict) and claimed.attempt.sequence_id <= claimed.input.get("times", 1):
            _end_by(claimed.input["end_by"])
        await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, "succeeded")


def _end_by(way: str) -> None:
    match way:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(3)
        case "raise":
            raise ValueError("the agent broke the runner")
        case "memory":
            hoard = [bytes(64 * 1024 * 1024) for _ in range(64)]
            raise AssertionError(f"{len(hoard)} blocks of memory could be had")
        case "cpu":
            while True:
                pass


async def ends_at_once(store: LightningStore, worker_id: int, event: Any) -> None:
    """A runner that has done its share."""
    await register(store)
    note(f"runner-{worker_id}")


class Fails:
    """A side that raises."""

    async def __call__(self, store: LightningStore, *_: Any, **__: Any) -> None:
        raise ValueError("this side cannot work")


async def enqueue_and_wait(store: LightningStore, event: Any) -> None:
    """An algorithm with twenty rollouts."""
    note("algorithm")
    rollouts = [await store.enqueue_rollout(number) for number in range(20)]
    done = await store.wait_for_rollouts(rollout_ids=[each.rollout_id for each in rollouts], timeout=PATIENCE_SECONDS)
    assert [each.status for each in done] == ["succeeded"] * 20


async def waits_for_ever(store: LightningStore, event: Any) -> None:
    """An algorithm without an end of its own."""
    note("algorithm")
    await asyncio.Event().wait()


async def blocks(store: LightningStore, event: Any) -> None:
    """An algorithm that does not let its loop turn."""
    note("algorithm")
    _block()


# --- Runners that do not -----------------------------------------------------------------------------


def _ignore(*numbers: signal.Signals) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def _block() -> None:
    while True:
        time.sleep(1)


async def ignores_sigint(event: Any) -> None:
    _ignore(signal.SIGINT)
    note("ignores_sigint")
    _block()


async def ignores_sigterm(event: Any) -> None:
    _ignore(signal.SIGINT, signal.SIGTERM)
    note("ignores_sigterm")
    _block()


async def double_forks(event: Any) -> None:
    """It goes when it is told; what it has started belongs to nobody any more, and hears only SIGTERM."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            _ignore(signal.SIGINT)
            note("double_forks-left")
            _block()
        os._exit(0)
    await until(lambda: noted(folder(), "double_forks-left"))
    note("double_forks")
    await asyncio.to_thread(event.wait)


async def setsids(event: Any) -> None:
    """It goes when it is told; the program that it has started has a session of its own, and hears nothing."""
    program = (
        "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; print(flush=True); time.sleep(999)"
    )
    child = subprocess.Popen([sys.executable, "-c", program], start_new_session=True, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    note("setsids-left", child.pid)
    note("setsids")
    await asyncio.to_thread(event.wait)


async def burns_cpu(event: Any) -> None:
    """Python code never gets a turn."""
    note("burns_cpu")
    sum(range(10**13))


async def is_stopped(event: Any) -> None:
    note("is_stopped")
    os.kill(os.getpid(), signal.SIGSTOP)
    await asyncio.to_thread(event.wait)
    _block()


async def holds_a_pipe(event: Any) -> None:
    """It goes when it is told; a child of its keeps every file open that it has inherited."""
    if os.fork() == 0:
        _ignore(signal.SIGINT)
        note("holds_a_pipe-left")
        _block()
    await until(lambda: noted(folder(), "holds_a_pipe-left"))
    note("holds_a_pipe")
    await asyncio.to_thread(event.wait)


async def swallows_cancel(event: Any) -> None:
    note("swallows_cancel")
    while True:
        try:
            await asyncio.sleep(1)
        except asyncio.CancelledError:
            continue


async def blocks_in_thread(event: Any) -> None:
    note("blocks_in_thread")
    await asyncio.to_thread(_block)


async def obeys(event: Any) -> None:
    note("obeys")
    await asyncio.to_thread(event.wait)


MISBEHAVIOURS: dict[Callable[[Any], Awaitable[None]], dict[str, int]] = {
    obeys: {"": 1},
    ignores_sigint: {"": 3},
    ignores_sigterm: {"": 4},
    double_forks: {"": 1, "-left": 3},
    setsids: {"": 1, "-left": 4},
    burns_cpu: {"": 3},
    is_stopped: {"": 2},
    holds_a_pipe: {"": 1, "-left": 3},
    swallows_cancel: {"": 3},
    blocks_in_thread: {"": 3},
}
"""What a runner may do, and which stage of an abort ends it (and what it leaves behind)."""


async def misbehave(store: LightningStore, worker_id: int, event: Any) -> None:
    """Each runner in another way."""
    await list(MISBEHAVIOURS)[worker_id](event)


async def swallow(store: LightningStore, worker_id: int, event: Any) -> None:
    """Both runners hear nothing."""
    _ignore(signal.SIGINT, signal.SIGTERM)
    await swallows_cancel(event)


async def ends_when_all_misbehave(store: LightningStore, event: Any) -> None:
    """An algorithm that goes on until every runner is at it."""
    wanted = {f"{each.__name__}{part}" for each, parts in MISBEHAVIOURS.items() for part in parts}
    await until(lambda: wanted <= {who for who, _, _ in noted(folder())})


async def a_few_misbehave(store: LightningStore, worker_id: int, event: Any) -> None:
    """Those that are hardest to end; with what they leave behind they are seven."""
    await [ignores_sigterm, double_forks, setsids, burns_cpu, is_stopped][worker_id](event)
