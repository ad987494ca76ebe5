"""Parts of a run of ``ClientServerExecutionStrategy``: its settings, its two sides, and the thread that steers it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import threading
from collections.abc import Awaitable, Coroutine, Iterable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args

from agentlightning.errors import (
    InvalidValue,
    StoreUnavailable,
    StoreUnreachable,
)
from agentlightning.execution.base import (
    AlgorithmBundle,
    ExecutionEvent,
    RunnerBundle,
    ThreadingEvent,
    cancel_all_tasks,
    resolve_managed_store_flag,
)
from agentlightning.execution.child import StartMethod, StartProcess
from agentlightning.execution.guest import GuestWatch, while_served
from agentlightning.execution.membership import deregister_worker, find_directive, join_server
from agentlightning.execution.quotas import Quotas
from agentlightning.execution.restarts import CrashCounter, RestartPolicy
from agentlightning.execution.slots import Slot
from agentlightning.http.client.client import LightningStoreClient
from agentlightning.http.routes import parse_address
from agentlightning.runner.heartbeat import host_part
from agentlightning.runner.main_thread import MAIN_THREAD
from agentlightning.runner.steady_loop import run_steadily
from agentlightning.security.credentials import Credentials, credentials_for
from agentlightning.security.hosts import is_loopback, require_key, url_of
from agentlightning.security.tls import AnyPath, tls_files
from agentlightning.settings import LightningEnvVar, resolve_int_env_var, resolve_str_env_var
from agentlightning.store.base import LightningStore

_T = TypeVar("_T")

# --- Settings --------------------------------------------------------------------------------------------------------

Role = Literal["algorithm", "runner", "both"]
MainProcess = Literal["algorithm", "runner"]

_DEFAULT_HOST = "localhost"
_DEFAULT_PORT = 4747
_TLS_VARIABLES = (LightningEnvVar.AGL_TLS_CERTIFICATE, LightningEnvVar.AGL_TLS_KEY, LightningEnvVar.AGL_TLS_CA_FILE)


class RunSettings:
    """The arguments of ``ClientServerExecutionStrategy``, which describes them; environment variables fill them in."""

    def __init__(
        self,
        role: Role | None = None,
        server_host: str | None = None,
        server_port: int | None = None,
        n_runners: int = 1,
        graceful_timeout: float = 10.0,
        terminate_timeout: float = 10.0,
        main_process: MainProcess = "algorithm",
        managed_store: bool | None = None,
        allowed_exit_codes: Iterable[int] = (0, -15),
        *,
        start_method: StartMethod | None = None,
        restarts: RestartPolicy | None = None,
        quotas: Quotas | None = None,
        api_key: str | None = None,
        run_id: str | None = None,
        server_url: str | None = None,
        connect_timeout: float = 300.0,
        stay: bool = False,
        tls_certificate: AnyPath | None = None,
        tls_key: AnyPath | None = None,
        tls_ca_file: AnyPath | None = None,
    ) -> None:
        self.role: Role = cast("Role", resolve_str_env_var(LightningEnvVar.AGL_CURRENT_ROLE, role, fallback="both"))
        self.server_host = resolve_str_env_var(LightningEnvVar.AGL_SERVER_HOST, server_host, fallback=_DEFAULT_HOST)
        # Nobody has to know the port of a run that is on this machine alone, and there may be several such runs.
        usual = 0 if self.role == "both" and is_loopback(self.server_host) else _DEFAULT_PORT
        self.server_port = resolve_int_env_var(LightningEnvVar.AGL_SERVER_PORT, server_port, fallback=usual)
        self.n_runners = n_runners
        self.graceful_timeout = graceful_timeout
        self.terminate_timeout = terminate_timeout
        self.main_process: MainProcess = main_process
        self.managed_store = resolve_managed_store_flag(managed_store)
        self.allowed_exit_codes = frozenset(allowed_exit_codes)
        self.start_method: StartMethod | None = start_method
        self.restarts = RestartPolicy() if restarts is None else restarts
        self.quotas = quotas
        self.run_id = resolve_str_env_var(LightningEnvVar.AGL_RUN_ID, run_id)
        server = None if server_url is None else parse_address(server_url)
        self.server_url = None if server is None else server.root
        self.connect_timeout = connect_timeout
        self.stay = stay
        self.api_key = server.api_key if api_key is None and server is not None else api_key
        if self.api_key is None and self.role != "runner":  # a runner finds it when the server is there
            self.api_key = resolve_str_env_var(LightningEnvVar.AGL_API_KEY) or None
        given = (tls_certificate, tls_key, tls_ca_file)
        certificate, key, ca_file = map(self._tls_file, _TLS_VARIABLES, given)
        self.tls, self.tls_ca_file = tls_files(certificate, key), ca_file
        self._check()

    def _tls_file(self, variable: LightningEnvVar, given: AnyPath | None) -> str | None:
        """A file for TLS. A variable may have been set for other servers than one on loopback."""
        if given is not None or is_loopback(self.server_host):
            return None if given is None else str(given)
        return resolve_str_env_var(variable) or None

    def _check(self) -> None:
        if self.role not in get_args(Role):
            raise InvalidValue(f"role {self.role!r} is not one of {', '.join(get_args(Role))} (AGL_CURRENT_ROLE)")
        port = self.server_port
        is_any = port == 0 and self.role == "runner" and self.server_url is None
        if type(port) is not int or not 0 <= port <= 65535 or is_any:
            raise InvalidValue(f"server_port {port!r} is not a port that can be used (AGL_SERVER_PORT)")
        if self.server_url is not None and self.role != "runner":
            raise InvalidValue(
                f"server_url {self.server_url!r} names a server elsewhere, but role {self.role!r} serves the store "
                "itself; give server_host and server_port"
            )
        if self.n_runners < 1:
            raise InvalidValue(f"n_runners {self.n_runners} is not valid; give at least 1")
        if self.graceful_timeout < 0 or self.terminate_timeout < 0 or self.connect_timeout < 0:
            raise InvalidValue("graceful_timeout, terminate_timeout and connect_timeout are seconds: give 0 or more")
        if self.main_process not in get_args(MainProcess):
            raise InvalidValue(f"main_process {self.main_process!r} is neither 'algorithm' nor 'runner'")
        if self.main_process == "runner" and (self.role != "both" or self.n_runners != 1):
            raise InvalidValue(
                "main_process='runner' keeps the one runner of role 'both' in this process: it needs role='both' and "
                f"n_runners=1, and they are {self.role!r} and {self.n_runners}"
            )
        if self.start_method is not None and self.start_method not in get_args(StartMethod):
            raise InvalidValue(f"start_method {self.start_method!r} is not one of {', '.join(get_args(StartMethod))}")
        if self.serves:
            remedy = "Set AGL_API_KEY, or api_key=, here and on the machines of the runners"
            require_key(self.server_host, bool(self.api_key), remedy, "server_host")

    @property
    def serves(self) -> bool:
        """Whether the store is served by this process."""
        return self.role != "runner" and self.managed_store


class ServerAccess(NamedTuple):
    """How a process reaches the store's server. It goes to the processes of a run through the launcher's pipe."""

    url: str
    api_key: str | None = None
    tls_ca_file: str | None = None
    tls_certificate: str | None = None

    def client(self) -> LightningStoreClient:
        """A client of the server."""
        return LightningStoreClient(
            self.url, api_key=self.api_key, tls_ca_file=self.tls_ca_file, tls_certificate=self.tls_certificate
        )

    def credentials(self) -> Credentials:
        """The key to show now, and the certificates to accept."""
        return credentials_for(
            self.url, self.api_key, tls_ca_file=self.tls_ca_file, tls_certificate=self.tls_certificate
        )


def remote_server(settings: RunSettings) -> ServerAccess:
    """The server of role ``runner``. It has a certificate if one is mentioned: its own, or that of its authority."""
    scheme = "https" if settings.tls or settings.tls_ca_file else "http"
    url = settings.server_url or url_of(settings.server_host, settings.server_port, scheme)
    return ServerAccess(url, settings.api_key or None, settings.tls_ca_file)


def worker_names(count: int) -> list[str]:
    """New worker ids, unique across machines, processes and calls; each belongs to one runner, also a new one."""
    prefix = f"{host_part()}-{os.getpid()}-{secrets.token_hex(4)}"
    return [f"{prefix}-{index}" for index in range(count)]


def runner_slots(settings: RunSettings, server: ServerAccess, run_id: str | None) -> list[Slot]:
    """The slots of the runners on this machine; for ``server`` and ``run_id`` see ``SideJob.run``."""
    names = enumerate(worker_names(settings.n_runners))
    starts = [start_of(settings, name, server, run_id, index) for index, name in names]
    blamed = set[str]()
    return [Slot(start, CrashCounter(settings.restarts, blamed)) for start in starts]


def start_of(
    settings: RunSettings, name: str, server: ServerAccess, run_id: str | None, index: int | None
) -> StartProcess:
    """The command for the process of a side: of the runner with this index, or None: of the algorithm."""
    environment = {} if index is None else {LightningEnvVar.AGL_WORKER_NAME.value: name}
    quotas = None if index is None else settings.quotas
    return StartProcess(name, {"server": server, "run_id": run_id, "index": index}, environment, quotas)


# --- What the processes of a run do: one side of it, with a store ----------------------------------------------------

_DIRECTIVE_SECONDS = 2.0


@dataclass(frozen=True)
class SideJob:
    """One side of the run. It is an object, not a closure, so that it can be pickled by name.

    Args:
        bundle: the side.
        store: what it works on, where that is not served.
        is_guest: whether it runs for a server on another machine, which may not be up, or end before this side joins.
    """

    bundle: AlgorithmBundle | RunnerBundle
    store: LightningStore | None = None
    is_guest: bool = False

    def __call__(self, slot: str, event: ThreadingEvent, arguments: Mapping[str, Any]) -> str:
        """Run it in a process of its own; see ``start_of`` and ``run``."""
        main, work = MAIN_THREAD.get(), self.run(slot, event, **arguments)
        return run_steadily(work) if main is None else main.run(work)

    def wants_main_thread(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the runner, if it is one, runs agents in the main thread; see ``RunnerBundle``."""
        wants, index = getattr(self.bundle, "wants_main_thread", None), arguments["index"]
        return index is not None and wants is not None and wants(index)

    async def run(
        self, name: str, event: ExecutionEvent, *, server: ServerAccess, run_id: str | None, index: int | None
    ) -> str:
        """Run it to its end, and deregister the worker of a runner.

        Args:
            name: of a runner's worker.
            event: the stop event.
            server, run_id: where the store is served, and the run that must be served; None: any.
            index: of the runner; None: it is the algorithm.

        Returns:
            ``drain`` or ``stop``, if that is what the worker has been asked to do; ``gone``, if the server cannot be
            reached any more; else ``done``.
        """
        async with contextlib.AsyncExitStack() as stack:
            store = self.store
            if store is None:
                store = await stack.enter_async_context(server.client())
            if index is None:
                await cast("AlgorithmBundle", self.bundle)(store, event)
                return "done"
            try:

                def join(seconds: float) -> Awaitable[object]:
                    return join_server(server.url, server.credentials, run_id=run_id, limit_seconds=seconds)

                guard: contextlib.AbstractAsyncContextManager[GuestWatch | None] = contextlib.nullcontext()
                if self.is_guest:
                    guard = while_served(store, name, event, join)
                async with guard as watch:
                    await cast("RunnerBundle", self.bundle)(store, index, event)
                try:
                    status = watch and watch.directive
                    status = status or await find_directive(store, name, _DIRECTIVE_SECONDS) or "done"
                except (TimeoutError, StoreUnavailable):
                    status = "gone"
            except StoreUnreachable:
                return "gone"
            except BaseException as error:
                await deregister_worker(store, name, error)
                raise
            await deregister_worker(store, name)
            return status


# --- The thread that steers a run ------------------------------------------------------------------------------------


class LoopThread:
    """An event loop in a thread of its own.

    The supervisor and calls of the store run there, because the main thread runs one side of the run, which may block.
    """

    loop: asyncio.AbstractEventLoop
    _thread: threading.Thread

    def __init__(self, name: str) -> None:
        self._name = name

    def start(self) -> None:
        """Start the thread. Only before can this process be forked safely."""
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=self._name, daemon=True)
        self._thread.start()

    def begin(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Start a coroutine in the loop; other threads get its result from the future."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def call(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine in the loop and wait for it. Raises what it raises."""
        return self.wait(self.begin(work))

    def wait(self, future: Future[_T]) -> _T:
        """Wait for something that ``begin`` has started. Raises what it raises."""
        try:
            while not future.done():
                wait([future], 0.1)  # not longer, because Python runs signal handlers only between two calls
            return future.result()
        finally:  # also after an interrupt of this thread: the coroutine must not run on
            future.cancel()

    def close(self) -> None:
        """Cancel what runs, and end the thread."""
        self.begin(cancel_all_tasks()).result()
        self.begin(self.loop.shutdown_default_executor()).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
