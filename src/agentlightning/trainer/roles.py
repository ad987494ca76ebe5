"""The two roles of a run, as an execution strategy calls them: the algorithm's side and the runner's side.

Both are plain objects, because a strategy may send them to another process.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import json
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from agentlightning.algorithm.resume import ProxyMove, prepare_to_resume, watch_lost_workers
from agentlightning.errors import NothingToLearn
from agentlightning.execution.base import ExecutionEvent
from agentlightning.runner.agent import LitAgentRunner
from agentlightning.runner.base import Runner
from agentlightning.runner.heartbeat import process_space
from agentlightning.store.base import LightningStore
from agentlightning.tracer.base import Tracer
from agentlightning.tracer.otel import OtelTracer
from agentlightning.trainer.components import ComponentSpec, TracerRegistry, build_required
from agentlightning.trainer.identity import origin_of_this_process
from agentlightning.trainer.progress import Progress, ProgressSpec, make_view
from agentlightning.types import (
    AttemptedRollout,
    Dataset,
    EnqueueRolloutRequest,
    PaginatedResult,
    ResourceUnion,
    Rollout,
    RolloutConfig,
    RolloutMode,
    Span,
)
from agentlightning.types.attempt_spans import used_default_resources
from agentlightning.types.rewards import find_final_reward

if TYPE_CHECKING:
    from agentlightning.adapter.adapters import TraceAdapter
    from agentlightning.algorithm.base import Algorithm
    from agentlightning.algorithm.run import Run
    from agentlightning.litagent.litagent import Hook, LitAgent
    from agentlightning.proxy.llm_proxy import LLMProxy


T = TypeVar("T")

_logger = logging.getLogger(__name__)

_CHECK_SECONDS = 0.1
_PAGE = 100


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
    identity: Mapping[str, str] = field(default_factory=dict[str, str])
    """What the run is bound to."""
    _interrupted: bool = field(default=False, init=False)

    def interrupt(self) -> None:
        """End the algorithm early, as if the stop event had been set. Any thread may call this."""
        self._interrupted = True

    async def prepare(self, store: LightningStore) -> None:
        """Make the store ready for a run that may be resumed, before runners can reach it.

        Raises:
            InvalidValue: the run of this name was begun with something else.
        """
        if self.run is not None and self.algorithm is not None:
            self.run.bind(self.identity, origin_of_this_process())
            await prepare_to_resume(store, process_space(), behind_proxy=self.llm_proxy is not None)

    def why_no_guests(self) -> str | None:
        """Why agents on other machines cannot reach the models of this run, and what to do about it."""
        if self.llm_proxy is not None:
            return self.llm_proxy.why_no_guests()
        return None if self.algorithm is None else self.algorithm.why_no_guests()

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
                watch.cancel()
                (outcome,) = await asyncio.gather(watch, return_exceptions=True)
                if isinstance(outcome, Exception):
                    _logger.warning(
                        "could not look for workers of an earlier start, whose leases end them later: %s", outcome
                    )
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
        """Wait until the work is done, or a stop has come and no rollout is held, or may be waited for, any more."""
        while not (working.done() or event.is_set() or self._interrupted):  # the event of processes wakes no loop
            await asyncio.wait([working], timeout=_CHECK_SECONDS)
        try:
            async with asyncio.timeout(self.linger_seconds):
                while not working.done() and await store.query_rollouts(status_in=["preparing", "running"], limit=1):
                    await asyncio.wait([working], timeout=_CHECK_SECONDS)
        except TimeoutError:
            return
        except Exception as error:  # noqa: BLE001 - the run itself does not depend on it
            _logger.warning("could not wait for runners to finish what they hold: %s", error)

    async def _work(self, store: LightningStore, progress: Progress) -> None:
        if self.algorithm is None:
            _logger.warning(
                "this Trainer has no algorithm: it serves the store, for one that runs elsewhere, until it is stopped; "
                "for one here, give algorithm=, or call dev() to try the agent out"
            )
            await asyncio.Event().wait()  # until cancelled
            return
        made = self._equip(self.algorithm, store, progress)
        if self.algorithm.is_async():
            await cast("Awaitable[None]", self.algorithm.run(self.train_dataset, self.val_dataset))
        else:
            await _in_thread(functools.partial(self.algorithm.run, self.train_dataset, self.val_dataset))
        # Of a run that is resumed all rollouts count: those that are left may be few.
        if made or self.run is not None:
            await _require_a_success(store, made[0] if self.run is None else None)

    def _equip(self, algorithm: Algorithm, store: LightningStore, progress: Progress) -> list[str]:
        """Give the algorithm what it works with; returns a list for the id of the first rollout that it will make."""
        made: list[str] = []
        move = None if self.run is None else ProxyMove(store, self.llm_proxy)
        algorithm.set_store(algorithm_store(store, self.rollout_config, progress.observe, move, made))
        algorithm.set_adapter(self.adapter)
        algorithm.set_llm_proxy(self.llm_proxy)
        algorithm.set_rollout_config(self.rollout_config)
        if self.initial_resources is not None:
            algorithm.set_initial_resources(self.initial_resources)
        if self.run is not None:
            algorithm.set_run(self.run)
        algorithm.set_reporter(progress.report)
        return made


async def _require_a_success(store: LightningStore, first_id: str | None) -> None:
    """Raise ``NothingToLearn`` if of the rollouts from this one on (None: of all) some failed and none succeeded.

    They are read from the newest to the oldest, so that a run with a success needs one page.
    """
    reasons, last = Counter[str](), ""
    async for each in _newest_first(store, first_id):
        if each.status == "succeeded":
            return
        if each.status == "failed":
            last = last or str(each.reason_message)
            reasons[each.reason_code or "no reason"] += 1
    if reasons:
        counts = ", ".join(f"{code}: {number}" for code, number in reasons.most_common(3))
        raise NothingToLearn(
            f"every rollout failed, {reasons.total()} in all ({counts}); the last one with: {last}. "
            "Correct the agent and try again; trainer.dev() tries it on a few inputs"
        )


async def _newest_first(store: LightningStore, last_id: str | None) -> AsyncIterator[Rollout]:
    """The rollouts of a store, the newest first, down to this one."""
    passed = 0
    while page := await store.query_rollouts(sort_order="desc", limit=_PAGE, offset=passed):
        for each in page:
            yield each
            if each.rollout_id == last_id:
                return
        passed += len(page)


async def _in_thread(work: Callable[[], Any]) -> None:
    """Run a blocking function in a daemon thread, because it cannot be cancelled and must not block exit."""
    outcome = Future[Any]()
    outcome.set_running_or_notify_cancel()  # from here on a cancellation of the waiter leaves it alone
    threading.Thread(target=settle, args=(outcome, work), name="agentlightning-algorithm", daemon=True).start()
    await asyncio.wrap_future(outcome)


def settle(outcome: Future[T], work: Callable[[], T]) -> None:
    """Do the work, and give what it returns or raises to those who wait for the outcome."""
    try:
        outcome.set_result(work())
    except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
        outcome.set_exception(error)


# --- The store as an algorithm sees it ---------------------------------------------------------------

DEFAULT_ROLLOUT_CONFIG = RolloutConfig(max_attempts=3, retry_condition=["unresponsive", "timeout"])
"""Lost workers and timeouts are retried, up to 3 attempts in all; errors of the agent are not."""

_READS = ("get_rollout_by_id", "query_rollouts", "get_latest_attempt", "query_attempts", "statistics")
"""With which an algorithm can see how far its rollouts are without waiting for them; `query_spans` is one, too."""


def algorithm_store(
    store: LightningStore,
    config: RolloutConfig,
    observe: Callable[[str, float], None] | None = None,
    move: ProxyMove | None = None,
    made: list[str] | None = None,
) -> LightningStore:
    """Return a store that passes everything on to ``store``, also what ``store`` offers beyond the contract.

    Args:
        store: where everything is kept.
        config: for every rollout that is created without one.
        observe: called as ``observe(rollout_id, reward)`` for each final reward read by `query_spans`. Progress shows
            the rewards that the algorithm sees, without a query of its own.
        move: of a run that may be resumed: is awaited before the algorithm's first request for rollouts.
        made: gets the id of the first rollout that is made through this store.
    """
    return cast("LightningStore", _AlgorithmStore(store, config, observe, move, [] if made is None else made))


@dataclass(eq=False)
class _AlgorithmStore:
    _store: LightningStore
    _config: RolloutConfig
    _observe: Callable[[str, float], None] | None
    _move: ProxyMove | None
    _made: list[str]
    _questions: set[str] = field(default_factory=set[str])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # pickle asks for special methods before there is a store to ask
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        found = getattr(self._store, name)
        if name not in _READS or self._move is None or self._move.done:
            return found

        async def watched(*args: Any, **more: Any) -> Any:
            await self._note_question(name, *args, more)
            return await found(*args, **more)

        return watched

    def answering_in_json(self) -> Any:
        """The same around the store's view for servers, so that a server of this store keeps its fast path.

        Rewards are not observed there, because replies of that view are bytes.
        """
        view = self._store.answering_in_json()
        return None if view is None else replace(self, _store=view, _observe=None)

    async def _move_proxy(self) -> None:
        if self._move is not None:
            await self._move.ensure()

    async def _note_question(self, *question: Any) -> None:
        """Let the store hand out rollouts if a question is asked twice: the algorithm polls for something to happen.

        The first time it may only look whether a rollout exists, before its models are served.
        """
        if self._move is None or self._move.done:
            return
        if repr(question) in self._questions:
            await self.wait_for_rollouts(rollout_ids=[], timeout=0)
        self._questions.add(repr(question))

    async def enqueue_rollout(
        self,
        input: Any,
        mode: RolloutMode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        *args: Any,
        **more: Any,
    ) -> Rollout:
        await self._move_proxy()
        made = await self._store.enqueue_rollout(input, mode, resources_id, config or self._config, *args, **more)
        self._note_made(made)
        return made

    async def enqueue_many_rollouts(self, rollouts: Sequence[EnqueueRolloutRequest]) -> Sequence[Rollout]:
        await self._move_proxy()
        made = await self._store.enqueue_many_rollouts(
            [each if each.config is not None else each.model_copy(update={"config": self._config}) for each in rollouts]
        )
        self._note_made(*made)
        return made

    async def start_rollout(
        self,
        input: Any,
        mode: RolloutMode | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        *args: Any,
        **more: Any,
    ) -> AttemptedRollout:
        made = await self._store.start_rollout(input, mode, resources_id, config or self._config, *args, **more)
        self._note_made(made)
        return made

    def _note_made(self, *rollouts: Rollout | bytes) -> None:
        """Keep the id of the first rollout; the view for servers has them as JSON."""
        if rollouts and not self._made:
            first = rollouts[0]
            self._made.append(first.rollout_id if isinstance(first, Rollout) else json.loads(first)["rollout_id"])

    async def wait_for_rollouts(self, *, rollout_ids: Sequence[str], timeout: float | None = None) -> list[Rollout]:
        await self._move_proxy()
        return await self._store.wait_for_rollouts(rollout_ids=rollout_ids, timeout=timeout)

    async def query_spans(
        self, rollout_id: str, attempt_id: str | Literal["latest"] | None = None, **filters: Any
    ) -> PaginatedResult[Span]:
        await self._note_question("query_spans", rollout_id, attempt_id, filters)
        spans = await self._store.query_spans(rollout_id, attempt_id, **filters)
        reward = None if self._observe is None else find_final_reward(spans)
        if self._observe is not None and reward is not None and used_default_resources(spans) is None:
            self._observe(rollout_id, reward)
        return spans


LightningStore.register(_AlgorithmStore)


# --- The runner's side ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunnerFactory:
    """Makes the runner of each worker, from specs.

    A runner or tracer that was given as an object belongs to the first worker; others in the same process get copies.
    """

    runner_spec: ComponentSpec[Runner[Any]]
    tracer_spec: ComponentSpec[Tracer]
    max_rollouts: int | None
    default_resources: Mapping[str, ResourceUnion] | None = None

    def __call__(self, worker_id: int) -> Runner[Any]:
        """Return the runner of a worker, counted from 0.

        Raises:
            InvalidValue: a spec does not make a runner or a tracer.
        """
        made = build_required(
            self.runner_spec,
            cast("type[Runner[Any]]", Runner),
            "runner",
            default_factory=lambda: LitAgentRunner[Any](
                self.tracer(worker_id), max_rollouts=self.max_rollouts, default_resources=self.default_resources
            ),
            optional_defaults={
                "tracer": lambda: self.tracer(worker_id),
                "max_rollouts": lambda: self.max_rollouts,
                "default_resources": lambda: self.default_resources,
            },
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
    _made: Runner[Any] | None = None

    def wants_main_thread(self, worker_id: int) -> bool:
        """Make the runner, and return whether it wants to call the agent in the main thread."""
        self._made = self.make_runner(worker_id)
        return self._made.wants_main_thread(self.agent)

    async def __call__(self, store: LightningStore, worker_id: int, event: ExecutionEvent) -> None:
        """Work until the event is set, or the runner has done its ``max_rollouts``."""
        runner = self._made or self.make_runner(worker_id)
        with runner.run_context(agent=self.agent, store=store, hooks=self.hooks, worker_id=worker_id):
            await runner.iter(event=event)
