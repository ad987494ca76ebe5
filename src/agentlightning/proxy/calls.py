"""One model call, from the agent's request to the last byte of its reply.

The agent does not get the end of a reply before the store has accepted the call's span (or a short time has passed).
Whoever waits for the agent therefore finds all of its calls in the store.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, NoReturn

import aiohttp
from starlette.requests import Request
from starlette.types import Message, Receive, Send

from agentlightning.errors import InvalidId
from agentlightning.proxy.admission import Place, TurnedAway, current_task
from agentlightning.proxy.dialects.base import (
    FIRST_OF_EVENTS,
    EventSplitter,
    EventTooLarge,
    ProxyError,
    ReplyStream,
    Scrubber,
    WireDialect,
)
from agentlightning.proxy.recording import DISCONNECTED, CallOrigin, CallRecord
from agentlightning.proxy.session import ProxySession
from agentlightning.proxy.upstream import UpstreamReply
from agentlightning.store.validation import check_id
from agentlightning.telemetry.logs import trace_of

_logger = logging.getLogger(__name__)

_MAX_REQUEST_BYTES = 32 * 1024 * 1024
_MAX_REPLY_BYTES = 64 * 1024 * 1024
_MAX_EVENT_BYTES = 16 * 1024 * 1024
_MEASURED_BYTES = 64 * 1024
"""How many bytes of a stream pass between two looks at how much of it is kept."""
_SHOWN_HEADERS = ("content-type", "retry-after", "retry-after-ms", "x-request-id", "x-should-retry", "openai-version")
_SHOWN_PREFIXES = ("x-ratelimit-", "openai-processing-")


class AgentGone(Exception):
    """The agent has closed its connection."""


class StreamRelay:
    """Passes a streamed reply on to the agent, without the backend's secrets, while ``stream`` reads it for the record.

    From the reply's last word on, everything is held back until ``ending`` is called (see ``ReplyStream.is_done``).
    """

    def __init__(self, stream: ReplyStream, scrubber: Scrubber) -> None:
        self._stream = stream
        self._scrubber = scrubber
        self._events = EventSplitter(_MAX_EVENT_BYTES)
        self._held = bytearray()

    def feed(self, data: bytes) -> bytes:
        """Read what the backend sent; returns what the agent may see now. Raises ``EventTooLarge`` if one event is
        longer than the limit."""
        shown: list[bytes] = []
        for event in self._events.feed(data):
            passed_on = self._scrubber.bytes(self._stream.feed(event))
            if self._stream.is_done:
                self._held += passed_on
            else:
                shown.append(passed_on)
        return b"".join(shown)

    @property
    def kept_bytes(self) -> int:
        """About how many bytes of the reply are kept, which is less than what has passed."""
        return self._stream.kept_bytes + len(self._held)

    def read_rest(self) -> None:
        """Read what came after the last whole event, at the end: some backends leave out the last empty line."""
        rest, self._events = self._events.rest(), EventSplitter(_MAX_EVENT_BYTES)
        self._held += self._scrubber.bytes(self._stream.feed(rest) if rest.strip() else rest)

    def ending(self) -> bytes:
        """Return the last bytes for the agent: what is held back, what came after the last whole event, and what the
        wire has after that."""
        self.read_rest()
        return bytes(self._held + self._scrubber.bytes(self._stream.end()))


def read_origin(request: Request) -> CallOrigin | None:
    """Read which attempt a call belongs to; None: none, and the call is not recorded.

    The ids are those of ``/rollout/{rollout_id}/attempt/{attempt_id}/`` or of the headers ``x-rollout-id`` and
    ``x-attempt-id``. A ``traceparent`` names the agent's span that the call is a child of.

    Raises:
        ProxyError: one id is given without the other, or one is not valid (400).
    """
    params, headers = request.path_params, request.headers
    rollout_id = params.get("rollout_id") or headers.get("x-rollout-id")
    attempt_id = params.get("attempt_id") or headers.get("x-attempt-id")
    if rollout_id is None and attempt_id is None:
        return None
    try:
        rollout_id = check_id(rollout_id, "rollout_id")
        attempt_id = check_id(attempt_id, "attempt_id")
    except InvalidId as error:
        raise ProxyError(400, "invalid_id", f"The call says for which attempt it is, but {error}.") from error
    trace_id, parent_span_id = trace_of(headers.get("traceparent", "")) or (None, None)
    return CallOrigin(rollout_id, attempt_id, trace_id, parent_span_id)


def ids_of(origin: CallOrigin | None) -> dict[str, str]:
    """Return the ids of an origin as parameters of a path."""
    return {} if origin is None else {"rollout_id": origin.rollout_id, "attempt_id": origin.attempt_id}


async def handle_model_call(session: ProxySession, dialect: WireDialect, request: Request, send: Send) -> None:
    """Answer one model call. Raises ``ProxyError`` if it was not admitted; nothing was sent then."""
    origin = read_origin(request)
    session.check_can_record(origin)
    async with session.admission.place() as place:
        await _ModelCall(session, CallRecord(dialect, origin), place, send).run(request)


class _ModelCall:
    """One call that has a place, in flight or held."""

    def __init__(self, session: ProxySession, record: CallRecord, place: Place, send: Send) -> None:
        self._session = session
        self._record = record
        self._dialect = record.dialect
        self._place = place
        self._send = send
        self._has_begun = False
        """Whether the agent has got the head of a reply, so that no other status can be sent."""
        self._has_all = False
        """Whether the agent has got all that the model wrote, though not yet the end of the reply."""

    async def run(self, request: Request) -> None:
        """Have the call answered, recorded, and its reply ended. Never raises because of the backend or the agent.

        Raises:
            TurnedAway: it was held, and is not admitted; nothing was sent.
        """
        hangup = _Hangup()
        try:
            await self._run(request, hangup)
        finally:
            hangup.stop()

    async def _run(self, request: Request, hangup: _Hangup) -> None:
        record = self._record
        try:
            # A held call is read, too: only then is it seen that its agent hangs up.
            record.raw_request = await read_body(request, self._place.grow)
            hangup.watch(request.receive)
            async with hangup.cancels():
                await self._place.admitted()
            params = {**request.query_params, **request.path_params, **ids_of(record.origin)}
            record.request = self._dialect.read_request(record.raw_request, params)
            record.raw_request = record.request.recorded or record.raw_request
            ending = await self._pass_on(hangup)
        except AgentGone:
            self._end_without_agent()
            return
        except TurnedAway:
            raise
        except ProxyError as error:
            ending = self._refuse(error)
        except asyncio.CancelledError:
            if not self._session.admission.is_closed:
                raise
            current_task().uncancel()
            ending = self._refuse(ProxyError(503, "proxy_stopped", "The proxy was stopped during the call."))
        except Exception:
            _logger.exception("a model call failed in the proxy")
            why = "The proxy failed; its log says why. This is a bug."
            ending = self._refuse(ProxyError(500, "internal_error", why))
        # A stop that cancels one of these steps only ends its wait: the span is already queued for the store.
        await self._unless_stopped(self._session.record_and_wait(record))
        if hangup.has_happened and not self._has_all:
            self._session.retract(record)
        await self._unless_stopped(self._send_all(ending))

    def _end_without_agent(self) -> None:
        """Record a call whose agent has gone. Some agents go as soon as they have all that the model wrote."""
        if not self._has_all:
            self._record.fail(DISCONNECTED, "the agent closed the connection before the reply had ended")
        self._session.record(self._record)

    async def _send_all(self, messages: list[Message]) -> None:
        for message in messages:
            await self._send(message)

    async def _unless_stopped(self, step: Awaitable[None]) -> None:
        """Wait for ``step``, but no longer than until the stop of the proxy cancels the call."""
        try:
            await step
        except asyncio.CancelledError:
            if not self._session.admission.is_closed:
                raise
            current_task().uncancel()

    async def _pass_on(self, hangup: _Hangup) -> list[Message]:
        """Have the call answered by a backend. Returns the end of the reply, which is still to be sent."""
        session, record = self._session, self._record
        assert record.request is not None
        # Taken when the call begins: weights are changed while no call is in flight.
        record.model_version = session.version_of(record.request.model)
        async with hangup.cancels():
            await session.sampling.impose(record)
            async with session.upstream.call(record.request, record) as reply:
                record.status = reply.response.status
                is_stream = reply.response.content_type == "text/event-stream"
                if record.request.is_streamed and not is_stream and record.status < 400:
                    reply = await self._with_first_part(reply)
                    is_stream = reply.first.lstrip().startswith(FIRST_OF_EVENTS)
                if is_stream and record.status < 400:
                    return await self._relay_stream(reply)
                return await self._relay_whole(reply)

    async def _with_first_part(self, reply: UpstreamReply) -> UpstreamReply:
        """Read the first part of a reply, which tells a stream of events that calls itself something else."""
        try:
            return reply if reply.first else replace(reply, first=await reply.response.content.readany())
        except (aiohttp.ClientError, TimeoutError) as error:
            _raise_broken_off(reply, error)

    async def _relay_whole(self, reply: UpstreamReply) -> list[Message]:
        record, dialect, status = self._record, self._dialect, reply.response.status
        assert record.request is not None
        scrubber = Scrubber(reply.backend.api_key, reply.backend.headers)
        body = scrubber.bytes(await self._read_whole(reply))
        headers = _shown_headers(reply.response, scrubber)
        if status >= 400:
            return _whole(status, headers, self._refused_by_backend(reply, body, scrubber))
        answer = dialect.read_reply(body, reply.hidden, record.request)
        if answer is None:
            record.fail("invalid_reply", "the reply of the backend is no JSON object")
            record.reply.body = body
            return _whole(status, headers, body)
        answer.scrub(scrubber)
        record.reply = answer
        if answer.error is not None:  # under a status that says success
            record.fail(scrubber.text(answer.error.code), scrubber.text(answer.error.message))
            if answer.shown is not None:  # clients of other wires know errors by their status
                record.status = status = 502
        return _whole(status, headers, answer.body if answer.shown is None else answer.shown)

    def _refused_by_backend(self, reply: UpstreamReply, body: bytes, scrubber: Scrubber) -> bytes:
        """Record a backend's error; returns what the agent gets."""
        record, dialect, status = self._record, self._dialect, reply.response.status
        if status in (401, 403):
            # The agent never had the key that the backend refuses, and the backend may quote a part of it.
            why = (
                f"The backend {reply.backend.name} answered {status}: it does not accept the key that the proxy has "
                "for it; correct api_key in the proxy's model list."
            )
            error = ProxyError(status, "backend_key_refused", why)
            record.refuse(error)
            return record.reply.body
        code, message = dialect.read_error(body, status)
        record.fail(scrubber.text(code), scrubber.text(message))
        record.reply.body = body
        return dialect.shown_error(body, status)

    async def _read_whole(self, reply: UpstreamReply) -> bytes:
        """Read the body of a reply that is no stream."""
        parts: list[bytes] = []
        size = 0
        try:
            async for part in reply.parts():
                self._record.first_byte = self._record.first_byte or time.perf_counter()
                size = self._keep(size, size + len(part))
                parts.append(part)
        except (aiohttp.ClientError, TimeoutError) as error:
            _raise_broken_off(reply, error)
        return b"".join(parts)

    async def _relay_stream(self, reply: UpstreamReply) -> list[Message]:
        record, dialect = self._record, self._dialect
        scrubber = Scrubber(reply.backend.api_key, reply.backend.headers)
        assert record.request is not None
        stream = dialect.open_stream(reply.hidden, record.request)
        relay = StreamRelay(stream, scrubber)
        self._has_begun = True
        await self._send(_head(reply.response.status, _shown_headers(reply.response, scrubber)))
        passed = kept = 0
        try:
            async for data in reply.parts():
                record.first_byte = record.first_byte or time.perf_counter()
                shown = relay.feed(data)
                if shown:
                    await self._send({"type": "http.response.body", "body": shown, "more_body": True})
                    self._has_all = stream.is_finished
                passed += len(data)
                if passed >= _MEASURED_BYTES:
                    passed, kept = 0, self._keep(kept, relay.kept_bytes)
            relay.read_rest()
            if not stream.is_complete:
                raise aiohttp.ClientPayloadError("the stream ended in the middle of the reply")
        except (aiohttp.ClientError, TimeoutError, EventTooLarge) as error:
            _raise_broken_off(reply, error)
        finally:
            record.reply = stream.recorded()
            record.reply.scrub(scrubber)
        if stream.error is not None:
            record.fail(scrubber.text(stream.error.code), scrubber.text(stream.error.message))
        return [{"type": "http.response.body", "body": relay.ending()}]

    def _keep(self, before: int, now: int) -> int:
        """Count that the kept reply has grown to ``now`` bytes, which is returned. Raises ``ProxyError`` if it is too
        large (502), or the calls in flight take too much together (503)."""
        if now > _MAX_REPLY_BYTES:
            raise ProxyError(502, "reply_too_large", f"The reply of the backend is over {_MAX_REPLY_BYTES:,} bytes.")
        self._place.grow(now - before)
        return now

    def _refuse(self, error: ProxyError) -> list[Message]:
        """Record that the call failed; returns what tells the agent."""
        if self._has_begun:
            self._record.fail(error.code, error.message)
            return [{"type": "http.response.body", "body": self._dialect.error_event(error)}]
        self._record.refuse(error)
        return error_reply(self._dialect, error)


class _Hangup:
    """Notices that the agent closes its connection."""

    def __init__(self) -> None:
        self.has_happened = False
        self._cancels: asyncio.Task[Any] | None = None
        self._watcher: asyncio.Task[None] | None = None

    def watch(self, receive: Receive) -> None:
        """Begin to watch; the body of the request must have been read."""
        self._watcher = asyncio.create_task(self._watch(receive))

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.has_happened = True
        if self._cancels is not None:
            self._cancels.cancel()

    @asynccontextmanager
    async def cancels(self) -> AsyncGenerator[None]:
        """End the block when it happens, whatever the block waits for; raises ``AgentGone`` then."""
        if self.has_happened:
            raise AgentGone
        task = self._cancels = current_task()
        try:
            yield
        except asyncio.CancelledError:
            if not self.has_happened:
                raise
            task.uncancel()
            raise AgentGone from None
        finally:
            self._cancels = None

    def stop(self) -> None:
        """Notice nothing any more. Idempotent."""
        if self._watcher is not None:
            self._watcher.cancel()


async def read_body(request: Request, grow: Callable[[int], None]) -> bytes:
    """Read the body of a request; ``grow`` is told how much came.

    Raises:
        ProxyError: it is too large (413), or the calls in flight take too much together (503).
        AgentGone: the agent closed its connection before the end.
    """
    length = request.headers.get("content-length", "0")
    why = f"The request is larger than {_MAX_REQUEST_BYTES:,} bytes, the limit of the proxy."
    too_large = ProxyError(413, "request_too_large", why)
    if length.isdigit() and int(length) > _MAX_REQUEST_BYTES:
        raise too_large
    parts: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise AgentGone
        part = message.get("body", b"")
        size += len(part)
        if size > _MAX_REQUEST_BYTES:
            raise too_large
        grow(len(part))
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def _raise_broken_off(reply: UpstreamReply, error: Exception) -> NoReturn:
    """Raise what tells the agent that the backend's reply broke off."""
    backend = reply.backend
    if isinstance(error, TimeoutError):
        why = f"The backend {backend.name} was silent for {backend.timeout_seconds:g} s."
        raise ProxyError(504, "backend_timeout", why) from error
    problem = str(error) if isinstance(error, EventTooLarge) else type(error).__name__
    why = f"The backend {backend.name} broke off during its reply: {problem}."
    raise ProxyError(502, "backend_broke_off", why) from error


def _shown_headers(response: aiohttp.ClientResponse, scrubber: Scrubber) -> dict[str, str]:
    """Return the headers of a backend that concern the agent."""
    return {
        name.lower(): scrubber.text(value)
        for name, value in response.headers.items()
        if name.lower() in _SHOWN_HEADERS or name.lower().startswith(_SHOWN_PREFIXES)
    }


def _head(status: int, headers: Mapping[str, str]) -> Message:
    raw = [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": raw}


def _whole(status: int, headers: Mapping[str, str], body: bytes) -> list[Message]:
    shown = {"content-type": "application/json", **headers, "content-length": str(len(body))}
    return [_head(status, shown), {"type": "http.response.body", "body": body}]


def error_reply(dialect: WireDialect, error: ProxyError) -> list[Message]:
    """Return the messages of a reply that is an error, in the dialect's shape."""
    return _whole(error.status, error.headers(), dialect.error_body(error))
