"""``LightningStoreServer``: serves a store over HTTP, and passes calls on to it in the process that serves."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Self

from agentlightning.errors import InvalidValue, StoreUnavailable
from agentlightning.http.client.client import LightningStoreClient
from agentlightning.http.routes import OTLP_TRACES_PATH
from agentlightning.http.server.admin import Operations
from agentlightning.http.server.app import StoreApp
from agentlightning.http.server.decoder import Decoder
from agentlightning.http.server.direct import DirectConnection, KnownHeaders
from agentlightning.http.server.endpoints import Endpoints
from agentlightning.http.server.limits import AccessControl, ServerLimits
from agentlightning.http.signatures import ForwardingStore
from agentlightning.security.access import AccessPolicy
from agentlightning.security.hosts import EVERY_ADDRESS, AllowedHosts, AllowedOrigins, require_key, url_of
from agentlightning.security.keys import ApiKey
from agentlightning.security.tls import AnyPath, tls_files
from agentlightning.serving.server import ThreadedServer, ended_by_signal, reload_on_hangup
from agentlightning.settings import LightningEnvVar, resolve_str_env_var
from agentlightning.store.base import LightningStore, LightningStoreCapabilities
from agentlightning.store.engine import EngineStore
from agentlightning.telemetry.metrics import load_metrics

_log = logging.getLogger(__name__)

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 4747

_REPLACED: Mapping[str, str] = {
    "launch_mode": "the server always runs in a thread of its own; for a process of its own, run `agl store`",
    "launcher_args": "limits=ServerLimits(…) and the arguments of this class say the same",
    "tracker": "GET /metrics has the numbers, for Prometheus",
}
"""Arguments of 0.3 without effect, and what replaces them."""


class LightningStoreServer(ForwardingStore):
    """Serves a store over HTTP from a thread of its own, which any event loop or thread may start and stop.

    The object is a store, too: in the process that made it, it is ``store`` itself; pickled, or inherited by
    fork, it is a client of its own endpoint. ``store`` stays the caller's, who closes it after ``stop``.

    Args:
        store: what is served; safe to use from any thread.
        host: name or address to listen on. Default: this machine only.
        port: 0 for any that is free; ``port`` says which after ``start``. Default: 4747.
        cors_allow_origins: web pages that may use the server, such as ``https://lab.example``; ``*`` for all.
        n_workers: of 0.3; one process serves a store, so only 1 is possible.
        api_key: what every request has to show. Default: ``AGL_API_KEY``; an empty text: nothing. Without one, only
            loopback is served.
        allowed_hosts: names under which the server is reached, besides its addresses and ``localhost``.
        tls_certificate, tls_key: files in PEM, for HTTPS.
        run_id: the run that is served, if it is one; runners of another one stay away.
        access_policy: decides which callers have the permission of which route. Default: all have all.
        limits: bounds on everything that a client can make the server hold.
        replaced: other arguments of 0.3: accepted, with a warning that says what came in their place.

    Raises:
        InvalidValue: an argument is not valid.
    """

    def __init__(
        self,
        store: LightningStore,
        host: str | None = None,
        port: int | None = None,
        cors_allow_origins: Sequence[str] | str | None = None,
        *,
        n_workers: int = 1,
        api_key: str | None = None,
        allowed_hosts: Sequence[str] = (),
        tls_certificate: AnyPath | None = None,
        tls_key: AnyPath | None = None,
        run_id: str | None = None,
        access_policy: AccessPolicy | None = None,
        limits: ServerLimits = ServerLimits(),  # noqa: B008 - a value that cannot change
        **replaced: Any,
    ) -> None:
        unknown = replaced.keys() - _REPLACED.keys()
        if unknown:
            raise TypeError(f"LightningStoreServer takes no argument {', '.join(sorted(unknown))}")
        for name, value in replaced.items():
            if value is not None:
                warnings.warn(f"{name} has no effect: {_REPLACED[name]}", DeprecationWarning, stacklevel=2)
        if n_workers != 1:
            raise InvalidValue(f"n_workers {n_workers!r} is not possible: one process serves a store; leave it out")
        self._tls = tls_files(tls_certificate, tls_key)
        self.store: LightningStore | None = store
        """What is served; None in another process."""
        self.host = DEFAULT_HOST if host is None else host
        self.port = DEFAULT_PORT if port is None else port
        self.run_id = run_id
        self.app: StoreApp | None = None
        """The ASGI application, while the server runs."""
        self._key = resolve_str_env_var(LightningEnvVar.AGL_API_KEY, api_key) or None
        self._access = AccessControl(
            ApiKey(self._key) if self._key else None,
            AllowedHosts([self.host, *allowed_hosts]),
            AllowedOrigins(cors_allow_origins),
            access_policy,
        )
        self._limits = limits
        self._bound: tuple[ThreadedServer, StoreApp] | None = None
        """Has the port, and serves while ``app`` is set."""
        self._changing = threading.Lock()
        self._owner = os.getpid()
        self._client: LightningStoreClient | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"host": self.host, "port": self.port, "run_id": self.run_id, "_key": self._key, "_tls": self._tls}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self.store = self.app = self._bound = self._client = None
        self._changing = threading.Lock()
        self._owner = -1

    def __repr__(self) -> str:
        return f"LightningStoreServer({self.store!r}, {self.endpoint!r})"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    # --- Serving ---------------------------------------------------------------------------------

    @property
    def endpoint(self) -> str:
        """Where clients on this machine find the server, without a prefix: ``http://127.0.0.1:4747``."""
        host = ("::1" if self.host == "::" else DEFAULT_HOST) if self.host in EVERY_ADDRESS else self.host
        return url_of(host, self.port, "http" if self._tls is None else "https")

    async def start(self) -> None:
        """Serve; returns when requests are answered. Nothing happens if the server runs already.

        Raises:
            InvalidValue: others could reach the server, and there is no key; or the files for TLS are not usable.
            StoreUnavailable: the port cannot be had; the message says why. Or this is a copy in another process.
        """
        await asyncio.to_thread(self.start_blocking)

    def start_blocking(self) -> None:
        """``start``, for a thread without an event loop."""
        with self._changing:
            if self.app is not None:
                return
            listener, app = self._bind()
            try:
                listener.start()
            except OSError as error:
                self._bound = None
                raise StoreUnavailable(str(error)) from error
            self.app = app
        _log.info("serving %s at %s", type(self.store).__name__, self.endpoint)

    def take_port(self) -> None:
        """Bind the port before anything else is started, so that a failure leaves nothing behind. Idempotent.

        The server does not listen yet: ``start`` does, and ``stop`` releases the port. Raises as ``start``.
        """
        with self._changing:
            self._bind()

    async def stop(self) -> None:
        """Refuse new requests, answer long polls, finish all others and release the port. Idempotent."""
        await asyncio.to_thread(self.stop_blocking)
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    def stop_blocking(self) -> None:
        """``stop``, for a thread without an event loop."""
        with self._changing:
            bound, self._bound = self._bound, None
            was_serving, self.app = self.app is not None, None
            if bound is not None:
                try:
                    bound[0].stop()
                finally:
                    bound[1].close()
        if was_serving:
            _log.info("stopped serving at %s", self.endpoint)

    async def run_forever(self) -> None:
        """Serve until this task is cancelled. Raises as ``start``."""
        try:
            await self.start()
            await asyncio.get_running_loop().create_future()
        finally:
            await self.stop()

    def reload_tls(self) -> bool:
        """Read the files for TLS again; new connections get what is in them. From any thread.

        Returns:
            Whether that was done: not for plain HTTP, or when nothing is served here.

        Raises:
            InvalidValue: they cannot be used; what was read before stays in use.
        """
        return self._bound is not None and self._bound[0].reload_tls()

    def _bind(self) -> tuple[ThreadedServer, StoreApp]:
        if self._bound is not None:
            return self._bound
        if not self._owned or self.store is None:
            raise StoreUnavailable("this is a copy of a server of another process; make a new one to serve here")
        require_key(self.host, self._key is not None, "Set AGL_API_KEY (or api_key=, --api-key)")
        app = StoreApp(Endpoints(self.store), self._access, self._limits, Decoder())
        app.others = Operations(self.store, app, self.run_id).by_path()
        listener = ThreadedServer(
            partial(nullcontext, app),
            self.host,
            self.port,
            name="agl-http",
            bounds=self._limits,
            connection=partial(DirectConnection, app=app, known=KnownHeaders()),
            drain_seconds=self._limits.drain_seconds,
            on_drain=app.drain,
            tls=self._tls,
            keepalive_seconds=self._limits.idle_seconds,
        )
        app.open_connections = lambda: listener.open_connections
        try:
            self.port = listener.bind()
        except OSError as error:
            raise StoreUnavailable(str(error)) from error
        self._bound = listener, app
        return self._bound

    # --- Being a store ---------------------------------------------------------------------------

    @property
    def capabilities(self) -> LightningStoreCapabilities:
        plain_spans = not self._owned or self.store is None or self.store.capabilities.get("plain_spans", False)
        return {
            "thread_safe": True,
            "async_safe": True,
            "zero_copy": True,
            "otlp_traces": True,
            "plain_spans": plain_spans,
        }

    def otlp_traces_endpoint(self) -> str:
        """URL that takes spans by OTLP/HTTP."""
        return self.endpoint + OTLP_TRACES_PATH

    @property
    def _owned(self) -> bool:
        return self._owner == os.getpid()

    def _target(self) -> LightningStore:
        if self._owned and self.store is not None:
            return self.store
        with self._changing:
            if self._client is None:
                certificate = None if self._tls is None else self._tls.certificate
                self._client = LightningStoreClient(self.endpoint, api_key=self._key, tls_certificate=certificate)
            return self._client


# --- A server as a whole process: from the first signal that it answers to the last byte on the ---

_YOUNG_OBJECTS = 20_000
"""How many net allocations trigger a collection of the youngest generation."""


def run_service(server: LightningStoreServer, store: EngineStore, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT; then finish what was begun and close the store. For the main thread.

    SIGHUP reads the certificate and key again.
    A second signal ends the process at once, which loses nothing that was acknowledged.

    Args:
        server: serves ``store``.
        store: opened here, and closed at the end.
        ready: called when requests are answered.

    Raises:
        AgentLightningError: the store cannot be opened, or the port cannot be had.
    """
    server.take_port()  # first, so that a start that fails leaves no new database behind
    try:
        asyncio.run(_serve(server, store, ready))
    finally:
        server.stop_blocking()


async def _serve(server: LightningStoreServer, store: EngineStore, ready: Callable[[], None]) -> None:
    async with store:
        await server.start()
        ended = ended_by_signal()
        reload_on_hangup(server.reload_tls)
        load_metrics()
        await store.statistics()  # opens what its reads need, for the same reason
        # What lives for ever is not looked at by the garbage collector, and it runs less often: requests leave hardly
        # any reference cycles, and looking for them took 5 % of the processor.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_YOUNG_OBJECTS, 20, 20)
        ready()
        await ended.wait()
        await server.stop()
    _log.info("stopped; every acknowledged write is in the store")
