"""The network of a simulation: requests of clients to the one server, and what can happen to them on the way.

A request may be lost, or its reply; the connection may be reset before or after the server has it; a proxy may send it
twice; it may be late, also by much more than its sender waits. A link that is cut carries nothing, and tells nobody:
what was sent meanwhile is lost, or arrives when the link is mended. Ends of processes are told as a kernel tells them,
by a reset, if the link carries it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple, Protocol

from multidict import CIMultiDict

from agentlightning.errors import StoreUnreachable
from agentlightning.http.client.transport import WireReply, WireRequest
from agentlightning.http.server.exchange import Exchange, Reply
from simulated_time import ProcessLoop, World

__all__ = ["Call", "Host", "Link", "Mix", "SimulatedExchange", "SimulatedNetwork"]

_KEEP_ALIVE_SECONDS = 30.0
"""When TCP's own probes find that the other end does not answer (``serving.keepalive``)."""


class Mix(NamedTuple):
    """How likely each fate of a request is; the rest of them arrive, and so do their replies."""

    request_lost: float = 0.0
    reply_lost: float = 0.0
    reset_before: float = 0.0
    reset_after: float = 0.0
    twice: float = 0.0
    late: float = 0.0


class Host(Protocol):
    """What listens for requests."""

    loop: ProcessLoop | None
    """None: no process is running."""

    def accept(self, exchange: SimulatedExchange) -> None:
        """Answer a request. Called in ``loop``."""
        ...


class Link:
    """A client's connection to the network.

    Args:
        network: the network.
        loop: the client's process.
        name: of the client's machine; all processes of one are cut off together.
    """

    def __init__(self, network: SimulatedNetwork, loop: ProcessLoop, name: str) -> None:
        self._network = network
        self.loop = loop
        self.name = name

    async def send(self, request: WireRequest) -> WireReply:
        """See ``Transport``."""
        call = Call(self, request, self.loop.create_future())
        self._network.carry(call)
        try:
            return await call.answer
        except asyncio.CancelledError:
            call.given_up = True
            self._network.hang_up(call)
            raise

    async def close(self) -> None:
        """There is nothing to let go of."""


class Call:
    """One try of a request."""

    def __init__(self, link: Link, request: WireRequest, answer: asyncio.Future[WireReply]) -> None:
        self.link = link
        self.request = request
        self.answer = answer
        self.given_up = False
        """Whether the client has hung up, or its process has ended."""
        self.exchanges: list[SimulatedExchange] = []
        """The same request at the server, as often as it has arrived."""
        self.reply_lost = self.reset_after = False


class SimulatedExchange(Exchange):
    """A request as it has arrived at a server.

    Args:
        call: what has arrived.
        network: takes the reply.
    """

    def __init__(self, call: Call, network: SimulatedNetwork) -> None:
        # The base class is not initialised: there is no ASGI scope, and nothing to receive from.
        request = call.request
        path, _, query = request.target.partition("?")
        self.call = call
        self._network = network
        self.method, self.path, self.query = request.method, path, query.encode()
        self.client = None
        self.body = request.body or b""
        length = str(len(self.body)).encode()
        json = (b"content-type", b"application/json")
        self.raw_headers = [(b"host", b"127.0.0.1"), (b"content-length", length), json]
        self.headers = dict(self.raw_headers)
        self.gone = False
        self._on_gone: Callable[[], None] | None = None

    def when_gone(self, tell: Callable[[], None]) -> Callable[[], object]:
        """See ``Exchange``."""
        self._on_gone = tell
        if self.gone:
            tell()
        return self._forget

    def _forget(self) -> None:
        self._on_gone = None

    def hear_of_end(self) -> None:
        """The connection has ended. Called in the server's process."""
        self.gone = True
        if self._on_gone is not None:
            self._on_gone()

    async def send(self, reply: Reply) -> int:
        """Hand the reply to the network."""
        headers = CIMultiDict((name.decode(), value.decode("latin-1")) for name, value in reply.headers)
        body = reply.body
        if reply.parts is not None:
            body = b"".join([part async for part in reply.parts]) + body
        self._network.answer(self, WireReply(reply.status, headers, body))
        return reply.status


class SimulatedNetwork:
    """Carries requests and replies.

    Args:
        world: where it is.
        host: the server.
        latency: the least and the most seconds of a way that nothing disturbs.
    """

    def __init__(self, world: World, host: Host, latency: tuple[float, float]) -> None:
        self._world = world
        self._host = host
        self._latency = latency
        self._cut_until: dict[str, float] = {}
        self._mixes: dict[str, tuple[float, Mix]] = {}
        self._at_server: dict[SimulatedExchange, ProcessLoop] = {}
        self.on_loss: Callable[[str, WireRequest], None] = lambda *_: None
        """Told of each request that does not reach the server in time, with its machine."""

    # --- Trouble ---------------------------------------------------------------------------------

    def cut(self, name: str, seconds: float) -> None:
        """Cut a machine off."""
        self._cut_until[name] = max(self._cut_until.get(name, 0.0), self._world.now + seconds)

    def disturb(self, name: str, seconds: float, mix: Mix) -> None:
        """Let the requests of a machine have these fates for some time."""
        self._mixes[name] = (self._world.now + seconds, mix)

    def _is_cut(self, call: Call) -> float:
        """For how many seconds its link is still cut."""
        return max(self._cut_until.get(call.link.name, 0.0) - self._world.now, 0.0)

    def _way(self) -> float:
        least, most = self._latency
        chance = self._world.chance.random
        return least + (most - least) * chance() ** 4  # mostly short

    # --- Requests --------------------------------------------------------------------------------

    def carry(self, call: Call) -> None:
        """A client sends a request."""
        world, request = self._world, call.request
        fate = self._fate(call)
        loop = call.link.loop
        world.note(loop.name, f"sends {request.method} {request.target}{f' ({fate})' if fate else ''}")
        cut = self._is_cut(call)
        if fate in ("request_lost", "reset_before", "late"):
            self.on_loss(call.link.name, request)
        if fate == "request_lost" or (cut and world.chance.random() < 0.5):
            return
        delay = self._way() + cut
        match fate:
            case "reset_before":
                world.after(delay, self._reset, call)
                return
            case "reply_lost":
                call.reply_lost = True
            case "reset_after":
                call.reset_after = True
            case "twice":
                world.after(delay + world.chance.uniform(0.0, 20.0), self._arrive, call, True)
            case "late":
                delay += world.chance.uniform(1.0, 50.0)
            case _:
                pass
        world.after(delay, self._arrive, call, False)

    def _fate(self, call: Call) -> str:
        until, mix = self._mixes.get(call.link.name, (0.0, None))
        if mix is None or self._world.now >= until:
            return ""
        at = self._world.chance.random()
        for name, likely in zip(Mix._fields, mix, strict=True):
            at -= likely
            if at < 0:
                return name
        return ""

    def _arrive(self, call: Call, is_copy: bool) -> None:
        server = self._host.loop
        if server is None:
            if not is_copy:
                self._world.after(self._way(), self._reset, call)
            return
        exchange = SimulatedExchange(call, self)
        call.exchanges.append(exchange)
        self._at_server[exchange] = server
        if (call.given_up or call.link.loop.is_killed) and not is_copy and not self._is_cut(call):
            exchange.gone = True
        server.call_soon(self._accept, exchange)
        if call.reset_after:
            self._world.after(self._way(), self._reset, call)

    def _accept(self, exchange: SimulatedExchange) -> None:
        self._world.note("server", f"gets {exchange.method} {exchange.path} of {exchange.call.link.loop.name}")
        self._host.accept(exchange)

    def answer(self, exchange: SimulatedExchange, reply: WireReply) -> None:
        """The server has answered."""
        call = exchange.call
        if self._at_server.pop(exchange, None) is None:
            return  # of a process that was killed
        lost = call.reply_lost or self._is_cut(call) > 0 or exchange is not call.exchanges[0]
        told = f"answers {call.link.loop.name} {reply.status} to {exchange.method} {exchange.path}"
        self._world.note("server", f"{told}{' (lost)' if lost else ''}")
        if not lost and not call.reset_after:
            self._world.after(self._way(), self._deliver, call, reply)

    def _deliver(self, call: Call, reply: WireReply) -> None:
        if not call.given_up and not call.link.loop.is_killed:
            call.link.loop.call_soon(self._settle, call, reply, None)

    def _reset(self, call: Call) -> None:
        if not call.given_up and not call.link.loop.is_killed:
            call.link.loop.call_soon(self._settle, call, None, StoreUnreachable("the connection was reset"))

    def _settle(self, call: Call, reply: WireReply | None, error: Exception | None) -> None:
        if call.answer.done():
            return
        self._world.note(call.link.loop.name, f"hears {reply.status if reply else 'a reset'} to {call.request.target}")
        if reply is not None:
            call.answer.set_result(reply)
        elif error is not None:
            call.answer.set_exception(error)

    # --- Ends of processes -----------------------------------------------------------------------

    def hang_up(self, call: Call) -> None:
        """A client has ended the connection of a call."""
        cut = self._is_cut(call)
        delay = self._way() + (min(cut, _KEEP_ALIVE_SECONDS) if cut else 0.0)
        for exchange in call.exchanges[:1]:  # a proxy that sends a copy waits for the reply itself
            self._world.after(delay, self._tell_server, exchange)

    def _tell_server(self, exchange: SimulatedExchange) -> None:
        server = self._at_server.get(exchange)
        if server is not None and server is self._host.loop:
            server.call_soon(exchange.hear_of_end)

    def client_ended(self, loop: ProcessLoop) -> None:
        """The process of a client has ended: its kernel resets the connections."""
        for exchange in list(self._at_server):
            call = exchange.call
            if call.link.loop is loop and not call.given_up:
                call.given_up = True
                self.hang_up(call)

    def server_ended(self) -> None:
        """The process of the server has ended: its kernel resets the connections."""
        at_server, self._at_server = self._at_server, {}
        for exchange in at_server:
            if not self._is_cut(exchange.call) and exchange is exchange.call.exchanges[0]:
                self._world.after(self._way(), self._reset, exchange.call)
