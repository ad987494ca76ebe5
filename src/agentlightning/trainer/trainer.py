"""``Trainer``: an agent, an algorithm and a way to run them, put together."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from agentlightning.adapter.base import TraceAdapter
from agentlightning.algorithm.base import Algorithm
from agentlightning.algorithm.fast import Baseline, FastAlgorithm
from agentlightning.algorithm.run import Run
from agentlightning.errors import InvalidValue
from agentlightning.execution.base import ExecutionStrategy
from agentlightning.litagent.litagent import Hook, LitAgent
from agentlightning.runner.base import Runner
from agentlightning.store.base import LightningStore
from agentlightning.store.sqlite.store import InMemoryLightningStore, SqliteLightningStore
from agentlightning.tracer.base import Tracer
from agentlightning.trainer.components import (
    ComponentSpec,
    adapter_of,
    algorithm_of,
    hooks_of,
    number_of,
    one_of,
    proxy_of,
    store_of,
    strategy_of,
    warn_of_ignored,
)
from agentlightning.trainer.roles import AlgorithmRole, RunnerFactory, RunnerRole
from agentlightning.trainer.views import ProgressSpec, make_view
from agentlightning.trainer.wrappers import DEFAULT_ROLLOUT_CONFIG
from agentlightning.types import Dataset, NamedResources, RolloutConfig

if TYPE_CHECKING:
    from agentlightning.proxy.llm_proxy import LLMProxy


# --- Running blocking work where an event loop is already running, as in a notebook ---

T = TypeVar("T")

_LOOK_SECONDS = 0.2


def loop_is_running() -> bool:
    """Whether this thread is inside a running event loop, where ``asyncio.run`` is refused."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def run_beside_loop(work: Callable[[], T], interrupt: Callable[[], None]) -> T:
    """Run ``work`` in a thread of its own and wait for its result, in a thread whose loop is running.

    A Ctrl+C reaches only the main thread. It is passed on by ``interrupt``, and raised here when the work has ended.

    Raises:
        KeyboardInterrupt: Ctrl+C while waiting.
        Exception: what ``work`` raised.
    """
    outcome = Future[T]()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - carried to the waiting thread, whatever it is
            outcome.set_exception(error)

    to_start = [threading.Thread(target=run, name="agentlightning-fit", daemon=True)]
    interrupted = False
    while True:
        try:  # around the start as well: from then on an interrupt has something to end
            while to_start:
                to_start.pop().start()
            # Not by Thread.join, which takes a thread for ended when a signal interrupts it; and not without a limit,
            # because a signal that comes just before a thread begins to wait does not wake it.
            while not outcome.done():
                wait([outcome], timeout=_LOOK_SECONDS)
            break
        except KeyboardInterrupt:
            interrupted = True
            interrupt()
    if interrupted:
        raise KeyboardInterrupt
    return outcome.result()


# ---


class Trainer:
    """Trains an agent: ``Trainer(algorithm=…).fit(agent, dataset)``.

    Components are given as objects, classes, functions that return one, names, or dicts; see
    ``agentlightning.trainer.components``. Left out, they are: a store in memory, ``LitAgentRunner`` with an
    ``OtelTracer``, the strategy ``cs`` (the algorithm in this process, each runner in one of its own), and
    ``TracerTraceToTriplet``.

    Args:
        algorithm: what learns; without one, ``fit`` serves the store until it is stopped.
        n_runners: how many runners; default 1.
        max_rollouts: how many rollouts each runner takes before it ends; default: no limit.
        strategy: how both sides are run: ``"cs"``, ``"shm"``, or one of your own.
        port: where the store is served, for strategies that serve it.
        store: where everything is kept.
        run: a name for this run. Its store is then the file ``RUNS_FOLDER/NAME/store.db`` (unless ``store`` is
            given) and its checkpoint lies beside it; a later ``fit`` of that name goes on where this one ended,
            however it ended.
        runs_folder: where the folders of runs are; default ``agl-runs`` in the current folder.
        rollout_config: for rollouts that the algorithm enqueues without one. Default: lost workers and timeouts are
            retried, up to 3 attempts, errors of the agent are not. ``RolloutConfig()`` retries nothing.
        initial_resources: what the agent uses to begin with.
        llm_proxy: records model calls; handed to the algorithm, and stopped when the run ends.
        runner, tracer, adapter, hooks: the runner's side, and how spans become training data.
        progress: ``auto`` (a table on a terminal, else log lines), ``table``, ``log``, ``off``, or a view.
        n_workers, max_tasks, triplet_exporter: old names of n_runners, max_rollouts, adapter.
        dev, daemon: of 0.3. ``dev`` is replaced by the method ``dev()``; daemon processes are not needed.

    Raises:
        InvalidValue: a spec that makes no such component, or arguments that contradict each other.
    """

    def __init__(
        self,
        *,
        dev: bool = False,
        n_runners: int | None = None,
        max_rollouts: int | None = None,
        initial_resources: NamedResources | None = None,
        tracer: ComponentSpec[Tracer] = None,
        adapter: ComponentSpec[TraceAdapter[Any]] = None,
        store: ComponentSpec[LightningStore] = None,
        runner: ComponentSpec[Runner[Any]] = None,
        strategy: ComponentSpec[ExecutionStrategy] = None,
        port: int | None = None,
        algorithm: ComponentSpec[Algorithm] = None,
        llm_proxy: ComponentSpec[LLMProxy] = None,
        n_workers: int | None = None,
        max_tasks: int | None = None,
        daemon: bool = True,
        triplet_exporter: ComponentSpec[TraceAdapter[Any]] = None,
        hooks: Hook | Sequence[Hook] | None = None,
        run: str | None = None,
        runs_folder: str | Path = "agl-runs",
        rollout_config: RolloutConfig | None = None,
        progress: ProgressSpec = "auto",
    ) -> None:
        if dev:
            warnings.warn("Trainer(dev=True) has no effect; call trainer.dev(…)", DeprecationWarning, stacklevel=2)
        if not daemon:
            warnings.warn("daemon=False has no effect: runners never outlive us", DeprecationWarning, stacklevel=2)
        n_runners = number_of("n_runners", one_of("n_runners", n_runners, "n_workers", n_workers), 1)
        max_rollouts = number_of("max_rollouts", one_of("max_rollouts", max_rollouts, "max_tasks", max_tasks), 0)
        adapter = one_of("adapter", adapter, "triplet_exporter", triplet_exporter)
        make_view(progress)  # a wrong word is told here, not in the middle of things

        self.n_runners, self.max_rollouts, self.port = n_runners or 1, max_rollouts, port
        self.run_folder = None if run is None else Path(runs_folder) / run
        self.run = None if run is None else Run(run, Path(runs_folder) / run)
        self.initial_resources = initial_resources
        self.rollout_config = _config_of(rollout_config)
        self.hooks: Sequence[Hook] = hooks_of(hooks)
        self.progress: ProgressSpec = progress
        self._make_runner = make_runner = RunnerFactory(runner, tracer, max_rollouts)
        self.tracer, self.runner = make_runner.tracer(0), make_runner(0)
        self.adapter = adapter_of(adapter)
        self.algorithm = algorithm_of(algorithm)
        self.store, self._store_is_ours = store_of(store, self._default_store), store is None
        self.strategy = strategy_of(strategy, n_runners, port)
        self.llm_proxy = proxy_of(llm_proxy, self.store)
        warn_of_ignored("runner", self.runner, runner, tracer=tracer, max_rollouts=max_rollouts)
        warn_of_ignored("strategy", self.strategy, strategy, n_runners=n_runners, server_port=port)

    @property
    def n_workers(self) -> int:
        """Old name of ``n_runners``."""
        return self.n_runners

    @property
    def max_tasks(self) -> int | None:
        """Old name of ``max_rollouts``."""
        return self.max_rollouts

    @property
    def triplet_exporter(self) -> TraceAdapter[Any]:
        """Old name of ``adapter``."""
        return self.adapter

    def fit(
        self,
        agent: LitAgent[Any],
        train_dataset: Dataset[Any] | None = None,
        *,
        val_dataset: Dataset[Any] | None = None,
    ) -> None:
        """Run the algorithm on the agent, and return when it has ended.

        Works in a script and in a notebook. After a run that has a name was interrupted, killed even, the same
        call takes it up again: rollouts that had ended are not run again.

        Args:
            agent: what is trained.
            train_dataset, val_dataset: inputs of rollouts, by position.

        Raises:
            InvalidValue: the agent is none.
            Exception: what the algorithm raised, or why no runner could live.
        """
        self._execute(agent, self.algorithm, train_dataset, val_dataset)

    def dev(
        self,
        agent: LitAgent[Any],
        train_dataset: Dataset[Any] | None = None,
        *,
        val_dataset: Dataset[Any] | None = None,
    ) -> None:
        """Try an agent out: like ``fit``, with an algorithm that is quick and learns nothing (``Baseline``).

        Raises:
            TypeError: the trainer's algorithm is not a ``FastAlgorithm``.
        """
        algorithm = self.algorithm or Baseline()
        if not isinstance(algorithm, FastAlgorithm):
            raise TypeError(
                f"dev() takes a FastAlgorithm, and the trainer has a {type(algorithm).__name__}; call fit(), or make a "
                "Trainer without algorithm="
            )
        self._execute(agent, algorithm, train_dataset, val_dataset)

    def _execute(
        self,
        agent: LitAgent[Any],
        algorithm: Algorithm | None,
        train_dataset: Dataset[Any] | None,
        val_dataset: Dataset[Any] | None,
    ) -> None:
        if not isinstance(agent, LitAgent):  # pyright: ignore[reportUnnecessaryIsInstance] - callers may not check types
            raise InvalidValue(
                f"the agent is a {type(agent).__name__}; decorate a function with @agl.rollout, or write a LitAgent"
            )
        if isinstance(train_dataset, str):
            raise InvalidValue(
                f"fit(agent, {train_dataset!r}) was for v0.1 servers; give a dataset, or take tasks from that server "
                "with agl.AgentLightningClient"
            )
        if self.run_folder is not None:
            self.run_folder.mkdir(parents=True, exist_ok=True)
        agent.set_trainer(self)
        if algorithm is not None:
            algorithm.set_trainer(self)
        algorithm_role = AlgorithmRole(
            algorithm=algorithm,
            adapter=self.adapter,
            llm_proxy=self.llm_proxy,
            initial_resources=self.initial_resources,
            rollout_config=self.rollout_config,
            run=self.run,
            train_dataset=train_dataset,
            val_dataset=val_dataset,
            progress=self.progress,
            linger_seconds=self.strategy.linger_seconds(),
        )
        runner_role = RunnerRole(self._make_runner, agent, self.hooks)

        def execute() -> None:
            try:
                self.strategy.execute(algorithm_role, runner_role, self.store)
            finally:
                self._let_go()

        if loop_is_running():
            run_beside_loop(execute, algorithm_role.interrupt)
        else:
            execute()

    def _let_go(self) -> None:
        """Close the file of the run, for whoever wants it next: another trainer of that name, in a notebook perhaps.

        ``store`` opens it again when it is next asked for something.
        """
        if self._store_is_ours and isinstance(self.store, SqliteLightningStore):
            asyncio.run(self.store.close())
            self.store = self._default_store()

    def _default_store(self) -> LightningStore:
        if self.run_folder is None:
            return InMemoryLightningStore()
        return SqliteLightningStore(self.run_folder / "store.db")


def _config_of(given: RolloutConfig | None) -> RolloutConfig:
    if given is None:
        return DEFAULT_ROLLOUT_CONFIG
    if not isinstance(given, RolloutConfig):  # pyright: ignore[reportUnnecessaryIsInstance] - callers may not check types
        raise InvalidValue(f"rollout_config is {given!r}, a {type(given).__name__}; give an agl.RolloutConfig(…)")
    return given
