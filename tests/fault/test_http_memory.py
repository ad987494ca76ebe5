"""What clients make a server hold: requests that wait, and replies that are not read, are within its bounds."""

from __future__ import annotations

import asyncio
import json
import select
import socket
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any

import pytest
from uvicorn.protocols.http.flow_control import FlowControl

from agentlightning.errors import StoreUnavailable
from agentlightning.http.server import endpoints
from agentlightning.http.server.app import StoreApp
from agentlightning.http.server.limits import Load, ServerLimits
from agentlightning.http.server.server import LightningStoreServer
from agentlightning.serving.connections import PairedFlow
from agentlightning.store.sqlite.store import InMemoryLightningStore
from agentlightning.types import EnqueueRolloutRequest

_MIB = 1024 * 1024
_JUNK = 8 * _MIB


@contextmanager
def _allocated() -> Iterator[None]:
    """Within the block, ``tracemalloc`` counts what Python has allocated and not freed."""
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


@asynccontextmanager
async def _asked(port: int, path: str, body: bytes) -> AsyncIterator[asyncio.StreamReader]:
    """A request that was sent whole."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"POST /agl/v1%b HTTP/1.1\r\nhost: localhost\r\ncontent-length: " % path.encode())
        writer.write(b"%d\r\n\r\n" % len(body) + body)
        del body
        await writer.drain()
        yield reader
    finally:
        writer.close()


async def _until_it_waits(app: StoreApp) -> None:
    async with asyncio.timeout(30):
        while not app._waits:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/queues/rollouts/dequeue", {"worker_id": "w", "request_id": "rq-1", "wait_seconds": 60.0}),
        ("/waits/rollouts", {"rollout_ids": ["ro-1"], "timeout": 60.0}),
    ],
)
async def test_a_request_that_waits_does_not_hold_its_body(path: str, fields: dict[str, object]) -> None:
    async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0) as server:
        await store.start_rollout(1, rollout_id="ro-1")
        assert server.app is not None
        with _allocated():
            before = tracemalloc.get_traced_memory()[0]
            body = json.dumps({**fields, "junk": "x" * _JUNK}).encode()
            assert tracemalloc.get_traced_memory()[0] - before > _JUNK  # a body that is held is seen
            asked = _asked(server.port, path, body)
            del body
            async with asked:
                await _until_it_waits(server.app)
                assert tracemalloc.get_traced_memory()[0] - before < _MIB


# --- Replies that are not read --------------------------------------------------------------------------


@contextmanager
def _deaf(port: int, *parts: bytes) -> Iterator[socket.socket]:
    """A client that has sent this and reads nothing, with a small buffer of its system."""
    with socket.socket() as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        made.settimeout(30)
        made.connect(("127.0.0.1", port))
        for part in parts:
            made.sendall(part)
        yield made


def _post(path: str, body: bytes, *headers: bytes) -> bytes:
    lines = [b"POST /agl/v1%b HTTP/1.1" % path.encode(), b"host: localhost", b"content-length: %d" % len(body)]
    return b"\r\n".join([*lines, *headers]) + b"\r\n\r\n" + body


async def _until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not happened():
            await asyncio.sleep(0.01)


def _statuses(answers: bytes) -> list[bytes]:
    return [part[:3] for part in answers.split(b"HTTP/1.1 ")[1:]]


def _answered(port: int) -> int:
    """How many reads of a rollout the server has answered."""
    route = rb'requests_total{route="POST /agl/v1/rollouts/{rollout_id}",status="200"} '
    return int(_get(port, "/metrics").partition(route)[2][:1])


LARGE = 3 * _MIB


@pytest.mark.parametrize(("direct", "paused"), [(True, True), (False, True), (True, False)])
async def test_a_client_that_does_not_read_gets_no_second_reply(
    direct: bool, paused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sends six requests at once. Without the pause, six large replies would be in memory."""
    if not paused:
        monkeypatch.setattr(PairedFlow, "pause_writing", FlowControl.pause_writing)
    path = "/rollouts/ro-1" + ("" if direct else "?x=1")
    asked = _post(path, b'{"metadata":{}}')
    async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0) as server:
        await store.enqueue_rollout("x" * LARGE, rollout_id="ro-1")
        assert server.app is not None
        load = server.app.load
        with _deaf(server.port, asked) as client:
            await _until(lambda: load.bytes > 10_000)
            for _ in range(5):
                client.sendall(asked)
                answered = await asyncio.to_thread(_answered, server.port)  # it has come before this
            while not paused and answered <= 2:  # the control: without the pause it goes on
                answered = await asyncio.to_thread(_answered, server.port)
            assert (answered <= 2) == paused
            assert load.bytes < 2.5 * LARGE
            if paused:  # whoever begins to read gets all of them
                left, tail = 6, b""
                while left:
                    tail = tail[-11:] + await asyncio.to_thread(client.recv, 2**20)
                    left -= tail.count(b"HTTP/1.1 200")
        await _until(lambda: load.bytes == 0)


async def test_replies_that_nobody_reads_are_within_the_bounds() -> None:
    limits = ServerLimits(in_flight_bytes=LARGE + _MIB)
    asked = _post("/rollouts/ro-1", b'{"metadata":{}}')
    async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0, limits=limits) as server:
        await store.enqueue_rollout("x" * LARGE, rollout_id="ro-1")
        assert server.app is not None
        load = server.app.load
        with ExitStack() as deaf:
            for _ in range(12):
                deaf.enter_context(_deaf(server.port, asked))
            await _until(lambda: load.bytes > _MIB and not load.requests)  # a part of each is in the system's buffers
            assert load.bytes <= limits.in_flight_bytes
            refused = await asyncio.to_thread(_exchange, server.port, _post("/rollouts/ro-1", b'{"metadata":{}}'))
            assert _statuses(refused) == [b"503"]
            problem = json.loads(refused.partition(b"\r\n\r\n")[2])
            assert problem["code"] == "store_unavailable"
            assert "send the same request again" in problem["detail"]
            beat = await asyncio.to_thread(_exchange, server.port, _post("/workers/w-1", b"{}"))
            assert _statuses(beat) == [b"200"]
        await _until(lambda: load.bytes == 0)
        assert _statuses(await asyncio.to_thread(_exchange, server.port, asked)) == [b"200"]


@pytest.mark.parametrize("counted", [True, False])
async def test_pages_that_nobody_reads_are_within_the_bounds(counted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has 4 MB; not counted, all twelve would be in memory."""
    limits = ServerLimits(in_flight_bytes=10 * _MIB)
    asked = b"GET /agl/v1/rollouts?limit=-1 HTTP/1.1\r\nhost: localhost\r\n\r\n"
    if not counted:
        monkeypatch.setattr(Load, "reply", lambda *_: None)
    async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0, limits=limits) as server:
        await store.enqueue_many_rollouts([EnqueueRolloutRequest(input="x" * 20_000) for _ in range(200)])
        assert server.app is not None
        load = server.app.load
        with ExitStack() as deaf:
            for _ in range(12):
                deaf.enter_context(_deaf(server.port, asked))
            await _until(lambda: load.requests == (2 if counted else 12))
            refused = _statuses(await asyncio.to_thread(_exchange, server.port, asked))
            assert (refused[0] in (b"429", b"503")) == counted
            assert load.bytes <= limits.in_flight_bytes
        await _until(lambda: load.bytes == load.requests == 0)


@pytest.mark.parametrize("part", [_post("/workers/w-1", b" " * 60_000)[:-1], b"GET / HTTP/1.1\r\nx: " + b"x" * 60_000])
async def test_requests_that_are_not_whole_are_counted_and_refused_when_they_are_too_many(part: bytes) -> None:
    limits = ServerLimits(in_flight_bytes=_MIB)
    async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0, limits=limits) as server:
        assert server.app is not None
        load = server.app.load
        with ExitStack() as opened:
            halves = [opened.enter_context(_deaf(server.port, part[:-2], part[-2:])) for _ in range(40)]
            await _until(lambda: bool(select.select(halves, [], [], 0)[0]))
            await asyncio.sleep(0.2)
            answered = select.select(halves, [], [], 0)[0]
            assert answered
            assert {(await asyncio.to_thread(each.recv, 65536))[9:12] for each in answered} == {b"503"}
            assert load.bytes <= 2 * _MIB
        await _until(lambda: load.bytes == 0)


def _exchange(port: int, request: bytes) -> bytes:
    """The whole reply to a request."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(request.replace(b"\r\n", b"\r\nconnection: close\r\n", 1))
        received = b""
        while part := connection.recv(2**20):
            received += part
    return received


def _get(port: int, path: str) -> bytes:
    return _exchange(port, f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())


@pytest.mark.parametrize("direct", [True, False])
async def test_a_long_list_goes_out_in_parts_whichever_way_it_goes(direct: bool) -> None:
    """200 rollouts of 2 KB; the reply is 100 times as long as the longest part may be."""
    async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0) as server:
        rollouts = [{"rollout_id": f"ro-{n}", "input": "x" * 2_000, "metadata": {"n": n}} for n in range(200)]
        await store.enqueue_many_rollouts([EnqueueRolloutRequest(**each) for each in rollouts])
        claim = _post("/queues/rollouts/dequeue" + ("" if direct else "?x=1"), b'{"limit":200}')
        answer = await asyncio.to_thread(_exchange, server.port, claim)
        head, _, chunks = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert b"transfer-encoding: chunked" in head.lower()
        body = b""
        while chunks:
            size, _, rest = chunks.partition(b"\r\n")
            assert int(size, 16) < 70_000
            body, chunks = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        assert [each["rollout_id"] for each in json.loads(body)] == [f"ro-{n}" for n in range(200)]


async def test_a_long_reply_that_fails_in_the_middle_is_not_taken_for_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    made = endpoints.list_parts

    def broken(items: Any) -> Iterator[bytes]:
        parts = made(items)
        yield next(parts)
        yield next(parts)
        raise StoreUnavailable("the disk is gone")

    monkeypatch.setattr(endpoints, "list_parts", broken)
    async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0) as server:
        await store.enqueue_many_rollouts([EnqueueRolloutRequest(input="x" * 2_000) for _ in range(200)])
        for path in ("/queues/rollouts/dequeue", "/queues/rollouts/dequeue?x=1"):
            answer = await asyncio.to_thread(_cut_off, server.port, _post(path, b'{"limit":100}'))
            assert answer.startswith(b"HTTP/1.1 200")
            assert not answer.endswith(b"0\r\n\r\n")
        assert server.app is not None
        await _until(lambda: server.app is not None and server.app.load.bytes == server.app.load.requests == 0)


def _cut_off(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(request)
        received = b""
        with suppress(ConnectionError):
            while part := connection.recv(2**20):
                received += part
    return received
