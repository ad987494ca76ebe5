"""A client among loops, threads, processes and pickles; and that nothing of it is left open.

Warnings are errors in all tests: a session or a socket left open fails them.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from agentlightning.errors import InvalidValue, NotAuthenticated, StoreClosed, StoreUnreachable
from agentlightning.http.client.client import LightningStoreClient
from agentlightning.http.client.retry import Resilience
from agentlightning.http.client.transport import HttpTransport
from agentlightning.http.server.server import LightningStoreServer
from agentlightning.store.sqlite.store import InMemoryLightningStore
from served_store import served
from store_server_process import free_port


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LightningStoreServer]:
    with served(tmp_path / "store.db") as running:
        yield running


@pytest.fixture
def url(server: LightningStoreServer) -> str:
    return server.endpoint


async def _use(client: LightningStoreClient) -> int:
    await asyncio.gather(*(client.enqueue_rollout(number) for number in range(5)))
    return (await client.statistics())["total_rollouts"]


# --- Loops and threads -----------------------------------------------------------------------------


def _sessions_of(client: LightningStoreClient) -> object:
    assert isinstance(client._http, HttpTransport)
    return client._http._sessions


def test_a_loop_that_ends_takes_its_session_along(url: str) -> None:
    client = LightningStoreClient(url, spool_dir=None)
    for number in range(1, 4):
        assert asyncio.run(_use(client)) == 5 * number
        gc.collect()
        assert not _sessions_of(client)
    asyncio.run(client.close())


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_loop_that_was_closed_without_further_ado(
    url: str, new_loop: Callable[[], asyncio.AbstractEventLoop], recwarn: pytest.WarningsRecorder
) -> None:
    client = LightningStoreClient(url, spool_dir=None)
    loop = new_loop()
    loop.run_until_complete(_use(client))
    with pytest.warns(ResourceWarning) if new_loop is uvloop.new_event_loop else _nothing():
        loop.close()  # uvloop itself warns here of every socket; it has nobody to ask
    assert asyncio.run(_use(client)) == 10, "the session of the closed loop does not matter"
    asyncio.run(client.close())
    del client, loop
    gc.collect()


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def test_closing_while_the_loop_that_used_the_client_ends(url: str) -> None:
    """That loop cancels what it was given to do, which is not the business of who closes."""
    client = LightningStoreClient(url, spool_dir=None)
    used, end = threading.Event(), threading.Event()

    async def use() -> None:
        await client.statistics()
        used.set()
        end.wait()  # blocks the loop, so that the closing is still to be done when it ends

    async def close() -> None:
        used.wait()
        closing = asyncio.create_task(client.close())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        end.set()
        await closing

    thread = threading.Thread(target=lambda: asyncio.run(use()))
    thread.start()
    asyncio.run(close())
    thread.join()


def test_closing_from_another_loop_while_the_first_still_runs(url: str) -> None:
    client = LightningStoreClient(url, spool_dir=None)
    used, done = threading.Event(), threading.Event()

    async def stay() -> None:
        await _use(client)
        used.set()
        await asyncio.to_thread(done.wait)

    thread = threading.Thread(target=lambda: asyncio.run(stay()))
    thread.start()
    used.wait()
    asyncio.run(client.close())
    assert not _sessions_of(client)
    done.set()
    thread.join()
    gc.collect()


def test_closing_when_the_loop_neither_runs_nor_is_closed(url: str) -> None:
    client = LightningStoreClient(url, spool_dir=None)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(_use(client))
    asyncio.run(client.close())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    gc.collect()


def test_many_threads_with_loops_of_their_own(url: str) -> None:
    client = LightningStoreClient(url, spool_dir=None)
    threads = [threading.Thread(target=lambda: asyncio.run(_use(client))) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert asyncio.run(_use(client)) == 45
    asyncio.run(client.close())


async def test_a_client_works_again_after_close(url: str) -> None:
    client = LightningStoreClient(url, spool_dir=None)
    assert await _use(client) == 5
    await client.close()
    await client.close()
    assert await _use(client) == 10
    await client.close()


async def test_calls_under_way_end_with_the_client(url: str) -> None:
    async with LightningStoreClient(url, spool_dir=None) as client:
        waiting = [
            asyncio.create_task(client.dequeue_rollout("w", wait_seconds=60)),
            asyncio.create_task(client.wait_for_rollouts(rollout_ids=["ro-1"], timeout=60)),
        ]
        rollout = await client.enqueue_rollout(1, rollout_id="ro-1")
        assert (await waiting[0]) is not None
        waiting[0] = asyncio.create_task(client.dequeue_rollout("w", wait_seconds=60))
        waiting.append(asyncio.create_task(client.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=60)))
        await asyncio.sleep(0.1)
    for task in waiting:
        with pytest.raises(StoreClosed, match="was closed while POST"):
            await task


async def test_calls_that_wait_for_a_dead_server_end_with_the_client() -> None:
    async with LightningStoreClient(f"http://127.0.0.1:{free_port()}", spool_dir=None) as client:
        waiting = asyncio.create_task(client.statistics())
        await asyncio.sleep(0.1)
    with pytest.raises(StoreClosed):
        await waiting


async def test_connections_are_bounded_and_long_polls_leave_some_for_the_rest(url: str) -> None:
    async with LightningStoreClient(url, spool_dir=None, max_connections=8) as client:
        polls = [asyncio.create_task(client.dequeue_rollout(f"w{n}", wait_seconds=5)) for n in range(30)]
        await asyncio.sleep(0.2)
        async with asyncio.timeout(2):
            await client.update_worker("w1")
        await client.enqueue_many_rollouts([])
        for task in polls:
            task.cancel()
        await asyncio.gather(*polls, return_exceptions=True)


# --- Processes -------------------------------------------------------------------------------------


async def test_a_pickled_client_is_the_same_client(url: str, tmp_path: Path) -> None:
    async with LightningStoreClient(
        f"{url}/v1/agl",
        api_key="k",
        request_timeout=7.0,
        resilience=Resilience(patience_seconds=9.0),
        spool_dir=tmp_path,
    ) as client:
        await _use(client)
        copy: LightningStoreClient = pickle.loads(pickle.dumps(client))
        assert await _use(copy) == 10
        assert copy.server_address == client.server_address
        assert (copy._caller.timeout_seconds, copy._caller.patience_seconds) == (7.0, 9.0)
        await copy.close()


def _in_child(client: LightningStoreClient) -> None:
    assert asyncio.run(_use(client)) == 10


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_a_child_process(url: str, method: str) -> None:
    client = LightningStoreClient(url, spool_dir=None)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(_use(client))
    context: Any = multiprocessing.get_context(method)
    child = context.Process(target=_in_child, args=(client,))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert loop.run_until_complete(_use(client)) == 15, "the child has left the parent's connections alone"
    loop.run_until_complete(client.close())
    loop.close()


def test_a_forked_child_does_not_touch_the_spool(tmp_path: Path) -> None:
    from spooling_process import numbered

    async def scene() -> None:
        numbers = Resilience(spool_after_seconds=0.05)
        client = LightningStoreClient(f"http://127.0.0.1:{free_port()}", spool_dir=tmp_path, resilience=numbers)
        await client.add_span(numbered("ro-1", "at-1", 0))
        pid = os.fork()
        if pid == 0:
            os._exit(0 if client.health.spool is None or client.health.spool.waiting_spans == 0 else 1)
        assert os.waitpid(pid, 0)[1] == 0
        report = client.health.spool
        assert report is not None
        assert report.waiting_spans == 1
        await client.close(grace_seconds=0.0)

    asyncio.run(scene())


# --- Who and where -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/", "/v1/agl", "/agl/v1", "/agl/v1/"])
async def test_addresses(url: str, prefix: str) -> None:
    async with LightningStoreClient(url + prefix, spool_dir=None) as client:
        assert client.server_address_root == url
        assert client.server_address == f"{url}/v1/agl"
        assert client.otlp_traces_endpoint() == f"{url}/v1/traces"
        assert client.capabilities == {
            "thread_safe": True,
            "async_safe": True,
            "zero_copy": True,
            "otlp_traces": True,
            "plain_spans": True,
        }
        assert await client.get_rollout_by_id("ro-unknown") is None


@pytest.mark.parametrize(
    "bad", ["", "localhost:4747", "ftp://host", "http://", "http://host:port", "http://h/?q=1", None, 5]
)
def test_what_is_no_address(bad: str) -> None:
    with pytest.raises(InvalidValue, match="http://host:4747"):
        LightningStoreClient(bad)


def test_a_key_is_not_shown() -> None:
    client = LightningStoreClient("http://agl:secret@host:4747", api_key="other-secret")
    assert repr(client) == "LightningStoreClient('http://host:4747')"
    with pytest.raises(InvalidValue) as caught:
        LightningStoreClient("ftp://agl:secret@host:4747")
    assert "secret" not in caught.value.message


async def test_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        InMemoryLightningStore() as store,
        LightningStoreServer(store, port=0, api_key="the-right-key") as server,
    ):
        with_user = server.endpoint.replace("http://", "http://agl:the-right-key@")

        async def works(address: str, key: str | None) -> bool:
            async with LightningStoreClient(address, api_key=key, spool_dir=None) as client:
                try:
                    await client.statistics()
                except NotAuthenticated:
                    return False
                return True

        assert not await works(server.endpoint, None)
        assert not await works(server.endpoint, "another-key")
        assert await works(server.endpoint, "the-right-key")
        assert await works(with_user, None)
        assert not await works(with_user, "another-key"), "an argument wins"
        monkeypatch.setenv("AGL_API_KEY", "the-right-key")
        assert await works(server.endpoint, None)
        assert not await works(server.endpoint, "another-key")


async def test_retry_delays_of_0_3_bound_the_tries() -> None:
    client = LightningStoreClient(f"http://127.0.0.1:{free_port()}", retry_delays=(0.01, 0.02), spool_dir=None)
    with pytest.raises(StoreUnreachable, match="3 tries"):
        await client.statistics()
    assert client.health.calls == 3
    await client.close()
