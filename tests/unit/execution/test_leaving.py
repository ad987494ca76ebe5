"""The end of a run for workers elsewhere, and what an operator can ask of one."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import execution_programs as programs
from agentlightning import ClientServerExecutionStrategy, InMemoryLightningStore
from agentlightning.execution.leaving import dismiss, say_goodbye, stranded
from agentlightning.store.client_server.server.server import LightningStoreServer

QUICK: dict[str, Any] = {"graceful_timeout": 5.0, "terminate_timeout": 2.0}
_HOST = """
import sys
import execution_programs as programs
from agentlightning import ClientServerExecutionStrategy, InMemoryLightningStore

ClientServerExecutionStrategy(
    role="runner", server_port=int(sys.argv[1]), connect_timeout=20, stay=True, graceful_timeout=5
).execute(programs.enqueue_and_wait, programs.works, InMemoryLightningStore())
"""


async def test_workers_are_asked_and_waited_for() -> None:
    async with InMemoryLightningStore() as store:
        await store.update_worker("one", lease_seconds=60)
        await store.update_worker("of-0.3")  # without a lease: it neither hears nor leaves
        leaving = asyncio.create_task(dismiss(store, "drain", 10))
        while (await store.update_worker("one")).directive is None:
            await asyncio.sleep(0.001)
        await store.update_worker("late", lease_seconds=60)
        while (await store.update_worker("late")).directive is None:
            await asyncio.sleep(0.01)
        await say_goodbye(store, "one")
        assert not leaving.done()
        await say_goodbye(store, "late")
        assert await leaving == []


async def test_those_who_stay_are_named() -> None:
    async with InMemoryLightningStore() as store:
        await store.update_worker("stubborn", lease_seconds=60)
        began = time.monotonic()
        assert await dismiss(store, "stop", 0.1) == ["stubborn"]
        assert time.monotonic() - began < 2


async def test_a_goodbye_ends_what_the_worker_holds_and_says_why() -> None:
    async with InMemoryLightningStore() as store:
        await say_goodbye(store, "nobody-knows-me")
        reasons = []
        for error in (None, ValueError("a\0b \ud800"), MemoryError()):
            started = await store.start_rollout("input", worker_id="worker")
            await store.update_attempt(started.rollout_id, started.attempt.attempt_id, "running")
            await say_goodbye(store, "worker", error)
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
        assert await stranded(store) == 0
        await store.enqueue_rollout("input")
        assert await stranded(store) == 1
        await store.update_worker("worker", lease_seconds=60)
        assert await stranded(store) == 0


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


def test_a_host_that_stays_comes_back_for_the_next_run(folder: Path) -> None:
    server = LightningStoreServer(InMemoryLightningStore(), port=0)  # finds a free port
    server.start_blocking()
    server.stop_blocking()
    with subprocess.Popen(
        [sys.executable, "-c", _HOST, str(server.port)],
        env={**os.environ, "PYTHONPATH": str(Path(programs.__file__).parent)},
        stderr=subprocess.PIPE,
        text=True,
    ) as host:
        for _ in range(2):
            ClientServerExecutionStrategy(role="algorithm", server_port=server.port, **QUICK).execute(
                programs.enqueue_and_wait, programs.works, InMemoryLightningStore()
            )
        lives = {pid for _, pid, _ in programs.noted(folder, "runner")}
        host.send_signal(signal.SIGINT)
        _, errors = host.communicate(timeout=20)
    assert host.returncode == 130, errors
    assert len(lives) == 2
    assert "the run is over (drain); waiting for the next one" in errors
