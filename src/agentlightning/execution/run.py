"""The parts of which every run of ``ClientServerExecutionStrategy`` is made; ``roles`` puts them together.

The order of a run matters. The launcher comes first, while this process has as few threads as possible; then the
server, so that its port is known; then the processes. At the end, workers on other machines are asked to leave while
the processes here are stopped. The server stops last, because workers that leave have results to report.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from agentlightning.errors import AgentLightningError, ExecutionFailed, StoreUnavailable, StoreUnreachable
from agentlightning.execution.abort import SignalHandlers, abort_stages
from agentlightning.execution.base import (
    AlgorithmBundle,
    ExecutionEvent,
    RunnerBundle,
    ThreadingEvent,
    prepare_store,
)
from agentlightning.execution.child import Slot
from agentlightning.execution.membership import ask_workers_to_leave, deregister_worker, join_server
from agentlightning.execution.quotas import Quotas, RestartPolicy
from agentlightning.execution.shipping import StartMethod
from agentlightning.execution.supervisor import LoopThread, Supervisor
from agentlightning.http.client.client import LightningStoreClient
from agentlightning.settings import LightningEnvVar, resolve_str_env_var
from agentlightning.store.base import LightningStore
from agentlightning.types import WorkerDirective

_log = logging.getLogger(__name__)

# --- What the processes of a run do: one side of it, with a store ----------------------------------------------------

_JOIN_SECONDS = 30.0
"""How long a new process waits for a server that has answered before; it may be restarting."""
_DIRECTIVE_SECONDS = 2.0


@dataclass(frozen=True)
class StoreAddress:
    """Where a side of the run finds the store.

    Args:
        store: the store itself, where it is not served.
        url: of the server; used if there is no ``store``.
        api_key: for the server.
        run_id: the run that the server must serve; None: any.
    """

    store: LightningStore | None = None
    url: str = ""
    api_key: str | None = None
    run_id: str | None = None

    def arguments(self) -> dict[str, Any]:
        """What is sent to a process as plain values. The key goes by the environment, which few can read."""
        return {"url": self.url, "run_id": self.run_id}

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[LightningStore, None]:
        """The store, for the length of the block. Raises as ``join_server``."""
        if self.store is not None:
            yield self.store
            return
        await join_server(self.url, api_key=self.api_key, run_id=self.run_id, limit_seconds=_JOIN_SECONDS)
        client = LightningStoreClient(self.url, api_key=self.api_key)
        try:
            yield client
        finally:
            await client.close()


def _address(store: LightningStore | None, arguments: Mapping[str, Any]) -> StoreAddress:
    key = resolve_str_env_var(LightningEnvVar.AGL_API_KEY)
    return StoreAddress(store=store, url=arguments["url"], api_key=key, run_id=arguments["run_id"])


async def run_runner(bundle: RunnerBundle, address: StoreAddress, name: str, index: int, event: ExecutionEvent) -> str:
    """Run one runner to its end, and deregister its worker.

    Returns:
        ``drain`` or ``stop``, if that is what the worker has been asked to do; ``gone``, if the server cannot be
        reached any more; else ``done``.
    """
    async with address.open() as store:
        try:
            await bundle(store, index, event)
            status = await _leave_reason(store, name)
        except StoreUnreachable:
            return "gone"
        except BaseException as error:
            await deregister_worker(store, name, error)
            raise
        await deregister_worker(store, name)
        return status


async def _leave_reason(store: LightningStore, name: str) -> str:
    try:
        async with asyncio.timeout(_DIRECTIVE_SECONDS):
            worker = await store.get_worker_by_id(name)
    except (TimeoutError, StoreUnavailable):
        return "gone"
    return "done" if worker is None or worker.directive is None else worker.directive


@dataclass(frozen=True)
class RunnerJob:
    """One runner in a process of its own. It is an object, not a closure, so that it can be pickled by name.

    Args:
        bundle: the runner's side.
        store: where it is not served.
    """

    bundle: RunnerBundle
    store: LightningStore | None = None

    def __call__(self, slot: str, event: ThreadingEvent, arguments: Mapping[str, Any]) -> str:
        """Run it. ``arguments``: its ``index``, and where the store is."""
        address = _address(self.store, arguments)
        return asyncio.run(run_runner(self.bundle, address, slot, arguments["index"], event))


@dataclass(frozen=True)
class AlgorithmJob:
    """The algorithm in a process of its own.

    Args:
        bundle: the algorithm's side.
        store: where it is not served.
    """

    bundle: AlgorithmBundle
    store: LightningStore | None = None

    def __call__(self, slot: str, event: ThreadingEvent, arguments: Mapping[str, Any]) -> str:
        """Run it. ``arguments``: where the store is."""

        async def run() -> None:
            async with _address(self.store, arguments).open() as store:
                await self.bundle(store, event)

        asyncio.run(run())
        return "done"


# --- The side of a run that stays in the main thread -----------------------------------------------------------------


class MainThreadSide:
    """Runs one coroutine in the thread that calls ``run``, and lets other threads end it.

    Args:
        graceful_timeout: seconds that it gets to end after it was cancelled, and after each interrupt.
        interrupt: raises ``KeyboardInterrupt`` in that thread.
    """

    def __init__(self, graceful_timeout: float, interrupt: Callable[[], None]) -> None:
        self._graceful_timeout = graceful_timeout
        self._interrupt = interrupt
        self._lock = threading.Lock()
        self._task: tuple[asyncio.AbstractEventLoop, asyncio.Task[None]] | None = None
        self._end_requested = False
        self._done = threading.Event()
        self._escalation: threading.Thread | None = None

    def run(self, work: Coroutine[Any, Any, object]) -> None:
        """Run the coroutine to its end. Raises what it raises; nothing if it was asked to end, and did."""
        try:
            with asyncio.Runner() as runner:
                runner.run(self._run(work))
        except (asyncio.CancelledError, KeyboardInterrupt):
            if not self._end_requested:
                raise
        finally:
            work.close()
            self._done.set()
            if self._escalation is not None:
                self._escalation.join()

    def end(self, *, delay_seconds: float = 0.0) -> None:
        """Ask it to end: cancel it, then interrupt the thread until it ends. Any thread may call; idempotent.

        Args:
            delay_seconds: how long to wait before, because it may end by itself.
        """
        with self._lock:
            if self._end_requested or self._done.is_set():
                return
            self._end_requested = True
            self._escalation = threading.Thread(
                target=self._escalate, args=(delay_seconds,), name="agl-main-side", daemon=True
            )
            self._escalation.start()

    async def _run(self, work: Coroutine[Any, Any, object]) -> None:
        async def task_body() -> None:
            await work

        task = asyncio.create_task(task_body())
        self._task = (asyncio.get_running_loop(), task)
        try:
            await task
        finally:
            self._task = None

    def _escalate(self, delay_seconds: float) -> None:
        if self._done.wait(delay_seconds):
            return
        while not self._done.wait(0.01):  # until it has begun and can be cancelled
            running = self._task
            if running is not None:
                loop, task = running
                with contextlib.suppress(RuntimeError):  # it has just ended
                    loop.call_soon_threadsafe(task.cancel)
                break
        while not self._done.wait(self._graceful_timeout):
            _log.warning(
                "what runs in the main thread does not end within %g s; interrupting it", self._graceful_timeout
            )
            self._interrupt()


# --- The end of a run ------------------------------------------------------------------------------------------------


class RunShutdown:
    """Ends the processes here in four stages, and meanwhile asks workers on other machines to leave.

    Args:
        thread: where calls of the store run.
        graceful_timeout: seconds of the first stage, which workers on other machines get to leave, too.
        terminate_timeout: seconds of each other stage; workers that were asked to drain get as long again to stop.
        hurry: whether to go to the last stage at once, and wait for no other machine.
        supervisor: of the processes here; None: there are none.
    """

    def __init__(
        self,
        thread: LoopThread,
        graceful_timeout: float,
        terminate_timeout: float,
        hurry: Callable[[], bool],
        supervisor: Supervisor | None,
    ) -> None:
        self._thread = thread
        self._graceful_timeout = graceful_timeout
        self._terminate_timeout = terminate_timeout
        self._hurry = hurry
        self._supervisor = supervisor
        self._lock = threading.Lock()
        self._work: threading.Thread | None = None
        self.store: LightningStore | None = None
        """By which workers on other machines learn of the end; None: there are none."""

    def begin(self, directive: WorkerDirective) -> None:
        """Begin the shutdown and return at once. Any thread may call; only the first call counts.

        Args:
            directive: ``drain`` lets workers finish what they hold; ``stop`` does not.
        """
        with self._lock:
            if self._work is None:
                self._work = threading.Thread(target=self._run, args=(directive,), name="agl-shutdown", daemon=True)
                self._work.start()

    def finish(self) -> None:
        """Wait until it is over. It must have begun."""
        assert self._work is not None
        while self._work.is_alive():
            self._work.join(0.1)  # not longer, because Python runs signal handlers only between two calls

    def _run(self, directive: WorkerDirective) -> None:
        leaving = self._ask(directive, self._graceful_timeout)
        if self._supervisor is not None:
            self._supervisor.abort(abort_stages(self._graceful_timeout, self._terminate_timeout), self._hurry)
        left = self._wait(leaving)
        if left and directive == "drain":
            left = self._wait(self._ask("stop", self._terminate_timeout))
        if left:
            _log.warning("these workers have not left: %s; they will find the server gone", ", ".join(sorted(left)))

    def _ask(self, directive: WorkerDirective, seconds: float) -> Future[list[str]] | None:
        if self.store is None or self._hurry():
            return None
        return self._thread.begin(ask_workers_to_leave(self.store, directive, seconds))

    def _wait(self, leaving: Future[list[str]] | None) -> list[str]:
        """The workers that have not left when their time is over; none if somebody is in a hurry."""
        while leaving is not None and not self._hurry():
            try:
                return leaving.result(0.05)
            except TimeoutError:
                if leaving.done():
                    _log.warning("the store did not accept in time that workers shall leave")
                    return []
            except (AgentLightningError, NotImplementedError) as error:
                _log.warning("workers on other machines could not be asked to leave: %s", error)
                return []
        if leaving is not None:
            leaving.cancel()
        return []


# --- What all runs have in common ------------------------------------------------------------------------------------


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
        """Of a server on another machine."""
        if self.server_url is not None:
            return self.server_url
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def environment(self, worker_name: str | None = None) -> dict[str, str]:
        """What a process gets in addition to the environment of this one."""
        given = {LightningEnvVar.AGL_API_KEY.value: self.api_key, LightningEnvVar.AGL_WORKER_NAME.value: worker_name}
        return {name: value for name, value in given.items() if value is not None}

    def runner_slots(self, address: StoreAddress) -> list[Slot]:
        """The slots of the runners on this machine."""
        return [
            Slot(
                name=name,
                job="runner",
                arguments={**address.arguments(), "index": index},
                restart=self.restarts,
                quotas=self.quotas,
                environment=self.environment(name),
            )
            for index, name in enumerate(self.worker_names)
        ]


class ClientServerRun:
    """One call of ``ClientServerExecutionStrategy.execute``.

    Args:
        settings: the arguments of the strategy.
        store: what the run works on.
    """

    def __init__(self, settings: RunSettings, store: LightningStore) -> None:
        self._settings = settings
        self._store = store
        self._unserved = None if settings.managed_store else store
        self._thread = LoopThread("agl-supervisor")
        self._signals = SignalHandlers(self._interrupted)
        self._main = MainThreadSide(settings.graceful_timeout, self._signals.interrupt_main_thread)
        self._event = ThreadingEvent()
        self._failure: ExecutionFailed | None = None

    def _make_shutdown(self, supervisor: Supervisor | None) -> RunShutdown:
        settings = self._settings
        return RunShutdown(
            self._thread, settings.graceful_timeout, settings.terminate_timeout, self._signals.is_hurried, supervisor
        )

    def _interrupted(self) -> None:
        """Called in the main thread at the first signal."""
        raise NotImplementedError

    @contextmanager
    def _served(self, algorithm: AlgorithmBundle) -> Generator[StoreAddress, None, None]:
        """The store as both sides get it, for the length of the block. The algorithm's side gets it first."""
        settings = self._settings
        prepare_store(algorithm, self._store)
        if self._unserved is not None:
            yield StoreAddress(store=self._store)
            return
        # Imported late, because a machine that only has runners does not need the server's framework.
        from agentlightning.http.server.server import LightningStoreServer

        run_id = settings.run_id or f"run-{secrets.token_hex(6)}"
        server = LightningStoreServer(
            self._store, settings.host, settings.port, api_key=settings.api_key, run_id=run_id
        )
        server.start_blocking()
        try:
            _log.info("run %s is served at %s", run_id, server.endpoint)
            yield StoreAddress(store=server, url=server.endpoint, api_key=settings.api_key, run_id=run_id)
        finally:
            server.stop_blocking()

    def _run_main(self, work: Coroutine[Any, Any, object]) -> None:
        """Run one side in this thread. After a signal, or a failure of the other side, how it ends does not matter."""
        try:
            self._main.run(work)
        except BaseException as error:
            if self._signals.number is None and self._failure is None:
                raise
            _log.debug("the side of the run in this process ended with %r", error)

    def _conclude(self) -> None:
        """Raise ``Interrupted`` or the failure of the run, if there was one."""
        self._signals.check()
        if self._failure is not None:
            raise self._failure
