"""One call of a client-server strategy: what is started, in which order, and what becomes of it all at the end.

The order matters. The nursery comes first, while this process has as few threads as it ever will; then the
server, so that its port is known; then the processes. At the end, workers elsewhere are asked to leave while
the processes here are stopped; the server goes last, because those who leave have things to report.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Coroutine, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from agentlightning.errors import ExecutionFailed
from agentlightning.execution.base import AlgorithmBundle, prepare_store
from agentlightning.execution.events import ThreadingEvent
from agentlightning.execution.interrupts import Interrupts
from agentlightning.execution.jobs import Door
from agentlightning.execution.loop_thread import LoopThread
from agentlightning.execution.main_role import MainRole
from agentlightning.execution.nursery import StartMethod
from agentlightning.execution.quotas import Quotas
from agentlightning.execution.restarts import RestartPolicy
from agentlightning.execution.shutdown import Shutdown
from agentlightning.execution.slots import Slot
from agentlightning.execution.supervision import Supervision
from agentlightning.settings import LightningEnvVar
from agentlightning.store.base import LightningStore

__all__ = ["Run", "RunSettings", "runner_slots"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSettings:
    """The arguments of ``ClientServerExecutionStrategy``, checked."""

    host: str
    port: int
    server_url: str | None
    worker_names: tuple[str, ...]
    graceful_timeout: float
    terminate_timeout: float
    managed_store: bool
    allowed_exit_codes: frozenset[int]
    start_method: StartMethod | None
    restarts: RestartPolicy
    quotas: Quotas | None
    api_key: str | None
    run_id: str | None
    connect_timeout: float
    stay: bool

    @property
    def url(self) -> str:
        """Of a server elsewhere."""
        if self.server_url is not None:
            return self.server_url
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def environment(self, **more: str | None) -> dict[str, str]:
        """What processes get in addition to the environment of this one."""
        given = {LightningEnvVar.AGL_API_KEY.value: self.api_key, **more}
        return {name: value for name, value in given.items() if value is not None}


class Run:
    """What all runs have in common.

    Args:
        settings: how.
        store: on what.
    """

    def __init__(self, settings: RunSettings, store: LightningStore) -> None:
        self._settings = settings
        self._store = store
        self._thread = LoopThread("agl-supervisor")
        self._interrupts = Interrupts(self._interrupted)
        self._main = MainRole(settings.graceful_timeout, self._interrupts.force)
        self._event = ThreadingEvent()
        self._failure: ExecutionFailed | None = None

    def _shutdown(self, supervision: Supervision | None) -> Shutdown:
        settings = self._settings
        return Shutdown(
            self._thread, settings.graceful_timeout, settings.terminate_timeout, self._interrupts.hurry, supervision
        )

    def _interrupted(self) -> None:
        raise NotImplementedError

    @contextmanager
    def _served(self, algorithm: AlgorithmBundle) -> Generator[Door, None, None]:
        """The store as the two sides get it, for the length of the block; the algorithm's side sees it first."""
        settings = self._settings
        prepare_store(algorithm, self._store)
        if not settings.managed_store:
            yield Door(store=self._store)
            return
        # Where only runners are, there is no need for the server's framework.
        from agentlightning.store.client_server.server.server import LightningStoreServer

        run_id = settings.run_id or f"run-{secrets.token_hex(6)}"
        server = LightningStoreServer(
            self._store, settings.host, settings.port, api_key=settings.api_key, run_id=run_id
        )
        server.start_blocking()
        try:
            _log.info("run %s is served at %s", run_id, server.endpoint)
            yield Door(store=server, url=server.endpoint, api_key=settings.api_key, run_id=run_id)
        finally:
            server.stop_blocking()

    def _run_main(self, work: Coroutine[Any, Any, None]) -> None:
        """Run one side here. A signal, or the failure of the other side, outweighs how it ends."""
        try:
            self._main.run(work)
        except BaseException as error:
            if self._interrupts.number is None and self._failure is None:
                raise
            _log.debug("the side of the run in this process ended with %r", error)

    def _conclude(self) -> None:
        """Raise what the run came to, if it is not well."""
        self._interrupts.check()
        if self._failure is not None:
            raise self._failure


def runner_slots(settings: RunSettings, door: Door) -> list[Slot]:
    """The places of the runners here."""
    return [
        Slot(
            name=name,
            job="runner",
            arguments={**door.arguments(), "index": index},
            restart=settings.restarts,
            quotas=settings.quotas,
            environment=settings.environment(**{LightningEnvVar.AGL_WORKER_NAME.value: name}),
        )
        for index, name in enumerate(settings.worker_names)
    ]
