"""The two roles of a run, as an execution strategy calls them: the algorithm's side and the runner's side.

Both are plain objects, so that they can be sent to another process.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from agentlightning.execution.base import ExecutionEvent
from agentlightning.runner.agent import LitAgentRunner
from agentlightning.runner.base import Runner
from agentlightning.store.base import LightningStore
from agentlightning.tracer.base import Tracer
from agentlightning.tracer.otel import OtelTracer
from agentlightning.trainer.components import ComponentSpec, TracerRegistry, build_component
from agentlightning.trainer.progress import Progress
from agentlightning.trainer.resume import (
    end_leftovers,
    hold_until_asked,
    requeue_cut_off,
    watch_leftovers,
    with_taking_up,
)
from agentlightning.trainer.views import ProgressSpec, make_view
from agentlightning.trainer.wrappers import with_reward_observer, with_rollout_config
from agentlightning.types import Dataset, NamedResources, RolloutConfig

if TYPE_CHECKING:
    from agentlightning.adapter.base import TraceAdapter
    from agentlightning.algorithm.base import Algorithm
    from agentlightning.algorithm.run import Run
    from agentlightning.litagent.litagent import Hook, LitAgent
    from agentlightning.proxy.llm_proxy import LLMProxy


_logger = logging.getLogger(__name__)

_STOP_CHECK_SECONDS = 0.1


@dataclass
class AlgorithmRole:
    """Gives the algorithm what it works with, runs it, and shows progress meanwhile.

    Without an algorithm it keeps the store served until the run is stopped.
    """

    algorithm: Algorithm | None
    adapter: TraceAdapter[Any]
    llm_proxy: LLMProxy | None
    initial_resources: NamedResources | None
    rollout_config: RolloutConfig
    run: Run | None
    train_dataset: Dataset[Any] | None
    val_dataset: Dataset[Any] | None
    progress: ProgressSpec
    linger_seconds: float
    """How long what it serves stays up once the run is stopped, for runners that finish what they hold."""
    _interrupted: bool = field(default=False, init=False)

    def interrupt(self) -> None:
        """End the algorithm early, as if the stop event had been set. Any thread may call."""
        self._interrupted = True

    async def prepare(self, store: LightningStore) -> None:
        """Before runners can reach the store: see to what an earlier start of the run has left in it."""
        if self.run is None or self.algorithm is None:
            return
        hold_until_asked(store)
        await end_leftovers(store)
        if self.llm_proxy is not None:
            await requeue_cut_off(store)

    async def __call__(self, store: LightningStore, event: ExecutionEvent) -> None:
        """Run to the end of the algorithm, or until the event is set and runners have finished what they hold.

        The proxy is stopped after.
        """
        progress = Progress(store, make_view(self.progress))
        if self.llm_proxy is not None:
            self.llm_proxy.set_store(store)
        leftovers = None if self.run is None else asyncio.create_task(watch_leftovers(store))
        try:
            async with progress:
                await self._until_stopped(self._work(store, progress), store, event)
        finally:
            if leftovers is not None:
                leftovers.cancel()
                (outcome,) = await asyncio.gather(leftovers, return_exceptions=True)
                if isinstance(outcome, Exception):  # their leases say the same, later
                    _logger.warning("could not look for workers of an earlier start: %s", outcome)
            if self.llm_proxy is not None and self.llm_proxy.is_running():
                await self.llm_proxy.stop()

    async def _until_stopped(
        self, work: Coroutine[Any, Any, None], store: LightningStore, event: ExecutionEvent
    ) -> None:
        """Do the work; when the run is stopped first, cancel it, but not before runners can do without it."""
        working = asyncio.create_task(work)
        waiting = asyncio.create_task(self._wait_for_end(working, store, event))
        try:
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
        await _either(working, self._stop(event))
        if not working.done():
            await _either(working, _until_nothing_runs(store), self.linger_seconds)

    async def _stop(self, event: ExecutionEvent) -> None:
        while not (event.is_set() or self._interrupted):  # noqa: ASYNC110 - an event of processes, which wakes no loop
            await asyncio.sleep(_STOP_CHECK_SECONDS)

    async def _work(self, store: LightningStore, progress: Progress) -> None:
        if self.algorithm is None:
            _logger.warning(
                "this Trainer has no algorithm: it serves the store, for one that runs elsewhere, until it is stopped; "
                "for one here, give algorithm=, or call dev() to try the agent out"
            )
            await asyncio.Event().wait()  # until it is cancelled
            return
        self._equip(self.algorithm, store, progress)
        if self.algorithm.is_async():
            await cast("Awaitable[None]", self.algorithm.run(self.train_dataset, self.val_dataset))
        else:
            await _in_thread(functools.partial(self.algorithm.run, self.train_dataset, self.val_dataset))

    def _equip(self, algorithm: Algorithm, store: LightningStore, progress: Progress) -> None:
        given = store if self.run is None else with_taking_up(store, self.llm_proxy)
        algorithm.set_store(with_reward_observer(with_rollout_config(given, self.rollout_config), progress.observe))
        algorithm.set_adapter(self.adapter)
        algorithm.set_llm_proxy(self.llm_proxy)
        algorithm.set_rollout_config(self.rollout_config)
        if self.initial_resources is not None:
            algorithm.set_initial_resources(self.initial_resources)
        if self.run is not None:
            algorithm.set_run(self.run)
        algorithm.set_reporter(progress.report)


async def _either(working: asyncio.Task[None], other: Coroutine[Any, Any, None], seconds: float | None = None) -> None:
    """Wait until one of them has ended, or the time is up; the other coroutine is cancelled then."""
    meanwhile = asyncio.create_task(other)
    try:
        await asyncio.wait([working, meanwhile], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        meanwhile.cancel()
        (outcome,) = await asyncio.gather(meanwhile, return_exceptions=True)
        if isinstance(outcome, Exception):
            _logger.warning("could not wait for runners to finish what they hold: %s", outcome)


async def _until_nothing_runs(store: LightningStore) -> None:
    while await store.query_rollouts(status_in=["preparing", "running"], limit=1):  # noqa: ASYNC110 - a store tells no end
        await asyncio.sleep(_STOP_CHECK_SECONDS)


async def _in_thread(work: Callable[[], Any]) -> None:
    """Run a blocking function in a daemon thread: one that does not end when cancelled must not keep the process."""
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
        except BaseException as caught:  # noqa: BLE001 - carried to the loop, whatever it is
            error = caught
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=run, name="agentlightning-algorithm", daemon=True).start()
    await done


@dataclass(frozen=True)
class RunnerFactory:
    """Makes the runner of each worker, from specs.

    A runner or tracer that was given as an object is the first worker's; others of the same process get copies.
    """

    runner_spec: ComponentSpec[Runner[Any]]
    tracer_spec: ComponentSpec[Tracer]
    max_rollouts: int | None

    def __call__(self, worker_id: int) -> Runner[Any]:
        """The runner of a worker, counted from 0.

        Raises:
            InvalidValue: a spec that makes none.
        """
        made = build_component(
            self.runner_spec,
            expected_type=cast("type[Runner[Any]]", Runner),
            spec_name="runner",
            default_factory=lambda: LitAgentRunner(self.tracer(worker_id), max_rollouts=self.max_rollouts),
            optional_defaults={"tracer": lambda: self.tracer(worker_id), "max_rollouts": lambda: self.max_rollouts},
            dict_default_cls=LitAgentRunner,
        )
        assert made is not None  # there is a default
        return copy.deepcopy(made) if made is self.runner_spec and worker_id else made

    def tracer(self, worker_id: int) -> Tracer:
        """The tracer of a worker. Raises as the runner."""
        made = build_component(
            self.tracer_spec,
            expected_type=Tracer,
            spec_name="tracer",
            default_factory=OtelTracer,
            registry=TracerRegistry,
        )
        assert made is not None  # there is a default
        return copy.deepcopy(made) if made is self.tracer_spec and worker_id else made


@dataclass
class RunnerRole:
    """Runs the agent on what the store hands out, as one worker."""

    make_runner: Callable[[int], Runner[Any]]
    agent: LitAgent[Any]
    hooks: Sequence[Hook]

    async def __call__(self, store: LightningStore, worker_id: int, event: ExecutionEvent) -> None:
        """Work until the event is set, or the runner has done its share."""
        runner = self.make_runner(worker_id)
        with runner.run_context(agent=self.agent, store=store, hooks=self.hooks, worker_id=worker_id):
            await runner.iter(event=event)
