"""The parts of a runner: its name, its threads, its look at the machine, its wait for an event."""

from __future__ import annotations

import asyncio
import contextvars
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from agentlightning.execution.base import MultiprocessingEvent, ThreadingEvent
from agentlightning.runner.attempt import failed
from agentlightning.runner.base import stop_watch
from agentlightning.runner.calling import AgentExit, AgentThreads
from agentlightning.runner.heartbeat import Heartbeat, registration, system_statistics, worker_name
from agentlightning.store.sqlite.store import InMemoryLightningStore
from agentlightning.store.validation import check_id, encode_json
from limited import without_descriptors

# --- Names -----------------------------------------------------------------------------------------


def test_a_name_is_the_same_each_time_and_unique_across_processes() -> None:
    assert worker_name(3) == worker_name(3)
    assert worker_name(3) != worker_name(4)
    check_id(worker_name(3), "worker_id")
    code = "from agentlightning.runner.heartbeat import worker_name; print(worker_name(3))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other != worker_name(3)
    assert f"-{os.getpid()}-" in worker_name(3)


def test_a_supervisor_gives_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGL_WORKER_NAME", "slot")
    assert worker_name(3) == "slot"


@pytest.mark.parametrize("host", ["ma chine.local", "ünï", "x" * 300, "///"])
def test_any_host_makes_a_valid_name(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    check_id(worker_name(0), "worker_id")


def test_what_is_told_is_json() -> None:
    encode_json(registration({"a": "b"}), "registration")
    encode_json(system_statistics(), "stats")


async def test_a_heartbeat_goes_on_where_the_machine_tells_nothing_of_itself() -> None:
    async with InMemoryLightningStore() as store:
        heartbeat = Heartbeat(
            store,
            "worker",
            interval_seconds=10.0,
            jitter_seconds=0.0,
            lease_seconds=30.0,
            include_gpu=False,
            in_thread=False,
            registration={},
            statistics=system_statistics,
        )
        await store.statistics()
        with without_descriptors():
            with pytest.raises(OSError, match="Too many open files"):
                system_statistics()
            heartbeat.start_in_loop()
            await asyncio.wrap_future(heartbeat.first_beat)
        heartbeat.stop()
        worker = await store.get_worker_by_id("worker")
        assert worker is not None
        assert (worker.status, worker.heartbeat_stats) == ("idle", None)


def test_gpus_are_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, Model X, 12, 100, 2000'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (gpu,) = system_statistics(include_gpu=True)["gpus"]
    assert (gpu["name"], gpu["memory.total"]) == ("Model X", "2000")
    program.write_text("#!/bin/sh\nexit 1\n")
    assert "error" in system_statistics(include_gpu=True)["gpus"][0]


def test_a_reason_fits_into_the_store() -> None:
    outcome = failed("agent_error", ValueError("\0\ud800" + "x" * 10_000))
    assert outcome.reason_message is not None
    encode_json(outcome.reason_message, "message")
    assert len(outcome.reason_message) < 2100


# --- Threads ---------------------------------------------------------------------------------------


def test_threads_are_used_again() -> None:
    threads = AgentThreads("test")
    used = {threads.call(threading.get_ident).result(10) for _ in range(20)}
    assert len(used) == 1
    threads.close()


def test_there_is_always_a_free_one() -> None:
    threads, gate = AgentThreads("test"), threading.Event()
    stuck = [threads.call(gate.wait) for _ in range(5)]
    assert threads.call(lambda: 1).result(10) == 1
    gate.set()
    assert all(each.result(10) for each in stuck)
    threads.close()


def test_a_call_for_which_there_is_no_thread_is_not_made_later(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, gate = AgentThreads("test"), threading.Event()
    blocked, made = threads.call(gate.wait), list[str]()

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            threads.call(lambda: made.append("orphan"))
    assert threads.call(lambda: 1).result(10) == 1  # in a thread of its own: the first one is not free
    gate.set()
    assert blocked.result(10)
    assert threads.call(lambda: 2).result(10) == 2
    threads.close()
    assert made == []


async def test_the_context_is_carried_over_and_exceptions_back() -> None:
    threads, variable = AgentThreads("test"), contextvars.ContextVar("variable", default=0)
    variable.set(7)
    assert threads.call(variable.get).result(10) == 7
    with pytest.raises(AgentExit, match=r"sys\.exit\(3\)"):  # the loop that waits for it would end with the other
        threads.call(lambda: sys.exit(3)).result(10)
    with pytest.raises(RuntimeError, match="StopIteration"):
        await asyncio.wrap_future(threads.call(lambda: next(iter(()))))
    assert threads.call(lambda: 1).result(10) == 1
    threads.close()


def test_a_hanging_agent_does_not_keep_its_process_alive() -> None:
    code = (
        "import threading; from agentlightning.runner.calling import AgentExit, AgentThreads\n"
        "AgentThreads('x').call(threading.Event().wait); print('end')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "end\n"


# --- Events ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [ThreadingEvent(), MultiprocessingEvent(), threading.Event()])
async def test_an_event_wakes_a_coroutine_at_once(event: threading.Event) -> None:
    with stop_watch(event) as stopped:
        waiting = asyncio.create_task(stopped.wait())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        began = time.monotonic()
        event.set()
        async with asyncio.timeout(10):
            await waiting
        assert time.monotonic() - began < 0.3
    with stop_watch(event) as stopped:
        assert stopped.is_set()
    with stop_watch(None) as stopped:
        assert not stopped.is_set()
