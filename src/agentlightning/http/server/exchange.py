"""One request and its reply, as ASGI gives them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping, Sequence
from typing import Any, NamedTuple

from agentlightning.errors import AgentLightningError, BadRequest, TooLarge, UnsupportedMedia
from agentlightning.http.codec import PROBLEM_TYPE, encode_problem
from agentlightning.http.routes import Priority
from agentlightning.telemetry.logs import WorkContext

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]

_ONCE = (b"host", b"content-length", b"content-type", b"content-encoding", b"authorization", b"origin")


class Reply(NamedTuple):
    """What goes back."""

    status: int
    body: bytes = b""
    headers: Sequence[Header] = ()
    parts: Iterable[bytes] | None = None
    """The body in parts, where it is large."""
    content_type: bytes = b"application/json"


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
    held: int | None = None
    """The bytes that ``Load`` counts for it; None: it does not count it."""
    extra_headers: Sequence[Header] = ()
    """Headers of the reply, whatever it is."""
    task: asyncio.Task[None] | None = None
    tasks: set[asyncio.Task[None]] | None = None
    """What answers it, and where that is to be taken out at the end."""

    def __init__(self, scope: Message, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
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
        await self._send({"type": "http.response.start", "status": reply.status, "headers": headers})
        for part in reply.parts or ():
            await self._send({"type": "http.response.body", "body": part, "more_body": True})
        await self._send({"type": "http.response.body", "body": reply.body})
        return reply.status
