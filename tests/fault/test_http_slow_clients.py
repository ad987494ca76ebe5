"""Clients that are slow on purpose, or too many, and a server that is told to stop while they are there."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agentlightning.http.client.client import LightningStoreClient
from agentlightning.http.server.limits import ServerLimits
from agentlightning.http.server.server import LightningStoreServer
from agentlightning.store.sqlite.store import InMemoryLightningStore, SqliteLightningStore
from agl_store import AglStore
from scenes import enqueued

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

HALF_HEADERS = b"POST /agl/v1/rollouts HTTP/1.1\r\nhost: 127.0.0.1\r\nx-slow: "
HALF_BODY = (
    b"POST /agl/v1/spans HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: 5000\r\n\r\n{"
)
HALF_LARGE_BODY = HALF_BODY.replace(b"5000", b"5000000")


@asynccontextmanager
async def _open(port: int, *parts: bytes) -> AsyncIterator[list[Streams]]:
    """Connections, each of which has sent one of the parts."""
    opened: list[Streams] = []
    try:
        for part in parts:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            opened.append((reader, writer))
            writer.write(part)
        for _, writer in opened:
            await writer.drain()
        yield opened
    finally:
        for _, writer in opened:
            writer.close()


def _halves(number: int) -> list[bytes]:
    return [(HALF_HEADERS, HALF_BODY, HALF_LARGE_BODY, b"")[each % 4] for each in range(number)]


@pytest.mark.parametrize("part", [b"", HALF_HEADERS, HALF_BODY, HALF_LARGE_BODY])
async def test_a_request_that_does_not_arrive_is_ended(part: bytes) -> None:
    limits = ServerLimits(header_seconds=0.3, body_seconds=0.3)
    async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0, limits=limits) as server:
        async with _open(server.port, part) as [(reader, writer)]:
            began = time.monotonic()
            for _ in range(3 if part else 0):  # a byte now and then does not help
                await asyncio.sleep(0.05)
                writer.write(b" ")
            answer = await asyncio.wait_for(reader.read(), 10)
            assert time.monotonic() - began < 5
        assert answer.startswith(b"HTTP/1.1 408")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "bad_request"


async def test_headers_without_end_are_ended() -> None:
    async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0) as server:
        async with _open(server.port, b"GET / HTTP/1.1\r\nx: " + b"a" * 200_000) as [(reader, _)]:
            answer = await asyncio.wait_for(reader.read(), 10)
        assert answer.startswith(b"HTTP/1.1 431")


async def test_headers_that_are_too_large_in_two_pieces_are_refused_once() -> None:
    part = b"GET / HTTP/1.1\r\nx: " + b"a" * 60_000
    async with (
        InMemoryLightningStore() as store,
        LightningStoreServer(store, port=0) as server,
        _open(server.port, part) as [(reader, writer)],
    ):
        await asyncio.sleep(0.1)  # if both arrive as one, the test tells nothing, but does not fail
        writer.write(b"a" * 10_000 + b"\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), 10)
    assert answer.startswith(b"HTTP/1.1 431")
    assert answer.count(b"HTTP/1.1 431") == 1


@pytest.mark.parametrize("asked", [b"GET /agl/v1/health", b"POST /agl/v1/workers/w-1"])
async def test_headers_that_come_whole_are_bounded_as_well(asked: bytes) -> None:
    async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0) as server:
        for size, status in ((60_000, b"200"), (66_000, b"431")):
            head = asked + b" HTTP/1.1\r\nhost: localhost\r\nx: "
            async with _open(server.port, head + b"a" * size + b"\r\n\r\n") as [(reader, _)]:
                assert (await asyncio.wait_for(reader.readline(), 10)).split()[1] == status


@pytest.mark.parametrize(
    ("part", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"POST /agl/v1/spans HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /agl/v1/spans HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        (HALF_HEADERS, 408),
    ],
)
async def test_whoever_is_sent_away_is_told_why_and_by_which_id(
    part: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "agentlightning")
    limits = ServerLimits(header_seconds=0.3)
    async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0, limits=limits) as server:
        async with _open(server.port, part) as [(reader, _)]:
            head, _, body = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")
        assert b'agl_http_requests_total{route="other",status="%d"} 1.0' % status in await asyncio.to_thread(
            _get, server.port, "/metrics"
        )
    problem = json.loads(body)
    assert (problem["status"], problem["code"]) == (status, "bad_request")
    line, *headers = head.split(b"\r\n")
    assert line == b"HTTP/1.1 %d %b" % (status, problem["title"].encode())
    assert b"x-request-id: " + problem["request_id"].encode() in headers
    assert problem["request_id"] in {getattr(record, "request_id", None) for record in caplog.records}


async def test_a_client_that_does_not_read_its_reply_is_cut_off() -> None:
    """What it asked for would stay in memory."""
    limits = ServerLimits(body_seconds=0.3)
    ask = b"GET /agl/v1/rollouts?limit=-1 HTTP/1.1\r\nhost: localhost\r\n\r\n"
    async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0, limits=limits) as server:
        await enqueued(store, *["x" * 600] * 10_000)
        async with _open(server.port, ask) as [(reader, _)]:  # one that reads gets everything
            assert (await asyncio.wait_for(reader.readline(), 10)).split()[1] == b"200"
            size = 0
            while size < 6_000_000:
                size += len(await asyncio.wait_for(reader.read(2**18), 10))
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(("127.0.0.1", server.port))
            deaf.sendall(ask)
            async with asyncio.timeout(30):
                while b"agl_http_connections 1.0" not in await asyncio.to_thread(_get, server.port, "/metrics"):
                    await asyncio.sleep(0.05)


async def test_requests_that_are_not_done_in_time_end_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    limits = ServerLimits(drain_seconds=0.2)
    async with (
        InMemoryLightningStore() as store,
        LightningStoreServer(store, port=0, limits=limits) as server,
        _open(server.port, HALF_LARGE_BODY),
    ):
        assert server.app is not None
        while not server.app.load.requests:
            await asyncio.sleep(0.01)
        await server.stop()
    assert "1 requests did not end" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_client_that_asks_first_is_told_to_go_on() -> None:
    """``Expect: 100-continue``, as curl sends it with large bodies."""
    body = b'{"rollouts":[{"input":1,"rollout_id":"ro-1"}]}'
    head = b"POST /agl/v1/queues/rollouts/enqueue HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\n"
    async with (
        InMemoryLightningStore() as store,
        LightningStoreServer(store, port=0) as server,
        _open(server.port, head + b"content-length: %d\r\n\r\n" % len(body)) as [(reader, writer)],
    ):
        told = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        assert told.startswith(b"HTTP/1.1 100")
        writer.write(body)
        assert (await asyncio.wait_for(reader.readline(), 10)).startswith(b"HTTP/1.1 201")


async def test_too_many_connections_from_one_address() -> None:
    limits = ServerLimits(connections_per_address=5)
    async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0, limits=limits) as server:
        async with _open(server.port, *[b""] * 5), _open(server.port, b"") as [(reader, _)]:
            answer = await asyncio.wait_for(reader.read(), 10)
            assert answer.startswith(b"HTTP/1.1 503")
            assert b"retry-after: 1" in answer
        # They have left; the server learns of it a moment later.
        while not (await asyncio.to_thread(_answer_to, server.port)).startswith(b"HTTP/1.1 200"):
            await asyncio.sleep(0.02)


async def test_pipelined_requests_are_answered_in_order() -> None:
    """Hot ones and others, in one piece and in many."""

    def post(path: str, body: bytes) -> bytes:
        head = f"POST /agl/v1{path} HTTP/1.1\r\nhost: x.localhost\r\ncontent-length: {len(body)}\r\n\r\n"
        return head.encode() + body

    requests = [
        post("/queues/rollouts/enqueue", b'{"rollouts":[{"input":1,"rollout_id":"ro-1"}]}'),
        b"GET /agl/v1/rollouts/ro-1 HTTP/1.1\r\nhost: x.localhost\r\n\r\n",
        post("/queues/rollouts/dequeue", b'{"request_id":"rq-1"}'),
        post("/queues/rollouts/dequeue", b""),
        b"GET /nothing HTTP/1.1\r\nhost: x.localhost\r\n\r\n",
        post("/workers/w-1", b"{}"),
        b"GET /agl/v1/health HTTP/1.1\r\nhost: x.localhost\r\nconnection: close\r\n\r\n",
    ]
    for size in (10_000, 37):
        async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0) as server:
            stream = b"".join(requests)
            async with _open(server.port, b"") as [(reader, writer)]:
                for start in range(0, len(stream), size):
                    writer.write(stream[start : start + size])
                    await writer.drain()
                answer = await asyncio.wait_for(reader.read(), 10)
        statuses = [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]]
        assert statuses == [b"201", b"200", b"200", b"200", b"404", b"200", b"200"]


async def _honest_latencies(endpoint: str, number: int) -> list[float]:
    """Seconds that each call of a client takes that does its work meanwhile."""
    taken: list[float] = []
    async with LightningStoreClient(endpoint, spool_dir=None) as client:
        for each in range(number):
            began = time.perf_counter()
            await client.update_worker("honest", {"n": each})
            taken.append(time.perf_counter() - began)
    return sorted(taken)


@pytest.mark.parametrize("slow", [120, pytest.param(500, marks=pytest.mark.slow)])
async def test_slow_connections_hold_up_nobody_and_no_end(tmp_path: Path, slow: int) -> None:
    path = tmp_path / "store.db"
    with AglStore(database=path) as agl:
        async with _open(agl.port, *_halves(slow)):
            taken = await _honest_latencies(agl.endpoint, 200)
            assert taken[int(len(taken) * 0.99)] < 0.25
            began = time.monotonic()
            assert await asyncio.to_thread(agl.terminate) == 0
            assert time.monotonic() - began < 20
    async with SqliteLightningStore(path) as store:
        worker = await store.get_worker_by_id("honest")
        assert worker is not None
        assert worker.heartbeat_stats == {"n": 199}


async def test_a_server_that_stops_answers_those_who_wait(tmp_path: Path) -> None:
    """A claim that waits is told to come again; what was acknowledged is in the file, without a log beside it."""
    path = tmp_path / "store.db"
    with AglStore(database=path) as agl:
        async with LightningStoreClient(agl.endpoint, spool_dir=None) as client:
            ids = await enqueued(client, *range(20))
        body = b'{"wait_seconds":60.0,"request_id":"rq-1","worker_id":"w"}'
        wait = b'{"rollout_ids":["%b"],"timeout":60.0}' % ids[0].encode()
        async with LightningStoreClient(agl.endpoint, spool_dir=None) as client:
            for _ in ids:
                assert await client.dequeue_rollout("w") is not None
        requests = [
            b"POST /agl/v1%b HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%b" % (target, len(each), each)
            for target, each in ((b"/queues/rollouts/dequeue", body), (b"/waits/rollouts", wait))
        ]
        async with _open(agl.port, *requests) as waiting:
            while b"agl_http_connections 3" not in await asyncio.to_thread(_get, agl.port, "/metrics"):
                await asyncio.sleep(0.02)
            ended = asyncio.create_task(asyncio.to_thread(agl.terminate))
            for reader, _ in waiting:
                answer = await asyncio.wait_for(reader.read(), 10)
                assert answer.startswith(b"HTTP/1.1 503"), answer
                assert b"retry-after: 1" in answer
            assert await ended == 0
    assert not path.with_name("store.db-wal").exists()
    async with SqliteLightningStore(path) as store:
        assert (await store.query_rollouts()).total == 20


async def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with AglStore(database=tmp_path / "store.db") as agl:
        async with _open(agl.port, HALF_LARGE_BODY):
            agl.process.terminate()
            while _is_listening(agl.port):
                await asyncio.sleep(0.02)
            agl.process.terminate()
            assert await asyncio.to_thread(agl.process.wait, 5) == -15


def _answer_to(port: int) -> bytes:
    try:
        return _get(port, "/agl/v1/health")
    except ConnectionResetError:  # the server has closed, having answered before it was asked
        return b""


def _is_listening(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            return True
    except OSError:
        return False


def _get(port: int, path: str) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n".encode())
        parts: list[bytes] = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)
