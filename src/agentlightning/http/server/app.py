"""The server as an ASGI application: everything between the bytes of a request and those of its reply.

Routes of the table are found in a dictionary and answered here, without a framework's machinery in
between; all other paths (health, metrics, OTLP, the OpenAPI document) belong to a FastAPI application
behind it. Every request passes the same gate first, whoever answers it.
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
from agentlightning.http.routes import CANONICAL, Dialect
from agentlightning.http.server.endpoints import Answerer, Call, InvalidRequest, Reply
from agentlightning.http.server.exchange import ClientGone, Exchange
from agentlightning.http.server.limits import Gate, Load, ServerLimits
from agentlightning.http.server.matching import Bound, Match, RouteTable
from agentlightning.telemetry.context import CURRENT, WorkContext
from agentlightning.telemetry.metrics import RequestMeter

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Message, Receive, Send], Awaitable[None]]

_log = logging.getLogger(__name__)
_SLOW_SECONDS = 1.0
_PROBLEM_TYPE = PROBLEM_TYPE.encode()
_OTHER = "other"
"""The label of paths that are not in the table: there is no end to them, and metrics must have one."""


class StoreApp:
    """Answers HTTP for a store.

    Args:
        answerer: answers the routes of the table.
        gate: decides who may send requests.
        limits: how much is taken at once.
        others: answers every other path, after the gate.
    """

    def __init__(self, answerer: Answerer, gate: Gate, limits: ServerLimits, others: Asgi) -> None:
        self._answerer = answerer
        self._gate = gate
        self._limits = limits
        self._others = others
        self._table = RouteTable()
        self._load = Load(limits)
        self._numbers = count(1)
        self._run = secrets.token_hex(4)
        self._draining = False
        self.waits: set[Wait] = set()
        """What clients wait for, longer than a moment."""
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

    def find_hot(self, path: str) -> Match | None:
        """The route that a POST to ``path`` leads to, if it is one of the hot ones."""
        found = self._table.find("POST", path)
        return found if found is not None and found.bound.route.hot else None

    def note_refusal(self, client: Sequence[Any] | None, status: int, why: str, seconds: float) -> str:
        """A client is sent away before its request is there; returns the id that reply and log name."""
        request_id = self._new_request_id()
        self.meter.note(_OTHER, status, seconds)
        extra = {"client": _address(client), "status": status, "request_id": request_id}
        _log.log(logging.WARNING if status >= 500 else logging.DEBUG, "a client is sent away: %s", why, extra=extra)
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
        exchange.request_id = exchange.asked_request_id() or self._new_request_id()
        context = WorkContext(exchange.request_id, exchange.traceparent())
        CURRENT.set(context)
        label, dialect, status = _OTHER, CANONICAL, 499
        try:
            exchange.check_headers()
            preflight = self._gate.check(exchange)
            if preflight is not None:
                status = await exchange.send(preflight)
                return
            if found is None:
                found = self._table.find(exchange.method, exchange.path)
            if found is None:
                status = await self._elsewhere(exchange)
                return
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
            self._note(exchange, label, status, seconds)

    async def _answer(self, exchange: Exchange, bound: Bound, values: Sequence[str]) -> Reply:
        priority = bound.route.priority
        self._check_open()
        size = exchange.declared_size(self._limits.body_bytes)
        self._load.take(priority, size)
        held = [size]
        counted = True
        try:
            raw = b""
            if bound.route.body is not None:
                exchange.check_json()
                raw = await exchange.read_body(self._limits.body_bytes, lambda more: self._grow(priority, held, more))
            call = self._answerer.call(bound, values, exchange.query, raw)
            if not call.waits:
                return await self._answerer.answer(call)
            self._load.give_back(held[0])  # it may wait for minutes, and costs nothing meanwhile
            counted = False
            return await self._wait(exchange, call)
        finally:
            if counted:
                self._load.give_back(held[0])

    def _grow(self, priority: Any, held: list[int], total: int) -> None:
        if total > held[0]:
            self._load.grow(priority, total - held[0])
            held[0] = total

    async def _wait(self, exchange: Exchange, call: Call) -> Reply:
        """Answer a call that may wait: until there is an answer, the client is gone, or the server stops."""
        exchange.may_wait = True
        wait = Wait(exchange, self)
        try:
            return await self._answerer.answer(call)
        except asyncio.CancelledError:
            if not wait.was_ended():
                raise
            self._check_open()
            raise ClientGone from None
        finally:
            wait.stop()

    async def _elsewhere(self, exchange: Exchange) -> int:
        """Answer what is not in the table; returns the status."""
        verbs = self._table.verbs(exchange.path)
        if not verbs:
            return await self._pass_on(exchange)
        allowed = ", ".join(verbs)
        refused = BadRequest(f"{exchange.method} is not possible on this path; it takes {allowed}")
        return await exchange.send(self._problem(exchange, refused, 405, [(b"allow", allowed.encode())]))

    async def _pass_on(self, exchange: Exchange) -> int:
        """Let the other application answer; returns the status."""
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

    def _check_open(self) -> None:
        if self.draining:
            raise StoreUnavailable("the server is stopping; send this again, to the one that takes its place")

    def _note(self, exchange: Exchange, label: str, status: int, seconds: float) -> None:
        """Log the request: failures and slow ones always, others where somebody wants to see everything.

        That those who still wait are sent elsewhere when the server stops is no failure.
        """
        is_failed = status >= 500 and not (status == 503 and self.draining)
        is_slow = seconds > _SLOW_SECONDS and not exchange.may_wait
        level = logging.WARNING if is_failed else logging.INFO if is_slow else logging.DEBUG
        if _log.isEnabledFor(level):
            extra = {"client": _address(exchange.client), "status": status, "milliseconds": round(seconds * 1000, 3)}
            _log.log(level, "%s %s → %d", exchange.method, _shown(exchange.path), status, extra=extra)


def _address(client: Sequence[Any] | None) -> str:
    return "{}:{}".format(*client) if client else "unknown"


def _shown(path: str) -> str:
    """A path for a log line, in which it cannot begin another one."""
    return path if path.isprintable() else ascii(path)


class Wait:
    """The wait of the task that makes it, which may be ended before its time: its client goes, or the server stops.

    Most calls that may wait do not, so nothing is done about it in the first moment.

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
        """Wait no longer."""
        if not self._ended:
            self._ended = True
            self._task.cancel()

    def was_ended(self) -> bool:
        """Whether it was this that cancelled the task; then the task is as if it had not been."""
        if self._ended:
            self._task.uncancel()
        return self._ended

    def stop(self) -> None:
        """There is an answer."""
        self._start.cancel()
        self._app.waits.discard(self)
        if self._forget is not None:
            self._forget()

    def _begin(self) -> None:
        self._app.waits.add(self)
        self._forget = self._exchange.when_gone(self.end)
        if self._app.draining:
            self.end()
