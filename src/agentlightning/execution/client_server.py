"""``ClientServerExecutionStrategy``: the store on HTTP, the algorithm and each runner in a process of its own."""

from __future__ import annotations

import os
import re
import secrets
import socket
from collections.abc import Iterable
from typing import ClassVar, Literal, cast, get_args

from agentlightning.errors import InvalidValue
from agentlightning.execution.base import (
    LINGER_SHARE,
    AlgorithmBundle,
    ExecutionStrategy,
    RunnerBundle,
    resolve_managed_store_flag,
)
from agentlightning.execution.quotas import Quotas, RestartPolicy
from agentlightning.execution.roles import AlgorithmRun, RunnerHostRun
from agentlightning.execution.run import RunSettings
from agentlightning.execution.shipping import StartMethod
from agentlightning.http.routes import parse_address
from agentlightning.security.hosts import is_loopback
from agentlightning.settings import LightningEnvVar, resolve_int_env_var, resolve_str_env_var
from agentlightning.store.base import LightningStore

Role = Literal["algorithm", "runner", "both"]
MainProcess = Literal["algorithm", "runner"]

_DEFAULT_HOST = "localhost"
_DEFAULT_PORT = 4747
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._~-]+")


class ClientServerExecutionStrategy(ExecutionStrategy):
    """Runs both sides of a run as processes, on one machine or on many, around a store on HTTP.

    ``algorithm``: serves the store and runs the algorithm here. ``runner``: runs ``n_runners`` runners here, each
    in a process of its own, for a server on another machine, which it waits for. ``both``: all of it here.

    Runners are watched: when one crashes, its attempts end in the store at once, it is started again, and the others
    go on. When the algorithm ends, runners on other machines are asked, through the store, to finish and to leave.

    Args:
        role: what this process does. Default: ``AGL_CURRENT_ROLE``, else ``both``.
        server_host: name or address where the store is served, or for ``runner``, where the server is. Default:
            ``AGL_SERVER_HOST``, else ``localhost``. One that other machines can reach needs an API key.
        server_port: its port; 0 (not for ``runner``): any free one. Default: ``AGL_SERVER_PORT``, else 4747.
        n_runners: how many runners run on this machine.
        graceful_timeout: seconds that processes get to end by themselves after the stop event (stage 1 of an abort).
        terminate_timeout: seconds for each of the other stages: SIGINT, SIGTERM, SIGKILL.
        main_process: of ``both``: which side runs in this process; ``runner`` needs ``n_runners=1``.
        managed_store: whether the store is served. False: both sides get it as it is, so it must work in several
            processes. Default: ``AGL_MANAGED_STORE``, else True.
        allowed_exit_codes: exit codes of a runner that do not count as a crash (negative: by a signal).
        start_method: how processes are started: ``fork``, ``spawn`` or ``forkserver``. Default: ``fork`` while this
            process has one thread, else ``forkserver``.
        restarts: when a runner that crashed is started again.
        quotas: limits of each runner process.
        api_key: of the server. Default: ``AGL_API_KEY``.
        run_id: names the run; a runner refuses the server of another run. Default: ``AGL_RUN_ID``, else a new one for
            ``algorithm`` and ``both``, and any for ``runner``.
        server_url: of ``runner``: the server's URL, where ``server_host`` and ``server_port`` are not enough: with
            ``https://``, or with a path that a reverse proxy adds. It may contain the key.
        connect_timeout: seconds that a runner waits for a server that is not up yet.
        stay: of ``runner``: when the run is over, wait for the next one, without a limit.

    Raises:
        InvalidValue: an argument, or an environment variable, is not valid; or the store would be served to
            other machines without an API key. (It is a ``ValueError``, too.)
    """

    alias: ClassVar[str] = "cs"

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
    ) -> None:
        self.role: Role = cast("Role", resolve_str_env_var(LightningEnvVar.AGL_CURRENT_ROLE, role, fallback="both"))
        self.server_host = resolve_str_env_var(LightningEnvVar.AGL_SERVER_HOST, server_host, fallback=_DEFAULT_HOST)
        self.server_port = resolve_int_env_var(LightningEnvVar.AGL_SERVER_PORT, server_port, fallback=_DEFAULT_PORT)
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
        self._api_key = resolve_str_env_var(LightningEnvVar.AGL_API_KEY, api_key or (server and server.api_key))
        self._check()

    def execute(self, algorithm: AlgorithmBundle, runner: RunnerBundle, store: LightningStore) -> None:
        settings = self._settings()
        match self.role:
            case "algorithm":
                AlgorithmRun(settings, store).execute(algorithm, None)
            case "runner":
                RunnerHostRun(settings, store).execute(runner)
            case "both":
                AlgorithmRun(settings, store, self.main_process).execute(algorithm, runner)

    def linger_seconds(self) -> float:
        """A part of ``graceful_timeout``; 0 if the store is not served.

        A store that is not managed may serve other runs too, so something may always be running in it.
        """
        return LINGER_SHARE * self.graceful_timeout if self.managed_store else 0.0

    def _settings(self) -> RunSettings:
        return RunSettings(
            host=self.server_host,
            port=self.server_port,
            server_url=self.server_url,
            worker_names=_worker_names(self.n_runners),
            graceful_timeout=self.graceful_timeout,
            terminate_timeout=self.terminate_timeout,
            managed_store=self.managed_store,
            allowed_exit_codes=self.allowed_exit_codes,
            start_method=self.start_method,
            restarts=self.restarts,
            quotas=self.quotas,
            api_key=self._api_key,
            run_id=self.run_id,
            connect_timeout=self.connect_timeout,
            stay=self.stay,
        )

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
        serves = self.role != "runner" and self.managed_store
        if serves and not is_loopback(self.server_host) and not self._api_key:
            raise InvalidValue(
                f"server_host {self.server_host!r} lets other machines reach the store, and there is no API key: "
                "anybody who finds the port could read and change everything. Either set a key, in AGL_API_KEY or "
                "api_key=, here and on the machines of the runners (this command makes one: "
                "python -c 'import secrets; print(secrets.token_urlsafe(32))'); "
                "or serve this machine only, with server_host='localhost'"
            )


def _worker_names(number: int) -> tuple[str, ...]:
    """Worker ids, unique across machines, processes and calls. Each belongs to one slot, also after a restart."""
    host = _NOT_IN_NAMES.sub("-", socket.gethostname()).strip("-")[:64] or "host"
    token = secrets.token_hex(4)
    return tuple(f"{host}-{os.getpid()}-{token}-{index}" for index in range(number))
