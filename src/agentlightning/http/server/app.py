"""The server as an ASGI application: from the bytes of a request to the bytes of its reply.

The dispatcher finds routes of the table in a dictionary and answers them itself, because a framework's routing and
dependency injection would cost more than the store's work. All other paths (health, metrics, OTLP, the OpenAPI
document) go to a FastAPI application behind it. Host, key, origin and permission are checked here for all of them.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from itertools import count
from time import perf_counter
from typing import Any

from agentlightning.errors import AgentLightningError, BadRequest, StoreUnavailable
from agentlightning.http.codec import PROBLEM_TYPE, encode_problem
from agentlightning.http.routes import CANONICAL, OTHER_ROUTES, Dialect
from agentlightning.http.server.endpoints import Endpoint, Endpoints, InvalidRequest, Reply
from agentlightning.http.server.exchange import ClientGone, Exchange, well_formed_id
from agentlightning.http.server.limits import AccessControl, Load, ServerLimits
from agentlightning.http.server.matching import Bound, Match, RouteTable
from agentlightning.telemetry.logs import CURRENT, WorkContext
from agentlightning.telemetry.metrics import RequestMeter

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Message, Receive, Send], Awaitable[None]]

_log = logging.getLogger(__name__)
_SLOW_SECONDS = 1.0
_PROBLEM_TYPE = PROBLEM_TYPE.encode()
_OTHER = "other"
"""The label of all paths outside the table: clients can make up any number of paths, and each label takes memory."""


class StoreApp:
    """Answers HTTP for a store.

    Args:
        endpoints: answer the routes of the table.
        access: decides who may send requests.
        limits: how much is taken at once.
        others: answers every other path, after the same checks.
    """

    def __init__(self, endpoints: Endpoints, access: AccessControl, limits: ServerLimits, others: Asgi) -> None:
        self._endpoints = endpoints
        self._access = access
        self._limits = limits
        self._others = others
        self._table = RouteTable()
        self.find = self._table.find
        """The route for a verb and a path."""
        self._load = Load(limits)
        self._numbers = count(1)
        self._run = secrets.token_hex(4)
        self._draining = False
        self.waits: set[LongPoll] = set()
        """Long polls that are waiting now."""
        self.meter = RequestMeter()

    @property
    def load(self) -> Load:
        """What is being worked on."""
        return self._load

    @property
    def draining(self) -> bool:
        """Whether the server is about to stop, and takes no new requests."""
        return self._draining

    def drain(self) -> None:
        """Take no new requests, and answer those that wait. Call in the server's loop."""
        self._draining = True
        for wait in list(self.waits):
            wait.end()

    def note_refusal(self, client: Sequence[Any] | None, status: int, why: str, seconds: float) -> str:
        """Count and log a client that is refused before its request is complete; returns the id for reply and log."""
        request_id = self._new_request_id()
        self.meter.note(_OTHER, status, seconds)
        extra = {"client": _address(client), "status": status, "request_id": request_id}
        _log.log(logging.WARNING if status >= 500 else logging.DEBUG, "a client is refused: %s", why, extra=extra)
        return request_id

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self.serve(Exchange(scope, receive, send))
        elif scope["type"] == "lifespan":
            await self._others(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1000})

    async def serve(self, exchange: Exchange, found: Match | None = None) -> None:
        """Answer a request; ``found`` is what its path leads to, where that is known. Raises nothing."""
        began = perf_counter()
        headers = exchange.headers
        asked, traceparent = headers.get(b"x-request-id"), headers.get(b"traceparent")
        is_given = asked is not None and well_formed_id(asked)
        exchange.request_id = asked.decode() if asked is not None and is_given else self._new_request_id()
        context = WorkContext(exchange.request_id, None if traceparent is None else traceparent.decode("latin-1"))
        CURRENT.set(context)
        label, dialect, status = _OTHER, CANONICAL, 499
        try:
            if found is None:
                found = self.find(exchange.method, exchange.path)
            permission = OTHER_ROUTES.get(exchange.path, "read") if found is None else found.bound.route.permission
            if len(headers) != len(exchange.raw_headers):
                exchange.check_headers()
            preflight = self._access.check(exchange, permission)
            if preflight is not None:
                status = await exchange.send(preflight)
            elif found is None:
                status = await self._elsewhere(exchange)
            else:
                bound = found.bound
                label, dialect = bound.label, bound.dialect
                context.ids = dict(zip(bound.names, found.values, strict=True))
                status = await exchange.send(await self._answer(exchange, bound, found.values))
        except ClientGone:
            return
        except InvalidRequest as refused:
            body = encode_problem(refused.error, exchange.request_id, errors=refused.places)
            status = await exchange.send(Reply(refused.error.status, body, content_type=_PROBLEM_TYPE))
        except AgentLightningError as error:
            status = await self._refuse(exchange, error, dialect)
        except Exception:  # noqa: BLE001 - the boundary of a request: nothing gets past it but an id
            _log.exception("%s %s failed", exchange.method, label)
            hidden = AgentLightningError("the server failed; its log says why, under this request_id")
            status = await exchange.send(self._problem(exchange, hidden, 500))
        finally:
            seconds = perf_counter() - began
            self.meter.note(label, status, seconds)
            if status >= 500 or seconds > _SLOW_SECONDS or _log.isEnabledFor(logging.DEBUG):
                self._note(exchange, label, status, seconds)

    async def _answer(self, exchange: Exchange, bound: Bound, values: Sequence[str]) -> Reply:
        priority = bound.route.priority
        if self._draining:
            raise _stopping()
        raw = exchange.body
        size = exchange.declared_size(self._limits.body_bytes) if raw is None else len(raw)
        self._load.take(priority, size)
        held = [size]
        counted = True
        try:
            if bound.route.body is None:
                raw = b""
            elif (
                exchange.headers.get(b"content-type") != b"application/json" or b"content-encoding" in exchange.headers
            ):
                exchange.check_json()
            if raw is None:
                raw = await exchange.read_body(self._limits.body_bytes, lambda more: self._grow(priority, held, more))
            endpoint = self._endpoints[bound]
            arguments = endpoint.arguments(values, exchange.query, raw)
            if bound.route.wait_argument is None or not endpoint.waits(arguments):
                return await endpoint.answer(arguments)
            self._load.give_back(held[0])  # a long poll may wait for minutes and uses nothing meanwhile
            counted = False
            return await self._wait(exchange, endpoint, arguments)
        finally:
            if counted:
                self._load.give_back(held[0])

    def _grow(self, priority: Any, held: list[int], total: int) -> None:
        if total > held[0]:
            self._load.grow(priority, total - held[0])
            held[0] = total

    async def _wait(self, exchange: Exchange, endpoint: Endpoint, arguments: dict[str, Any]) -> Reply:
        """Answer a call that may wait, unless the client disconnects or the server stops before."""
        exchange.may_wait = True
        wait = LongPoll(exchange, self)
        try:
            return await endpoint.answer(arguments)
        except asyncio.CancelledError:
            if not wait.was_ended():
                raise
            if self._draining:
                raise _stopping() from None
            raise ClientGone from None
        finally:
            wait.stop()

    async def _elsewhere(self, exchange: Exchange) -> int:
        """Answer a path outside the table, or a wrong verb; returns the status."""
        verbs = self._table.verbs(exchange.path)
        if not verbs:
            return await self._pass_on(exchange)
        allowed = ", ".join(verbs)
        refused = BadRequest(f"{exchange.method} is not possible on this path; it takes {allowed}")
        return await exchange.send(self._problem(exchange, refused, 405, [(b"allow", allowed.encode())]))

    async def _pass_on(self, exchange: Exchange) -> int:
        """Let the FastAPI application answer; returns the status."""
        status = 0

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *exchange.reply_headers()]}
            await exchange.pass_through(message)

        exchange.scope.setdefault("state", {})["request_id"] = exchange.request_id
        try:
            await self._others(exchange.scope, exchange.receive, send)
        except Exception:
            if not status:
                raise
            _log.exception("%s %s failed", exchange.method, _shown(exchange.path))  # and it has said so to the client
        return status

    async def _refuse(self, exchange: Exchange, error: AgentLightningError, dialect: Dialect) -> int:
        status, headers = error.status, list[tuple[bytes, bytes]]()
        if status == 401:
            headers.append((b"www-authenticate", b'Bearer realm="agentlightning", Basic realm="agentlightning"'))
        if status == 429:
            status = dialect.overload_status
            self.meter.shed += 1
        if status in (429, 503, 507):
            headers.append((b"retry-after", str(self._limits.retry_after_seconds).encode()))
        return await exchange.send(self._problem(exchange, error, status, headers))

    def _problem(
        self,
        exchange: Exchange,
        error: AgentLightningError,
        status: int,
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> Reply:
        body = encode_problem(error, exchange.request_id, status=status)
        return Reply(status, body, headers, content_type=_PROBLEM_TYPE)

    def _new_request_id(self) -> str:
        return f"{self._run}-{next(self._numbers):x}"

    def _note(self, exchange: Exchange, label: str, status: int, seconds: float) -> None:
        """Log the request: failed and slow ones always, others at level DEBUG.

        A 503 while the server stops is no failure: it sends waiting clients to the next server.
        """
        is_failed = status >= 500 and not (status == 503 and self.draining)
        is_slow = seconds > _SLOW_SECONDS and not exchange.may_wait
        level = logging.WARNING if is_failed else logging.INFO if is_slow else logging.DEBUG
        if _log.isEnabledFor(level):
            extra = {"client": _address(exchange.client), "status": status, "milliseconds": round(seconds * 1000, 3)}
            _log.log(level, "%s %s → %d", exchange.method, _shown(exchange.path), status, extra=extra)


def _stopping() -> StoreUnavailable:
    return StoreUnavailable("the server is stopping; retry at its successor")


def _address(client: Sequence[Any] | None) -> str:
    return "{}:{}".format(*client) if client else "unknown"


def _shown(path: str) -> str:
    """A path for a log line. Line breaks in it are escaped, so that it cannot forge another line."""
    return path if path.isprintable() else ascii(path)


class LongPoll:
    """Ends the long poll of the current task early when its client disconnects or the server stops.

    Most long polls are answered at once, so it does nothing in the first 50 ms.

    Args:
        exchange: with the client.
        app: the server.
    """

    _LATER_SECONDS = 0.05

    def __init__(self, exchange: Exchange, app: StoreApp) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._exchange = exchange
        self._app = app
        self._ended = False
        self._forget: Callable[[], object] | None = None
        self._start = task.get_loop().call_later(self._LATER_SECONDS, self._begin)

    def end(self) -> None:
        """Cancel the task that waits."""
        if not self._ended:
            self._ended = True
            self._task.cancel()

    def was_ended(self) -> bool:
        """Whether this object cancelled the task. If so, the cancellation is taken back."""
        if self._ended:
            self._task.uncancel()
        return self._ended

    def stop(self) -> None:
        """Stop watching, because the call was answered."""
        self._start.cancel()
        self._app.waits.discard(self)
        if self._forget is not None:
            self._forget()

    def _begin(self) -> None:
        self._app.waits.add(self)
        self._forget = self._exchange.when_gone(self.end)
        if self._app.draining:
            self.end()
