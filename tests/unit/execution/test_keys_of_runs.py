"""A run on one machine has a key that it made: its own processes and its user get in, others do not."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import execution_programs as programs
from agentlightning import ClientServerExecutionStrategy, InMemoryLightningStore, SqliteLightningStore
from agentlightning.errors import InvalidValue, NotAuthenticated, WrongServer
from agentlightning.execution.membership import join_server
from agentlightning.execution.run import remote_server
from agentlightning.http.client.client import LightningStoreClient
from agentlightning.http.server.server import LightningStoreServer
from agentlightning.security.credentials import Credentials, credentials_for
from agentlightning.security.local_servers import LocalServer, announce, find_local, find_serving
from agentlightning.security.tls import TlsTrust
from certificates import self_signed
from command_line import agl

QUICK: dict[str, Any] = {"graceful_timeout": 5.0, "terminate_timeout": 2.0}
STOP = b'{"directive": "stop"}'


@pytest.fixture(autouse=True)
def no_key_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGL_API_KEY", raising=False)


def status_of(url: str, path: str, body: bytes | None = None, key: str | None = None) -> int:
    """How a server answers a program that knows nothing of this package."""
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/agl/v1{path}", body, headers), timeout=10) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


class LooksAtKeys:
    """A runner that works only if the key of the run is nowhere where a program that it starts would have it."""

    async def __call__(self, store: Any, worker_id: int, event: Any) -> None:
        found = find_local(store.server_address_root)
        assert found is not None
        assert found.api_key
        assert found.api_key not in " ".join(os.environ.values())
        await programs.works(store, worker_id, event)


class Algorithm:
    """An algorithm that lets a test look at the run once its runners are at work."""

    def __init__(self, look: Callable[[str], Any], runners: int = 1) -> None:
        self.look = look
        self.runners = runners

    async def __call__(self, store: Any, event: Any) -> None:
        enqueued = [await store.enqueue_rollout(number) for number in range(4)]
        done = await store.wait_for_rollouts(rollout_ids=[each.rollout_id for each in enqueued], timeout=60)
        assert {each.status for each in done} == {"succeeded"}
        await asyncio.to_thread(self.look, store.endpoint)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_run_on_loopback_asks_for_a_key_that_only_its_own_processes_have(method: Any, folder: Path) -> None:
    seen: list[str] = []

    def look(url: str) -> None:
        found = find_local(url)
        assert found is not None
        assert found.api_key is not None
        seen.append(found.api_key)
        answers = [status_of(url, "/statistics"), status_of(url, "/workers/bulk/directive", STOP)]
        answers.append(status_of(url, "/statistics", key="a-wrong-key"))
        assert answers == [401, 401, 401]
        assert status_of(url, "/statistics", key=found.api_key) == 200
        pids = [pid for _, pid, _ in programs.noted(folder, "runner") if Path(f"/proc/{pid}").exists()]
        assert pids
        for pid in [*pids, os.getpid()]:  # what `ps` shows, and what a child would inherit
            for what in ("environ", "cmdline"):
                assert found.api_key.encode() not in Path(f"/proc/{pid}/{what}").read_bytes()

    for _ in range(2):
        strategy = ClientServerExecutionStrategy(start_method=method, **QUICK)
        strategy.execute(Algorithm(look), LooksAtKeys(), InMemoryLightningStore())
    assert len(set(seen)) == 2, "each run has a new key"


def test_the_key_of_the_user_is_the_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGL_API_KEY", "a-key-of-the-user")

    def look(url: str) -> None:
        found = find_local(url)
        assert found is not None
        assert found.api_key is None, "it is not written down"
        assert status_of(url, "/statistics") == 401
        assert status_of(url, "/statistics", key="a-key-of-the-user") == 200

    ClientServerExecutionStrategy(**QUICK).execute(Algorithm(look), programs.works, InMemoryLightningStore())


def test_no_key_is_possible_on_purpose(folder: Path) -> None:
    """The negative control: without the key of the run, anybody on the machine reads and stops it."""

    def look(url: str) -> None:
        assert (status_of(url, "/statistics"), status_of(url, "/workers/bulk/directive", STOP)) == (200, 200)

    strategy = ClientServerExecutionStrategy(api_key="", **QUICK)
    strategy.execute(Algorithm(look), programs.works, InMemoryLightningStore())


def test_the_algorithm_in_a_process_of_its_own_gets_the_key(folder: Path) -> None:
    store = InMemoryLightningStore()
    strategy = ClientServerExecutionStrategy(main_process="runner", **QUICK)
    strategy.execute(programs.enqueue_and_wait, LooksAtKeys(), store)
    assert asyncio.run(store.statistics())["rollouts_by_status"]["succeeded"] == 20


# --- The user's other programs ------------------------------------------------------------------------


def test_commands_of_the_user_find_the_run_by_its_address_and_by_its_file(folder: Path, tmp_path: Path) -> None:
    database = tmp_path / "store.db"

    def look(url: str) -> None:
        for target in (url, url.replace("localhost", "127.0.0.1"), database):
            assert agl("status", "--url", target, "-o", "json").ok().json["rollouts"]["succeeded"] == 4
        rollout_id = agl("rollouts", "ls", "-o", "json", "--url", database).ok().json["items"][0]["rollout_id"]
        # A change of a file goes through the process that has it.
        assert "drain" in agl("workers", "drain", "--all", "--url", database).ok().out
        refused = agl("rollouts", "cancel", rollout_id, "--url", database)
        assert (refused.code, "succeeded" in refused.err) == (1, True)
        strange = agl("status", "--url", url, "--api-key", "a-wrong-key")
        assert (strange.code, "does not take this API key" in strange.err) == (1, True)

    store = SqliteLightningStore(database)
    ClientServerExecutionStrategy(**QUICK).execute(Algorithm(look), programs.works, store)
    asyncio.run(store.close())
    assert find_serving(database) is None
    agl("rollouts", "prune", "--older-than", "0s", "-y", "--url", database).ok()  # nobody has it any more


@pytest.mark.root
def test_commands_of_another_user_do_not(folder: Path, tmp_path: Path) -> None:
    def look(url: str) -> None:
        # The second time as somebody who looks in the same place, but is not the user who runs it. 65534 is nobody.
        code = f"""
import os
from command_line import agl
agl("status", "--url", {url!r}).ok()
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
print(agl("status", "--url", {url!r}).err)
"""
        environment = os.environ | {"PYTHONPATH": str(Path(programs.__file__).parent)}
        words = [sys.executable, "-c", code]
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
        assert "asks for an API key" in done.stdout, done.stderr

    ClientServerExecutionStrategy(**QUICK).execute(Algorithm(look), programs.works, InMemoryLightningStore())


def test_what_is_written_down_is_for_the_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    place = tmp_path / "agentlightning" / "servers"
    withdraw = announce(LocalServer("http://127.0.0.1:4747", "a-key-that-was-made", "/x/store.db"))
    [file] = place.iterdir()
    assert (file.stat().st_mode & 0o777, place.stat().st_mode & 0o777) == (0o600, 0o700)
    for url, is_it in [
        ("http://localhost:4747", True),
        ("http://127.0.0.1:4747/", True),
        ("http://127.0.0.2:4747", False),
        ("http://127.0.0.1:4748", False),
        ("http://gpu-1:4747", False),
    ]:
        assert (find_local(url) is not None) == is_it, url
    assert credentials_for("http://127.0.0.1:4747").api_key == "a-key-that-was-made"
    assert credentials_for("http://127.0.0.1:4747", "given").api_key == "given"
    file.chmod(0o644)  # somebody else may have written it
    assert find_local("http://127.0.0.1:4747") is None
    withdraw()
    assert list(place.iterdir()) == []


def test_what_a_killed_server_left_behind_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else may listen on its port by now, and would be told a key."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    server = LocalServer("http://127.0.0.1:4747", "a-key-that-was-made")
    code = f"""
import sys, time
from agentlightning.security.local_servers import LocalServer, announce
announce(LocalServer(*{tuple(server)!r}))
print("announced", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"announced\n"
        assert find_local(server.url) == server
        process.kill()
        process.wait()
    assert find_local(server.url) is None
    assert list((tmp_path / "agentlightning" / "servers").iterdir()) == []


def test_a_user_without_a_home_still_has_a_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/no-such-place")
    ClientServerExecutionStrategy(**QUICK).execute(Algorithm(lambda _: None), programs.works, InMemoryLightningStore())
    assert "give it a key of yours (AGL_API_KEY)" in caplog.text


async def test_a_runner_that_asks_while_the_server_begins_is_let_in() -> None:
    """It has looked for the key just before that was there, and finds the server just after."""
    right, none = Credentials("the-key-of-the-run", TlsTrust()), Credentials(None, TlsTrust())
    async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0, api_key=right.api_key) as server:
        found = iter([none, none])  # for the certificates, and for the first request
        await join_server(server.endpoint, lambda: next(found, right), run_id=None, limit_seconds=10)
        with pytest.raises(WrongServer, match="refuses a client without an API key"):  # the negative control
            await join_server(server.endpoint, lambda: none, run_id=None, limit_seconds=10)


async def test_a_client_goes_on_with_a_run_that_was_begun_anew(tmp_path: Path) -> None:
    """As the runners of another terminal do when the algorithm is started again at its port: it has another key."""
    async with InMemoryLightningStore() as store:
        port = 0
        client = None
        for key in ("the-key-of-the-first", "the-key-of-the-second"):
            async with LightningStoreServer(store, port=port, api_key=key) as server:
                port = server.port
                withdraw = announce(LocalServer(server.endpoint, key))
                client = client or LightningStoreClient(server.endpoint, spool_dir=None)
                assert (await client.statistics())["total_rollouts"] == 0
                withdraw()
        assert client is not None
        async with LightningStoreServer(store, port=port, api_key="the-key-of-nobody"):
            with pytest.raises(NotAuthenticated):
                await client.statistics()
        await client.close()


# --- Certificates ------------------------------------------------------------------------------------


@pytest.mark.parametrize("main", ["algorithm", "runner"])
def test_a_run_with_a_certificate_is_reached_by_its_processes_and_its_user(
    main: Any, folder: Path, tmp_path: Path
) -> None:
    """Whatever names are in the certificate: they are for others. It is not trusted by anybody else here."""
    certificate, key = self_signed(tmp_path, "gpu-1.example")
    database = tmp_path / "store.db"
    store = SqliteLightningStore(database)
    strategy = ClientServerExecutionStrategy(main_process=main, tls_certificate=certificate, tls_key=key, **QUICK)

    def look(url: str) -> None:
        assert url.startswith("https://")
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            status_of(url, "/statistics")
        for target in (url, database):
            assert agl("status", "--url", target, "-o", "json").ok().json["rollouts"]["succeeded"] == 4
        agl("workers", "drain", "--all", "--url", database).ok()
        copy = pickle.loads(pickle.dumps(served[0]))  # as a process of the run may get it
        assert asyncio.run(copy.statistics())["rollouts_by_status"]["succeeded"] == 4

    served: list[Any] = []

    async def algorithm(store: Any, event: Any) -> None:
        served.append(store)
        await Algorithm(look)(store, event)

    strategy.execute(algorithm if main == "algorithm" else programs.enqueue_and_wait, programs.works, store)
    assert asyncio.run(store.statistics())["rollouts_by_status"]["succeeded"] == (4 if main == "algorithm" else 20)
    asyncio.run(store.close())


def test_variables_are_for_servers_that_others_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = self_signed(tmp_path)
    for name, value in (("CERTIFICATE", certificate), ("KEY", key), ("CA_FILE", certificate)):
        monkeypatch.setenv(f"AGL_TLS_{name}", str(value))
    here, there = (
        ClientServerExecutionStrategy(server_host=host, api_key="long-enough") for host in ("localhost", "::")
    )
    assert (here.tls, there.tls) == (None, (certificate, key))
    runner = ClientServerExecutionStrategy(role="runner", server_host="gpu-1")
    assert remote_server(runner).url == "https://gpu-1:4747"
    assert remote_server(ClientServerExecutionStrategy(role="runner")).url == "http://localhost:4747"
    assert LightningStoreClient("https://gpu-1:4747").server_address_root == "https://gpu-1:4747"
    monkeypatch.setenv("AGL_TLS_CA_FILE", str(key))
    with pytest.raises(InvalidValue, match="has no certificates that can be used"):
        LightningStoreClient("https://gpu-1:4747")
