"""The two roles of a run, as an execution strategy calls them: the algorithm's side and the runner's side.

Both are plain objects, because a strategy may send them to another process.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from agentlightning.algorithm.run import ProxyMove, prepare_to_resume, watch_lost_workers
from agentlightning.execution.base import ExecutionEvent
from agentlightning.runner.agent import LitAgentRunner
from agentlightning.runner.base import Runner
from agentlightning.runner.heartbeat import process_space
from agentlightning.store.base import LightningStore
from agentlightning.tracer.base import Tracer
from agentlightning.tracer.otel import OtelTracer
from agentlightning.trainer.algorithm_store import algorithm_store
from agentlightning.trainer.components import ComponentSpec, TracerRegistry, build_required
from agentlightning.trainer.progress import Progress, ProgressSpec, make_view
from agentlightning.types import Dataset, ResourceUnion, RolloutConfig

if TYPE_CHECKING:
    from agentlightning.adapter.adapters import TraceAdapter
    from agentlightning.algorithm.base import Algorithm
    from agentlightning.algorithm.run import Run
    from agentlightning.litagent.litagent import Hook, LitAgent
    from agentlightning.proxy.llm_proxy import LLMProxy


_logger = logging.getLogger(__name__)

_CHECK_SECONDS = 0.1


@dataclass
class AlgorithmRole:
    """Gives the algorithm what it works with, runs it, and shows progress meanwhile.

    Without an algorithm it keeps the store served until the run is stopped.
    """

    algorithm: Algorithm | None
    adapter: TraceAdapter[Any]
    llm_proxy: LLMProxy | None
    initial_resources: Mapping[str, ResourceUnion] | None
    rollout_config: RolloutConfig
    run: Run | None
    train_dataset: Dataset[Any] | None
    val_dataset: Dataset[Any] | None
    progress: ProgressSpec
    linger_seconds: float
    """How long the algorithm, and the models that it serves, stay up after a stop, for runners that finish their
    rollouts."""
    _interrupted: bool = field(default=False, init=False)

    def interrupt(self) -> None:
        """End the algorithm early, as if the stop event had been set. Any thread may call this."""
        self._interrupted = True

    async def prepare(self, store: LightningStore) -> None:
        """Make the store ready for a run that may be resumed, before runners can reach it."""
        if self.run is not None and self.algorithm is not None:
            await prepare_to_resume(store, process_space(), behind_proxy=self.llm_proxy is not None)

    async def __call__(self, store: LightningStore, event: ExecutionEvent) -> None:
        """Run until the algorithm ends, or until the event is set and runners have finished what they hold."""
        progress = Progress(store, make_view(self.progress))
        if self.llm_proxy is not None:
            self.llm_proxy.set_store(store)
        watch = None if self.run is None else asyncio.create_task(watch_lost_workers(store, process_space()))
        try:
            async with progress:
                await self._until_stopped(self._work(store, progress), store, event)
        finally:
            if watch is not None:
                await _cancel(watch, "could not look for workers of an earlier start, whose leases end them later")
            if self.llm_proxy is not None and self.llm_proxy.is_running():
                await self.llm_proxy.stop()

    async def _until_stopped(
        self, work: Coroutine[Any, Any, None], store: LightningStore, event: ExecutionEvent
    ) -> None:
        """Do the work. After a stop it is cancelled, but only once no runner needs its models any more."""
        working = asyncio.create_task(work)
        waiting = asyncio.create_task(self._wait_for_end(working, store, event))
        try:
            # Shielded: a cancellation of this task is a stop, too, and runners get the same time to finish after it.
            await asyncio.shield(waiting)
        except asyncio.CancelledError:
            self._interrupted = True
            await asyncio.wait([waiting])
            raise
        finally:
            for task in (waiting, working):
                task.cancel()
            await asyncio.gather(waiting, working, return_exceptions=True)
        if not working.cancelled():
            working.result()

    async def _wait_for_end(self, working: asyncio.Task[None], store: LightningStore, event: ExecutionEvent) -> None:
        await _first_of(working, self._stop(event))
        if not working.done():
            await _first_of(working, _until_nothing_runs(store), self.linger_seconds)

    async def _stop(self, event: ExecutionEvent) -> None:
        while not (event.is_set() or self._interrupted):  # noqa: ASYNC110 - an event of processes, which wakes no loop
            await asyncio.sleep(_CHECK_SECONDS)

    async def _work(self, store: LightningStore, progress: Progress) -> None:
        if self.algorithm is None:
            _logger.warning(
                "this Trainer has no algorithm: it serves the store, for one that runs elsewhere, until it is stopped; "
                "for one here, give algorithm=, or call dev() to try the agent out"
            )
            await asyncio.Event().wait()  # until cancelled
            return
        self._equip(self.algorithm, store, progress)
        if self.algorithm.is_async():
            await cast("Awaitable[None]", self.algorithm.run(self.train_dataset, self.val_dataset))
        else:
            await _in_thread(functools.partial(self.algorithm.run, self.train_dataset, self.val_dataset))

    def _equip(self, algorithm: Algorithm, store: LightningStore, progress: Progress) -> None:
        move = None if self.run is None else ProxyMove(store, self.llm_proxy)
        algorithm.set_store(algorithm_store(store, self.rollout_config, progress.observe, move))
        algorithm.set_adapter(self.adapter)
        algorithm.set_llm_proxy(self.llm_proxy)
        algorithm.set_rollout_config(self.rollout_config)
        if self.initial_resources is not None:
            algorithm.set_initial_resources(self.initial_resources)
        if self.run is not None:
            algorithm.set_run(self.run)
        algorithm.set_reporter(progress.report)


async def _first_of(
    working: asyncio.Task[None], other: Coroutine[Any, Any, None], timeout_seconds: float | None = None
) -> None:
    """Wait until one of them has ended, or the time is up; ``other`` is cancelled then."""
    meanwhile = asyncio.create_task(other)
    try:
        await asyncio.wait([working, meanwhile], timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await _cancel(meanwhile, "could not wait for runners to finish what they hold")


async def _cancel(task: asyncio.Task[None], failure: str) -> None:
    """End a task that is not needed any more. If it failed, that is logged: the run itself does not depend on it."""
    task.cancel()
    (outcome,) = await asyncio.gather(task, return_exceptions=True)
    if isinstance(outcome, Exception):
        _logger.warning("%s: %s", failure, outcome)


async def _until_nothing_runs(store: LightningStore) -> None:
    while await store.query_rollouts(status_in=["preparing", "running"], limit=1):  # noqa: ASYNC110 - no store tells when
        await asyncio.sleep(_CHECK_SECONDS)


async def _in_thread(work: Callable[[], Any]) -> None:
    """Run a blocking function in a daemon thread, because it cannot be cancelled and must not block exit."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def run() -> None:
        error: BaseException | None = None
        try:
            work()
        except BaseException as caught:  # noqa: BLE001 - raised again in the loop
            error = caught
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=run, name="agentlightning-algorithm", daemon=True).start()
    await done


@dataclass(frozen=True)
class RunnerFactory:
    """Makes the runner of each worker, from specs.

    A runner or tracer that was given as an object belongs to the first worker; others in the same process get copies.
    """

    runner_spec: ComponentSpec[Runner[Any]]
    tracer_spec: ComponentSpec[Tracer]
    max_rollouts: int | None

    def __call__(self, worker_id: int) -> Runner[Any]:
        """Return the runner of a worker, counted from 0.

        Raises:
            InvalidValue: a spec does not make a runner or a tracer.
        """
        made = build_required(
            self.runner_spec,
            cast("type[Runner[Any]]", Runner),
            "runner",
            default_factory=lambda: LitAgentRunner[Any](self.tracer(worker_id), max_rollouts=self.max_rollouts),
            optional_defaults={"tracer": lambda: self.tracer(worker_id), "max_rollouts": lambda: self.max_rollouts},
            dict_default_cls=LitAgentRunner,
        )
        return copy.deepcopy(made) if made is self.runner_spec and worker_id else made

    def tracer(self, worker_id: int) -> Tracer:
        """Return the tracer of a worker. Raises like ``__call__``."""
        made = build_required(self.tracer_spec, Tracer, "tracer", default_factory=OtelTracer, registry=TracerRegistry)
        return copy.deepcopy(made) if made is self.tracer_spec and worker_id else made


@dataclass
class RunnerRole:
    """Runs the agent on what the store hands out, as one worker."""

    make_runner: Callable[[int], Runner[Any]]
    agent: LitAgent[Any]
    hooks: Sequence[Hook]

    async def __call__(self, store: LightningStore, worker_id: int, event: ExecutionEvent) -> None:
        """Work until the event is set, or the runner has done its ``max_rollouts``."""
        runner = self.make_runner(worker_id)
        with runner.run_context(agent=self.agent, store=store, hooks=self.hooks, worker_id=worker_id):
            await runner.iter(event=event)
