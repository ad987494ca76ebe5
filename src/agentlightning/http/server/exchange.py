"""One request and its reply, as ASGI gives them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from agentlightning.errors import BadRequest, TooLarge, UnsupportedMedia
from agentlightning.http.server.endpoints import Reply

Message = MutableMapping[str, Any]

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._~:@\-]{1,128}")
_ONCE = (b"host", b"content-length", b"content-type", b"content-encoding", b"authorization", b"origin")


class ClientGone(Exception):
    """Whoever sent the request does not wait for the reply any more."""


class Exchange:
    """A request that is being answered.

    Args:
        scope, receive, send: of ASGI 3.0, for HTTP.
    """

    __slots__ = (
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
        self.may_wait = False
        """Whether it asks to be answered when there is something to say, so that its time says nothing."""
        self.extra_headers: list[tuple[bytes, bytes]] = []

    # --- The request -----------------------------------------------------------------------------

    def asked_request_id(self) -> str | None:
        """The id that the client gave its request, if it did and it is well-formed."""
        given = self.headers.get(b"x-request-id")
        return given.decode() if given is not None and _REQUEST_ID.fullmatch(given) else None

    def traceparent(self) -> str | None:
        """The header of that name (W3C Trace Context)."""
        given = self.headers.get(b"traceparent")
        return None if given is None else given.decode("latin-1")

    def check_headers(self) -> None:
        """Raise ``BadRequest`` if a header that decides something is given more than once."""
        if len(self.headers) != len(self.raw_headers):
            names = [name for name, _ in self.raw_headers]
            for name in _ONCE:
                if names.count(name) > 1:
                    raise BadRequest(f"the header {name.decode()} is given more than once")

    def declared_size(self, limit: int) -> int:
        """The number of bytes that the body is said to have; 0 if that is not said.

        Raises:
            TooLarge: it is above the limit.
        """
        given = self.headers.get(b"content-length")
        if given is None:
            return 0
        size = int(given)  # the HTTP parser has let only digits through
        if size > limit:
            self.close_after()  # the body is on its way, and nobody will read it
            raise TooLarge(f"the body has {size:,} bytes; the server takes {limit:,} at a time")
        return size

    def check_json(self) -> None:
        """Raise ``UnsupportedMedia`` if the body is said to be something other than JSON."""
        if self.headers.get(b"content-length") == b"0":
            return  # there is none, and clients of 0.3 call nothing an application/octet-stream
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
            arrived: told how many there are so far, where they do not come all at once; may raise.

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
        """Call ``tell`` when the client has gone; returns what takes that back."""
        listening = asyncio.ensure_future(self._hear_of_end())
        listening.add_done_callback(lambda done: None if done.cancelled() else tell())
        return listening.cancel

    async def _hear_of_end(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass

    # --- The reply -------------------------------------------------------------------------------

    def close_after(self) -> None:
        """End the connection after this reply."""
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
        """Send a part of a reply that another application makes."""
        await self.send_message(message)
