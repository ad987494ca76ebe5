"""The process that supervises is killed with SIGKILL: what it has started ends by itself, within five seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import execution_programs as programs

ALLOWED_SECONDS = 5.0
_RUN = """
import sys, threading
import execution_programs as programs
from agentlightning import ClientServerExecutionStrategy, InMemoryLightningStore

def run():
    strategy = ClientServerExecutionStrategy(server_port=0, n_runners=5, start_method=sys.argv[1])
    strategy.execute(programs.waits_for_ever, programs.a_few_misbehave, InMemoryLightningStore())

# Not from the main thread, which may end before others: the kernel would take that for the death of the parent.
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""
ROUNDS = [("fork", 1)]
LONG = [
    pytest.param(method, rounds, marks=pytest.mark.slow)
    for method, rounds in [("fork", 20), ("forkserver", 20), ("spawn", 10)]
]


def control_groups(pid: int) -> list[Path]:
    """The control groups of a run that a process is in, where there are any (cgroups(7))."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    roots = [Path(mount[1]) for mount in mounts if mount[2] == "cgroup2"]
    inside = [line[4:] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines() if line.startswith("0::/agl-")]
    return [root / path for root in roots for path in inside]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("method", "rounds"), [*ROUNDS, *LONG])
def test_nothing_outlives_the_parent(method: str, rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(rounds):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.setenv("AGL_TEST_FOLDER", str(folder))
        with subprocess.Popen(
            [sys.executable, "-c", _RUN, method],
            env={**os.environ, "PYTHONPATH": str(Path(programs.__file__).parent)},
            start_new_session=True,
            stderr=subprocess.DEVNULL,
        ) as parent:
            programs.wait_until(lambda where=folder: len(programs.noted(where)) == 8, "all are at work")
            assert len(programs.alive(folder)) == 8
            groups = {group for _, pid, _ in programs.noted(folder) for group in control_groups(pid)}
            parent.send_signal(signal.SIGKILL)
        began = time.monotonic()
        programs.wait_until(lambda where=folder: not programs.alive(where), f"all have ended (round {number})", 20)
        assert time.monotonic() - began < ALLOWED_SECONDS
        programs.wait_until(lambda groups=groups: not [each for each in groups if each.exists()], "no cgroup is left")


def test_the_harness_sees_what_outlives_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a child that nobody looks after is found alive."""
    monkeypatch.setenv("AGL_TEST_FOLDER", str(tmp_path))
    program = (
        "import os, time, execution_programs as programs\n"
        "if os.fork() == 0:\n    programs.note('orphan'); time.sleep(30)\ntime.sleep(30)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(Path(programs.__file__).parent)},
        start_new_session=True,
    ) as parent:
        programs.wait_until(lambda: programs.noted(tmp_path), "the child is there")
        parent.kill()
    assert programs.alive(tmp_path) == ["orphan"]
    os.kill(programs.noted(tmp_path)[0][1], signal.SIGKILL)
