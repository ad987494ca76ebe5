"""Heartbeats of the supervisor, for runners that live but do not speak."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from agentlightning import InMemoryLightningStore
from agentlightning.execution.child import StartProcess
from agentlightning.execution.process_tree import is_running
from agentlightning.execution.slots import Slot
from agentlightning.execution.stand_in import StandIn
from agentlightning.runner.vital_signs import Times, VitalSigns, make_places, open_shared_memory
from execution_programs import until, wait_until


class Listening(InMemoryLightningStore):
    """Keeps the heartbeats, and answers them when it is allowed to."""

    def __init__(self) -> None:
        super().__init__()
        self.beats: list[tuple[str, Any, Any]] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def update_worker(self, worker_id: str, *args: Any, **more: Any) -> Any:
        self.beats.append((worker_id, more["attempt_ids"], more["lease_seconds"]))
        await self.may_answer.wait()
        return await super().update_worker(worker_id, *args, **more)


@asynccontextmanager
async def watched(store: Listening, *names: str) -> AsyncIterator[tuple[StandIn, list[Slot]]]:
    """Slots with a process each, which does nothing, and a runner's place that says that it did not speak lately."""
    file = open_shared_memory()
    slots: list[Slot] = []
    processes: list[subprocess.Popen[bytes]] = []
    for name, signs in zip(names, make_places(file, len(names)), strict=True):
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        processes.append(process)
        slots.append(Slot(StartProcess(name, {}, {}), None, signs=signs, state="running", pid=process.pid))
        signs.show_life(Times(time.monotonic() - 10, 0.05, 30.0))
    stand_in = StandIn(slots, store)
    stand_in.start()
    try:
        yield stand_in, slots
    finally:
        for process in processes:
            process.kill()
            process.wait()
        os.close(file)


async def test_one_that_lives_and_is_silent_is_spoken_for() -> None:
    store = Listening()
    async with watched(store, "silent") as (_, [slot]):
        assert slot.signs is not None
        slot.signs.begin("at-1")
        slot.signs.begin("at-2")
        slot.signs.end("at-1")
        slot.signs.begin("at-3")
        await until(lambda: len([each for each in store.beats if each[1] == ["at-3", "at-2"]]) > 2)
        worker = await store.get_worker_by_id("silent")
    assert store.beats[-1] == ("silent", ["at-3", "at-2"], 30.0)
    assert worker is not None
    assert worker.lease_seconds == 30.0


async def test_nobody_else_is() -> None:
    store = Listening()
    async with watched(store, "silent", "speaks", "stopped", "ended", "none", "starting") as (_, slots):
        _, speaks, stopped, ended, none, starting = slots
        for each in slots[1:]:
            each.state = "starting"  # until it is as its name says
        for each in (speaks, none):
            assert each.signs is not None
        speaks.signs.show_life(Times(math.inf, 0.05, 30.0))  # type: ignore[union-attr]
        none.signs.clear()  # type: ignore[union-attr]
        os.kill(stopped.pid, signal.SIGSTOP)
        os.kill(ended.pid, signal.SIGKILL)  # and is not collected
        wait_until(lambda: not is_running(stopped.pid) and not is_running(ended.pid), "both stand still")
        for each in (speaks, stopped, ended, none):
            each.state = "running"
        assert starting.state == "starting"
        store.beats.clear()
        await until(lambda: len(store.beats) > 5)
        assert {name for name, _, _ in store.beats} == {"silent"}
        os.kill(stopped.pid, signal.SIGCONT)
        await until(lambda: "stopped" in {name for name, _, _ in store.beats})  # so each would have been seen


async def test_a_loss_is_told_after_the_beat_that_is_under_way() -> None:
    store = Listening()
    store.may_answer.clear()
    async with watched(store, "silent") as (stand_in, [slot]):
        await until(lambda: store.beats)
        slot.state = "waiting"  # its process was killed
        assert stand_in.speaks_for("silent")
        telling = asyncio.create_task(stand_in.fall_silent("silent"))
        await asyncio.sleep(0)
        assert not telling.done()
        store.may_answer.set()
        await telling
        assert not stand_in.speaks_for("silent")
        assert len(store.beats) == 1


def test_what_a_runner_leaves_is_bounded_and_forgotten() -> None:
    file = open_shared_memory()
    try:
        first, second = make_places(file, 2)
        for number in range(5000):  # more than there is room for
            second.begin(f"at-{number:0125}")
        second.begin("x" * 129)
        seen = VitalSigns(file, 1)  # as another process sees it
        assert 2000 < len(seen.attempt_ids()) < 5000
        assert first.attempt_ids() == []
        for number in range(5000):
            second.end(f"at-{number:0125}")
        second.begin("at-x")
        assert seen.attempt_ids() == ["at-x"]
        assert seen.times() is None
        second.show_life(Times(1.0, 2.0, 3.0))
        assert seen.times() == (1.0, 2.0, 3.0)
        seen.clear()
        assert (second.times(), second.attempt_ids()) == (None, [])
    finally:
        os.close(file)


def test_who_is_at_work_and_how_much_was_done_is_known_after_the_end() -> None:
    file = open_shared_memory()
    try:
        [signs] = make_places(file, 1)
        seen = VitalSigns(file, 0)
        for attempt in ("at-1", "at-2", "at-3"):
            signs.begin(attempt)
        signs.reporting("at-2")
        signs.reporting("at-unknown")
        signs.end("at-3")
        assert (seen.at_work(), seen.attempt_ids(), seen.ended()) == (["at-1"], ["at-1", "at-2"], 1)
        signs.clear()  # it was torn down
        assert (seen.at_work(), seen.attempt_ids(), seen.ended()) == ([], [], 1)
        seen.reset()
        assert seen.ended() == 0
    finally:
        os.close(file)


def test_a_new_process_in_a_slot_inherits_no_signs() -> None:
    file = open_shared_memory()
    try:
        [signs] = make_places(file, 1)
        signs.show_life(Times(1.0, 2.0, 3.0))
        signs.begin("at-1")
        Slot(StartProcess("slot", {}, {}), None, signs=signs).next_start(0.0)
        assert (signs.times(), signs.attempt_ids()) == (None, [])
    finally:
        os.close(file)


@pytest.mark.parametrize("number", [0, 2**22 + 1])
def test_a_process_that_is_not_there_does_not_run(number: int) -> None:
    assert not is_running(number)
    assert is_running(os.getpid())
