"""The end of a run for workers elsewhere, and what an operator can ask of one."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest

import execution_programs as programs
from agentlightning import ClientServerExecutionStrategy, InMemoryLightningStore
from agentlightning.execution.membership import ask_workers_to_leave, deregister_worker, unserved_rollouts
from agentlightning.execution.run import ServerAccess, SideJob
from agentlightning.http.client.client import LightningStoreClient
from agentlightning.http.server.server import LightningStoreServer
from agentlightning.types import WorkerDirective

QUICK: dict[str, Any] = {"graceful_timeout": 5.0, "terminate_timeout": 2.0, "start_method": "fork"}
_HOST = """
import sys
import execution_programs as programs
from agentlightning import ClientServerExecutionStrategy, InMemoryLightningStore

ClientServerExecutionStrategy(
    role="runner",
    server_port=int(sys.argv[1]),
    n_runners=int(sys.argv[2]),
    connect_timeout=20,
    stay=True,
    graceful_timeout=5,
).execute(programs.enqueue_and_wait, programs.works, InMemoryLightningStore())
"""


async def test_workers_are_asked_and_waited_for() -> None:
    async with InMemoryLightningStore() as store:
        await store.update_worker("one", lease_seconds=60)
        await store.update_worker("of-0.3")  # without a lease: it neither hears nor leaves
        leaving = asyncio.create_task(ask_workers_to_leave(store, "drain", 10))
        while (await store.update_worker("one")).directive is None:
            await asyncio.sleep(0.001)
        await store.update_worker("late", lease_seconds=60)
        while (await store.update_worker("late")).directive is None:
            await asyncio.sleep(0.01)
        await deregister_worker(store, "one")
        assert not leaving.done()
        await deregister_worker(store, "late")
        assert await leaving == []


async def test_those_who_stay_are_named() -> None:
    async with InMemoryLightningStore() as store:
        await store.update_worker("stubborn", lease_seconds=60)
        began = time.monotonic()
        assert await ask_workers_to_leave(store, "stop", 0.1) == ["stubborn"]
        assert time.monotonic() - began < 2


async def test_a_goodbye_ends_what_the_worker_holds_and_says_why() -> None:
    async with InMemoryLightningStore() as store:
        await deregister_worker(store, "nobody-knows-me")
        reasons = []
        for error in (None, ValueError("a\0b \ud800"), MemoryError()):
            started = await store.start_rollout("input", worker_id="worker")
            await store.update_attempt(started.rollout_id, started.attempt.attempt_id, "running")
            await deregister_worker(store, "worker", error)
            attempt = await store.get_latest_attempt(started.rollout_id)
            assert attempt is not None
            reasons.append((attempt.status, attempt.reason_code, attempt.reason_message))
        assert reasons == [
            ("unresponsive", "worker_lost", "its runner has ended"),
            ("unresponsive", "worker_lost", "its runner failed: ValueError: ab ?"),
            ("unresponsive", "resource_exhausted", "its runner failed: MemoryError: "),
        ]


async def test_rollouts_are_stranded_only_without_workers() -> None:
    async with InMemoryLightningStore() as store:
        assert await unserved_rollouts(store) == 0
        await store.enqueue_rollout("input")
        assert await unserved_rollouts(store) == 1
        await store.update_worker("worker", lease_seconds=60)
        assert await unserved_rollouts(store) == 0


class RefusesLookUps(InMemoryLightningStore):
    """A store that does not say what a worker was asked to do."""

    lost: ClassVar[list[str]] = []

    async def get_worker_by_id(self, worker_id: str) -> Any:
        raise NotImplementedError("no look-ups")

    async def report_worker_lost(self, worker_id: str, **said: Any) -> Any:
        self.lost.append(worker_id)
        return await super().report_worker_lost(worker_id, **said)


async def test_a_worker_says_goodbye_also_when_the_store_does_not_answer_what_it_was_asked_to_do() -> None:
    async def registers(store: Any, worker_id: int, event: Any) -> None:
        await store.update_worker("worker-1", lease_seconds=60.0)

    async with RefusesLookUps() as store:
        nowhere = ServerAccess("")
        with pytest.raises(NotImplementedError):
            await SideJob(registers, store).run("worker-1", threading.Event(), server=nowhere, run_id=None, index=0)
        assert store.lost == ["worker-1"]


def test_an_operator_drains_one_worker(folder: Path) -> None:
    """It ends in good order and is not replaced; the other one does the rest."""
    drained: list[str] = []

    async def algorithm(store: Any, event: Any) -> None:
        await programs.until(lambda: len(programs.noted(folder, "runner")) == 2)
        while len(workers := list(await store.query_workers())) < 2:
            await asyncio.sleep(0.01)
        drained.append(workers[0].worker_id)
        await store.direct_workers("drain", worker_ids=drained)
        await programs.until(lambda: len(programs.alive(folder)) == 2)  # one runner, and this process
        ids = [(await store.enqueue_rollout(number)).rollout_id for number in range(10)]
        done = await store.wait_for_rollouts(rollout_ids=ids, timeout=10)
        assert len(done) == 10
        assert drained[0] not in {each.attempt.worker_id for each in done}

    programs.note("this process")
    ClientServerExecutionStrategy(server_port=0, n_runners=2, **QUICK).execute(
        algorithm, programs.works, InMemoryLightningStore()
    )
    assert len(programs.noted(folder, "runner")) == 2


def test_one_that_crashes_while_it_drains_is_not_replaced(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def algorithm(store: Any, event: Any) -> None:
        await programs.until(lambda: len(programs.noted(folder, "runner")) == 2)
        stopped, _ = programs.noted(folder, "runner")
        os.kill(stopped[1], signal.SIGSTOP)
        workers = {each.registration["pid"]: each.worker_id for each in await store.query_workers()}
        await store.direct_workers("drain", worker_ids=[workers[stopped[1]]])
        os.kill(stopped[1], signal.SIGKILL)
        await programs.until(lambda: "it had been asked to leave" in caplog.text)

    ClientServerExecutionStrategy(server_port=0, n_runners=2, **QUICK).execute(
        algorithm, programs.works, InMemoryLightningStore()
    )
    assert len(programs.noted(folder, "runner")) == 2


class LateBeats(InMemoryLightningStore):
    """As if a last heartbeat of each worker were taken just after its goodbye."""

    def __init__(self) -> None:
        super().__init__()
        self.late: list[str] = []

    async def report_worker_lost(self, worker_id: str, **said: Any) -> Any:
        lost = await super().report_worker_lost(worker_id, **said)
        if worker_id not in self.late:
            self.late.append(worker_id)
            await self.update_worker(worker_id, lease_seconds=60.0)
        return lost


def test_a_worker_whose_process_has_ended_here_is_not_waited_for(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = LateBeats()

    async def algorithm(store: Any, event: Any) -> None:
        await programs.until(lambda: len(programs.noted(folder, "runner")) == 2)
        while len(list(await store.query_workers())) < 2:
            await asyncio.sleep(0.01)

    ClientServerExecutionStrategy(server_port=0, n_runners=2, **QUICK).execute(algorithm, programs.works, store)
    assert len(store.late) == 2
    assert "have not left" not in caplog.text


# --- A host that stays -------------------------------------------------------------------------------


class Host:
    """A process with runners that wait for one run after the other.

    Args:
        port: where servers will be.
        folder: for its log.
        before: lines of Python to run in it first.
        n_runners: how many there are.
    """

    def __init__(self, port: int, folder: Path, before: str = "", n_runners: int = 1) -> None:
        self.log = folder / "host.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", before + _HOST, str(port), str(n_runners)],
                env={**os.environ, "PYTHONPATH": str(Path(programs.__file__).parent)},
                stderr=log,
            )

    def says(self, text: str) -> None:
        """Wait for a line of its log."""
        programs.wait_until(lambda: text in self.log.read_text(), f"the host says {text!r}")

    def end(self) -> None:
        """Ctrl+C."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(20) == 130, self.log.read_text()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def serving(port: int = 0) -> Iterator[LightningStoreServer]:
    """A new store, served as the run that goes by the same name each time."""
    server = LightningStoreServer(InMemoryLightningStore(), port=port, run_id="nightly")
    server.start_blocking()
    try:
        yield server
    finally:
        server.stop_blocking()


def begun(folder: Path, lives: int) -> Callable[[], bool]:
    """Whether so many runners have begun, one after the other or side by side."""
    return lambda: len(programs.noted(folder, "runner")) >= lives


def ask(server: LightningStoreServer, directive: WorkerDirective | None, only: int | None = None) -> None:
    """Ask the workers, or those of one process, for something, as an operator does, or a run that ends."""

    async def work() -> None:
        async with LightningStoreClient(server.endpoint, spool_dir=None) as store:
            workers = await store.query_workers()
            names = [each.worker_id for each in workers if only in (None, (each.registration or {})["pid"])]
            await store.direct_workers(directive, worker_ids=names)

    asyncio.run(work())


def test_a_host_that_stays_comes_back_for_the_next_run(folder: Path) -> None:
    with serving() as server:  # finds a free port
        port = server.port
    with Host(port, folder) as host:
        for _ in range(2):
            ClientServerExecutionStrategy(role="algorithm", server_port=port, **QUICK).execute(
                programs.enqueue_and_wait, programs.works, InMemoryLightningStore()
            )
        host.end()
    assert len({pid for _, pid, _ in programs.noted(folder, "runner")}) == 2
    host.says("all runners have left (drain); waiting for the next run")


_UNGUARDED = """
from agentlightning.execution import roles

async def may_rejoin(store, slots):
    return [slot.name for slot in slots]

roles.may_rejoin = may_rejoin
"""


@pytest.mark.parametrize("directive", ["drain", "stop"])
def test_a_host_stays_away_from_the_run_that_sent_it_away(directive: WorkerDirective, folder: Path) -> None:
    """Though its server goes on answering for a while. A server that was started anew is that of another run."""
    with serving() as server, Host(server.port, folder) as host:
        programs.wait_until(begun(folder, 1), "the runner is at work")
        ask(server, directive)
        host.says("it has asked these workers to leave")  # it has found the server, and does not join it
        assert len(programs.noted(folder, "runner")) == 1
        server.stop_blocking()
        with serving(server.port):
            programs.wait_until(begun(folder, 2), "the runner is at work for the next run")
            host.end()
    assert len(programs.noted(folder, "runner")) == 2


def test_a_host_that_does_not_look_who_sent_it_away_is_seen_to_come_back(folder: Path) -> None:
    """Negative control."""
    with serving() as server, Host(server.port, folder, _UNGUARDED) as host:
        programs.wait_until(begun(folder, 1), "the runner is at work")
        for lives in (2, 3, 4):
            ask(server, "drain")
            programs.wait_until(begun(folder, lives), "it is back in the run that has sent it away")
        host.end()


def test_whom_an_operator_resumes_comes_back_on_a_host_that_stays(folder: Path) -> None:
    with serving() as server, Host(server.port, folder, n_runners=2) as host:
        programs.wait_until(begun(folder, 2), "both are at work")
        (_, first, _), _ = programs.noted(folder, "runner")
        ask(server, "drain", only=first)
        programs.wait_until(lambda: len(programs.alive(folder)) == 1, "one of them has left")
        ask(server, None, only=first)
        programs.wait_until(begun(folder, 3), "it is back, beside the other one")
        ask(server, "drain")
        host.says("it has asked these workers to leave")
        assert programs.alive(folder) == []
        ask(server, None)
        programs.wait_until(begun(folder, 5), "both are back")
        host.end()


def test_a_host_stays_when_its_runner_crashes_on_the_way_out(folder: Path) -> None:
    with serving() as server, Host(server.port, folder) as host:
        programs.wait_until(begun(folder, 1), "the runner is at work")
        [(_, pid, _)] = programs.noted(folder, "runner")
        os.kill(pid, signal.SIGSTOP)
        ask(server, "drain")
        os.kill(pid, signal.SIGKILL)
        host.says("all runners have left (drain)")
        host.end()
    assert len(programs.noted(folder, "runner")) == 1


_LATE = """
import agentlightning as agl
import execution_programs as programs
from agentlightning.execution import guest

guest.JOIN_SECONDS = 1.0

async def late(store, worker_id, event):
    programs.note(f"runner-{worker_id}")
    await programs.until(lambda: (programs.folder() / "go").exists())
    runner = agl.LitAgentRunner(agl.OtelTracer())
    with runner.run_context(agent=agl.rollout(lambda task: 1.0), store=store):
        await runner.iter(event=event)

programs.works = late
"""


def test_runners_that_join_just_as_a_run_ends_notice_that_it_is_gone(folder: Path) -> None:
    """Although each of them would wait 600 s for a server that it knows to come back."""
    with serving() as server, Host(server.port, folder, _LATE) as host:
        programs.wait_until(begun(folder, 1), "the runner has begun, and the server does not know it")
        server.stop_blocking()
        (folder / "go").touch()
        host.says("all runners have left (gone); waiting for the next run")
        with serving(server.port):
            programs.wait_until(begun(folder, 2), "the runner is at work for the next run")
            host.end()


def test_ctrl_c_ends_the_wait_for_a_server_at_once(folder: Path) -> None:
    """Also while one that listens does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as silent, Host(silent.getsockname()[1], folder) as host:
        silent.settimeout(20)
        connection, _ = silent.accept()
        with connection:
            began = time.monotonic()
            host.end()
            assert time.monotonic() - began < 3  # of the 5 seconds that an answer may take
