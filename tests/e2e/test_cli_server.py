"""The commands on a server: the same answers as from the file, and the same orders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentlightning.cli import target, workers
from agentlightning.cli.terminal import ExitCode
from agentlightning.errors import StoreUnreachable
from agentlightning.store.sqlite.store import InMemoryLightningStore
from command_line import agl, clean_environment
from served_store import closed_port, served, served_elsewhere
from worked_store import RESOURCES, work


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """(URL, file) of a server whose store only this module reads."""
    path = tmp_path_factory.mktemp("served") / "store.db"
    with served(path, work) as server:
        yield server.endpoint, path


# --- The same answers --------------------------------------------------------------------------------

_LOOKS = (
    ["rollouts", "ls"],
    ["rollouts", "ls", "--status", "failed", "--sort", "end_time"],
    ["rollouts", "show", "ro-task-4"],
    ["workers", "ls"],
    ["resources", "ls"],
    ["resources", "ls", RESOURCES],
    ["resources", "show", RESOURCES, "--version", "1"],
    ["trace", "ro-task-3"],
    ["verify"],
)


@pytest.mark.parametrize("words", _LOOKS, ids=" ".join)
def test_a_server_and_its_file_answer_the_same(worked: tuple[str, Path], words: list[str]) -> None:
    by_server, by_file = (agl(*words, "-o", "json", "--url", each).ok().json for each in worked)
    if words[0] == "workers":  # their signs of life are written now and then only
        by_server, by_file = (without_times(each) for each in (by_server, by_file))
    assert by_server == by_file


def without_times(page: dict[str, Any]) -> list[dict[str, Any]]:
    return [{name: value for name, value in each.items() if not name.endswith("_time")} for each in page["items"]]


def test_status_and_trace_draw_the_same(worked: tuple[str, Path]) -> None:
    url, path = worked
    assert agl("trace", "ro-task-3", "--url", url).ok().out == agl("trace", "ro-task-3", "--url", path).ok().out
    text = agl("status", "--url", url).ok().out
    assert text.startswith(f"{url}  sqlite, ")
    assert "8   1 queuing   1 running   4 succeeded   2 failed" in text


def test_orders_go_through_the_server(database: Path) -> None:
    with served(database, work) as server:
        env = {"AGL_SERVER_URL": server.endpoint}
        assert agl("workers", "drain", "w-1", env=env).ok().out == "w-1  asked to drain, holds ro-task-6\n"
        assert "version 3" in agl("resources", "rollback", RESOURCES, "1", env=env).ok().out
        assert agl("workers", "drain", "w-9", env=env).code == ExitCode.NOT_FOUND
        refused = agl("backup", database.with_name("backup.db"), env=env)
        assert refused.code == ExitCode.USAGE
        assert "on the machine of the server" in refused.err
        assert agl("backup", database.with_name("backup.db"), "--url", database).code == ExitCode.OK


def test_one_who_writes_to_the_file_is_sent_to_the_server(database: Path) -> None:
    with served_elsewhere(database) as (url, pid):
        agl("status", "--url", database).ok()
        done = agl("workers", "drain", "--all", "--url", database)
        assert done.code == ExitCode.UNREACHABLE
        assert f"process {pid} " in done.err
        assert f"use --url {url} instead" in done.err
        agl("workers", "drain", "--all", "--url", url).ok()


def test_a_watch_rides_out_a_server_that_is_killed_and_started_again(database: Path) -> None:
    words = [sys.executable, "-m", "agentlightning", "status", "--watch", "--interval", "0.2", "-o", "json"]
    with served_elsewhere(database) as (url, pid):
        watch = subprocess.Popen(
            [*words, "--url", url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment()
        )
        assert watch.stdout is not None
        started = json.loads(watch.stdout.readline())["time"]
        os.kill(pid, signal.SIGKILL)
    with served_elsewhere(database, port=int(url.rpartition(":")[2])):
        while (look := json.loads(watch.stdout.readline()))["uptime_seconds"] > look["time"] - started:
            pass  # said before the server was killed
        watch.send_signal(signal.SIGINT)
        _, err = watch.communicate(timeout=20)
    assert (watch.returncode, err) == (ExitCode.INTERRUPTED, "")


@pytest.mark.parametrize("words", [["status"], ["rollouts", "ls"], ["verify"], ["workers", "drain", "--all"]])
def test_a_server_that_is_not_there_is_exit_code_4_at_once(words: list[str]) -> None:
    done = agl(*words, "--url", f"http://127.0.0.1:{closed_port()}")
    assert (done.code, done.out) == (ExitCode.UNREACHABLE, "")
    assert "nothing listens at" in done.err


@pytest.mark.parametrize(
    "words", [["rollouts", "ls"], ["rollouts", "cancel", "ro-1"], ["workers", "drain", "--all"]], ids=" ".join
)
def test_a_server_that_falls_silent_is_given_up_soon(
    words: list[str], database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "_PATIENCE_SECONDS", 0.3)
    ask = target.ask
    with served_elsewhere(database) as (url, pid):

        def ask_and_stop(server: target.Server) -> target.Answer:
            answer = ask(server)
            os.kill(pid, signal.SIGSTOP)
            os.waitpid(pid, os.WUNTRACED)  # until it stands still
            return answer

        monkeypatch.setattr(target, "ask", ask_and_stop)
        try:
            done = agl(*words, "--url", url)
        finally:
            os.kill(pid, signal.SIGCONT)
    assert (done.code, done.out) == (ExitCode.UNREACHABLE, "")
    assert "did not answer" in done.err


async def test_who_waits_for_workers_rides_out_a_server_that_is_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Away(InMemoryLightningStore):
        answers = 0

        async def query_workers(self, *args: Any, **kwargs: Any) -> Any:
            self.answers += 1
            if self.answers < 3:
                raise StoreUnreachable("the server is being started again")
            return await super().query_workers(*args, **kwargs)

    monkeypatch.setattr(workers, "_LOOK_SECONDS", 0.01)
    async with Away() as store:
        await workers._wait_until_free(store, ["w-1"], 60.0)
    assert "None of them works any more" in capsys.readouterr().out
    async with Away() as store:
        with pytest.raises(StoreUnreachable):
            await workers._wait_until_free(store, ["w-1"], 0.0)
