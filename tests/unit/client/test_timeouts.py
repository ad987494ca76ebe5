"""A reply that does not come is given up after the time that the request allows."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from agentlightning import LightningStoreClient
from agentlightning.errors import StoreUnreachable
from agentlightning.http.client import transport
from agentlightning.http.client.calls import Caller, plan_of
from agentlightning.http.client.retry import Resilience, Retrying
from agentlightning.http.client.transport import Transport, WireRequest
from agentlightning.http.routes import CLIENT_ROUTES
from agentlightning.store.sources import TimeOrderedIds
from scripted_transport import ScriptedTransport, silent
from virtual_time import in_virtual_time


def _one_try(inner: Transport, clock: Callable[[], float]) -> Retrying:
    probe = WireRequest("GET", "/health")
    numbers = Resilience(probe_interval_seconds=1e9)
    return Retrying(inner, server="http://s", probe=probe, numbers=numbers, retry_delays=(), monotonic=clock)


@pytest.mark.parametrize("allowed", [0.5, 30.0, 3600.0])
def test_a_reply_in_time_is_delivered(allowed: float) -> None:
    async def scene(clock: Callable[[], float]) -> None:
        inner = ScriptedTransport([silent(allowed - 0.1)], clock)
        reply = await _one_try(inner, clock).send(
            WireRequest("GET", "/", timeout_seconds=allowed, patience_seconds=1e6)
        )
        assert reply.status == 200

    in_virtual_time(scene)


@pytest.mark.parametrize("allowed", [0.5, 30.0, 3600.0])
def test_a_reply_too_late_is_given_up_at_that_moment(allowed: float) -> None:
    async def scene(clock: Callable[[], float]) -> None:
        inner = ScriptedTransport([silent(allowed + 0.1)], clock)
        with pytest.raises(StoreUnreachable, match=f"no reply to GET /x within {allowed:g} s"):
            await _one_try(inner, clock).send(WireRequest("GET", "/x", timeout_seconds=allowed, patience_seconds=1e6))
        assert clock() == pytest.approx(allowed)
        assert inner.cancelled == 1

    in_virtual_time(scene)


@pytest.mark.parametrize("method", sorted(CLIENT_ROUTES))
def test_a_lost_reply_to_any_call_leaves_time_for_another_try(method: str) -> None:
    """Also where the server has long to work. A page is noticed by its silence, which needs a real connection."""

    async def scene(clock: Callable[[], float]) -> None:
        inner = ScriptedTransport([silent(1e9)], clock)
        made = Retrying(
            inner,
            server="http://s",
            probe=WireRequest("GET", "/health"),
            numbers=Resilience(probe_interval_seconds=1e9),
        )
        caller = Caller(made, "/agl/v1", TimeOrderedIds(), timeout_seconds=30.0, patience_seconds=120.0)
        arguments = dict.fromkeys(plan_of(method).route.in_path, "x")
        request = WireRequest(*caller.request(plan_of(method), arguments))
        if request.silence_seconds is not None:
            request = request._replace(timeout_seconds=request.silence_seconds)
        assert (await made.send(request)).status == 200
        assert len(inner.tries) == 2

    in_virtual_time(scene)


# --- Over real connections --------------------------------------------------------------------------

_PAGE = b'{"items":[],"total":0,"limit":-1,"offset":0}'
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(_PAGE)


class _Server:
    """Answers with an empty page.

    Args:
        lost: how many requests get no reply; their connections stay open.
        pause_seconds: between the pieces of a reply.
    """

    def __init__(self, *, lost: int = 0, pause_seconds: float = 0.0) -> None:
        self._lost, self._pause = lost, pause_seconds
        self.requests = 0
        self._connections: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def client(self, request_timeout: float) -> AsyncIterator[LightningStoreClient]:
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        url = "http://{}:{}".format(*server.sockets[0].getsockname())
        async with server, LightningStoreClient(url, spool_dir=None, request_timeout=request_timeout) as client:
            yield client
        await asyncio.gather(*self._connections)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.append(task)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                self.requests += 1
                if self.requests <= self._lost:
                    continue
                for start in range(0, len(_PAGE), 10):
                    writer.write(_HEAD * (start == 0) + _PAGE[start : start + 10])
                    await asyncio.sleep(self._pause)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@pytest.mark.parametrize("method", ["query_rollouts", "query_attempts", "query_spans", "query_resources"])
async def test_a_lost_reply_to_a_query_is_noticed_long_before_the_patience_has_run_out(method: str) -> None:
    server = _Server(lost=1)
    async with server.client(request_timeout=0.5) as client, asyncio.timeout(60.0):
        ids = ["ro-1"] if method in ("query_attempts", "query_spans") else []
        assert list(await getattr(client, method)(*ids)) == []
    assert server.requests == 2


async def test_a_long_page_may_take_longer_than_a_silence() -> None:
    server = _Server(pause_seconds=0.5)
    async with server.client(request_timeout=2.0) as client:
        assert list(await client.query_rollouts()) == []
    assert server.requests == 1


async def test_a_connection_ends_when_the_server_is_gone_without_a_farewell() -> None:
    made = transport._socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 1)))
    with made:
        assert made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert made.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
