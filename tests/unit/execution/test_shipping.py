"""What can be sent to another process, and how what cannot is named."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agentlightning import ClientServerExecutionStrategy, InMemoryLightningStore
from agentlightning.errors import InvalidValue
from agentlightning.execution.child import choose_start_method, pack, unpack


@dataclass
class Agent:
    """Something with parts."""

    tools: dict[str, Any]


class Refuses:
    def __reduce__(self) -> str:
        raise OSError("it is held open")


def test_closures_and_lambdas_can_be_sent() -> None:
    base = 40
    assert unpack("it", pack("it", lambda number: base + number))(2) == 42


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Agent({"lock": threading.Lock()}), "the runner's side.tools['lock'], a _thread.lock, cannot be sent"),
        ([1, {"a": Refuses()}], "the runner's side[1]['a'], a "),
        (Agent({"list": [threading.Lock()]}).__repr__, "the runner's side.__self__.tools['list'][0], a _thread.lock"),
    ],
)
def test_what_cannot_be_sent_is_named_with_the_ways_out(value: object, named: str) -> None:
    with pytest.raises(InvalidValue) as told:
        pack("the runner's side", value)
    assert named in str(told.value)
    assert "start_method='fork'" in str(told.value)


def test_what_a_user_gave_is_named_by_its_own_name() -> None:
    job = SimpleNamespace(bundle=SimpleNamespace(agent=SimpleNamespace(lock=threading.Lock())))
    with pytest.raises(InvalidValue, match=r"^agent\.lock, a _thread\.lock, cannot be sent"):
        pack("the runner's side", job)


def test_what_a_closure_holds_is_named() -> None:
    lock = threading.Lock()

    def agent() -> threading.Lock:
        return lock

    with pytest.raises(InvalidValue, match=r"the runner's side → lock, a _thread\.lock"):
        pack("the runner's side", agent)


def test_a_module_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_here.py").write_text("def agent(): ...")
    monkeypatch.syspath_prepend(str(tmp_path))
    only_here = importlib.import_module("only_here")

    packed = pack("the runner's side", only_here.agent)
    monkeypatch.delitem(sys.modules, "only_here")
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each != str(tmp_path)])
    with pytest.raises(ModuleNotFoundError) as told:
        unpack("the runner's side", packed)
    assert told.value.__notes__ == ["the runner's side was defined in a module that cannot be imported in this process"]


class TestTheStartMethod:
    def test_is_the_one_that_was_asked_for(self) -> None:
        assert choose_start_method("spawn", "it", None) == "spawn"

    def test_is_not_fork_where_there_are_threads(self) -> None:
        release = threading.Event()
        thread = threading.Thread(target=release.wait)
        thread.start()
        try:
            assert choose_start_method(None, "the runner's side", lambda child, arguments: "done") == "forkserver"
        finally:
            release.set()
            thread.join()

    def test_is_fork_with_a_warning_where_nothing_else_is_possible(self, caplog: pytest.LogCaptureFixture) -> None:
        release = threading.Event()
        thread = threading.Thread(target=release.wait)
        thread.start()
        try:
            assert choose_start_method(None, "the runner's side", lambda child, arguments: str(release)) == "fork"
        finally:
            release.set()
            thread.join()
        assert "the runner's side → release" in caplog.text

    def test_is_fork_in_a_process_with_one_thread(self) -> None:
        program = "from agentlightning.execution import child; print(child.choose_start_method(None, 'it', None))"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout == "fork\n"


_SCRIPT = """
import asyncio
from agentlightning import ClientServerExecutionStrategy, InMemoryLightningStore

inputs = [1, 2, 3]

class Doubling:
    '''Only this script knows it; and it has no guard against being imported.'''
    async def __call__(self, store, worker_id, event):
        for _ in inputs:
            claimed = await store.dequeue_rollout(wait_seconds=10)
            await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, "succeeded")

async def algorithm(store, event):
    ids = [(await store.enqueue_rollout(each)).rollout_id for each in inputs]
    print(len(await store.wait_for_rollouts(rollout_ids=ids, timeout=10)))

ClientServerExecutionStrategy(server_port=0, start_method="spawn").execute(
    algorithm, Doubling(), InMemoryLightningStore()
)
"""


def test_what_a_script_defines_is_sent_to_a_new_interpreter(tmp_path: Path) -> None:
    """No ``if __name__ == "__main__"`` is needed."""
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    done = subprocess.run([sys.executable, "-W", "error", str(script)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("3\n", "", 0)


def test_a_run_names_what_it_cannot_send() -> None:
    lock = threading.Lock()

    async def runner(store: Any, worker_id: int, event: Any) -> None:
        lock.acquire()

    async def algorithm(store: Any, event: Any) -> None:
        return

    with pytest.raises(InvalidValue, match=r"the runner's side\.bundle → lock, a _thread\.lock"):
        ClientServerExecutionStrategy(server_port=0, start_method="spawn").execute(
            algorithm, runner, InMemoryLightningStore()
        )
