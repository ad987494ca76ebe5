"""``ClientServerExecutionStrategy``: the store on HTTP, the algorithm and each runner in a process of its own."""

from __future__ import annotations

from typing import ClassVar

from agentlightning.errors import InvalidValue
from agentlightning.execution.base import LINGER_SHARE, AlgorithmBundle, ExecutionStrategy, RunnerBundle
from agentlightning.execution.roles import AlgorithmRun, RunnerHostRun
from agentlightning.execution.run import RunSettings
from agentlightning.security.tls import Serving
from agentlightning.store.base import LightningStore


class ClientServerExecutionStrategy(RunSettings, ExecutionStrategy):
    """Runs both sides of a run as processes, on one machine or on many, around a store on HTTP.

    ``algorithm``: serves the store and runs the algorithm here. ``runner``: runs ``n_runners`` runners here, each
    in a process of its own, for a server on another machine, which it waits for. ``both``: all of it here.

    Runners are watched: when one crashes, its attempts end in the store at once, it is started again, and the others
    go on. When the algorithm ends, runners on other machines are asked, through the store, to finish and to leave.

    Args:
        role: what this process does. Default: ``AGL_CURRENT_ROLE``, else ``both``.
        server_host: name or address where the store is served, or for ``runner``, where the server is. Default:
            ``AGL_SERVER_HOST``, else ``localhost``. One that other machines can reach needs an API key. An LLM proxy of
            the ``Trainer`` listens there too.
        server_port: its port; 0 (not for ``runner``): any free one. Default: ``AGL_SERVER_PORT``, else any free one for
            ``both`` on loopback, else 4747.
        n_runners: how many runners run on this machine.
        graceful_timeout: seconds that processes get to end by themselves after the stop event (stage 1 of an abort).
        terminate_timeout: seconds for each of the other stages: SIGINT, SIGTERM, SIGKILL.
        main_process: of ``both``: which side runs in this process; ``runner`` needs ``n_runners=1``.
        managed_store: whether the store is served. False: both sides get it as it is, so it must work in several
            processes (its ``capabilities`` say ``zero_copy``); ``execute`` refuses another one. Default:
            ``AGL_MANAGED_STORE``, else True.
        allowed_exit_codes: exit codes of a runner that do not count as a crash (negative: by a signal).
        start_method: how processes are started: ``fork``, ``spawn`` or ``forkserver``. Default: ``fork`` while this
            process has one thread, else ``forkserver``.
        restarts: when a runner that crashed is started again.
        quotas: limits of each runner process.
        api_key: of the server. Default: ``AGL_API_KEY``; else a server on loopback makes a new one for each run, which
            the processes of the run and other programs of this user find. An empty text: it asks for none.
        run_id: names the run; a runner refuses the server of another run. Default: ``AGL_RUN_ID``, else a new one for
            ``algorithm`` and ``both``, and any for ``runner``.
        server_url: of ``runner``: the server's URL, where ``server_host`` and ``server_port`` are not enough: with
            ``https://``, or with a path that a reverse proxy adds. It may contain the key.
        connect_timeout: seconds that a runner waits for a server that is not up yet.
        stay: of ``runner``: when the run is over, wait for the next one, without a limit.
        tls_certificate, tls_key: the files in PEM of a server with HTTPS. Default: ``AGL_TLS_CERTIFICATE`` and
            ``AGL_TLS_KEY``, except on loopback.
        tls_ca_file: of ``runner``: the authorities that the server's certificate is checked with; the server is then
            reached by ``https``. Default: ``AGL_TLS_CA_FILE``, except on loopback.

    Raises:
        InvalidValue: an argument, or an environment variable, is not valid; or the store would be served to
            other machines without an API key. (It is a ``ValueError``, too.)
    """

    alias: ClassVar[str] = "cs"

    def execute(self, algorithm: AlgorithmBundle, runner: RunnerBundle, store: LightningStore) -> None:
        if not self.managed_store and self.role != "algorithm" and not store.capabilities.get("zero_copy"):
            raise InvalidValue(
                f"managed_store=False gives the {type(store).__name__} to each process as it is, and it works in "
                f"one process only: runners would have a copy of their own, and role {self.role!r} loses all work. "
                "Leave managed_store out, so that the store is served; or give a LightningStoreClient of a server "
                "(a store of your own that works in several processes says so by zero_copy in its capabilities)"
            )
        if self.role == "runner":
            RunnerHostRun(self, store).execute(runner)
        else:
            AlgorithmRun(self, store).execute(algorithm, runner)

    def serving(self) -> Serving | None:
        """Where the store is served; None if it is not served by this process."""
        return Serving(self.server_host, self.tls) if self.serves else None

    def linger_seconds(self) -> float:
        """A part of ``graceful_timeout``; 0 if the store is not served.

        A store that is not managed may serve other runs too, so something may always be running in it.
        """
        return LINGER_SHARE * self.graceful_timeout if self.managed_store else 0.0
