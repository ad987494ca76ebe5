"""A server in a thread: its start, its errors and its end."""

from __future__ import annotations

import asyncio
import socket
import urllib.request
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from typing import Any

import pytest

from agentlightning.serving.connections import BoundedConnection, ConnectionBounds
from agentlightning.serving.server import ThreadedServer


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers everything with "ok"; ``/slow`` after a while."""
    if scope["path"] == "/slow":
        await asyncio.sleep(0.3)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def served(**more: Any) -> ThreadedServer:
    return ThreadedServer(partial(nullcontext, app), "127.0.0.1", 0, name="test-server", **more)


def get(server: ThreadedServer, path: str = "/") -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=10) as reply:
        return reply.read()


def test_it_answers_from_start_to_stop_and_the_port_is_free_after() -> None:
    server = served()
    assert not server.is_running
    port = server.bind()
    assert port == server.bind() == server.port
    server.start()
    assert server.is_running
    assert get(server) == b"ok"
    server.stop()
    server.stop()
    assert not server.is_running
    socket.create_server(("127.0.0.1", port)).close()


def test_connections_end_when_the_client_is_gone_without_a_farewell() -> None:
    seen: list[list[int]] = []

    class Noting(BoundedConnection):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            accepted = transport.get_extra_info("socket")
            seen.append(
                [
                    accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                    accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                    accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
                ]
            )
            super().connection_made(transport)

    server = served(connection=Noting)
    server.start()
    assert get(server) == b"ok"
    server.stop()
    assert seen == [[1, 8, 20_000]]


def test_a_port_that_was_only_reserved_is_given_back() -> None:
    server = served()
    port = server.bind()
    server.stop()
    socket.create_server(("127.0.0.1", port)).close()


def test_a_start_after_the_stop_ends_at_once() -> None:
    server = served()
    server.stop()
    server.start()
    server.stop()
    assert not server.is_running
    socket.create_server(("127.0.0.1", server.port)).close()


def test_a_port_that_is_taken_is_told_to_who_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port: int = other.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} on 127.0.0.1 is taken"):
            ThreadedServer(partial(nullcontext, app), "127.0.0.1", port, name="test-server").start()


def test_what_the_application_raises_is_told_to_who_starts_or_stops() -> None:
    @asynccontextmanager
    async def failing(at: str) -> AsyncGenerator[Any]:
        if at == "start":
            raise LookupError("no model")
        yield app
        raise LookupError("not saved")

    server = ThreadedServer(partial(failing, "start"), "127.0.0.1", 0, name="test-server")
    with pytest.raises(LookupError, match="no model"):
        server.start()
    server.stop()
    server = ThreadedServer(partial(failing, "stop"), "127.0.0.1", 0, name="test-server")
    server.start()
    with pytest.raises(LookupError, match="not saved"):
        server.stop()


async def test_a_request_in_progress_is_finished() -> None:
    drained: list[bool] = []
    server = served(on_drain=lambda: drained.append(True))
    await asyncio.to_thread(server.start)
    slow = asyncio.create_task(asyncio.to_thread(get, server, "/slow"))
    while not server.open_connections:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)  # the request is on its way to the application
    await asyncio.to_thread(server.stop)
    assert await slow == b"ok"
    assert drained == [True]


async def test_connections_beyond_the_bound_are_refused() -> None:
    server = served(bounds=ConnectionBounds(connections=1))
    await asyncio.to_thread(server.start)
    try:
        _, first = await asyncio.open_connection("127.0.0.1", server.port)
        while not server.open_connections:
            await asyncio.sleep(0.01)
        reader, second = await asyncio.open_connection("127.0.0.1", server.port)
        reply = await asyncio.wait_for(reader.read(), 10)
        assert reply.startswith(b"HTTP/1.1 503")
        assert b"takes no more" in reply
        for writer in (first, second):
            writer.close()
            await writer.wait_closed()
    finally:
        await asyncio.to_thread(server.stop)
