"""The seam between what a client wants to say and how it gets there.

What makes a client sturdy (retries, the circuit breaker, timeouts) is a `Transport` around another one, which speaks
HTTP. Each can be tested alone, with a transport of the test's own inside.
"""

from __future__ import annotations

import asyncio
import io
import socket
import ssl
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol, cast

import aiohttp
from yarl import URL

from agentlightning.errors import StoreUnreachable
from agentlightning.http.routes import Priority
from agentlightning.security.credentials import Credentials
from agentlightning.serving.keepalive import probe_when_idle


class WireRequest(NamedTuple):
    """One request, encoded once and sent as often as it takes."""

    method: str
    target: str
    """Path and query below the server's root, percent-encoded: ``/v1/agl/rollouts?limit=1``."""
    body: bytes | None = None
    priority: Priority = "write"
    timeout_seconds: float = 30.0
    """How long one try may take until the whole reply is there."""
    patience_seconds: float = 120.0
    """How long all tries together may take."""
    waits_while_shed: bool = True
    """Whether to wait when the circuit breaker holds it back; otherwise that is an error at once."""
    long_poll: bool = False
    """Whether the server may sit on it until something happens; then it must not use up the connections."""
    silence_seconds: float | None = None
    """How long the server may send nothing: a long reply takes its time, but a lost one is to be noticed."""


class WireReply(NamedTuple):
    """What came back: any status at all."""

    status: int
    headers: Mapping[str, str]
    """By name, in any case of letters."""
    body: bytes


class Transport(Protocol):
    """Takes a request to the server and brings the reply."""

    async def send(self, request: WireRequest) -> WireReply:
        """The server's reply, whatever its status.

        Raises:
            StoreUnreachable: there was none. Whether the server did what was asked is unknown.
        """
        ...


class Connections(Transport, Protocol):
    """A transport that holds connections."""

    async def close(self) -> None:
        """Let go of them. Later requests open new ones; idempotent."""
        ...


_JSON = {"Content-Type": "application/json"}
_PIECE_BYTES = 2**18
_GONE_SECONDS = 30
_UNBOUNDED = nullcontext()


class _Session(NamedTuple):
    session: aiohttp.ClientSession
    polls: asyncio.Semaphore
    """Long polls hold a connection for long; these are the ones that they may hold."""
    lifetime: AsyncGenerator[aiohttp.ClientSession, None]


class HttpTransport:
    """Sends requests from any thread and any event loop.

    Args:
        root: scheme, host and port of the server, without a slash at the end.
        credentials: finds what the server is shown, and how its certificate is checked. It is asked again when the
            server refuses the key: a run that was begun anew under this address has another one.
        connect_seconds: how long opening a connection may take.
        max_connections: the most there are at once in each event loop; further requests wait for one.

    Raises:
        InvalidValue: a file has no certificates.
    """

    def __init__(
        self,
        root: str,
        credentials: Callable[[], Credentials],
        *,
        connect_seconds: float,
        max_connections: int,
    ) -> None:
        self._root = root
        self._find_credentials = credentials
        self._credentials = credentials()
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_seconds)
        self._connect_seconds = connect_seconds
        self._max_connections = max_connections
        self._ssl: ssl.SSLContext | bool = self._credentials.trust.context() or True
        self._lock = threading.Lock()
        self._sessions: dict[asyncio.AbstractEventLoop, _Session] = {}
        self._urls: dict[str, URL] = {}

    async def send(self, request: WireRequest) -> WireReply:
        """One try, without a limit of time but those for connecting and for silence.

        Raises:
            StoreUnreachable: no connection, or no whole reply.
        """
        shown = self._credentials
        opened = self._sessions.get(asyncio.get_running_loop()) or await self._open()
        body: bytes | io.BytesIO | None = request.body
        if body is not None and len(body) > _PIECE_BYTES:
            body = io.BytesIO(body)  # aiohttp sends it in pieces, between which the event loop does other things
        try:
            async with (
                opened.polls if request.long_poll else _UNBOUNDED,
                opened.session.request(
                    request.method,
                    self._urls.get(request.target) or self._url(request.target),
                    data=body,
                    headers=None if body is None else _JSON,
                    allow_redirects=False,
                    timeout=self._timeout
                    if request.silence_seconds is None
                    else aiohttp.ClientTimeout(
                        total=None, sock_connect=self._connect_seconds, sock_read=request.silence_seconds
                    ),
                ) as response,
            ):
                reply = WireReply(response.status, response.headers, await response.read())
        except aiohttp.SocketTimeoutError as error:
            raise StoreUnreachable(
                f"{self._root} sent nothing for {request.silence_seconds:g} s after {request.method} {request.target}"
            ) from error
        except TimeoutError as error:  # aiohttp's own is one, too
            raise StoreUnreachable(
                f"no connection to {self._root} within {self._connect_seconds:g} s: {error or 'it timed out'}"
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise StoreUnreachable(f"{type(error).__name__}: {error or 'the connection was closed'}") from error
        return await self.send(request) if reply.status == 401 and self._renew(shown) else reply

    def _renew(self, refused: Credentials) -> bool:
        """Whether there is another key by now than the one that the server has refused."""
        with self._lock:
            if self._credentials == refused:
                self._credentials = self._find_credentials()
                for each in self._sessions.values():
                    each.session.headers.update(self._credentials.headers)
        return self._credentials.api_key != refused.api_key

    async def close(self) -> None:
        """Close all sessions, also those of other event loops. Later requests open new ones; idempotent."""
        with self._lock:
            sessions = self._sessions
            self._sessions = {}
        for loop, each in sessions.items():
            if loop is asyncio.get_running_loop():
                await each.lifetime.aclose()
            elif loop.is_running():
                ending = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_end(each), loop))
                await asyncio.wait([ending], timeout=5)
                # If that loop is busy or ends meanwhile, which cancels this, its own end closes the session.
                if not ending.cancel() and not ending.cancelled():
                    ending.result()
            else:
                _let_go(each.session)

    def _url(self, target: str) -> URL:
        """The URL of a target. Those without ids and query are few, so they are parsed once and kept."""
        url = URL(self._root + target, encoded=True)
        if "?" not in target and target.count("/") <= 5 and len(self._urls) <= 256:
            self._urls[target] = url
        return url

    async def _open(self) -> _Session:
        loop = asyncio.get_running_loop()
        lifetime = self._lifetime(loop)
        session = await anext(lifetime)  # does not suspend, so no other task of this loop comes between
        polls = asyncio.Semaphore(max(1, self._max_connections * 3 // 4))
        with self._lock:
            closed = [self._sessions.pop(other) for other in list(self._sessions) if other.is_closed()]
            opened = self._sessions[loop] = _Session(session, polls, lifetime)
        for each in closed:
            _let_go(each.session)
        return opened

    async def _lifetime(self, loop: asyncio.AbstractEventLoop) -> AsyncGenerator[aiohttp.ClientSession, None]:
        """A session that an event loop closes when it ends, as it does with all asynchronous generators."""
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=self._max_connections, ssl=self._ssl, ttl_dns_cache=30, socket_factory=_socket
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": "agentlightning", **self._credentials.headers},
            timeout=self._timeout,
            read_bufsize=2**18,
        )
        try:
            yield session
        finally:
            with self._lock:
                known = self._sessions.get(loop)
                if known is not None and known.session is session:
                    del self._sessions[loop]
            await session.close()


def _socket(address: tuple[Any, ...]) -> socket.socket:
    """A socket for an address as ``getaddrinfo`` gives it, which notices when the server's machine is gone."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    probe_when_idle(made, _GONE_SECONDS)
    return made


async def _end(each: _Session) -> None:
    await each.lifetime.aclose()


def _let_go(session: aiohttp.ClientSession) -> None:
    """Close the session of a loop that does not run, and may never run again."""
    pools = cast("Any", session.connector)
    session.detach()
    if pools is None:
        return
    idle = [protocol for pool in pools._conns.values() for protocol, _ in pool]
    for protocol in [*idle, *pools._acquired]:
        transport = protocol.transport
        if transport is None:
            continue
        try:
            transport.abort()
        except RuntimeError:
            # A closed loop calls nothing back any more, so what abort() would have had it call is called here.
            ended = getattr(transport, "_call_connection_lost", None)
            if ended is not None:
                ended(None)
    pools._conns.clear()
    pools._acquired.clear()
    pools._closed = True
