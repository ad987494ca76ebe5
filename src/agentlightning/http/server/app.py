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
from functools import partial
from itertools import count
from time import perf_counter
from typing import Any, NamedTuple

from agentlightning.errors import (
    AgentLightningError,
    BadRequest,
    NoSuchRoute,
    NotAuthenticated,
    Overloaded,
    StoreUnavailable,
)
from agentlightning.http.codec import PROBLEM_TYPE, encode_problem
from agentlightning.http.routes import CANONICAL, Dialect
from agentlightning.http.server.decoder import Decoder
from agentlightning.http.server.endpoints import Endpoint, Endpoints, Match
from agentlightning.http.server.exchange import ClientGone, Exchange, Header, Message, Receive, Reply, Send
from agentlightning.http.server.intake import SURELY_LIGHT_BYTES, put_together, take_in
from agentlightning.http.server.limits import STOPPING, AccessControl, Load, ServerLimits
from agentlightning.security.access import Permission
from agentlightning.telemetry.logs import CURRENT
from agentlightning.telemetry.metrics import RequestMeter

_log = logging.getLogger(__name__)
_SLOW_SECONDS = 1.0
_GUESS_SECONDS = 1.0
"""How long an address that guesses keys waits for each answer; the next guess needs another connection."""
_LARGE_REPLY_BYTES = 64 * 1024
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
        decoder: reads large bodies; None: the event loop does.
    """

    def __init__(
        self, endpoints: Endpoints, access: AccessControl, limits: ServerLimits, decoder: Decoder | None = None
    ) -> None:
        self._endpoints = endpoints
        self.find = endpoints.find
        """The route for a verb and a path."""
        self.access = access
        """Decides who may send requests."""
        self.decoder = decoder
        """Reads large bodies."""
        self._read_seconds = limits.body_seconds
        self._retry_after = str(limits.retry_after_seconds).encode()
        self._numbers = count(1)
        self._run = secrets.token_hex(4)
        self.others: Mapping[str, Operation] = {}
        """What answers other paths, after the same checks."""
        self.load = Load(limits)
        """What is being worked on."""
        self._waits: dict[Callable[[], None], None] = {}
        """End the calls that are waiting now, in the order in which they came."""
        self.meter = RequestMeter()
        self.open_connections: Callable[[], int] = lambda: 0

    def drain(self) -> None:
        """Take no new requests, and answer those that wait. Call in the server's loop."""
        self.load.draining = True
        for end in list(self._waits):
            end()

    def close(self) -> None:
        """Let go of what it holds, after the last request; idempotent. Blocks."""
        if self.decoder is not None:
            self.decoder.close()

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
                reply = self.access.check(exchange, "read" if operation is None else operation.permission)
                if reply is None:
                    reply = await self._elsewhere(exchange, operation)
            else:
                endpoint = found.endpoint
                reply = self.access.check(exchange, endpoint.route.permission)
                if reply is None:
                    label, dialect, exchange.ids = endpoint.label, endpoint.dialect, found.ids
                    reply = await self._answer(exchange, endpoint, found.ids)
            size = len(reply.body) + reply.held_bytes
            if size > _LARGE_REPLY_BYTES:
                self.load.reply(exchange, size)
            exchange.read_seconds = self._read_seconds
            status = await exchange.send(reply)
        except ClientGone:
            return
        except AgentLightningError as error:
            if isinstance(error, NotAuthenticated) and self.access.is_guessing(exchange):
                exchange.close_after()
                await asyncio.sleep(_GUESS_SECONDS)
            status = await self._fail(exchange, error, dialect)
        except Exception:  # noqa: BLE001 - the boundary of a request: nothing gets past it but an id
            _log.exception("%s %s failed", exchange.method, _shown(exchange.path) if label is _OTHER else label)
            hidden = AgentLightningError("the server failed; its log says why, under this request_id")
            status = await self._fail(exchange, hidden, dialect)
        finally:
            self.load.give_back(exchange)
            seconds = perf_counter() - began
            self.meter.note(label, status, seconds)
            if exchange.task is not None and exchange.tasks is not None:
                exchange.tasks.discard(exchange.task)
                exchange.task = None  # its context holds the exchange: together they would wait for the collector
            if status >= 500 or seconds > _SLOW_SECONDS or _log.isEnabledFor(logging.DEBUG):
                self._note(exchange, status, seconds)

    async def _fail(self, exchange: Exchange, error: AgentLightningError, dialect: Dialect) -> int:
        """Refuse the request, or end the connection if a part of another reply was sent; returns the status."""
        if not exchange.reply_has_begun:
            return await exchange.send(self._refusal(exchange, error, dialect))
        _log.warning("a reply ends in the middle: %s", error.message)
        await exchange.cut_off()
        return error.status

    async def _answer(self, exchange: Exchange, endpoint: Endpoint, ids: Mapping[str, str]) -> Reply:
        """Answer a request to a route of the table."""
        load = self.load
        load.admit(exchange, endpoint.route.priority)
        body, exchange.body = exchange.body, None  # whatever is begun here may keep its context, and so the exchange
        parts = [] if body is None else [body]
        del body
        if not endpoint.intake.has_body:
            parts = [b""]
        elif exchange.headers.get(b"content-type") != b"application/json" or b"content-encoding" in exchange.headers:
            exchange.check_json()
        parts = parts or await load.body_of(exchange)
        is_small = len(parts) == 1 and len(parts[0]) <= SURELY_LIGHT_BYTES  # as nearly always
        if is_small or self.decoder is None or endpoint.intake.is_light(parts):
            arguments = endpoint.intake.arguments(ids, exchange.query, b"".join(parts))
            parts.clear()  # a call that waits for minutes does not hold its body
        else:
            reading = partial(take_in, endpoint.intake.source(ids, exchange.query))
            arguments = put_together(await self.decoder.read(reading, parts))
        if not endpoint.may_wait or not endpoint.waits(arguments):
            return endpoint.reply(await endpoint.call(**arguments), arguments)
        load.wait(exchange, endpoint.kept_bytes(arguments))
        return await self._wait(exchange, endpoint, arguments)

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
            self._waits[end] = None
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
            self._waits.pop(end, None)
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
