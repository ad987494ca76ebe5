"""One request and its reply, as ASGI gives them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import aclosing
from time import monotonic
from typing import Any, NamedTuple

from agentlightning.errors import AgentLightningError, BadRequest, TooLarge, UnsupportedMedia
from agentlightning.http.codec import PROBLEM_TYPE, encode_problem
from agentlightning.http.routes import Priority
from agentlightning.serving.connections import BYTES_PER_SECOND
from agentlightning.telemetry.logs import WorkContext

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]

TRANSPORT = "agentlightning.transport"
"""The extension of ASGI under which a connection offers its transport."""
_log = logging.getLogger(__name__)
_ONCE = (b"host", b"content-length", b"content-type", b"content-encoding", b"authorization", b"origin")


class Reply(NamedTuple):
    """What goes back."""

    status: int
    body: bytes = b""
    headers: Sequence[Header] = ()
    parts: AsyncGenerator[bytes] | None = None
    """The body in parts, where it is large. Each is made when the client has read those before."""
    content_type: bytes = b"application/json"
    held_bytes: int = 0
    """Bytes of the records that ``parts`` are made of, which are in memory until the last part is sent."""


class ClientGone(Exception):
    """The client disconnected, so nobody will read the reply."""


class Exchange(WorkContext):
    """A request that is being answered.

    Args:
        scope, receive, send: of ASGI 3.0, for HTTP.
    """

    request_id: str = ""  # pyright: ignore[reportIncompatibleVariableOverride] - set before anything else is done
    ids: dict[str, str] | None = None
    query: bytes = b""
    body: bytes | None = None
    """The whole body, where it is there already."""
    may_wait = False
    """Whether this is a long poll, whose duration is not the server's and is not logged as slow."""
    priority: Priority = "read"
    held = 0
    """The bytes that ``Load`` counts for it."""
    is_counted = False
    """Whether ``Load`` counts it as a request that is being worked on."""
    extra_headers: Sequence[Header] = ()
    """Headers of the reply, whatever it is."""
    reply_has_begun = False
    """Whether a part of the reply was sent, so that no other can be."""
    read_seconds = 30.0
    """How long its client may take to read a reply, in addition to a second for every 64 KiB of it."""
    task: asyncio.Task[None] | None = None
    tasks: set[asyncio.Task[None]] | None = None
    """What answers it, and where that is to be taken out at the end."""

    def __init__(self, scope: Message, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._transport: asyncio.Transport | None = scope.get("extensions", {}).get(TRANSPORT)
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query = scope["query_string"]
        self.client: Sequence[Any] | None = scope.get("client")
        """Address and port of the other side."""
        self.raw_headers: Sequence[Header] = scope["headers"]
        self.headers: dict[bytes, bytes] = dict(self.raw_headers)

    # --- The request -----------------------------------------------------------------------------

    def fields(self) -> dict[str, str]:
        self.traceparent = self.headers.get(b"traceparent", b"").decode("latin-1")
        return super().fields()

    def check_headers(self) -> None:
        """Raise ``BadRequest`` if a header that decides how the request is handled is given more than once.

        A proxy in front may have read the other one of the two (request smuggling).
        """
        names = [name for name, _ in self.raw_headers]
        for name in _ONCE:
            if names.count(name) > 1:
                raise BadRequest(f"the header {name.decode()} is given more than once")

    def declared_size(self, limit: int) -> int:
        """The body's size according to its header; 0 if there is no such header.

        Raises:
            TooLarge: it is above the limit.
        """
        size = int(self.headers.get(b"content-length", 0))  # the HTTP parser refuses anything but digits
        if size > limit:
            self.close_after()  # the client may be sending the body already, and nobody reads it
            raise TooLarge(f"the body has {size:,} bytes; the server takes {limit:,} at a time")
        return size

    def check_json(self) -> None:
        """Raise ``UnsupportedMedia`` if a header says that the body is not JSON."""
        if self.headers.get(b"content-length") == b"0":
            return  # no body; clients of 0.3 declare an absent body as application/octet-stream
        given = self.headers.get(b"content-type", b"application/json")
        media, _, parameters = given.lower().partition(b";")
        charset = parameters.strip()
        if media.strip() != b"application/json" or charset not in (b"", b"charset=utf-8", b'charset="utf-8"'):
            raise UnsupportedMedia(f"the body is {given[:80].decode('latin-1')!r}; send application/json in UTF-8")
        encoding = self.headers.get(b"content-encoding", b"identity").lower()
        if encoding != b"identity":
            raise UnsupportedMedia(f"the body is encoded as {encoding[:80].decode('latin-1')!r}; send it as it is")

    async def body_parts(self) -> AsyncIterator[bytes]:
        """The parts of the body as they arrive. Raises ``ClientGone`` if the connection ends before the body does."""
        more = True
        while more:
            message = await self._receive()
            if message["type"] != "http.request":
                raise ClientGone
            more = message.get("more_body", False)
            yield message.get("body", b"")

    def when_gone(self, tell: Callable[[], None]) -> Callable[[], object]:
        """Call ``tell`` when the client disconnects; returns a function that cancels this."""

        async def listen() -> None:
            while (await self._receive())["type"] != "http.disconnect":
                pass
            tell()

        return asyncio.ensure_future(listen()).cancel

    # --- The reply -------------------------------------------------------------------------------

    def problem(self, error: AgentLightningError, status: int | None = None, headers: Sequence[Header] = ()) -> Reply:
        """The reply that refuses the request."""
        status = error.status if status is None else status
        body = encode_problem(error, self.request_id, status=status)
        return Reply(status, body, headers, content_type=PROBLEM_TYPE.encode())

    def close_after(self) -> None:
        """Close the connection after this reply."""
        self.extra_headers = (*self.extra_headers, (b"connection", b"close"))

    async def send(self, reply: Reply) -> int:
        """Send the whole reply; returns its status."""
        headers = [(b"content-type", reply.content_type), *reply.headers]
        headers += [(b"x-request-id", self.request_id.encode()), *self.extra_headers]
        if reply.parts is None:
            headers.append((b"content-length", b"%d" % len(reply.body)))
        await self._tell({"type": "http.response.start", "status": reply.status, "headers": headers})
        if reply.parts is not None:
            gone: list[bool] = []
            forget = self.when_gone(lambda: gone.append(True))
            try:
                await self._send_parts(reply.parts, self._send_part, lambda: bool(gone))
            finally:
                forget()
        await self._tell({"type": "http.response.body", "body": reply.body})
        return reply.status

    async def _tell(self, message: Message) -> None:
        """Send a message of ASGI. A transport that has failed is closed some time before the connection knows that, and
        takes no more. Raises ``ClientGone`` then."""
        if self._transport is not None and self._transport.is_closing():
            raise ClientGone
        await self._send(message)

    async def _send_part(self, part: bytes) -> None:
        await self._tell({"type": "http.response.body", "body": part, "more_body": True})
        # uvicorn waits before it writes until what it has written before is read.
        await self._tell({"type": "http.response.body", "body": b"", "more_body": True})

    async def _send_parts(
        self, parts: AsyncGenerator[bytes], send: Callable[[bytes], Awaitable[None]], is_gone: Callable[[], bool]
    ) -> None:
        """Send a reply in parts. Raises ``ClientGone`` if its client is gone, or reads too slowly."""
        self.reply_has_begun = True
        waited, sent = 0.0, 0
        async with aclosing(parts):
            async for part in parts:
                began = monotonic()
                await send(part)
                waited, sent = waited + monotonic() - began, sent + len(part)
                if waited > self.read_seconds + sent / BYTES_PER_SECOND:
                    _log.info("a client took %.0f s to read %d bytes of its reply and is disconnected", waited, sent)
                    await self.cut_off()
                    raise ClientGone
                if is_gone():
                    raise ClientGone

    async def cut_off(self) -> None:
        """End the connection within the reply, so that nobody takes what was sent for all of it."""
        if self._transport is not None:
            self._transport.abort()
            while (await self._receive())["type"] != "http.disconnect":
                pass
