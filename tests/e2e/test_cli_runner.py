"""`agl runner`: an agent, in Python or not, for a store behind a server."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import agentlightning as agl_package
from agentlightning.cli.terminal import ExitCode
from agentlightning.errors import InvalidValue
from agentlightning.http.client.client import LightningStoreClient
from agentlightning.http.server.server import LightningStoreServer
from agentlightning.runner.program import load_agent
from certificates import self_signed
from command_line import agl, clean_environment
from execution_programs import wait_until
from scenes import enqueued
from served_store import served

AGENT = """
import signal
import time
import agentlightning as agl

def plain(task):
    return task * 2

@agl.rollout
async def agent(task):
    return task * 3

def limited(task):
    def late(*_):
        raise TimeoutError
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        time.sleep(60)
    except TimeoutError:
        return task * 5

class Agent(agl.LitAgent):
    def rollout(self, task, resources, rollout):
        return task * 4

number = 5
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LightningStoreServer]:
    with served(tmp_path / "store.db") as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "agents"
    folder.mkdir()
    (folder / "mine.py").write_text(AGENT)
    return folder


def start(folder: Path, server: LightningStoreServer, *words: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "agentlightning", "runner", *words, "--url", server.endpoint],
        cwd=folder,
        env=clean_environment(AGL_SPOOL_DIR=str(folder / "spool"), PYTHONDONTWRITEBYTECODE="1", **environment),
        stderr=subprocess.PIPE,
        text=True,
    )


async def rewards(server: LightningStoreServer, *tasks: Any, then: str | None = None) -> list[float | None]:
    """What comes of these tasks; after that the workers are asked to end."""
    async with LightningStoreClient(server.endpoint, spool_dir=None) as store:
        ids = await enqueued(store, *tasks)
        done = await store.wait_for_rollouts(rollout_ids=ids, timeout=30)
        assert [rollout.status for rollout in done] == ["succeeded"] * len(ids)
        if then is not None:
            await store.direct_workers("stop" if then == "stop" else "drain")
        return [agl_package.find_final_reward(await store.query_spans(each)) for each in ids]


@pytest.mark.parametrize(
    ("words", "reward"),
    [
        (["mine:plain"], 2.0),
        (["mine.py:agent", "-c", "2"], 3.0),
        (["mine:Agent"], 4.0),
        (["mine:limited"], 5.0),
        (["--exec", "test -f mine.py && echo $AGL_TASK"], 1.0),
    ],
    ids=["function", "file", "class", "alarm", "program"],
)
def test_agents_of_every_kind(words: list[str], reward: float, folder: Path, server: LightningStoreServer) -> None:
    process = start(folder, server, *words)
    with process:
        assert asyncio.run(rewards(server, 1, 1, then="drain")) == [reward, reward]
        _, log = process.communicate(timeout=30)
    assert process.returncode == ExitCode.OK, log
    assert states(server) == ["worker_left"]


def states(server: LightningStoreServer) -> list[str | None]:
    """Why the workers that the store knows are gone."""
    told = agl("workers", "ls", "--json", "--url", server.endpoint).ok().json
    return [each["reason_code"] for each in told["items"]]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGTERM, 143)])
def test_several_processes_and_a_signal(
    number: signal.Signals, code: int, folder: Path, server: LightningStoreServer
) -> None:
    process = start(folder, server, "--exec", "echo 0.5", "-n", "2", "-c", "4", "--label", "zone=a")

    async def labels() -> list[Any]:
        async with LightningStoreClient(server.endpoint, spool_dir=None) as store:
            workers = await store.query_workers(status_in=["idle", "busy"])
            return [(each.registration or {})["labels"] for each in workers]

    with process:
        assert asyncio.run(rewards(server, *range(12))) == [0.5] * 12
        assert asyncio.run(labels()) == [{"zone": "a"}] * 2
        process.send_signal(number)
        _, log = process.communicate(timeout=30)
    assert process.returncode == code, log
    assert states(server) == ["worker_left"] * 2, "a signal is a wish, too"
    assert "2 ended in order" in agl("status", "--url", server.endpoint).ok().out
    assert log.count(f"joined the store at {server.endpoint}; runners ready: 2") == 1


def test_one_signal_lets_runners_finish_what_they_hold(folder: Path, server: LightningStoreServer) -> None:
    os.mkfifo(folder / "go")
    go = os.open(folder / "go", os.O_RDWR)
    process = start(folder, server, "--exec", "touch begun; read line < go; echo 0.5")

    async def enqueue() -> list[str]:
        async with LightningStoreClient(server.endpoint, spool_dir=None) as store:
            return await enqueued(store, 1)

    async def status(rollout_id: str) -> str:
        async with LightningStoreClient(server.endpoint, spool_dir=None) as store:
            rollout = await store.get_rollout_by_id(rollout_id)
            assert rollout is not None
            return rollout.status

    with process:
        (rollout_id,) = asyncio.run(enqueue())
        wait_until((folder / "begun").exists, "the program has begun")
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        log = next(line for line in process.stderr if "SIGINT: stopping" in line)
        os.write(go, b"\n")
        os.close(go)
        log += process.communicate(timeout=30)[1]
    assert process.returncode == ExitCode.INTERRUPTED, log
    assert "after the stop event, stage 1" in log
    assert asyncio.run(status(rollout_id)) == "succeeded", log


def test_a_server_with_tls(folder: Path, tmp_path: Path) -> None:
    """Its certificate must be trusted; one of an authority of one's own is, if that is named."""
    certificate, key = self_signed(tmp_path)
    with served(tmp_path / "store.db", tls_certificate=certificate, tls_key=key, run_id="run-7") as server:
        with start(folder, server, "mine:plain", SSL_CERT_FILE=str(certificate)) as process:
            ids = asyncio.run(_done_and_drained(server, certificate))
            _, log = process.communicate(timeout=30)
        assert (process.returncode, len(ids)) == (ExitCode.OK, 1), log
        assert f"joined run run-7 at {server.endpoint}; runners ready: 1" in log
        with start(folder, server, "mine:plain") as process:
            _, log = process.communicate(timeout=30)
        assert process.returncode == ExitCode.FAILED, log
        assert "is not trusted here" in log
        assert "SSL_CERT_FILE" in log


async def _done_and_drained(server: LightningStoreServer, certificate: Path) -> list[str]:
    async with LightningStoreClient(server.endpoint, spool_dir=None, tls_ca_file=certificate) as store:
        ids = await enqueued(store, 1)
        done = await store.wait_for_rollouts(rollout_ids=ids, timeout=30)
        await store.direct_workers("drain")
        return [each.rollout_id for each in done if each.status == "succeeded"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], ExitCode.USAGE, "MODULE:AGENT"),
        (["a:b", "--exec", "true"], ExitCode.USAGE, "MODULE:AGENT"),
        (["nothing:agent"], ExitCode.USAGE, "no module 'nothing'"),
        (["nothing.py:agent"], ExitCode.USAGE, "no file"),
        (["nothing"], ExitCode.USAGE, "MODULE:NAME"),
        (["mine:missing"], ExitCode.USAGE, "nothing called 'missing'"),
        (["mine:number"], ExitCode.USAGE, "is a int"),
        (["mine:agent", "--label", "x"], ExitCode.USAGE, "NAME=VALUE"),
        (["mine:agent", "--default-resources", "no.json"], ExitCode.USAGE, "--default-resources no.json: [Errno 2]"),
        (["--exec", " "], ExitCode.USAGE, "empty"),
        (["--exec", "true", "--url", "store.db"], ExitCode.USAGE, "agl store"),
        (["--exec", "true", "--url", "ftp://h:1"], ExitCode.USAGE, "https://"),
        (["--exec", "true", "--url", "http://127.0.0.1:9", "--wait", "0"], ExitCode.FAILED, "no server to join"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    words: list[str], code: int, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    done = agl("runner", *words)
    sys.modules.pop("mine", None)
    assert done.code == code, done
    assert said in done.err.replace("\n", " ").replace("│ ", "").replace("  ", " ")


def test_a_module_that_misses_another_says_which(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "broken.py").write_text("import not_there_at_all\n")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(InvalidValue, match=r"No module named 'not_there_at_all' \(.*broken\.py, line 1\)"):
        load_agent("broken:agent", os.getcwd())


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def agent(task)\n    return 1.0\n", "SyntaxError: expected ':' ({file}, line 1)"),
        ("import sys\nsys.exit('usage: …')\n", "SystemExit: usage: … ({file}, line 2); put"),
        ("def make():\n    return {}['x']\nagent = make()\n", "KeyError: 'x' ({file}, line 2)"),
        (
            "import agentlightning as agl\nclass agent(agl.LitAgent):\n    def __init__(self, x): ...\n",
            "argument: 'x';",
        ),
    ],
)
def test_an_error_in_the_users_file_is_the_users(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    (folder / "of_user.py").write_text(code)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    done = agl("runner", "of_user.py:agent")
    sys.modules.pop("of_user", None)
    assert (done.code, "bug of Agent Lightning" in done.err) == (ExitCode.USAGE, False)
    assert said.format(file=folder / "of_user.py") in done.err
