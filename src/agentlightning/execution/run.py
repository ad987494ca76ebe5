"""One call of a client-server strategy: what is started, in which order, and what becomes of it all at the end.

The order matters. The nursery comes first, while this process has as few threads as it ever will; then the
server, so that its port is known; then the processes. At the end, workers elsewhere are asked to leave while
the processes here are stopped; the server goes last, because those who leave have things to report.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from agentlightning.errors import ExecutionFailed
from agentlightning.execution.base import AlgorithmBundle, prepare_store
from agentlightning.execution.events import Interrupts, ThreadingEvent
from agentlightning.execution.jobs import Door
from agentlightning.execution.launcher import StartMethod
from agentlightning.execution.quotas import Quotas, RestartPolicy
from agentlightning.execution.supervision import LoopThread, Shutdown, Supervision
from agentlightning.execution.supervisor import Slot
from agentlightning.settings import LightningEnvVar
from agentlightning.store.base import LightningStore

# --- The side of a run that stays in this thread, and how it is ended from another ---

_log = logging.getLogger(__name__)


class MainRole:
    """Runs one coroutine in the thread that calls ``run``.

    Args:
        graceful_timeout: seconds that it gets to end after each request, before the next, stronger one.
        force: raises ``KeyboardInterrupt`` in that thread.
    """

    def __init__(self, graceful_timeout: float, force: Callable[[], None]) -> None:
        self._graceful_timeout = graceful_timeout
        self._force = force
        self._lock = threading.Lock()
        self._working: tuple[asyncio.AbstractEventLoop, asyncio.Task[None]] | None = None
        self._asked: list[float] = []
        self._done = threading.Event()
        self._watch: threading.Thread | None = None

    @property
    def asked_to_end(self) -> bool:
        """Whether ``end`` was called before it had ended."""
        return bool(self._asked)

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run the coroutine to its end. Raises what it raises; nothing if it was asked to end, and did."""
        try:
            with asyncio.Runner() as runner:
                runner.run(self._work(work))
        except (asyncio.CancelledError, KeyboardInterrupt):
            if not self._asked:
                raise
        finally:
            work.close()
            self._done.set()
            if self._watch is not None:
                self._watch.join()

    def end(self, *, patience: float = 0.0) -> None:
        """Ask it to end, from any thread: cancel it, and if that does not help, interrupt the thread. Idempotent.

        Args:
            patience: seconds to wait before, because it may end by itself.
        """
        with self._lock:
            if self._asked or self._done.is_set():
                return
            self._asked.append(patience)
            self._watch = threading.Thread(target=self._press, args=(patience,), name="agl-main-role", daemon=True)
            self._watch.start()

    async def _work(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._working = (asyncio.get_running_loop(), task)
        try:
            await task
        finally:
            self._working = None

    def _press(self, patience: float) -> None:
        if self._done.wait(patience):
            return
        self._cancel()
        while not self._done.wait(self._graceful_timeout):
            _log.warning(
                "what runs in the main thread does not end within %g s; interrupting it", self._graceful_timeout
            )
            self._force()

    def _cancel(self) -> None:
        """As soon as it has begun."""
        while not self._done.wait(0.01):
            working = self._working
            if working is not None:
                loop, task = working
                with contextlib.suppress(RuntimeError):  # it has just ended
                    loop.call_soon_threadsafe(task.cancel)
                return


# ---


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
        from agentlightning.http.server.server import LightningStoreServer

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
