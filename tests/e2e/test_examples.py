"""Every example does what it says, as the programs that users start. Those that need more than one are put together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import agentlightning as agl

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
AGL = Path(sys.executable).with_name("agl")
DEADLINE_SECONDS = 90.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def start(folder: Path, *command: str, **variables: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AGL_", "COV_"))}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment | {"AGL_SERVER_PORT": "0"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for its end, which must be a good one; returns what it printed."""
    out, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, f"{process.args}\n{out}\n{err}"
    return out


def run_example(name: str, folder: Path, *arguments: str, **variables: str) -> str:
    return finish(start(folder, sys.executable, "-W", "error", str(EXAMPLES / name), *arguments, **variables))


@contextlib.contextmanager
def running(process: subprocess.Popen[str]) -> Generator[subprocess.Popen[str]]:
    """A program that is stopped at the end, as by Ctrl+C."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise


@contextlib.contextmanager
def store_program(folder: Path) -> Generator[str]:
    """``agl store`` on a free port; gives its URL once it answers."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with running(start(folder, str(AGL), "store", "--host", "127.0.0.1", "--port", str(port))) as server:
        wait_for_store(url, server)
        yield url


def wait_for_store(url: str, server: subprocess.Popen[str]) -> None:
    end = time.monotonic() + DEADLINE_SECONDS
    address = (url.rpartition("/")[2].partition(":")[0], int(url.rpartition(":")[2]))
    while True:
        assert server.poll() is None, f"the store ended: {server.communicate()}"
        assert time.monotonic() < end, "the store never answered"
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=1):
            return
        time.sleep(0.05)


def test_an_agent_is_trained_on_a_file_of_tasks(tmp_path: Path) -> None:
    out = run_example("tickets.py", tmp_path)
    assert re.search(r"right after: (9\d|100)%", out)


def test_the_file_of_tasks_can_be_swapped(tmp_path: Path) -> None:
    words = {"cold": "heating", "wet": "plumbing"}
    lines = [
        f'{{"text": "It is {word} in room {room}.", "team": "{team}"}}'
        for room in range(4)
        for word, team in words.items()
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert "2 teams" in run_example("tickets.py", tmp_path, "mine.jsonl")


def test_the_openai_sdk_streams_through_the_proxy(tmp_path: Path) -> None:
    assert "-> response tokens [" in run_example("openai_streaming.py", tmp_path)


def test_a_langgraph_agent_is_traced_and_trained(tmp_path: Path) -> None:
    assert "situations" in run_example("langgraph_agent.py", tmp_path)


def test_a_shell_script_is_an_agent(tmp_path: Path) -> None:
    agent = shutil.copytree(EXAMPLES / "shell_agent", tmp_path / "shell_agent") / "agent.sh"
    with store_program(tmp_path) as url:
        runner = start(tmp_path, str(AGL), "runner", "--url", url, "--exec", f"sh {agent}")
        with running(runner):
            out = run_example("shell_agent/ask.py", tmp_path, url)
    assert "succeeded, reward 1.0" in out


def test_two_machines_work_on_one_run(tmp_path: Path) -> None:
    variables = {"AGL_API_KEY": "secret-of-this-test", "AGL_SERVER_HOST": "127.0.0.1"}
    variables["AGL_SERVER_PORT"] = str(free_port())
    command = (sys.executable, "-W", "error", str(EXAMPLES / "two_machines.py"))
    with (
        running(start(tmp_path, *command, AGL_CURRENT_ROLE="runner", **variables)) as there,
        running(start(tmp_path, *command, AGL_CURRENT_ROLE="algorithm", **variables)) as here,
    ):
        assert "best: polite" in finish(here)
        finish(there)  # it was told that the algorithm has ended


def test_a_runner_with_the_wrong_key_does_no_work(tmp_path: Path) -> None:
    variables = {"AGL_SERVER_HOST": "127.0.0.1", "AGL_SERVER_PORT": str(free_port())}
    command = (sys.executable, "-W", "error", str(EXAMPLES / "two_machines.py"))
    with (
        running(start(tmp_path, *command, AGL_CURRENT_ROLE="algorithm", AGL_API_KEY="the-right-key", **variables)),
        running(
            start(tmp_path, *command, AGL_CURRENT_ROLE="runner", AGL_API_KEY="the-wrong-key", **variables)
        ) as stranger,
    ):
        out, err = stranger.communicate(timeout=DEADLINE_SECONDS)
        assert stranger.returncode not in (0, None)
        assert "key" in err
        assert not out


def test_a_script_of_0_3_runs_unchanged(tmp_path: Path) -> None:
    assert "best: Answer with a number only" in run_example("from_0_3.py", tmp_path)


def test_a_script_of_0_3_uses_an_external_store(tmp_path: Path) -> None:
    with store_program(tmp_path) as url:
        out = run_example("from_0_3.py", tmp_path, AGL_SERVER_URL=url)

        async def count() -> int:
            store = agl.LightningStoreClient(url)
            try:
                return len(await store.query_rollouts(status_in=["succeeded"]))
            finally:
                await store.close()

        assert asyncio.run(count()) == 6
    assert "best: Answer with a number only" in out
