"""``LLMProxy``: an OpenAI-compatible endpoint that records every model call of an attempt."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import aiohttp
from typing_extensions import override

from agentlightning.errors import InvalidValue, NotFound
from agentlightning.proxy.address import ProxyAddress
from agentlightning.proxy.admission import HOLD_SECONDS, RETRY_AFTER_SECONDS
from agentlightning.proxy.app import ProxyAccess, ProxyApp
from agentlightning.proxy.dialects import DEFAULT_DIALECT
from agentlightning.proxy.dialects.base import CaptureField, ProxyError
from agentlightning.proxy.legacy_arguments import capture_fields, warn_of_unused
from agentlightning.proxy.models import ModelConfig, backends_of
from agentlightning.proxy.sampling import check_sampling
from agentlightning.proxy.session import ProxySession, ProxySettings
from agentlightning.proxy.upstream import Routing, Upstream
from agentlightning.security.access import AccessPolicy
from agentlightning.security.hosts import require_key
from agentlightning.security.keys import ApiKey, new_key
from agentlightning.security.tls import AnyPath, Serving, tls_files
from agentlightning.serving.connections import BoundedConnection, ConnectionBounds
from agentlightning.serving.server import ThreadedServer
from agentlightning.store.base import LightningStore
from agentlightning.types import LLM, ProxyLLM
from agentlightning.types.endpoints import KEY_PATH

_NO_KEY = "not-needed"
"""The key that agents of a proxy without one get, because OpenAI's clients refuse to start without any."""
_DRAIN_SECONDS = 2.0
_SPARE_CONNECTIONS = 64
"""Beyond two per call: for idle clients and for health checks."""
_READ_BYTES = 16 * 1024
"""aiohttp reads up to twice as much of a reply ahead. A thousand streams must fit into memory when their agents read
more slowly than the backend writes."""
_KEEPALIVE_SECONDS = 4.0
"""Shorter than servers keep idle connections (uvicorn: 5 s), so that no call goes out on one that is being closed."""

_active: list[LLMProxy] = []
"""At most one proxy. The interface of 0.3 is a pair of module functions, so its state belongs to the module."""


def get_active_llm_proxy() -> LLMProxy:
    """Return the proxy that was started last in this process.

    Raises:
        NotFound: there is none.
    """
    if not _active:
        raise NotFound("no LLM proxy is active in this process; start one, or call set_active_llm_proxy")
    return _active[0]


def set_active_llm_proxy(proxy: LLMProxy) -> None:
    """Make ``proxy`` the one that ``get_active_llm_proxy`` returns."""
    _active[:] = [proxy]


class _ProxyConnection(BoundedConnection):
    """A connection that refuses clients, before there is a whole request, in the shape of OpenAI's errors."""

    @override
    def refusal(self, status: int, why: str) -> tuple[dict[str, str], bytes]:
        code = {self.OVERLOADED: "proxy_overloaded", self.TOO_SLOW: "request_too_slow"}.get(status, "headers_too_large")
        retry_after = 1.0 if status == self.OVERLOADED else None
        error = ProxyError(status, code, f"{why[0].upper()}{why[1:]}.", retry_after_seconds=retry_after)
        return {"content-type": "application/json", **error.headers()}, DEFAULT_DIALECT.error_body(error)


class LLMProxy:
    """Passes the model calls of agents on to backends, and records them.

    An agent calls ``{endpoint}/rollout/{rollout_id}/attempt/{attempt_id}/v1/chat/completions`` (the base URL that
    ``as_resource`` and ``ProxyLLM`` return) with any OpenAI client. The call is passed on to a backend, its reply is
    streamed back as it comes, and it becomes one span of the attempt, which the store has accepted by the time the
    agent has the end of the reply. Calls without ids are passed on and not recorded.

    The server runs in a thread of this process with its own event loop. ``agl proxy`` runs it as a program.

    Args:
        port: where to listen; None or 0: any free port, known after ``start``.
        model_list: the backends. See ``ModelConfig``.
        store: takes the spans.
        host: the address to listen on. Default: where the ``Trainer`` that has the proxy serves its store; without
            one, only this machine.
        litellm_config, num_workers, launch_mode, launcher_args, middlewares: arguments of 0.3 that have no effect;
            a value that is not the default warns, and one that would change results is refused.
        num_retries: how often a call is tried again, on the next backend or after a pause, before its first byte.
        callbacks: of 0.3; the names in it say what ``ask_for`` says.
        ask_for: what backends are asked for beyond what agents ask, for the record only: ``token_ids``,
            ``logprobs``, ``usage`` (of streams). Default: all. A backend that refuses one is not asked for it again.
        api_key: what agents must show; it is in the resources that ``as_resource`` returns. Default: a random one. An
            empty text: nothing, which only a proxy on loopback may ask for.
        control_key: opens ``POST /control/pause``, ``/control/resume``, ``/control/model_version`` and
            ``/control/sampling``, for algorithms in other processes. Default: there are no such routes.
        access_policy: decides what a caller with the right key may do. Default: everything.
        public_url: how agents on other machines reach the proxy, if not by its host and port: ``http://name:port``.
            Without ``port`` it also says where to listen.
        max_calls: how many calls may be in flight; more get 503.
        record_wait_seconds: how long the end of a reply waits for the store to accept the span, at most.
        grace_seconds: how long a stop waits for calls in flight, and then for spans that wait for the store.
        tls_certificate, tls_key: files in PEM, for HTTPS. Default: those of the store that it follows, except on
            loopback.

    Raises:
        InvalidValue: an argument is not valid. The message never shows a backend's key.
    """

    def __init__(
        self,
        port: int | None = None,
        model_list: Sequence[ModelConfig | dict[str, Any]] | None = None,
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
        ask_for: Collection[CaptureField] | None = None,
        api_key: str | None = None,
        control_key: str | None = None,
        access_policy: AccessPolicy | None = None,
        public_url: str | None = None,
        max_calls: int = 4_096,
        record_wait_seconds: float = 5.0,
        grace_seconds: float = 5.0,
        tls_certificate: AnyPath | None = None,
        tls_key: AnyPath | None = None,
    ) -> None:
        warn_of_unused(litellm_config, num_workers, launch_mode, launcher_args, middlewares)
        self._address = ProxyAddress(host, port, public_url, tls_files(tls_certificate, tls_key))
        self._settings = ProxySettings(
            num_retries=num_retries,
            capture=capture_fields(ask_for, callbacks),
            max_calls=max_calls,
            record_wait_seconds=record_wait_seconds,
            grace_seconds=grace_seconds,
        )
        self._makes_key = api_key is None
        self._key_text = new_key() if api_key is None else api_key or None
        self._api_key = None if self._key_text is None else ApiKey(self._key_text)
        self._control_key = None if control_key is None else ApiKey(control_key)
        self._access_policy = access_policy
        self._store = store
        backends_of(model_list or ())  # so that a mistake in it is reported here rather than by ``start``
        self._model_list = cast("list[ModelConfig]", list(model_list or ()))
        self._versions: dict[str, str] = {}
        self._imposed: dict[str, dict[str, float | None]] = {}
        self._owner_pid: int | None = None
        self._server: ThreadedServer | None = None
        self._session: ProxySession | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process does not run there, but knows the URL of the proxy that does."""
        return {**self.__dict__, "_server": None, "_session": None, "_owner_pid": None}

    # --- Running ---------------------------------------------------------------------------------

    def initialize(self) -> None:
        """Make this the proxy that ``get_active_llm_proxy`` returns. ``start`` does it too."""
        set_active_llm_proxy(self)

    async def start(self) -> None:
        """Begin to take calls. Does nothing if the proxy runs already.

        Raises:
            InvalidValue: the port is taken, the host is not an address of this machine, or others could reach the proxy
                without a key.
        """
        if self.is_running():
            return
        address = self._address
        require_key(address.host, self._api_key is not None, "Leave out api_key=''")
        max_connections = 2 * self._settings.max_calls + _SPARE_CONNECTIONS
        server = ThreadedServer(
            self._open_app,
            address.host,
            address.port,
            name="agl-llm-proxy",
            bounds=ConnectionBounds(connections=max_connections, connections_per_address=max_connections),
            connection=_ProxyConnection,
            drain_seconds=_DRAIN_SECONDS,
            stop_seconds=30.0 + 2 * self._settings.grace_seconds + self._settings.record_wait_seconds,
            tls=address.tls,
            date_header=False,  # OpenAI's clients do not read it
        )
        self._server, self._owner_pid = server, os.getpid()
        try:
            await asyncio.to_thread(server.start)
        except BaseException as error:
            await self.stop()  # a start that is cancelled goes on in its thread
            if isinstance(error, OSError):
                raise InvalidValue(str(error)) from error
            raise
        address.note_port(server.port)
        self.initialize()

    async def stop(self) -> None:
        """Let calls in flight end, bring all spans to the store, and free the port. Idempotent."""
        server, self._server = self._server, None
        if server is None or self._owner_pid != os.getpid():
            return
        await asyncio.to_thread(server.stop)
        self._session = None
        if _active == [self]:
            _active.clear()

    async def restart(self) -> None:
        """Stop, and start again on the same port."""
        self._address.keep_port()
        await self.stop()
        await self.start()

    def is_running(self) -> bool:
        """Whether this object takes calls in this process."""
        return self._server is not None and self._owner_pid == os.getpid() and self._server.is_running

    @asynccontextmanager
    async def _open_app(self) -> AsyncGenerator[ProxyApp]:
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_SECONDS),
            read_bufsize=_READ_BYTES,
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as client:
            settings = self._settings
            routing = Routing(backends_of(self._model_list))
            upstream = Upstream(client, routing, num_retries=settings.num_retries, capture=settings.capture)
            session = self._session = ProxySession(settings, upstream, self.get_store, self._versions, self._imposed)
            session.start()
            try:
                yield ProxyApp(session, ProxyAccess(self._api_key, self._control_key, self._access_policy))
            finally:
                await session.close()

    # --- What it works with ----------------------------------------------------------------------

    def get_store(self) -> LightningStore | None:
        """Return the store that takes the spans."""
        return self._store

    def set_store(self, store: LightningStore) -> None:
        """Send spans to ``store`` from now on, also those that wait."""
        self._store = store

    @property
    def model_list(self) -> Sequence[ModelConfig]:
        """The backends, as they were given, with their keys."""
        return tuple(self._model_list)

    def update_model_list(self, model_list: Sequence[ModelConfig | dict[str, Any]]) -> None:
        """Replace the backends. Calls in flight stay with those they have; no restart is needed.

        Raises:
            InvalidValue: an entry is not valid; the old list stays.
        """
        backends = backends_of(model_list)
        self._model_list = cast("list[ModelConfig]", list(model_list))
        if self._session is not None:
            self._session.upstream.routing = Routing(backends)

    def set_model_version(self, version: str, model: str | None = None) -> None:
        """Name the weights that answer from now on; calls that begin after are recorded with it.

        Args:
            version: any name of the weights.
            model: the model that they belong to; None: all models without a version of their own.
        """
        self._versions[model or ""] = version

    def impose_sampling(self, parameters: Mapping[str, float | None], model: str | None = None) -> None:
        """Replace sampling parameters in the calls of rollouts in mode ``train`` from now on.

        All other calls are passed on as they are: those of validation, and those that belong to no rollout. A span
        says what was asked and what was sent (``LLMCallAttributes.IMPOSED_SAMPLING``).

        Args:
            parameters: by name, such as ``{"temperature": 1.0, "seed": None}``. None removes what the agent sends;
                parameters that are not named are the agent's own. Empty: nothing is imposed any more.
            model: the model that is trained; None: all models without parameters of their own.

        Raises:
            InvalidValue: a name is not known, or a value is neither None nor a finite number.
        """
        self._imposed[model or ""] = check_sampling(parameters)

    async def pause(
        self,
        *,
        retry_after_seconds: float = RETRY_AFTER_SECONDS,
        hold_seconds: float = HOLD_SECONDS,
        timeout_seconds: float | None = None,
    ) -> int:
        """Pass no new calls on, and wait until those in flight have ended, so that weights can be changed.

        New calls wait for ``resume``: their agents see a slow reply. One that has waited for ``hold_seconds`` gets 429
        with ``Retry-After``, which OpenAI's clients obey (twice, by default).

        Args:
            retry_after_seconds: what calls are told that were held in vain.
            hold_seconds: how long a new call is held. 0: it gets 429 at once.
            timeout_seconds: how long to wait for calls in flight; None: without limit.

        Returns:
            How many calls are still in flight: 0, unless the time was up.

        Raises:
            InvalidValue: the proxy does not run here.
        """
        server, session = self._running("paused")
        return await server.call(session.admission.pause(retry_after_seconds, hold_seconds, timeout_seconds))

    async def resume(self) -> None:
        """Take calls again.

        Raises:
            InvalidValue: the proxy does not run here.
        """
        server, session = self._running("resumed")
        await server.call(session.admission.resume())

    def _running(self, what: str) -> tuple[ThreadedServer, ProxySession]:
        if self._server is None or self._session is None or not self.is_running():
            raise InvalidValue(f"the proxy does not run in this process, so it cannot be {what}; start it first")
        return self._server, self._session

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
        return self._address.url

    def follow(self, serving: Serving | None) -> None:
        """Listen where a store is served, by the same certificate, as far as the arguments leave that open.

        A ``Trainer`` calls it before a run. It holds from the next start on.
        """
        self._address.follow(serving)

    def why_no_guests(self) -> str | None:
        """Why agents on other machines cannot reach the proxy, and what to do about it; None: they can."""
        return self._address.why_no_guests()

    def as_resource(
        self,
        rollout_id: str | None = None,
        attempt_id: str | None = None,
        model: str | None = None,
        sampling_parameters: Mapping[str, Any] | None = None,
    ) -> LLM:
        """Return the proxy as a resource for agents.

        Args:
            rollout_id, attempt_id: give both for an ``LLM`` of this attempt, or neither for a ``ProxyLLM``, from
                which each rollout gets its own URL.
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
        key, sampling = self._key_text or _NO_KEY, dict(sampling_parameters or {})
        # Programs that were written for 0.3 send a key of their own; what they all use is the endpoint. It has the key
        # only if it stays on this machine, and never one that the user has given.
        in_url = f"{KEY_PATH}{key}" if self._makes_key and self._address.is_private else ""
        endpoint = f"{self.url}{in_url}/v1"
        resource = ProxyLLM(endpoint=endpoint, model=model, api_key=key, sampling_parameters=sampling)
        if rollout_id is None and attempt_id is None:
            return resource
        url = resource.get_base_url(rollout_id, attempt_id)
        return LLM(endpoint=url, model=model, api_key=key, sampling_parameters=sampling)
