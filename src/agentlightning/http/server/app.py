"""The server as an ASGI application: from the bytes of a request to the bytes of its reply.

Routes of the table and all other paths (health, metrics, OTLP, the OpenAPI document) are found in dictionaries, because
a framework's routing and dependency injection would cost more than the store's work. Host, key, origin and permission
are checked here for all of them.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import count
from time import monotonic, perf_counter
from typing import Any, NamedTuple, cast

from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from agentlightning.errors import AgentLightningError, BadRequest, NoSuchRoute, Overloaded, StoreUnavailable
from agentlightning.http.codec import PROBLEM_TYPE, encode_problem
from agentlightning.http.routes import CANONICAL, Dialect
from agentlightning.http.server.endpoints import Endpoint, Endpoints, Match
from agentlightning.http.server.exchange import ClientGone, Exchange, Header, Message, Receive, Reply, Send
from agentlightning.http.server.limits import STOPPING, AccessControl, Load, ServerLimits
from agentlightning.security.access import Permission
from agentlightning.serving.connections import BoundedConnection, ConnectionCounter
from agentlightning.telemetry.logs import CURRENT
from agentlightning.telemetry.metrics import RequestMeter

_log = logging.getLogger(__name__)
_SLOW_SECONDS = 1.0
_WAIT_BEGINS_SECONDS = 0.05
_well_formed_id = re.compile(rb"[A-Za-z0-9._~:@\-]{1,128}").fullmatch
"""Whether the id that a client gives its request can stand in a log and in a reply."""
_OTHER = "other"
"""The label of all paths outside the table: clients can make up any number of paths, and each label takes memory."""


class Operation(NamedTuple):
    """What answers a path outside the table of routes."""

    verbs: Sequence[str]
    permission: Permission | None
    """What a caller needs. None: everybody may, without a key, because it tells a probe nothing but that there is a
    server."""
    answer: Callable[[Exchange], Awaitable[Reply]]


class StoreApp:
    """Answers HTTP for a store.

    Args:
        endpoints: answer the routes of the table.
        access: decides who may send requests.
        limits: how much is taken at once.
    """

    def __init__(self, endpoints: Endpoints, access: AccessControl, limits: ServerLimits) -> None:
        self._endpoints = endpoints
        self.find = endpoints.find
        """The route for a verb and a path."""
        self._access = access
        self._retry_after = str(limits.retry_after_seconds).encode()
        self._numbers = count(1)
        self._run = secrets.token_hex(4)
        self.others: Mapping[str, Operation] = {}
        """What answers other paths, after the same checks."""
        self.load = Load(limits)
        """What is being worked on."""
        self._waits: set[Callable[[], None]] = set()
        """End the calls that are waiting now."""
        self.meter = RequestMeter()
        self.open_connections: Callable[[], int] = lambda: 0

    def drain(self) -> None:
        """Take no new requests, and answer those that wait. Call in the server's loop."""
        self.load.draining = True
        for end in list(self._waits):
            end()

    def refuse(
        self, client: Sequence[Any] | None, status: int, why: str, seconds: float
    ) -> tuple[dict[str, str], bytes]:
        """Refuse a client before its request is complete; returns headers and body of the reply."""
        request_id = f"{self._run}-{next(self._numbers):x}"
        self.meter.note(_OTHER, status, seconds)
        extra = {"client": _address(client), "status": status, "request_id": request_id}
        _log.log(logging.WARNING if status >= 500 else logging.DEBUG, "a client is refused: %s", why, extra=extra)
        headers = {"content-type": PROBLEM_TYPE, "x-request-id": request_id}
        if status == 503:
            headers["retry-after"] = self._retry_after.decode()
        error = Overloaded(why) if status == 503 else BadRequest(why)
        return headers, encode_problem(error, request_id, status=status)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self.serve(Exchange(scope, receive, send))
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})

    async def serve(self, exchange: Exchange, found: Match | None = None) -> None:
        """Answer a request; ``found`` is what its path leads to, where that is known. Raises nothing."""
        began = perf_counter()
        asked = exchange.headers.get(b"x-request-id")
        if asked is not None and _well_formed_id(asked):
            exchange.request_id = asked.decode()
        else:
            exchange.request_id = f"{self._run}-{next(self._numbers):x}"
        CURRENT.set(exchange)
        label, dialect, status = _OTHER, CANONICAL, 499
        try:
            if found is None:
                found = self.find(exchange.method, exchange.path)
            if len(exchange.headers) != len(exchange.raw_headers):
                exchange.check_headers()
            if found is None:
                operation = self.others.get(exchange.path)
                reply = self._access.check(exchange, "read" if operation is None else operation.permission)
                if reply is None:
                    reply = await self._elsewhere(exchange, operation)
            else:
                endpoint = found.endpoint
                reply = self._access.check(exchange, endpoint.route.permission)
                if reply is None:
                    label, dialect, exchange.ids = endpoint.label, endpoint.dialect, found.ids
                    reply = await self._answer(exchange, endpoint, found.ids)
            status = await exchange.send(reply)
        except ClientGone:
            return
        except AgentLightningError as error:
            status = await exchange.send(self._refusal(exchange, error, dialect))
        except Exception:  # noqa: BLE001 - the boundary of a request: nothing gets past it but an id
            _log.exception("%s %s failed", exchange.method, _shown(exchange.path) if label is _OTHER else label)
            hidden = AgentLightningError("the server failed; its log says why, under this request_id")
            status = await exchange.send(self._refusal(exchange, hidden, dialect))
        finally:
            seconds = perf_counter() - began
            self.meter.note(label, status, seconds)
            if exchange.task is not None and exchange.tasks is not None:
                exchange.tasks.discard(exchange.task)
                exchange.task = None  # its context holds the exchange: together they would wait for the collector
            if status >= 500 or seconds > _SLOW_SECONDS or _log.isEnabledFor(logging.DEBUG):
                self._note(exchange, status, seconds)

    async def _answer(self, exchange: Exchange, endpoint: Endpoint, ids: Mapping[str, str]) -> Reply:
        """Answer a request to a route of the table."""
        load = self.load
        load.admit(exchange, endpoint.route.priority)
        raw, exchange.body = exchange.body, None  # whatever is begun here may keep its context, and so the exchange
        try:
            if not endpoint.has_body:
                raw = b""
            elif (
                exchange.headers.get(b"content-type") != b"application/json" or b"content-encoding" in exchange.headers
            ):
                exchange.check_json()
            if raw is None:
                raw = await load.body_of(exchange)
            arguments = endpoint.arguments(ids, exchange.query, raw)
            if not endpoint.may_wait or not endpoint.waits(arguments):
                return endpoint.reply(await endpoint.call(**arguments), arguments)
            load.give_back(exchange)  # a long poll may wait for minutes and uses nothing meanwhile
            return await self._wait(exchange, endpoint, arguments)
        finally:
            load.give_back(exchange)

    async def _wait(self, exchange: Exchange, endpoint: Endpoint, arguments: dict[str, Any]) -> Reply:
        """Answer a call that may wait, unless its client disconnects or the server stops before."""
        exchange.may_wait = True
        task, ended, forget = asyncio.current_task(), False, list[Callable[[], object]]()
        assert task is not None

        def end() -> None:
            nonlocal ended
            if not ended:
                ended = True
                task.cancel()

        def begin() -> None:
            self._waits.add(end)
            forget.append(exchange.when_gone(end))
            if self.load.draining:
                end()

        # Most of these calls are answered at once, so nothing is done for them in the beginning.
        start = task.get_loop().call_later(_WAIT_BEGINS_SECONDS, begin)
        try:
            return endpoint.reply(await endpoint.call(**arguments), arguments)
        except asyncio.CancelledError:
            if not ended:
                raise
            task.uncancel()
            raise StoreUnavailable(STOPPING) if self.load.draining else ClientGone from None
        finally:
            start.cancel()
            self._waits.discard(end)
            for each in forget:
                each()

    async def _elsewhere(self, exchange: Exchange, operation: Operation | None) -> Reply:
        """Answer a path outside the table, or a wrong verb."""
        if operation is not None and exchange.method in operation.verbs:
            return await operation.answer(exchange)
        verbs = self._endpoints.verbs(exchange.path) if operation is None else operation.verbs
        if not verbs:
            raise NoSuchRoute(f"there is nothing under {exchange.path[:200]!r} on this server")
        allowed = ", ".join(verbs)
        refused = BadRequest(f"{exchange.method} is not possible on this path; it takes {allowed}")
        return exchange.problem(refused, 405, [(b"allow", allowed.encode())])

    def _refusal(self, exchange: Exchange, error: AgentLightningError, dialect: Dialect) -> Reply:
        status, headers = error.status, list[Header]()
        if status == 401:
            headers.append((b"www-authenticate", b'Bearer realm="agentlightning", Basic realm="agentlightning"'))
        if status == 429:
            status = dialect.overload_status
            self.meter.shed += 1
        if status in (429, 503, 507):
            headers.append((b"retry-after", self._retry_after))
        return exchange.problem(error, status, headers)

    def _note(self, exchange: Exchange, status: int, seconds: float) -> None:
        """Log the request: failed and slow ones always, others at level DEBUG.

        A 503 while the server stops is no failure: it sends waiting clients to the next server.
        """
        is_failed = status >= 500 and not (status == 503 and self.load.draining)
        is_slow = seconds > _SLOW_SECONDS and not exchange.may_wait
        level = logging.WARNING if is_failed else logging.INFO if is_slow else logging.DEBUG
        if _log.isEnabledFor(level):
            extra = {"client": _address(exchange.client), "status": status, "milliseconds": round(seconds * 1000, 3)}
            _log.log(level, "%s %s → %d", exchange.method, _shown(exchange.path), status, extra=extra)


def _address(client: Sequence[Any] | None) -> str:
    return "{}:{}".format(*client) if client else "unknown"


def _shown(path: str) -> str:
    """A path for a log line. Line breaks in it are escaped, so that it cannot forge another line."""
    return path if path.isprintable() else ascii(path)


# --- Small requests to the table's routes, answered without ASGI as soon as they are complete -------
# ASGI costs a third of what the server does for such a request besides the store's work. uvicorn handles all other
# requests, and those with anything unusual about them.

_DIRECT_BYTES = 64 * 1024
"""The largest body that is read before the limits on load are checked."""


class DirectConnection(BoundedConnection):
    """A connection that answers small requests without ASGI.

    Args:
        counter: counts connections.
        app: answers requests.
        arguments: of uvicorn.
    """

    def __init__(self, counter: ConnectionCounter, app: StoreApp, **arguments: Any) -> None:
        super().__init__(counter, **arguments)
        self._app = app
        self._collecting: DirectExchange | None = None
        self._last_reply = 0.0
        self._idle_timer: asyncio.TimerHandle | None = None

    @override
    def refusal(self, status: int, why: str) -> tuple[dict[str, str], bytes]:
        return self._app.refuse(self.client, status, why, self.waited_seconds)

    @override
    def on_message_begin(self) -> None:
        self.begin_message()
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    @override
    def on_headers_complete(self) -> None:
        self.end_headers()
        cycle = cast("RequestResponseCycle | DirectExchange | None", self.cycle)
        parser, url, headers = self.parser, self.url, dict(self.headers)
        length = headers.get(b"content-length", b"0")
        if (
            parser is not None
            and parser.get_method() == b"POST"
            and (cycle is None or cycle.response_complete)
            and b"%" not in url
            and b"?" not in url
            and url.isascii()
            and not self.expect_100_continue
            and not parser.should_upgrade()
            and parser.should_keep_alive()
            and b"transfer-encoding" not in headers
            and len(length) <= 5
            and int(length) <= _DIRECT_BYTES
        ):
            path = url.decode("ascii")
            found = self._app.find("POST", path)
            if found is not None and found.endpoint.direct:
                self._collecting = DirectExchange(self, path, headers, found)
                self.cycle = self._collecting  # type: ignore[assignment]  # uvicorn queues pipelined requests meanwhile
                return
        raw, expects = self.headers, self.expect_100_continue
        HttpToolsProtocol.on_message_begin(self)  # put off until now: see begin_message
        self.url, self.headers, self.scope["headers"] = url, raw, raw
        self.expect_100_continue = expects
        super().on_headers_complete()

    @override
    def on_body(self, body: bytes) -> None:
        if self._collecting is None:
            super().on_body(body)
        else:
            self._collecting.body = (self._collecting.body or b"") + body

    @override
    def on_message_complete(self) -> None:
        self._in_message = False
        exchange, self._collecting = self._collecting, None
        if exchange is None:
            super().on_message_complete()
            return
        # The application takes the task out at its end: a callback of the task would cost a turn of the loop.
        exchange.tasks = self.tasks
        exchange.task = self.loop.create_task(self._app.serve(exchange, exchange.found))
        self.tasks.add(exchange.task)

    # --- The time between requests: one timer for the connection, where uvicorn sets one after every reply ---

    @override
    def on_response_complete(self) -> None:
        self._last_reply = monotonic()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._close_if_idle)
        if self.pipeline or self.flow.read_paused:
            super().on_response_complete()

    def _close_if_idle(self) -> None:
        self._idle_timer = None
        if self._in_message or not self.cycle.response_complete:
            return  # the next reply sets it again
        left = self._last_reply + self.timeout_keep_alive - monotonic()
        if left > 0:
            self._idle_timer = self.loop.call_later(left, self._close_if_idle)
        else:
            self.timeout_keep_alive_handler()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        super().connection_lost(exc)


class DirectExchange(Exchange):
    """A small request that arrived whole. It stands in for uvicorn's object for a request and its response.

    Args:
        protocol: its connection.
        path: what it asks for.
        headers: its headers by name.
        found: the route that the path leads to.
    """

    method: str = "POST"
    body: bytes | None = b""
    disconnected = False
    keep_alive = True
    response_started = False
    response_complete = False
    _on_end: Callable[[], None] | None = None

    def __init__(self, protocol: DirectConnection, path: str, headers: dict[bytes, bytes], found: Match) -> None:
        # The base class is not initialised: there is no ASGI scope, and nothing to receive from.
        self.protocol = protocol
        self.path = path
        self.client = protocol.client
        self.raw_headers = protocol.headers
        self.headers = headers
        self.found = found

    @property
    def message_event(self) -> DirectExchange:
        """The event that uvicorn sets when the connection is lost: this object itself."""
        return self

    def set(self) -> None:
        """The connection is lost."""
        if self._on_end is not None:
            self._on_end()

    @override
    def when_gone(self, tell: Callable[[], None]) -> Callable[[], object]:
        self._on_end = tell
        if self.disconnected:
            tell()
        return self._forget

    def _forget(self) -> None:
        self._on_end = None

    @override
    async def send(self, reply: Reply) -> int:
        """Write the whole reply at once, and let the connection go on to its next request."""
        self.response_started = self.response_complete = True
        protocol, transport = self.protocol, self.protocol.transport
        if self.disconnected or transport.is_closing():
            return reply.status
        head = STATUS_LINE[reply.status]
        for name, value in (*protocol.server_state.default_headers, *reply.headers, *self.extra_headers):
            if name == b"connection":
                self.keep_alive = False
            else:
                head += b"%b: %b\r\n" % (name, value)
        if not self.keep_alive:
            head += b"connection: close\r\n"
        transport.write(
            b"%bcontent-type: %b\r\nx-request-id: %b\r\ncontent-length: %d\r\n\r\n%b"
            % (head, reply.content_type, self.request_id.encode(), len(reply.body), reply.body)
        )
        if not self.keep_alive:
            transport.close()
        protocol.on_response_complete()
        return reply.status
