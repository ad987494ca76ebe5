"""Agents that end their process, or try to: charged to the rollout that was running, and nothing loops for ever."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import crashing_agents as agents
import execution_programs as programs
from agentlightning import (
    ClientServerExecutionStrategy,
    InMemoryLightningStore,
    RestartPolicy,
    RolloutConfig,
    SharedMemoryExecutionStrategy,
)
from agentlightning.errors import ExecutionFailed
from agentlightning.execution import supervisor
from execution_agents import AgentRunner, HeldAgent

RETRIES = RolloutConfig(max_attempts=3, retry_condition=["unresponsive", "timeout"])
QUICK: dict[str, Any] = {"server_port": 0, "graceful_timeout": 5.0, "terminate_timeout": 2.0, "start_method": "fork"}
NO_LEASE: dict[str, Any] = {"lease_seconds": 3600.0, "heartbeat_interval": 1200.0}
"""A crash that is noticed has been told by the supervisor."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AGL_TEST_FOLDER", str(tmp_path))
    monkeypatch.setenv("AGL_SPOOL_DIR", str(tmp_path / "spool"))
    return tmp_path


class Inputs:
    """An algorithm that has these inputs run, and keeps what became of them."""

    def __init__(self, *inputs: Any, config: RolloutConfig = RETRIES) -> None:
        self.inputs, self.config = inputs, config
        self.ended: list[Any] = []
        self.attempts: list[list[Any]] = []

    async def __call__(self, store: Any, event: Any) -> None:
        ids = [(await store.enqueue_rollout(each, config=self.config)).rollout_id for each in self.inputs]
        self.ended = await store.wait_for_rollouts(rollout_ids=ids, timeout=90)
        self.attempts = [
            [each for each in await store.query_attempts(rollout_id) if each.reason_code != "released"]
            for rollout_id in ids
        ]

    def by_status(self, status: str) -> list[Any]:
        return [each.input for each in self.ended if each.status == status]


def run(algorithm: Inputs, agent: Any, runners: int = 1, runner: Any = None, **strategy: Any) -> None:
    side = AgentRunner(agent, **NO_LEASE, **(runner or {}))
    ClientServerExecutionStrategy(n_runners=runners, **(QUICK | strategy)).execute(
        algorithm, side, InMemoryLightningStore()
    )


# --- Crashes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "runners", "method"), [("exit", 1, "fork"), ("segv", 1, "forkserver"), ("kill", 2, "spawn")]
)
def test_a_crash_is_that_of_its_rollout(how: str, runners: int, method: str, folder: Path) -> None:
    """Four bad ones of twenty, the last ones, so that nothing good comes between their attempts."""
    algorithm = Inputs(*range(16), *[how] * 4)
    run(algorithm, agents.ends_its_process, runners, start_method=method)
    assert algorithm.by_status("succeeded") == list(range(16))
    assert [len(each) for each in algorithm.attempts] == [1] * 16 + [3] * 4
    for attempt in itertools.chain(*algorithm.attempts[16:]):
        assert (attempt.status, attempt.reason_code) == ("unresponsive", "worker_lost")
        assert f"{agents.CRASHES[how]} while it worked on this" in attempt.reason_message
        assert ("the last words of the agent" in attempt.reason_message) == (how == "exit")
    assert agents.CRASHES[how] in algorithm.ended[-1].reason_message


@pytest.mark.parametrize("how", ["exit", "abort"])
def test_one_attempt_is_enough_for_all_others(how: str, folder: Path) -> None:
    """Those of which the report is under way when the next one crashes, and those claimed ahead, lose nothing."""
    good = [number for number in range(60) if number % 6]
    inputs = [how if number % 6 == 0 else number for number in range(60)]
    algorithm = Inputs(*inputs, config=RolloutConfig(max_attempts=1))
    run(algorithm, agents.ends_its_process)
    assert algorithm.by_status("succeeded") == good
    assert algorithm.by_status("failed") == [how] * 10


def test_of_several_at_work_each_is_told(folder: Path) -> None:
    """Nobody knows which of them it was."""
    inputs = Inputs("a", "b", config=RolloutConfig(max_attempts=1))

    async def algorithm(store: Any, event: Any) -> None:
        work = asyncio.create_task(inputs(store, event))
        await programs.until(lambda: len(programs.noted(folder, "held")) == 2)
        os.kill(programs.noted(folder, "held")[0][1], signal.SIGKILL)
        await work

    side = AgentRunner(HeldAgent(), concurrency=2, **NO_LEASE)
    ClientServerExecutionStrategy(n_runners=1, **QUICK).execute(algorithm, side, InMemoryLightningStore())
    for [attempt] in inputs.attempts:
        assert "was killed by SIGKILL while it worked on this and on another one" in attempt.reason_message


def test_without_what_the_supervisor_knows_it_would_be_poison(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: an agent that ends its process at once has never confirmed anything."""
    report = supervisor.report_lost

    async def report_less(store: Any, worker: str, message: str, code: Any, seconds: float, at_work: Any = None) -> Any:
        return await report(store, worker, message, code, seconds)

    monkeypatch.setattr(supervisor, "report_lost", report_less)
    algorithm = Inputs("exit")
    run(algorithm, agents.ends_its_process)
    assert algorithm.ended[0].reason_code == "poison"


# --- No loop for ever --------------------------------------------------------------------------------


def test_agents_that_all_crash_end_the_run(folder: Path) -> None:
    with pytest.raises(ExecutionFailed, match=r"no runner can be kept alive.*exit code 7\n.*\nthe last words"):
        run(Inputs(*["exit"] * 30), agents.ends_its_process, restarts=RestartPolicy(most_per_minute=4))


def test_good_work_in_between_begins_the_count_anew(folder: Path) -> None:
    """Far more crashes than are allowed within a minute."""
    algorithm = Inputs(*[number if number % 2 else "exit" for number in range(30)])
    run(algorithm, agents.ends_its_process, restarts=RestartPolicy(most_per_minute=4))
    assert len(algorithm.by_status("succeeded")) == len(algorithm.by_status("failed")) == 15


class DiesAtOnce:
    """A runner that gets nowhere, and says why on a stream of its own."""

    async def __call__(self, store: Any, worker_id: int, event: Any) -> None:
        programs.note(f"runner-{worker_id}")
        os.write(2, b"libsomething.so.12: cannot open shared object file\n")
        print("and this is what print has")
        os._exit(127)


def test_a_runner_that_dies_at_once_ends_the_run_with_its_output(folder: Path) -> None:
    with pytest.raises(ExecutionFailed, match=r"no runner can be kept alive.*exit code 127") as told:
        ClientServerExecutionStrategy(n_runners=2, **QUICK).execute(
            programs.waits_for_ever, DiesAtOnce(), InMemoryLightningStore()
        )
    assert "libsomething.so.12: cannot open shared object file" in str(told.value)
    assert len(programs.noted(folder, "runner")) == 2 * 3


# --- Agents that only try ----------------------------------------------------------------------------


@pytest.mark.parametrize("agent", [agents.exits, agents.exits_in_a_coroutine])
@pytest.mark.parametrize("concurrency", [1, 3])
def test_what_an_agent_raises_is_a_failure_of_its_attempt(agent: Any, concurrency: int, folder: Path) -> None:
    coroutine = agent is agents.exits_in_a_coroutine
    ways = {way: said for way, said in agents.EXITS.items() if not (coroutine and way == "stop")}
    algorithm = Inputs(*ways, 1, *ways, 2, config=RolloutConfig(max_attempts=1))
    run(algorithm, agent, runner={"concurrency": concurrency})
    assert algorithm.by_status("succeeded") == [1, 2]
    told = {each.input: each for each in algorithm.ended if each.status == "failed"}
    assert {way: said in told[way].reason_message for way, said in ways.items()} == dict.fromkeys(ways, True)
    assert {each.reason_code for each in told.values()} == {"agent_error"}
    assert len({pid for _, pid, _ in programs.noted(folder, "process")}) == 1


@pytest.mark.parametrize("what", ["interrupt", "sys.exit"])
def test_what_its_own_tasks_and_callbacks_raise_ends_no_loop(what: str, folder: Path) -> None:
    algorithm = Inputs(["awaited", what], ["callback", what], 1, config=RolloutConfig(max_attempts=1))
    run(algorithm, agents.exits_in_a_coroutine)
    assert algorithm.by_status("failed") == [["awaited", what]]
    assert agents.EXITS[what] in algorithm.ended[0].reason_message
    assert len({pid for _, pid, _ in programs.noted(folder, "process")}) == 1


def test_what_a_hook_raises_ends_no_runner(folder: Path) -> None:
    algorithm = Inputs("interrupt", "sys.exit", "no exception", 1, config=RolloutConfig(max_attempts=1))
    run(algorithm, agents.AskedByHook())
    assert len(algorithm.by_status("succeeded")) == 4
    assert len({pid for _, pid, _ in programs.noted(folder, "process")}) == 1


@pytest.mark.parametrize("agent", [agents.exits, agents.exits_in_a_coroutine])
def test_in_threads_it_is_the_same(agent: Any, folder: Path) -> None:
    inputs: Sequence[Any] = ["interrupt", "sys.exit", 1]
    if agent is agents.exits_in_a_coroutine:
        inputs = [*inputs, ["awaited", "interrupt"], ["callback", "sys.exit"]]
    algorithm = Inputs(*inputs, config=RolloutConfig(max_attempts=1))
    SharedMemoryExecutionStrategy().execute(algorithm, AgentRunner(agent), InMemoryLightningStore())
    assert algorithm.by_status("failed") == [each for each in inputs if each != 1 and each != ["callback", "sys.exit"]]


_PRESSED = """
import asyncio, os, signal, threading, time
import agentlightning as agl

class Blocks(agl.LitAgent):
    async def rollout_async(self, task, resources, rollout):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        time.sleep(60)

async def work():
    async with agl.InMemoryLightningStore() as store:
        await store.enqueue_rollout(1)
        runner = agl.LitAgentRunner(agl.OtelTracer(), max_rollouts=1)
        with runner.run_context(agent=Blocks(), store=store, worker_id=0):
            await runner.iter()

asyncio.new_event_loop().run_until_complete(work())  # this handles no SIGINT, as a notebook's loop
"""


def test_ctrl_c_where_nobody_handles_it_is_not_the_agents() -> None:
    done = subprocess.run([sys.executable, "-c", _PRESSED], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGINT, done.stderr[-2000:]


# --- What processes print ----------------------------------------------------------------------------

_RUN = """
import logging, os, sys
import agentlightning as agl, execution_programs as programs

logging.getLogger("agentlightning").addHandler(logging.NullHandler())  # nor does this process wait for a reader

async def algorithm(store, event):
    ids = [(await store.enqueue_rollout(n)).rollout_id for n in range(4)]
    await store.wait_for_rollouts(rollout_ids=ids, timeout=60)
    programs.note("done")
    await programs.asyncio.Event().wait()

class Talks(agl.LitAgent):
    def rollout(self, task, resources, rollout):
        for number in range(int(os.environ["AGL_TEST_LINES"])):
            print(f"{task}: line {number} to stdout")
            print(f"{task}: line {number} to stderr", file=sys.stderr)
        return 1.0

from execution_agents import AgentRunner
strategy = agl.ClientServerExecutionStrategy(
    server_port=0, n_runners=2, start_method=sys.argv[1], graceful_timeout=1.0, terminate_timeout=0.5
)
strategy.execute(algorithm, AgentRunner(Talks()), agl.InMemoryLightningStore())
"""


@contextmanager
def begun(lines: int, method: str, **streams: Any) -> Iterator[subprocess.Popen[str]]:
    """A run whose agents talk; killed at the end, so that a test that fails leaves no process."""
    environment = {**os.environ, "PYTHONPATH": str(Path(programs.__file__).parent), "AGL_TEST_LINES": str(lines)}
    command = [sys.executable, "-c", _RUN, method]
    with subprocess.Popen(command, env=environment, text=True, start_new_session=True, **streams) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_everything_is_passed_on_in_its_order(method: str, folder: Path) -> None:
    with begun(300, method, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        read: list[str] = []
        for line in process.stdout:
            read.append(line.strip())
            if len(read) == 2 * 300 * 4:
                break
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    for task in range(4):
        own = [each for each in read if each.startswith(f"{task}:")]
        assert own == [f"{task}: line {number} to {s}" for number in range(300) for s in ("stdout", "stderr")]


def test_a_reader_that_stands_still_does_not_hold_up_the_launcher(folder: Path) -> None:
    """The agents wait, as they would anywhere; the run can be stopped, and nothing is left."""
    with begun(20_000, "fork", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        programs.wait_until(lambda: len(programs.descendants_of(process.pid)) >= 3, "the runners are there")
        time.sleep(1.0)  # until they have filled every pipe; it is no matter if they have not
        found = programs.descendants_of(process.pid)
        process.send_signal(signal.SIGINT)
        programs.wait_until(lambda: not programs.living(found), "all have ended", 20)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors[-2000:]
