"""One request and its reply, as ASGI gives them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from agentlightning.errors import BadRequest, TooLarge, UnsupportedMedia
from agentlightning.http.server.endpoints import Reply

Message = MutableMapping[str, Any]

well_formed_id = re.compile(rb"[A-Za-z0-9._~:@\-]{1,128}").fullmatch
"""Whether the id that a client gives its request can stand in a log and in a reply."""
_ONCE = (b"host", b"content-length", b"content-type", b"content-encoding", b"authorization", b"origin")


class ClientGone(Exception):
    """The client disconnected, so nobody will read the reply."""


class Exchange:
    """A request that is being answered.

    Args:
        scope, receive, send: of ASGI 3.0, for HTTP.
    """

    __slots__ = (
        "body",
        "client",
        "extra_headers",
        "headers",
        "may_wait",
        "method",
        "path",
        "query",
        "raw_headers",
        "receive",
        "request_id",
        "scope",
        "send_message",
    )

    def __init__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        self.scope = scope
        self.receive = receive
        self.send_message = send
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: bytes = scope["query_string"]
        self.client: Sequence[Any] | None = scope.get("client")
        """Address and port of the other side."""
        self.raw_headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.headers: dict[bytes, bytes] = dict(self.raw_headers)
        self.request_id = ""
        self.body: bytes | None = None
        """The whole body, where it is there already."""
        self.may_wait = False
        """Whether this is a long poll, whose duration is not the server's and is not logged as slow."""
        self.extra_headers: list[tuple[bytes, bytes]] = []

    # --- The request -----------------------------------------------------------------------------

    def check_headers(self) -> None:
        """Raise ``BadRequest`` if a header that decides how the request is handled is given more than once.

        A proxy in front may have read the other one of the two (request smuggling).
        """
        if len(self.headers) != len(self.raw_headers):
            names = [name for name, _ in self.raw_headers]
            for name in _ONCE:
                if names.count(name) > 1:
                    raise BadRequest(f"the header {name.decode()} is given more than once")

    def declared_size(self, limit: int) -> int:
        """The body's size according to its header; 0 if there is no such header.

        Raises:
            TooLarge: it is above the limit.
        """
        given = self.headers.get(b"content-length")
        if given is None:
            return 0
        size = int(given)  # the HTTP parser refuses anything but digits
        if size > limit:
            self.close_after()  # the client may be sending the body already, and nobody reads it
            raise TooLarge(f"the body has {size:,} bytes; the server takes {limit:,} at a time")
        return size

    def check_json(self) -> None:
        """Raise ``UnsupportedMedia`` if a header says that the body is not JSON."""
        if self.headers.get(b"content-length") == b"0":
            return  # no body; clients of 0.3 declare an absent body as application/octet-stream
        given = self.headers.get(b"content-type")
        if given is not None and given != b"application/json":
            media, _, parameters = given.lower().partition(b";")
            charset = parameters.strip()
            if media.strip() != b"application/json" or charset not in (b"", b"charset=utf-8", b'charset="utf-8"'):
                raise UnsupportedMedia(f"the body is {given[:80].decode('latin-1')!r}; send application/json in UTF-8")
        encoding = self.headers.get(b"content-encoding", b"identity").lower()
        if encoding != b"identity":
            raise UnsupportedMedia(f"the body is encoded as {encoding[:80].decode('latin-1')!r}; send it as it is")

    async def read_body(self, limit: int, arrived: Callable[[int], None]) -> bytes:
        """The whole body.

        Args:
            limit: the most bytes it may have.
            arrived: called with the size so far for a body in several parts; may raise.

        Raises:
            TooLarge: it is longer than ``limit``.
            ClientGone: the connection ended before the body did.
        """
        message = await self.receive()
        if message["type"] != "http.request":
            raise ClientGone
        body: bytes = message.get("body", b"")
        if not message.get("more_body", False):
            return body
        parts, size = [body], len(body)
        while message.get("more_body", False):
            message = await self.receive()
            if message["type"] != "http.request":
                raise ClientGone
            part: bytes = message.get("body", b"")
            parts.append(part)
            size += len(part)
            if size > limit:
                self.close_after()
                raise TooLarge(f"the body has more than {limit:,} bytes; send less at a time")
            arrived(size)
        return b"".join(parts)

    def when_gone(self, tell: Callable[[], None]) -> Callable[[], object]:
        """Call ``tell`` when the client disconnects; returns a function that cancels this."""
        listening = asyncio.ensure_future(self._hear_of_end())
        listening.add_done_callback(lambda done: None if done.cancelled() else tell())
        return listening.cancel

    async def _hear_of_end(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass

    # --- The reply -------------------------------------------------------------------------------

    def close_after(self) -> None:
        """Close the connection after this reply."""
        self.extra_headers.append((b"connection", b"close"))

    def reply_headers(self) -> list[tuple[bytes, bytes]]:
        """Headers of every reply."""
        return [(b"x-request-id", self.request_id.encode()), *self.extra_headers]

    async def send(self, reply: Reply) -> int:
        """Send the whole reply; returns its status."""
        headers = [(b"content-type", reply.content_type), *reply.headers, *self.reply_headers()]
        if reply.parts is None:
            headers.append((b"content-length", b"%d" % len(reply.body)))
            await self.send_message({"type": "http.response.start", "status": reply.status, "headers": headers})
            await self.send_message({"type": "http.response.body", "body": reply.body})
            return reply.status
        await self.send_message({"type": "http.response.start", "status": reply.status, "headers": headers})
        for part in reply.parts:
            await self.send_message({"type": "http.response.body", "body": part, "more_body": True})
        await self.send_message({"type": "http.response.body", "body": b""})
        return reply.status

    async def pass_through(self, message: Message) -> None:
        """Send a part of a reply of the FastAPI application."""
        await self.send_message(message)
