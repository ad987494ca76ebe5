"""Each role, main process and start method, with real processes."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

import execution_programs as programs
from agentlightning import ClientServerExecutionStrategy, InMemoryLightningStore, SqliteLightningStore
from agentlightning.errors import ExecutionFailed, InvalidValue, WrongServer
from agentlightning.http.client.client import LightningStoreClient
from agentlightning.http.server.server import LightningStoreServer

METHODS = ("fork", "forkserver", "spawn")
QUICK: dict[str, Any] = {"graceful_timeout": 5.0, "terminate_timeout": 2.0}


async def _statuses(store: Any) -> dict[str, int]:
    by_status = (await store.statistics())["rollouts_by_status"]
    return {status: number for status, number in by_status.items() if number}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("main", ["algorithm", "runner"])
def test_both_roles_on_one_machine(method: Any, main: Any, folder: Path) -> None:
    store = InMemoryLightningStore()
    strategy = ClientServerExecutionStrategy(
        role="both",
        server_port=0,
        n_runners=2 if main == "algorithm" else 1,
        main_process=main,
        start_method=method,
        **QUICK,
    )
    strategy.execute(programs.enqueue_and_wait, programs.works, store)
    assert asyncio.run(_statuses(store)) == {"succeeded": 20}
    here = {who for who, pid, _ in programs.noted(folder) if pid == os.getpid()}
    assert here == ({"algorithm"} if main == "algorithm" else {"runner-0"})
    others = [who for who, pid, _ in programs.noted(folder) if pid != os.getpid()]
    assert sorted(others) == (["runner-0", "runner-1"] if main == "algorithm" else ["algorithm"])
    assert [who for who in programs.alive(folder) if who not in here] == []


@pytest.mark.parametrize(
    "method",
    ["fork", pytest.param("forkserver", marks=pytest.mark.slow), pytest.param("spawn", marks=pytest.mark.slow)],
)
def test_the_roles_apart(method: Any, folder: Path) -> None:
    """Two strategies, which only know each other's address: the runners come first and wait for the server."""
    store = InMemoryLightningStore()
    server = LightningStoreServer(store, port=0)  # finds a free port
    server.start_blocking()
    server.stop_blocking()
    port = server.port
    algorithm = ClientServerExecutionStrategy(role="algorithm", server_port=port, **QUICK)
    runners = ClientServerExecutionStrategy(
        role="runner", server_port=port, n_runners=2, start_method=method, connect_timeout=20, **QUICK
    )
    failures: list[BaseException] = []

    def run_runners() -> None:
        try:
            runners.execute(programs.enqueue_and_wait, programs.works, InMemoryLightningStore())
        except Exception as error:  # noqa: BLE001 - told to the test
            failures.append(error)

    thread = threading.Thread(target=run_runners)
    thread.start()
    algorithm.execute(programs.enqueue_and_wait, programs.works, store)
    thread.join(20)
    assert not thread.is_alive()
    assert failures == []
    assert asyncio.run(_statuses(store)) == {"succeeded": 20}
    assert {who for who, _, _ in programs.noted(folder)} == {"algorithm", "runner-0", "runner-1"}
    workers = asyncio.run(_workers(store))
    assert [worker.directive for worker in workers] == ["drain", "drain"]
    assert [worker.status for worker in workers] == ["unknown", "unknown"]  # they have said goodbye


async def _workers(store: Any) -> list[Any]:
    return list(await store.query_workers())


def test_an_unmanaged_store_is_given_to_both_sides(folder: Path) -> None:
    """It must be fit for that: here a client of a server that was there before, and stays."""
    store = InMemoryLightningStore()
    server = LightningStoreServer(store, port=0)
    server.start_blocking()
    try:
        client = LightningStoreClient(server.endpoint)
        strategy = ClientServerExecutionStrategy(managed_store=False, n_runners=2, start_method="forkserver", **QUICK)
        strategy.execute(programs.enqueue_and_wait, programs.works, client)
        assert asyncio.run(_statuses(store)) == {"succeeded": 20}
        assert [worker.directive for worker in asyncio.run(_workers(store))] == [None, None]  # it is not our store
        assert programs.alive(folder) == ["algorithm"]
    finally:
        server.stop_blocking()


@pytest.mark.parametrize("role", ["both", "runner"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_an_unmanaged_store_of_one_process_is_refused(
    folder: Path, tmp_path: Path, role: Any, method: Any, on_disk: bool
) -> None:
    store = SqliteLightningStore(tmp_path / "store.db") if on_disk else InMemoryLightningStore()
    arguments: dict[str, Any] = {"server_port": 4747, "start_method": method, "managed_store": False, **QUICK}
    strategy = ClientServerExecutionStrategy(role=role, **arguments)
    with pytest.raises(InvalidValue, match=r"LightningStore.*one process only(.|\n)*Leave managed_store out"):
        strategy.execute(programs.enqueue_and_wait, programs.works, store)
    assert programs.noted(folder) == [], "nothing has begun"


def test_a_store_on_disk_that_was_in_use_before(folder: Path, tmp_path: Path) -> None:
    """The processes never touch the file; and what they did is there after."""

    async def before() -> SqliteLightningStore:
        store = SqliteLightningStore(tmp_path / "store.db")
        await store.enqueue_rollout("from before")
        return store

    async def after(store: SqliteLightningStore) -> None:
        assert await _statuses(store) == {"succeeded": 21}
        assert (await store.verify()).ok
        await store.close()

    store = asyncio.run(before())
    ClientServerExecutionStrategy(server_port=0, n_runners=2, start_method="fork", **QUICK).execute(
        programs.enqueue_and_wait, programs.works, store
    )
    asyncio.run(after(store))


# --- Runners of somebody else ------------------------------------------------------------------------


async def _claims_without_a_name(store: Any, worker_id: int, event: Any) -> None:
    """Knows nothing but its event; at the end it has something to report."""
    while not event.is_set():
        claimed = await store.dequeue_rollout(wait_seconds=0.5)
        if claimed is not None:
            await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, "succeeded")
    await store.enqueue_rollout("reported at the end")
    programs.note("reported")


async def _looks_at_nothing(store: Any, worker_id: int, event: Any) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        programs.note("cancelled")


@pytest.mark.parametrize(
    ("bundle", "note", "reports"), [(_claims_without_a_name, "reported", 1), (_looks_at_nothing, "cancelled", 0)]
)
def test_a_runner_of_somebody_else_ends_with_the_run(bundle: Any, note: str, reports: int, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    limits: dict[str, Any] = {"graceful_timeout": 3.0, "terminate_timeout": 3.0, "start_method": "fork"}
    runners = ClientServerExecutionStrategy(role="runner", server_port=port, connect_timeout=20, **limits)
    ends: list[BaseException | None] = []

    def run_runners() -> None:
        try:
            runners.execute(programs.enqueue_and_wait, bundle, InMemoryLightningStore())
            ends.append(None)
        except BaseException as error:  # noqa: BLE001 - told to the test
            ends.append(error)

    async def algorithm(store: Any, event: Any) -> None:
        while not await store.query_workers():
            await asyncio.sleep(0.01)

    store = InMemoryLightningStore()
    thread = threading.Thread(target=run_runners)
    thread.start()
    ClientServerExecutionStrategy(role="algorithm", server_port=port, **limits).execute(
        algorithm, programs.works, store
    )
    thread.join(20)
    assert not thread.is_alive()
    assert ends == [None]
    assert [who for who, _, _ in programs.noted(folder)] == [note]
    assert asyncio.run(_statuses(store)) == ({"queuing": reports} if reports else {})


# --- Who may join ------------------------------------------------------------------------------------


def _run_runner(port: int, **arguments: Any) -> None:
    strategy = ClientServerExecutionStrategy(role="runner", server_port=port, **QUICK, **arguments)
    strategy.execute(programs.enqueue_and_wait, programs.works, InMemoryLightningStore())


def test_a_runner_refuses_the_server_of_another_run(folder: Path) -> None:
    server = LightningStoreServer(InMemoryLightningStore(), port=0, run_id="run-a")
    server.start_blocking()
    try:
        with pytest.raises(WrongServer, match="serves run 'run-a', and this runner belongs to run 'run-b'"):
            _run_runner(server.port, run_id="run-b")
        assert programs.noted(folder) == []
    finally:
        server.stop_blocking()


@pytest.mark.parametrize("key", [None, "another-key"])
def test_a_runner_without_the_key_is_told(key: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGL_API_KEY", raising=False)
    server = LightningStoreServer(InMemoryLightningStore(), port=0, api_key="the-right-key")
    server.start_blocking()
    try:
        with pytest.raises(WrongServer, match="set AGL_API_KEY to the key of the server"):
            _run_runner(server.port, api_key=key)
    finally:
        server.stop_blocking()


def test_a_runner_waits_for_a_server_with_a_countdown_and_gives_up(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = LightningStoreServer(InMemoryLightningStore(), port=0)
    server.start_blocking()
    server.stop_blocking()
    with pytest.raises(ExecutionFailed, match=r"no server to join at http://localhost:\d+ within 1.5 s"):
        _run_runner(server.port, connect_timeout=1.5)
    assert "s left" in caplog.text


# --- What cannot be -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"role": "spectator"}, "role 'spectator' is not one of algorithm, runner, both"),
        ({"server_port": 70_000}, "server_port 70000"),
        ({"role": "runner", "server_port": 0}, "server_port 0"),
        ({"server_url": "https://h:1"}, "role 'both' serves the store itself"),
        ({"role": "runner", "server_url": "h:1"}, "'h:1' is not the address of a server"),
        ({"n_runners": 0}, "n_runners 0"),
        ({"graceful_timeout": -1}, "give 0 or more"),
        ({"main_process": "neither"}, "main_process 'neither'"),
        ({"main_process": "runner", "n_runners": 2}, "needs role='both' and n_runners=1"),
        ({"main_process": "runner", "role": "runner"}, "needs role='both' and n_runners=1"),
        ({"start_method": "clone"}, "start_method 'clone'"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ClientServerExecutionStrategy(**arguments)


@pytest.mark.parametrize("role", ["algorithm", "both"])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "trainer.example"])
def test_others_may_reach_the_store_only_with_a_key(role: Any, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGL_API_KEY", raising=False)
    with pytest.raises(InvalidValue, match=r"AGL_API_KEY(.|\n)*server_host='localhost'"):
        ClientServerExecutionStrategy(role=role, server_host=host)
    ClientServerExecutionStrategy(role=role, server_host=host, api_key="a-long-enough-key")
    ClientServerExecutionStrategy(role=role, server_host=host, managed_store=False)
    ClientServerExecutionStrategy(role="runner", server_host=host)
    monkeypatch.setenv("AGL_API_KEY", "a-long-enough-key")
    ClientServerExecutionStrategy(role=role, server_host=host)


def test_as_it_is_written_in_the_documentation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGL_API_KEY", "a-long-enough-key")
    strategy = ClientServerExecutionStrategy(
        role="both",
        server_host="0.0.0.0",
        server_port=0,  # 4747 may be taken on the machine that runs the tests
        n_runners=4,
        graceful_timeout=10.0,
        terminate_timeout=5.0,
        main_process="algorithm",
    )
    store = InMemoryLightningStore()
    strategy.execute(programs.enqueue_and_wait, programs.works, store)
    assert asyncio.run(_statuses(store)) == {"succeeded": 20}
    assert len(programs.noted(folder, "runner")) == 4


def test_the_environment_fills_in_what_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AGL_CURRENT_ROLE", "AGL_SERVER_HOST", "AGL_SERVER_PORT", "AGL_MANAGED_STORE", "AGL_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    strategy = ClientServerExecutionStrategy()
    assert (strategy.role, strategy.server_host, strategy.server_port) == ("both", "localhost", 0)
    assert (strategy.graceful_timeout, strategy.terminate_timeout, strategy.managed_store) == (10.0, 10.0, True)
    assert strategy.allowed_exit_codes == {0, -15}
    monkeypatch.setenv("AGL_CURRENT_ROLE", "runner")
    monkeypatch.setenv("AGL_SERVER_HOST", "10.0.0.9")
    monkeypatch.setenv("AGL_SERVER_PORT", "80")
    monkeypatch.setenv("AGL_MANAGED_STORE", "off")
    monkeypatch.setenv("AGL_RUN_ID", "run-7")
    strategy = ClientServerExecutionStrategy()
    assert (strategy.role, strategy.server_host, strategy.server_port) == ("runner", "10.0.0.9", 80)
    assert (strategy.managed_store, strategy.run_id) == (False, "run-7")
    assert ClientServerExecutionStrategy(role="both", server_port=81).server_port == 81
    monkeypatch.setenv("AGL_SERVER_PORT", "eighty")
    with pytest.raises(ValueError, match="AGL_SERVER_PORT"):
        ClientServerExecutionStrategy()
    monkeypatch.setenv("AGL_SERVER_PORT", "80")
    monkeypatch.setenv("AGL_MANAGED_STORE", "perhaps")
    with pytest.raises(ValueError, match="AGL_MANAGED_STORE"):
        ClientServerExecutionStrategy()
