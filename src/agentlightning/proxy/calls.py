"""One model call from the agent's request to the last byte of its reply.

The agent does not see the end of a call before the store has accepted its span (or a short time has passed), so that
whoever waits for the agent finds all of its calls in the store.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, NoReturn, cast

import aiohttp
import msgspec
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from agentlightning.proxy.admission import Room, caller_of
from agentlightning.proxy.assembly import ReplyAssembly
from agentlightning.proxy.capture import CallKind, without_asked
from agentlightning.proxy.errors import Refused, Scrubber, error_body
from agentlightning.proxy.models import Ask
from agentlightning.proxy.recording import CallRecord, read_question
from agentlightning.proxy.replies import Answer, read_answer
from agentlightning.proxy.session import Exchange
from agentlightning.proxy.sse import DONE, EventSplitter, EventTooLarge, data_of, event_of
from agentlightning.proxy.upstream import Reply

# --- A tee in a streamed reply: events go on to the agent as they come, and are taken down on t ---

_MAX_EVENT_BYTES = 16 * 1024 * 1024


class StreamTee:
    """One streamed reply on its way.

    What comes after the last word of the reply is held back (``ending``), so that the agent does not see the end of
    a call before it has been recorded.

    Args:
        kind: of the call.
        asks: what only the proxy asked for, which the agent does not see.
        scrubber: takes the backend's key out of what the agent sees.
    """

    def __init__(self, kind: CallKind, asks: frozenset[Ask], scrubber: Scrubber) -> None:
        self._asks = asks
        self._scrubber = scrubber
        self._events = EventSplitter(_MAX_EVENT_BYTES)
        self._assembly = ReplyAssembly(kind, asks)
        self._ending = bytearray()
        self._is_done = False
        self.error: object = None
        """The error that the backend sent in the stream: an object, or a text."""

    def feed(self, data: bytes) -> bytes:
        """Take in what the backend sent; returns what the agent may see now.

        Raises:
            EventTooLarge: one event grows without end.
        """
        shown = [self._show(event) for event in self._events.feed(data)]
        return b"".join(shown) if len(shown) != 1 else shown[0]

    def _show(self, event: bytes) -> bytes:
        data = data_of(event)
        if data == DONE or self._is_done:
            return self._hold(event)
        if not data:
            return self._scrubber.bytes(event)
        try:
            chunk = msgspec.json.decode(data)
        except msgspec.MsgspecError:
            return self._scrubber.bytes(event)  # not for us to judge
        if not isinstance(chunk, dict):
            return self._scrubber.bytes(event)
        facts = cast("dict[str, Any]", chunk)
        if facts.get("error"):
            self.error = facts["error"]
            return self._hold(event)
        self._assembly.add(facts)
        if not self._asks:
            return self._scrubber.bytes(event)
        return self._scrubber.bytes(event_of(msgspec.json.encode(facts))) if without_asked(facts, self._asks) else b""

    def _hold(self, event: bytes) -> bytes:
        """The last word has come: this event, and all that follow, wait for the record."""
        self._is_done = True
        self._ending += self._scrubber.bytes(event)
        return b""

    @property
    def kept_bytes(self) -> int:
        """About how much of the reply is kept, which is less than what has passed."""
        return self._assembly.kept_bytes + len(self._ending)

    @property
    def is_complete(self) -> bool:
        """Whether the backend said that the reply ends here."""
        return self._is_done or self._assembly.is_finished

    def ending(self) -> bytes:
        """The last bytes for the agent: what was held back, and what came after the last whole event."""
        return bytes(self._ending) + self._scrubber.bytes(self._events.rest())

    def answer(self) -> Answer:
        """The facts of the reply as far as it came."""
        return self._scrubber.answer(self._assembly.answer())


# ---

_logger = logging.getLogger(__name__)

_MAX_REPLY_BYTES = 64 * 1024 * 1024
_MEASURED_BYTES = 64 * 1024
"""After so many bytes of a stream it is looked how much of it is kept."""
_SHOWN_HEADERS = ("content-type", "retry-after", "retry-after-ms", "x-request-id", "x-should-retry", "openai-version")
_SHOWN_PREFIXES = ("x-ratelimit-", "openai-processing-")


class _AgentGone(Exception):
    """The agent has hung up."""


class ModelCalls:
    """An ASGI application: the calls of one kind.

    Args:
        exchange: what all calls share.
        kind: of the calls.
    """

    def __init__(self, exchange: Exchange, kind: CallKind) -> None:
        self._exchange = exchange
        self._kind: CallKind = kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        try:
            self._exchange.access.check(request.headers)
            caller = caller_of(request)
            self._exchange.check_room_for(caller)
            async with self._exchange.gate.call() as room:
                await _Call(self._exchange, CallRecord(self._kind, caller), room, send).run(request)
        except Refused as refused:
            await _send_whole(send, refused.status, refused.headers(), refused.body())


class _Call:
    """One call in progress."""

    def __init__(self, exchange: Exchange, record: CallRecord, room: Room, send: Send) -> None:
        self._exchange = exchange
        self._record = record
        self._room = room
        self._send = send
        self._has_begun = False
        """Whether the agent has got the head of a reply, so that no other status can be sent."""

    async def run(self, request: Request) -> None:
        record = self._record
        try:
            record.request = await _read_body(request, self._exchange.max_request_bytes, self._room)
            ending = await self._pass_on(request.receive)
        except _AgentGone:
            record.fail("client_disconnected", "the agent hung up before the reply had ended")
            self._exchange.deliver(record)
            return
        except Refused as refused:
            ending = self._refuse(refused)
        except asyncio.CancelledError:
            if not self._exchange.gate.is_closed:
                raise
            _current_task().uncancel()
            ending = self._refuse(Refused(503, "proxy_stopped", "The proxy was stopped during the call."))
        except Exception:
            _logger.exception("a model call failed in the proxy")
            ending = self._refuse(Refused(500, "internal_error", "The proxy failed; its log says why. This is a bug."))
        await self._unless_stopped(self._exchange.deliver_and_wait(self._record))  # if so, the span is on its way
        await self._unless_stopped(self._send_all(ending))  # if so, the agent reads nothing

    async def _send_all(self, messages: Iterable[Message]) -> None:
        for message in messages:
            await self._send(message)

    async def _unless_stopped(self, step: Awaitable[None]) -> None:
        """Wait for ``step``, but not when the proxy is stopped meanwhile and cuts calls off."""
        try:
            await step
        except asyncio.CancelledError:
            if not self._exchange.gate.is_closed:
                raise
            _current_task().uncancel()

    async def _pass_on(self, receive: Receive) -> list[Message]:
        """Have the call answered by a backend. Returns the end of the reply, which is still to be sent."""
        record = self._record
        question = record.question = read_question(record.request)
        routing = self._exchange.routing
        order = routing.order(question.model, record.caller.rollout_id if record.caller else None)
        record.model_version = self._exchange.version_of(question.model)
        upstream = self._exchange.upstream
        async with _cancelled_by_hangup(receive), upstream.call(routing, order, question, record) as reply:
            if reply.response.content_type == "text/event-stream" and reply.response.status < 400:
                return await self._relay_stream(reply)
            return await self._relay_whole(reply)

    async def _relay_whole(self, reply: Reply) -> list[Message]:
        record, status = self._record, reply.response.status
        scrubber = Scrubber(reply.backend)
        body = scrubber.bytes(await self._read_whole(reply))
        if status in (401, 403):
            body = _about_the_proxys_key(reply, status)
        record.status = status
        facts = _object_of(body)
        if facts is not None and status < 400:
            record.answer = scrubber.answer(read_answer(facts))
            if reply.asks:
                without_asked(facts, reply.asks)
                body = scrubber.bytes(msgspec.json.encode(facts))
        record.answer.body = body
        if status >= 400:
            record.fail(*_error_of(facts, status), status)
        elif facts is None:
            record.fail("invalid_reply", "the reply of the backend is no JSON object")
        return _whole(status, _shown_headers(reply.response, scrubber), body)

    async def _read_whole(self, reply: Reply) -> bytes:
        """The body of a reply that is no stream."""
        parts: list[bytes] = []
        size = 0
        try:
            async for part in reply.response.content.iter_any():
                if self._record.first_byte is None:
                    self._record.first_byte = time.perf_counter()
                size = self._grow(size, size + len(part))
                parts.append(part)
        except (aiohttp.ClientError, TimeoutError) as error:
            _raise_broken(reply, error)
        return b"".join(parts)

    async def _relay_stream(self, reply: Reply) -> list[Message]:
        record = self._record
        scrubber = Scrubber(reply.backend)
        tee = StreamTee(record.kind, reply.asks, scrubber)
        record.status = reply.response.status
        await self._begin(record.status, _shown_headers(reply.response, scrubber))
        passed = kept = 0
        try:
            async for data in reply.response.content.iter_any():
                if record.first_byte is None:
                    record.first_byte = time.perf_counter()
                shown = tee.feed(data)
                if shown:
                    await self._send({"type": "http.response.body", "body": shown, "more_body": True})
                passed += len(data)
                if passed >= _MEASURED_BYTES:
                    passed, kept = 0, self._grow(kept, tee.kept_bytes)
            if tee.error is None and not tee.is_complete:
                raise aiohttp.ClientPayloadError("the stream ended in the middle of the reply")
        except (aiohttp.ClientError, TimeoutError, EventTooLarge) as error:
            _raise_broken(reply, error)
        finally:
            record.answer = tee.answer()
        if tee.error is not None:
            code, message = _error_of({"error": tee.error}, record.status)
            record.fail(code, scrubber.text(message))
        return [{"type": "http.response.body", "body": tee.ending()}]

    def _grow(self, before: int, now: int) -> int:
        """The reply that is kept has grown to ``now`` bytes, which is returned.

        Raises:
            Refused: it is too large (502), or there is no room for it (503).
        """
        if now > _MAX_REPLY_BYTES:
            raise Refused(502, "reply_too_large", f"The reply of the backend is over {_MAX_REPLY_BYTES:,} bytes.")
        self._room.grow(now - before)
        return now

    def _refuse(self, refused: Refused) -> list[Message]:
        """Note that the call failed; returns what tells the agent."""
        record = self._record
        if self._has_begun:
            record.fail(refused.code, refused.message)
            return [{"type": "http.response.body", "body": event_of(refused.body())}]
        record.refuse(refused)
        return _whole(refused.status, refused.headers(), refused.body())

    async def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self._has_begun = True
        await self._send(_head(status, headers))


@asynccontextmanager
async def _cancelled_by_hangup(receive: Receive) -> AsyncGenerator[None]:
    """End the block when the agent hangs up, wherever it waits.

    Raises:
        _AgentGone: that happened.
    """
    task = _current_task()
    is_gone = False

    async def watch() -> None:
        nonlocal is_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not is_gone:
            raise
        task.uncancel()
        raise _AgentGone from None
    finally:
        watcher.cancel()


def _current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None, "calls run in tasks"
    return task


async def _read_body(request: Request, limit: int, room: Room) -> bytes:
    length = request.headers.get("content-length", "0")
    too_large = Refused(
        413, "request_too_large", f"The request is larger than {limit:,} bytes, the limit of the proxy."
    )
    if length.isdigit() and int(length) > limit:
        raise too_large
    parts: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise _AgentGone
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise too_large
        room.grow(len(part))
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def _raise_broken(reply: Reply, error: Exception) -> NoReturn:
    """Raise what tells the agent that the backend broke off."""
    if isinstance(error, TimeoutError):
        seconds = reply.backend.timeout_seconds
        raise Refused(
            504, "backend_timeout", f"The backend {reply.backend.name} was silent for {seconds:g} s."
        ) from error
    problem = str(error) if isinstance(error, EventTooLarge) else type(error).__name__
    raise Refused(
        502, "backend_broke_off", f"The backend {reply.backend.name} broke off during its reply: {problem}."
    ) from error


def _about_the_proxys_key(reply: Reply, status: int) -> bytes:
    """Instead of what the backend says of a key that the agent never had, and may quote in part."""
    return error_body(
        f"The backend {reply.backend.name} answered {status}: it does not accept the key that the proxy has for it; "
        "mend api_key in the proxy's model list.",
        "authentication_error" if status == 401 else "permission_error",
        "backend_key_refused",
    )


def _object_of(body: bytes) -> dict[str, Any] | None:
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def _error_of(facts: dict[str, Any] | None, status: int) -> tuple[str, str]:
    """Type and text of an error reply."""
    error = (facts or {}).get("error")
    known = cast("dict[str, Any]", error) if isinstance(error, dict) else {"message": error}
    kind = known.get("code") or known.get("type")
    message = known.get("message") or (facts or {}).get("message")
    return (
        kind if isinstance(kind, str) else str(status),
        message if isinstance(message, str) else f"the backend answered with HTTP status {status}",
    )


def _shown_headers(response: aiohttp.ClientResponse, scrubber: Scrubber) -> dict[str, str]:
    """The headers of a backend that concern the agent."""
    return {
        name.lower(): scrubber.text(value)
        for name, value in response.headers.items()
        if name.lower() in _SHOWN_HEADERS or name.lower().startswith(_SHOWN_PREFIXES)
    }


def _head(status: int, headers: Mapping[str, str]) -> Message:
    raw = [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": raw}


def _whole(status: int, headers: Mapping[str, str], body: bytes) -> list[Message]:
    told = {"content-type": "application/json", **headers, "content-length": str(len(body))}
    return [_head(status, told), {"type": "http.response.body", "body": body}]


async def _send_whole(send: Send, status: int, headers: Mapping[str, str], body: bytes) -> None:
    for message in _whole(status, headers, body):
        await send(message)
