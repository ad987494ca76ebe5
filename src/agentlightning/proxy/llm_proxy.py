"""``LLMProxy``: an OpenAI-compatible endpoint that records every model call of an attempt."""

from __future__ import annotations

import asyncio
import math
import os
import secrets
import socket
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, get_args

from fastapi import FastAPI
from typing_extensions import override

from agentlightning.errors import InvalidValue, NotFound
from agentlightning.proxy.app import build_app, control_routes
from agentlightning.proxy.errors import Refused
from agentlightning.proxy.models import Ask, ModelConfig, ask_for_of_callbacks, backends_of, warn_of_unused
from agentlightning.proxy.session import Exchange, ProxySettings, open_exchange
from agentlightning.proxy.upstream import Routing
from agentlightning.security.hosts import is_loopback
from agentlightning.security.keys import ApiKey
from agentlightning.serving.connections import BoundedConnection, ConnectionBounds
from agentlightning.serving.server import ThreadedServer
from agentlightning.store.base import LightningStore
from agentlightning.types import LLM, ProxyLLM

# --- The proxy that runs in this process, for code that is not handed one ---

_active: list[LLMProxy] = []
"""At most one. The interface of 0.3 is a pair of module functions, so its state belongs to the module."""


def get_active_llm_proxy() -> LLMProxy:
    """The proxy that was started last in this process.

    Raises:
        NotFound: there is none.
    """
    if not _active:
        raise NotFound("no LLM proxy is active in this process; start one, or call set_active_llm_proxy")
    return _active[0]


def set_active_llm_proxy(proxy: LLMProxy) -> None:
    """Make ``proxy`` the one that ``get_active_llm_proxy`` returns."""
    _active[:] = [proxy]


def forget_llm_proxy(proxy: LLMProxy) -> None:
    """There is no active proxy after, if ``proxy`` was it."""
    if _active and _active[0] is proxy:
        _active.clear()


# ---

_LOOPBACK = "127.0.0.1"
_NO_KEY = "not-needed"
"""What agents get as the key of a proxy without one: OpenAI's clients do not start without any."""
_DRAIN_SECONDS = 2.0
_SPARE = 64
"""Connections beyond those of calls: idle ones, and for a look at ``/health``."""
_ASKS = frozenset[Ask](get_args(Ask))


class _ProxyConnection(BoundedConnection):
    """A connection that refuses clients in the format of OpenAI's API."""

    @override
    def refusal(self, status: int, why: str) -> tuple[dict[str, str], bytes]:
        code = {self.OVERLOADED: "proxy_overloaded", self.TOO_SLOW: "request_too_slow"}.get(status, "headers_too_large")
        again = 1 if status == self.OVERLOADED else None
        refused = Refused(status, code, f"{why[0].upper()}{why[1:]}.", retry_after_seconds=again)
        return {"content-type": "application/json", **refused.headers()}, refused.body()


class LLMProxy:
    """Stands between agents and the backends of their models, and records what is said.

    An agent calls ``{endpoint}/rollout/{rollout_id}/attempt/{attempt_id}/v1/chat/completions`` (the base URL that
    ``as_resource`` and ``ProxyLLM`` hand out) with any OpenAI client. The call is passed on to a backend, streamed
    back as it comes, and becomes one span of the attempt, which the store has accepted by the time the agent has the
    end of the reply. Calls without ids are passed on and not recorded.

    The server runs in a thread of this process with its own event loop. ``agl proxy`` runs it as a program.

    Args:
        port: where to listen; None or 0: any free port, known after ``start``.
        model_list: the backends. See ``ModelConfig``.
        store: takes the spans.
        host: the address to listen on. Default: only this machine.
        litellm_config, num_workers, launch_mode, launcher_args, middlewares: of 0.3; see ``arguments``.
        num_retries: how often a call is tried again, on the next backend or after a pause, before its first byte.
        callbacks: of 0.3; the names in it say what ``ask_for`` says.
        ask_for: what backends are asked for beyond what agents ask, for the record only: ``token_ids``,
            ``logprobs``, ``usage`` (of streams). Default: all. A backend that does not know one is not asked again.
        api_key: what agents must show. Default: none if only this machine can connect, otherwise a random one.
            Either way it is in the resources that ``as_resource`` makes.
        control_key: opens ``POST /control/pause``, ``/control/resume`` and ``/control/model_version``, for algorithms
            in other processes. Default: there are no such routes.
        public_url: how agents reach the proxy, if not by its host and port: ``http://name:port``.
        max_calls: how many calls may be in flight; more get 503.
        record_wait_seconds: how long the end of a reply waits for the store to accept the span, at most.
        grace_seconds: how long calls in flight have when the proxy is stopped, and spans after them.

    Raises:
        InvalidValue: an argument is not valid. The message never shows a backend's key.
    """

    def __init__(
        self,
        port: int | None = None,
        model_list: Sequence[ModelConfig] | None = None,
        store: LightningStore | None = None,
        host: str | None = None,
        litellm_config: Mapping[str, Any] | None = None,
        num_retries: int = 2,
        num_workers: int = 1,
        launch_mode: str | None = None,
        launcher_args: object = None,
        middlewares: Sequence[object] | None = None,
        callbacks: Sequence[object] | None = None,
        *,
        ask_for: Collection[Ask] | None = None,
        api_key: str | None = None,
        control_key: str | None = None,
        public_url: str | None = None,
        max_calls: int = 4_096,
        record_wait_seconds: float = 5.0,
        grace_seconds: float = 5.0,
    ) -> None:
        warn_of_unused(
            litellm_config=litellm_config,
            num_workers=num_workers,
            launch_mode=launch_mode,
            launcher_args=launcher_args,
            middlewares=middlewares,
        )
        self._host = host or _LOOPBACK
        self._wanted_port = port or 0
        self._public_url = None if public_url is None else public_url.rstrip("/").removesuffix("/v1")
        self._settings = ProxySettings(
            num_retries=_at_least(num_retries, 0, "num_retries"),
            ask_for=_asks(ask_for, callbacks),
            max_calls=_at_least(max_calls, 1, "max_calls"),
            record_wait_seconds=_seconds(record_wait_seconds, "record_wait_seconds"),
            grace_seconds=_seconds(grace_seconds, "grace_seconds"),
        )
        self._key_text = api_key or (None if is_loopback(self._host) else secrets.token_urlsafe(24))
        self._api_key = None if self._key_text is None else ApiKey(self._key_text)
        self._control_key = None if control_key is None else ApiKey(control_key)
        self._store = store
        self._model_list = list(model_list or ())
        backends_of(self._model_list)  # refuses what is wrong with it, here rather than at the start
        self._versions: dict[str, str] = {}
        self._port: int | None = None
        self._owner_pid: int | None = None
        self._server: ThreadedServer | None = None
        self._exchange: Exchange | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process is a proxy that does not run there, but knows where this one does."""
        return {**self.__dict__, "_server": None, "_exchange": None, "_owner_pid": None}

    # --- Running ---------------------------------------------------------------------------------

    def initialize(self) -> None:
        """Make this the proxy that ``get_active_llm_proxy`` returns. ``start`` does it too."""
        set_active_llm_proxy(self)

    async def start(self) -> None:
        """Listen. Calls are taken after; nothing happens if it runs already.

        Raises:
            InvalidValue: the port is taken, or the host is not one of this machine.
        """
        if self.is_running():
            return
        most = 2 * self._settings.max_calls + _SPARE
        server = ThreadedServer(
            self._open_app,
            self._host,
            self._wanted_port,
            name="agl-llm-proxy",
            bounds=ConnectionBounds(connections=most, connections_per_address=most),
            connection=_ProxyConnection,
            drain_seconds=_DRAIN_SECONDS,
            date_header=False,  # replies pass on the backend's
        )
        try:
            await asyncio.to_thread(server.start)
        except OSError as error:
            raise InvalidValue(str(error)) from error
        self._port, self._server, self._owner_pid = server.port, server, os.getpid()
        self.initialize()

    async def stop(self) -> None:
        """Let calls in flight end, bring all spans to the store, and free the port. Idempotent."""
        server, self._server = self._server, None
        if server is None or self._owner_pid != os.getpid():
            return
        await asyncio.to_thread(server.stop)
        self._exchange = None
        forget_llm_proxy(self)

    async def restart(self) -> None:
        """Stop, and start again on the same port."""
        port = self._port
        await self.stop()
        self._wanted_port = self._wanted_port or port or 0
        await self.start()

    def is_running(self) -> bool:
        """Whether calls are taken, by this object in this process."""
        return self._server is not None and self._owner_pid == os.getpid() and self._server.is_running

    @asynccontextmanager
    async def _open_app(self) -> AsyncGenerator[FastAPI]:
        routing = Routing(backends_of(self._model_list))
        async with open_exchange(
            self._settings, self._api_key, routing, store=self.get_store, versions=self._versions
        ) as exchange:
            self._exchange = exchange
            app = build_app(exchange)
            if self._control_key is not None:
                app.include_router(control_routes(exchange, self._control_key, self._versions))
            yield app

    # --- What it works with ----------------------------------------------------------------------

    def get_store(self) -> LightningStore | None:
        """The store that takes the spans."""
        return self._store

    def set_store(self, store: LightningStore) -> None:
        """From now on spans go to ``store``, also those that wait."""
        self._store = store

    @property
    def model_list(self) -> Sequence[ModelConfig]:
        """The backends, as they were given, with their keys."""
        return tuple(self._model_list)

    def update_model_list(self, model_list: Sequence[ModelConfig]) -> None:
        """Replace the backends. Calls in flight stay with those they have; no restart is needed.

        Raises:
            InvalidValue: an entry is not valid; the old list stays.
        """
        backends = backends_of(model_list)
        self._model_list = list(model_list)
        if self._exchange is not None:
            self._exchange.routing = Routing(backends)

    def set_model_version(self, version: str, model: str | None = None) -> None:
        """Name the weights that answer from now on; calls that begin after are recorded with it.

        Args:
            version: any name of the weights.
            model: for which model; None: for all that have no name of their own.
        """
        self._versions[model or ""] = version

    async def pause(
        self, *, retry_after_seconds: float = 1.0, hold_seconds: float = 0.0, timeout_seconds: float | None = None
    ) -> int:
        """Take no new calls, and wait until those in flight have ended: then weights can be changed.

        New calls get 429 with ``Retry-After``, which OpenAI's clients obey (by default twice), until ``resume``.

        Args:
            retry_after_seconds: what they are told: about how long the pause will last.
            hold_seconds: how long a new call is kept waiting before it gets 429.
            timeout_seconds: how long to wait for calls in flight; None: as long as it takes.

        Returns:
            How many calls are still in flight: 0, unless the time was up.

        Raises:
            InvalidValue: the proxy does not run here.
        """
        server, exchange = self._running("paused")

        async def pause() -> int:
            exchange.gate.pause(retry_after_seconds, hold_seconds)
            return await exchange.gate.wait_empty(timeout_seconds)

        return await server.call(pause())

    async def resume(self) -> None:
        """Take calls again.

        Raises:
            InvalidValue: the proxy does not run here.
        """
        server, exchange = self._running("resumed")

        async def resume() -> None:
            exchange.gate.resume()

        await server.call(resume())

    def _running(self, what: str) -> tuple[ThreadedServer, Exchange]:
        if self._server is None or self._exchange is None or not self.is_running():
            raise InvalidValue(f"the proxy does not run in this process, so it cannot be {what}; start it first")
        return self._server, self._exchange

    # --- How agents reach it ---------------------------------------------------------------------

    @property
    def models(self) -> list[str]:
        """The names of the models, in the order of the model list."""
        return list(dict.fromkeys(entry["model_name"] for entry in self._model_list))

    @property
    def api_key(self) -> str | None:
        """What agents have to show; None: nothing."""
        return self._key_text

    @property
    def url(self) -> str:
        """Where the proxy is, without ``/v1``.

        Raises:
            InvalidValue: its port is not known before it has been started.
        """
        if self._public_url is not None:
            return self._public_url
        port = self._port or self._wanted_port
        if not port:
            raise InvalidValue("the proxy takes any free port, so its URL is known after start(); or give it a port")
        host = _outward_address() if self._host in ("0.0.0.0", "::") else self._host
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def as_resource(
        self,
        rollout_id: str | None = None,
        attempt_id: str | None = None,
        model: str | None = None,
        sampling_parameters: Mapping[str, Any] | None = None,
    ) -> LLM:
        """The proxy as a resource for agents.

        Args:
            rollout_id, attempt_id: give both for an ``LLM`` of this attempt, or neither for a ``ProxyLLM``, which
                each rollout gets its own URL from.
            model: one of the model list; may be left out if there is only one.
            sampling_parameters: what agents are to send with each call.

        Raises:
            InvalidValue: the model is unknown or must be named, one id is missing, or the port is not known yet.
        """
        names = self.models
        if model is None:
            if len(names) != 1:
                raise InvalidValue(f"the proxy serves {names}; say which model the resource is for")
            model = names[0]
        elif model not in names:
            raise InvalidValue(f"the proxy does not serve the model {model!r}; it serves {names}")
        resource = ProxyLLM(
            endpoint=f"{self.url}/v1",
            model=model,
            api_key=self._key_text or _NO_KEY,
            sampling_parameters=dict(sampling_parameters or {}),
        )
        if rollout_id is None and attempt_id is None:
            return resource
        return LLM(
            endpoint=resource.get_base_url(rollout_id, attempt_id),
            model=model,
            api_key=resource.api_key,
            sampling_parameters=resource.sampling_parameters,
        )


def _asks(ask_for: Collection[Ask] | None, callbacks: Sequence[object] | None) -> frozenset[Ask]:
    if callbacks is not None:
        if ask_for is not None:
            raise InvalidValue("give ask_for or callbacks, not both")
        return ask_for_of_callbacks(callbacks)
    if ask_for is None:
        return _ASKS
    if isinstance(ask_for, str) or not set(ask_for) <= _ASKS:
        raise InvalidValue(f"ask_for is {ask_for!r}; give some of {', '.join(sorted(_ASKS))}")
    return frozenset(ask_for)


def _at_least(value: int, least: int, what: str) -> int:
    if type(value) is not int or value < least:
        raise InvalidValue(f"{what} is {value!r}; give at least {least}")
    return value


def _seconds(value: float, what: str) -> float:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidValue(f"{what} is {value!r}; give seconds, 0 or more")
    return float(value)


def _outward_address() -> str:
    """The address of this machine by which others reach it.

    The one that a packet to another network would leave from: connecting a datagram socket finds the route and sends
    nothing. The target is of a network reserved for documentation (RFC 5737). Without any route: loopback.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return _LOOPBACK
        return str(probe.getsockname()[0])
