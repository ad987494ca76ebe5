"""Requests that are answered without ASGI: their headers are parsed once, and never taken for others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from agentlightning import InMemoryLightningStore
from agentlightning.http.server.direct import KnownHeaders
from agentlightning.http.server.server import LightningStoreServer

BEAT = b'{"heartbeat_stats":{"n":%d}}'


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The paths of the requests that the parser has seen."""
    seen: list[bytes] = []
    on_url = HttpToolsProtocol.on_url

    def note(self: HttpToolsProtocol, url: bytes) -> None:
        seen.append(url)
        on_url(self, url)

    monkeypatch.setattr(HttpToolsProtocol, "on_url", note)
    return seen


class Line:
    """A connection of a client that speaks HTTP by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def reply(self) -> tuple[int, Any]:
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(head.partition(b"content-length: ")[2].partition(b"\r")[0])
        return int(head[9:12]), msgspec.json.decode(await self.reader.readexactly(length))

    async def ask(self, *pieces: bytes) -> tuple[int, Any]:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            await asyncio.sleep(0)
        return await self.reply()


def post(body: bytes, *headers: bytes, path: bytes = b"/agl/v1/workers/w-1") -> bytes:
    lines = [b"POST " + path + b" HTTP/1.1", b"host: localhost", *headers, b"content-length: %d" % len(body)]
    return b"\r\n".join([*lines, b"", body])


@asynccontextmanager
async def serving() -> AsyncIterator[LightningStoreServer]:
    async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0) as server:
        yield server


async def line_to(server: LightningStoreServer) -> Line:
    return Line(*await asyncio.open_connection("127.0.0.1", server.port))


async def test_headers_that_are_known_are_not_parsed_again(parsed: list[bytes]) -> None:
    async with serving() as server:
        for paths in ([b"/agl/v1/workers/w-1"], []):  # another connection knows them, too
            line = await line_to(server)
            for number in (7, 70, 700):
                # The length and the path differ, all else is the same.
                path = b"/agl/v1/workers/w-%d" % (1 if number == 7 else number)
                status, worker = await line.ask(post(BEAT % number, path=path))
                assert (status, worker["heartbeat_stats"]) == (200, {"n": number})
                assert worker["worker_id"] == path.decode().rpartition("/")[2]
            assert parsed == paths
            parsed.clear()
            line.writer.close()


@pytest.mark.parametrize(
    "other",
    [
        post(BEAT % 2, b"x-request-id: mine"),
        post(BEAT % 2).replace(b"content-length: ", b"transfer-encoding: chunked\r\ncontent-length: "),
        post(BEAT % 2).replace(b"content-length: ", b"content-length: 1\r\ncontent-length: "),
        post(BEAT % 2).replace(b"content-length: ", b"content-length:  "),
        post(BEAT % 2).replace(b"HTTP/1.1", b"HTTP/1.0"),
        post(BEAT % 2).replace(b"POST ", b"POST  "),
        post(BEAT % 2, path=b"/agl/v1/workers/w%2D1"),
        post(BEAT % 2, path=b"/agl/v1/workers/w-1?x=1"),
        post(BEAT % 2, b"connection: close"),
        b"\r\n" + post(BEAT % 2),
    ],
)
async def test_whatever_else_is_parsed_as_if_nothing_were_known(other: bytes, parsed: list[bytes]) -> None:
    async with serving() as server:
        known, fresh = await line_to(server), await line_to(server)
        assert (await known.ask(post(BEAT % 1)))[0] == 200
        parsed.clear()
        status, reply = await known.ask(other)
        assert parsed or status == 400
        assert status != 200 or reply["heartbeat_stats"] == {"n": 2}
        assert status == (await fresh.ask(other))[0]
        known.writer.close()
        fresh.writer.close()


async def test_requests_in_pieces_and_several_in_one_piece(parsed: list[bytes]) -> None:
    async with serving() as server:
        line = await line_to(server)
        assert (await line.ask(post(BEAT % 1)))[0] == 200
        two, three, four = (post(BEAT % n) for n in (2, 3, 4))
        for pieces in ((two[:10], two[10:]), (two[:-3], two[-3:])):
            assert (await line.ask(*pieces))[1]["heartbeat_stats"] == {"n": 2}
        assert (await line.ask(three + four))[1]["heartbeat_stats"] == {"n": 3}
        assert (await line.reply())[1]["heartbeat_stats"] == {"n": 4}
        parsed.clear()
        assert (await line.ask(two))[1]["heartbeat_stats"] == {"n": 2}
        assert parsed == []
        line.writer.close()


def test_headers_that_always_differ_do_not_fill_the_memory() -> None:
    known = KnownHeaders()
    for number in range(1000):
        known.keep(b"x-request-id: %d" % number, {b"x-request-id": b"%d" % number})
    known.keep(b"x" * 5000, {b"x": b"x"})
    assert known.find(b"x" * 5000, b"1") is None
    assert known.find(b"x-request-id: 999", b"12") == {b"x-request-id": b"999", b"content-length": b"12"}
    assert sum(known.find(b"x-request-id: %d" % number, b"1") is not None for number in range(1000)) <= 256
