"""Both sides in one process: threads with loops of their own, one store."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from typing import Any

import pytest

from agentlightning import InMemoryLightningStore, SharedMemoryExecutionStrategy
from agentlightning.errors import ExecutionFailed
from agentlightning.runner.heartbeat import worker_name

QUICK: dict[str, Any] = {"graceful_delay": 2.0, "join_timeout": 1.0, "poll_interval": 0.01}


async def _algorithm(store: Any, event: Any) -> None:
    rollouts = [await store.enqueue_rollout(number) for number in range(20)]
    done = await store.wait_for_rollouts(rollout_ids=[each.rollout_id for each in rollouts], timeout=20)
    assert [each.status for each in done] == ["succeeded"] * 20


class Runner:
    """Works until it is stopped; keeps in which threads, and on what."""

    def __init__(self, most: int | None = None) -> None:
        self.threads: dict[int, threading.Thread] = {}
        self.inputs: list[Any] = []
        self.most = most

    async def __call__(self, store: Any, worker_id: int, event: Any) -> None:
        self.threads[worker_id] = threading.current_thread()
        while not event.is_set() and (self.most is None or len(self.inputs) < self.most):
            claimed = await store.dequeue_rollout(f"worker-{worker_id}", wait_seconds=0.05)
            if claimed is not None:
                self.inputs.append(claimed.input)
                await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, "succeeded")


@pytest.mark.parametrize(("main_thread", "n_runners"), [("runner", 1), ("algorithm", 1), ("algorithm", 4)])
def test_both_sides_share_one_store(main_thread: Any, n_runners: int) -> None:
    runner = Runner()
    SharedMemoryExecutionStrategy(n_runners, main_thread, **QUICK).execute(_algorithm, runner, InMemoryLightningStore())
    assert sorted(runner.inputs) == list(range(20))
    assert len(set(runner.threads.values())) == n_runners
    main_runs_a_runner = threading.current_thread() in runner.threads.values()
    assert main_runs_a_runner == (main_thread == "runner")
    assert not [each for each in runner.threads.values() if each.is_alive() and each is not threading.current_thread()]


@pytest.mark.parametrize("fails", [False, True])
def test_runners_say_goodbye(fails: bool) -> None:
    class Leaves(Runner):
        async def __call__(self, store: Any, worker_id: int, event: Any) -> None:
            await store.update_worker(worker_name(worker_id), lease_seconds=60)
            await super().__call__(store, worker_id, event)
            if fails:
                raise LookupError("no such tool")

    store = InMemoryLightningStore()
    with pytest.raises(LookupError) if fails else nullcontext():
        SharedMemoryExecutionStrategy(1, **QUICK).execute(_algorithm, Leaves(), store)
    worker = asyncio.run(store.get_worker_by_id(worker_name(0)))
    assert worker is not None
    assert worker.reason_code == ("worker_lost" if fails else "worker_left")


@pytest.mark.parametrize("main_thread", ["runner", "algorithm"])
def test_what_the_algorithm_raises_reaches_the_caller_and_stops_the_runner(main_thread: Any) -> None:
    async def broken(store: Any, event: Any) -> None:
        raise LookupError("no such data set")

    with pytest.raises(LookupError, match="no such data set"):
        SharedMemoryExecutionStrategy(1, main_thread, **QUICK).execute(broken, Runner(), InMemoryLightningStore())


@pytest.mark.parametrize("main_thread", ["runner", "algorithm"])
def test_what_a_runner_raises_reaches_the_caller_and_cancels_the_algorithm(main_thread: Any) -> None:
    cancelled = threading.Event()

    async def waits(store: Any, event: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async def broken(store: Any, worker_id: int, event: Any) -> None:
        raise LookupError("no such tool")

    strategy = SharedMemoryExecutionStrategy(1, main_thread, graceful_delay=0.1, join_timeout=1.0, poll_interval=0.01)
    with pytest.raises(LookupError, match="no such tool"):
        strategy.execute(waits, broken, InMemoryLightningStore())
    assert cancelled.is_set()


def test_a_side_may_go_on_for_a_while_after_the_stop_event() -> None:
    ended: list[str] = []

    async def done_at_once(store: Any, event: Any) -> None:
        return

    async def lingers(store: Any, worker_id: int, event: Any) -> None:
        await asyncio.to_thread(event.wait)
        await asyncio.sleep(0.1)
        ended.append("in good order")

    SharedMemoryExecutionStrategy(1, "algorithm", **QUICK).execute(done_at_once, lingers, InMemoryLightningStore())
    assert ended == ["in good order"]


def test_a_side_that_swallows_its_cancellation_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()

    async def done_at_once(store: Any, event: Any) -> None:
        return

    async def stubborn(store: Any, worker_id: int, event: Any) -> None:
        while not release.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue

    async def blocks(store: Any, worker_id: int, event: Any) -> None:
        await asyncio.sleep(0)
        release.wait()

    try:
        for runner in (stubborn, blocks):
            began = time.monotonic()
            SharedMemoryExecutionStrategy(1, "algorithm", 0.2, 0.1, 0.01).execute(
                done_at_once, runner, InMemoryLightningStore()
            )
            assert time.monotonic() - began < 1.5
            assert "abandoned" in caplog.text
            caplog.clear()
    finally:
        release.set()


@pytest.mark.parametrize("main_thread", ["runner", pytest.param("algorithm", marks=pytest.mark.slow)])
def test_rollouts_that_nobody_will_run_end_the_run(main_thread: Any) -> None:
    with pytest.raises(ExecutionFailed, match="have ended, and 15 rollouts wait"):
        SharedMemoryExecutionStrategy(1, main_thread, **QUICK).execute(
            _algorithm, Runner(most=5), InMemoryLightningStore()
        )


def test_a_runner_that_has_done_its_share_leaves_the_algorithm_its_time() -> None:
    finished: list[bool] = []

    async def slow(store: Any, event: Any) -> None:
        await asyncio.sleep(0.2)
        finished.append(True)

    SharedMemoryExecutionStrategy(1, "runner", **QUICK).execute(slow, Runner(most=0), InMemoryLightningStore())
    assert finished == [True]


@pytest.mark.parametrize(
    "arguments",
    [
        {"n_runners": 0},
        {"main_thread": "neither"},
        {"main_thread": "runner", "n_runners": 2},
        {"poll_interval": 0},
        {"join_timeout": -1},
        {"graceful_delay": -1},
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"runner|main_thread|seconds"):
        SharedMemoryExecutionStrategy(**arguments)


def test_the_environment_fills_in_whether_the_store_is_managed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGL_MANAGED_STORE", "0")
    assert SharedMemoryExecutionStrategy().managed_store is False
    assert SharedMemoryExecutionStrategy(managed_store=True).managed_store is True


_PROGRAM = """
import asyncio, os, signal, sys, threading, time
from agentlightning import InMemoryLightningStore, SharedMemoryExecutionStrategy

async def waits(store, event):
    await asyncio.Event().wait()

async def works(store, worker_id, event):
    print("waiting", flush=True)
    while not event.is_set():
        await asyncio.sleep(0.01)

async def blocks(store, worker_id, event):
    print("waiting", flush=True)
    time.sleep(60)

runner = works if sys.argv[1] == "works" else blocks
try:
    SharedMemoryExecutionStrategy(1, "runner", 0.5, 0.2, 0.01).execute(waits, runner, InMemoryLightningStore())
except KeyboardInterrupt as interrupt:
    print("caught", type(interrupt).__name__, flush=True)
    raise
"""


@pytest.mark.parametrize(("runner", "signals"), [("works", 1), ("blocks", 2)])
def test_ctrl_c_stops_both_sides(runner: str, signals: int) -> None:
    """A second one also interrupts what blocks the main thread."""
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, runner], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "waiting\n"
        for number in range(signals):
            os.kill(process.pid, 2)
            if number == 0:
                assert "stopping" in process.stderr.readline()
        output, errors = process.communicate(timeout=10)
    assert process.returncode == 130, errors
    assert output == "caught Interrupted\n"
