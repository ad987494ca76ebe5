"""A proxy between a client and a server that does to requests and replies what networks do to them.

It understands as much of HTTP/1.1 as it takes to know where a request and a reply end. It runs in a thread of its
own, so that the loop of the test may be as busy as it likes.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import NamedTuple
from urllib.parse import urlsplit

import httptools

__all__ = ["ChaosProxy", "Fault", "Seen", "chaos_proxy"]


class Fault(Enum):
    """What happens to one request."""

    NONE = auto()
    LOSE_REPLY = auto()
    """The server does what is asked, and its reply is lost."""
    LOSE_REQUEST = auto()
    """The connection is reset before the server has seen anything."""
    CUT_REQUEST = auto()
    """The server gets half of it."""
    CUT_REPLY = auto()
    """The client gets half of it."""
    REPEAT = auto()
    """The server gets it twice; the client gets the second reply."""
    REPEAT_LATER = auto()
    """The client gets its reply, and some time later the server gets the request again."""
    DELAY = auto()
    """Both ways take their time."""


class Seen(NamedTuple):
    """A request, as it is shown to whoever decides about it."""

    method: str
    path: str
    tries: int
    """How often the very same bytes have come by before."""


class _Request(NamedTuple):
    head: Seen
    raw: bytes


class ChaosProxy:
    """Listens on a port of this machine and passes on to another.

    Args:
        target: ``http://host:port`` of the server.
        decide: says what happens to each request; called in the proxy's thread.
        delay_seconds: how long ``DELAY`` and ``REPEAT_LATER`` take.
    """

    def __init__(self, target: str, decide: Callable[[Seen], Fault], delay_seconds: float = 0.05) -> None:
        parts = urlsplit(target)
        assert parts.hostname is not None
        assert parts.port is not None
        self._target = (parts.hostname, parts.port)
        self._decide = decide
        self._delay = delay_seconds
        self._tries = Counter[bytes]()
        self._later: set[asyncio.Task[None]] = set()
        self.happened = Counter[Fault]()
        """How often each fault was done."""
        self.url = ""

    async def serve(self, started: threading.Event, stop: asyncio.Event) -> None:
        """Listen until told to stop."""
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=512)
        port = server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        started.set()
        await stop.wait()
        if self._later:
            await asyncio.wait(self._later)
        server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async for request in self._requests(reader):
                fault = self._decide(request.head)
                self.happened[fault] += 1
                if not await self._do(fault, request.raw, writer):
                    break
        except OSError:
            pass  # one of the two has hung up; so does the proxy
        finally:
            _reset(writer)

    async def _do(self, fault: Fault, request: bytes, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection goes on."""
        match fault:
            case Fault.LOSE_REQUEST:
                return False
            case Fault.CUT_REQUEST:
                await self._ask(request[: len(request) // 2])
                return False
            case Fault.LOSE_REPLY:
                await self._ask(request)
                return False
            case Fault.REPEAT:
                await self._ask(request)
            case Fault.DELAY:
                await asyncio.sleep(self._delay)
            case Fault.REPEAT_LATER:
                task = asyncio.ensure_future(self._repeat_later(request))
                self._later.add(task)
                task.add_done_callback(self._later.discard)
            case _:
                pass
        reply = await self._ask(request)
        if fault is Fault.DELAY:
            await asyncio.sleep(self._delay)
        writer.write(reply[: len(reply) // 2] if fault is Fault.CUT_REPLY else reply)
        await writer.drain()
        return fault is not Fault.CUT_REPLY

    async def _repeat_later(self, request: bytes) -> None:
        await asyncio.sleep(self._delay)
        with contextlib.suppress(OSError):
            await self._ask(request)

    async def _ask(self, request: bytes) -> bytes:
        """The server's whole reply; what there is of it, if the server hangs up."""
        reader, writer = await asyncio.open_connection(*self._target)
        try:
            writer.write(request)
            if not _is_whole(request):
                return b""
            await writer.drain()
            return await _whole_reply(reader)
        finally:
            writer.close()

    async def _requests(self, reader: asyncio.StreamReader) -> AsyncIterator[_Request]:
        while True:
            watch = _Watch()
            parser = httptools.HttpRequestParser(watch)
            raw = b""
            while not watch.complete:
                data = await reader.read(2**18)
                if not data:
                    return
                raw += data
                parser.feed_data(data)
            self._tries[raw] += 1
            method = parser.get_method().decode()
            yield _Request(Seen(method, watch.url.decode(), self._tries[raw] - 1), raw)


class _Watch:
    """Notes when a message has ended."""

    complete = False
    url = b""

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_message_complete(self) -> None:
        self.complete = True


def _is_whole(request: bytes) -> bool:
    watch = _Watch()
    httptools.HttpRequestParser(watch).feed_data(request)
    return watch.complete


async def _whole_reply(reader: asyncio.StreamReader) -> bytes:
    watch = _Watch()
    parser = httptools.HttpResponseParser(watch)
    raw = b""
    while not watch.complete:
        data = await reader.read(2**18)
        if not data:
            break
        raw += data
        parser.feed_data(data)
    return raw


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection as a crash does, so that nobody takes it for a polite goodbye."""
    connection: socket.socket | None = writer.get_extra_info("socket")
    if connection is not None:
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextmanager
def chaos_proxy(target: str, decide: Callable[[Seen], Fault], delay_seconds: float = 0.05) -> Iterator[ChaosProxy]:
    """A proxy that runs for the length of the block."""
    proxy = ChaosProxy(target, decide, delay_seconds)
    started = threading.Event()
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        stop = asyncio.Event()
        running.append((asyncio.get_running_loop(), stop))
        await proxy.serve(started, stop)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="chaos-proxy")
    thread.start()
    try:
        assert started.wait(10)
        yield proxy
    finally:
        loop, stop = running[0]
        loop.call_soon_threadsafe(stop.set)
        thread.join()
