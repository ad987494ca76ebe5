"""Stop means stop: whatever a runner does, nothing of it survives, in the time that was set, and the log is right."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import execution_programs as programs
from agentlightning import ClientServerExecutionStrategy, InMemoryLightningStore
from agentlightning.execution.abort import Abort, AbortStage, ProcessEnd, abort_stages
from agentlightning.execution.process_tree import ProcessInfo, snapshot

GRACEFUL, TERMINATE = 0.6, 0.5
ALLOWED_SECONDS = GRACEFUL + 3 * TERMINATE + 2
METHODS = ["fork", pytest.param("forkserver", marks=pytest.mark.slow), pytest.param("spawn", marks=pytest.mark.slow)]
_STAGE = re.compile(r"\(pid (\d+)\) .* stage (\d)")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AGL_TEST_FOLDER", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("method", METHODS)
def test_whatever_runners_do_nothing_survives(method: Any, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    strategy = ClientServerExecutionStrategy(
        server_port=0,
        n_runners=len(programs.MISBEHAVIOURS),
        graceful_timeout=GRACEFUL,
        terminate_timeout=TERMINATE,
        start_method=method,
    )
    ended: list[float] = []

    async def algorithm(store: Any, event: Any) -> None:
        await programs.ends_when_all_misbehave(store, event)
        ended.append(time.monotonic())

    strategy.execute(algorithm, programs.misbehave, InMemoryLightningStore())
    seconds = time.monotonic() - ended[0]
    assert programs.alive(folder) == []
    assert seconds < ALLOWED_SECONDS
    expected = {
        f"{each.__name__}{part}": n for each, parts in programs.MISBEHAVIOURS.items() for part, n in parts.items()
    }
    found = {int(pid): int(stage) for pid, stage in _STAGE.findall(caplog.text)}
    assert {who: found.get(pid) for who, pid, _ in programs.noted(folder)} == expected


def test_a_process_that_survives_is_seen() -> None:
    """Negative control: without the stages that end it, it is there, and is told of."""
    program = "import signal, time; signal.signal(2, signal.SIG_IGN); print(flush=True); time.sleep(99)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as stubborn:
        assert stubborn.stdout is not None
        stubborn.stdout.readline()

        def living() -> list[ProcessInfo]:
            return [each for each in [snapshot().get(stubborn.pid)] if each is not None]

        def apply(stages: tuple[AbortStage, ...]) -> list[ProcessEnd]:
            abort = Abort(living, {stubborn.pid: "stubborn"}, lambda: None)
            for seconds in abort.steps(stages):
                time.sleep(seconds)
            return abort.ends

        stages = abort_stages(0.05, 0.05)
        [ending] = apply(stages[:2])
        assert (ending.pid, ending.stage) == (stubborn.pid, None)
        [ending] = apply(stages)
        assert ending.stage is not None
        assert ending.stage.name == "SIGTERM"


# --- Ctrl+C ------------------------------------------------------------------------------------------

_RUN = """
import logging, sys
import execution_programs as programs
from agentlightning import ClientServerExecutionStrategy, InMemoryLightningStore

logging.basicConfig(level=logging.INFO)
strategy = ClientServerExecutionStrategy(
    server_port=0, n_runners=2, graceful_timeout=float(sys.argv[2]), terminate_timeout=0.5, start_method=sys.argv[3]
)
strategy.execute(programs.waits_for_ever, getattr(programs, sys.argv[1]), InMemoryLightningStore())
"""


@contextmanager
def _begin(runner: str, graceful_timeout: float, folder: Path, method: str = "fork") -> Iterator[subprocess.Popen[str]]:
    """A run that works; killed at the end, so that a test that fails leaves no process."""
    with subprocess.Popen(
        [sys.executable, "-c", _RUN, runner, str(graceful_timeout), method],
        env={**os.environ, "PYTHONPATH": str(Path(programs.__file__).parent)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            programs.wait_until(lambda: len(programs.noted(folder)) >= 3, "both runners and the algorithm are at work")
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_begins_at_stage_1_and_ends_with_its_code(number: signal.Signals, code: int, folder: Path) -> None:
    with _begin("works", 5.0, folder) as process:
        began = time.monotonic()
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert time.monotonic() - began < 3
    assert programs.alive(folder) == []


def test_a_second_ctrl_c_goes_to_stage_4(folder: Path) -> None:
    with _begin("swallow", 30.0, folder) as process:
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        for line in process.stderr:
            if "send it again to kill" in line:
                break
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130, errors
    assert time.monotonic() - began < 3
    assert len(re.findall("SIGKILL, stage 4", errors)) == 2
    assert programs.alive(folder) == []


def test_an_algorithm_that_blocks_its_loop_is_interrupted(folder: Path) -> None:
    """It does not hear that it is cancelled."""
    program = _RUN.replace("programs.waits_for_ever", "programs.blocks")
    process = subprocess.Popen(
        [sys.executable, "-c", program, "works", "0.3", "fork"],
        env={**os.environ, "PYTHONPATH": str(Path(programs.__file__).parent)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        programs.wait_until(lambda: len(programs.noted(folder)) >= 3, "all are at work")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130, errors
    assert programs.alive(folder) == []
