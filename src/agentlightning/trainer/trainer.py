"""``Trainer``: puts an agent, an algorithm and a way to run them together."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from agentlightning.adapter.adapters import TraceAdapter, TracerTraceToTriplet
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
    AlgorithmRegistry,
    ComponentSpec,
    StoreRegistry,
    build_component,
    build_required,
    hooks_of,
    number_of,
    one_of,
    proxy_of,
    serving_of,
    store_file,
    strategy_of,
    warn_of_ignored,
)
from agentlightning.trainer.dev_report import dev_report, dev_store_file
from agentlightning.trainer.identity import identity_of
from agentlightning.trainer.progress import ProgressSpec, make_view
from agentlightning.trainer.roles import DEFAULT_ROLLOUT_CONFIG, AlgorithmRole, RunnerFactory, RunnerRole, settle
from agentlightning.trainer.rows import check_rows
from agentlightning.types import Dataset, ResourceUnion, RolloutConfig

if TYPE_CHECKING:
    from agentlightning.proxy.llm_proxy import LLMProxy


T = TypeVar("T")

_logger = logging.getLogger(__name__)

_CHECK_SECONDS = 0.2


def loop_is_running() -> bool:
    """Whether this thread is inside a running event loop, where ``asyncio.run`` is refused."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def run_beside_loop(work: Callable[[], T], interrupt: Callable[[], None]) -> T:
    """Run ``work`` in another thread and wait for its result. For a thread whose event loop is running: a notebook's.

    Ctrl+C reaches only the main thread. It is passed on by ``interrupt``, and raised here once the work has ended.

    Raises:
        KeyboardInterrupt: Ctrl+C while waiting.
        Exception: what ``work`` raised.
    """
    outcome = Future[T]()
    thread = threading.Thread(target=settle, args=(outcome, work), name="agentlightning-fit", daemon=True)
    to_start = [thread]
    interrupted = False
    while True:
        try:  # around the start, too: from there on an interrupt must be passed on
            while to_start:
                to_start.pop().start()
            # Thread.join would not do: a signal that interrupts it makes it take the thread for ended. The timeout is
            # there because a signal that arrives just before the wait does not wake it.
            while not outcome.done():
                wait([outcome], timeout=_CHECK_SECONDS)
            break
        except KeyboardInterrupt:
            interrupted = True
            interrupt()
    if interrupted:
        raise KeyboardInterrupt
    return outcome.result()


class Trainer:
    """Trains an agent: ``Trainer(algorithm=…).fit(agent, dataset)``.

    Components are given as objects, classes, functions that return one, names, or dicts; see
    ``agentlightning.trainer.components``. The defaults are a store in memory, ``LitAgentRunner`` with an
    ``OtelTracer``, the strategy ``cs`` (the algorithm in this process, each runner in its own), and
    ``TracerTraceToTriplet``.

    Args:
        algorithm: what learns; without one, ``fit`` serves the store until it is stopped.
        n_runners: number of runners; default 1.
        max_rollouts: number of rollouts that each runner takes before it ends; default: no limit.
        strategy: how both sides are run: ``"cs"``, ``"shm"``, or your own.
        port: of the store's server, for strategies that serve it. Default: for this machine alone any that is free;
            else 4747.
        store: where everything is kept; a text such as ``x.db`` is the path of a database file.
        run: a name for this run. Its store is then the file ``RUNS_FOLDER/NAME/store.db`` (unless ``store`` is
            given), with its checkpoint beside it. A later ``fit`` under that name resumes the run, even if its process
            was killed; one with another algorithm, agent or dataset is refused.
        runs_folder: folder of the runs' folders; default ``agl-runs`` in the current folder.
        rollout_config: for rollouts that the algorithm enqueues without one. By default lost workers and timeouts are
            retried, up to 3 attempts, and errors of the agent are not. ``RolloutConfig()`` retries nothing.
        initial_resources: what the agent uses to begin with.
        default_resources: what runners give to the agent when the server is so long out of reach that they cannot get
            those of a rollout. Such attempts are marked (``agl.used_default_resources``), and adapters and algorithms
            leave them out and count them. Default: a rollout without its resources fails.
        llm_proxy: records model calls; the algorithm gets it, and it is stopped when the run ends.
        runner, tracer, adapter, hooks: the runner's side, and how spans become training data.
        progress: ``auto`` (a table on a terminal, else log lines), ``table``, ``log``, ``off``, or a view.
        n_workers, max_tasks, triplet_exporter: old names of n_runners, max_rollouts, adapter.
        dev, daemon: of 0.3. The method ``dev()`` replaces ``dev``; daemon processes are not needed.

    Raises:
        InvalidValue: a spec does not make such a component, or arguments contradict each other.
    """

    def __init__(
        self,
        *,
        dev: bool = False,
        n_runners: int | None = None,
        max_rollouts: int | None = None,
        initial_resources: Mapping[str, ResourceUnion] | None = None,
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
        default_resources: Mapping[str, ResourceUnion] | None = None,
    ) -> None:
        _warn_of_obsolete(dev, daemon)
        n_runners = number_of("n_runners", one_of("n_runners", n_runners, "n_workers", n_workers), 1)
        max_rollouts = number_of("max_rollouts", one_of("max_rollouts", max_rollouts, "max_tasks", max_tasks), 0)
        adapter = one_of("adapter", adapter, "triplet_exporter", triplet_exporter)
        make_view(progress)  # so that a wrong word fails here, and not when the run has begun

        self.n_runners, self.max_rollouts, self.port = n_runners or 1, max_rollouts, port
        self._runs_folder, self.run_folder = Path(runs_folder), None if run is None else Path(runs_folder) / run
        self.run = None if run is None else Run(run, Path(runs_folder) / run)
        self.initial_resources, self.rollout_config = initial_resources, _config_of(rollout_config)
        self.hooks: Sequence[Hook] = hooks_of(hooks)
        self.progress: ProgressSpec = progress
        self._make_runner = make_runner = RunnerFactory(runner, tracer, max_rollouts, default_resources)
        self.tracer, self.runner = make_runner.tracer(0), make_runner(0)
        self.adapter = build_required(adapter, TraceAdapter, "adapter", default_factory=TracerTraceToTriplet)
        self.algorithm = _algorithm_of(algorithm)
        self._store_path = store_file(self.run_folder and self.run_folder / "store.db" if store is None else store)
        self._owns_store = store is None or self._store_path is not None
        self.store = self._default_store() if self._owns_store else _store_of(store)
        self.strategy = strategy_of(strategy, n_runners, port)
        self.llm_proxy = proxy_of(llm_proxy, self.store)
        own: dict[str, Any] = {"max_rollouts": max_rollouts, "default_resources": default_resources}
        warn_of_ignored("runner", self.runner, runner, tracer=tracer, **own)
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

        Works in scripts and in notebooks. If the run has a name and was interrupted, or its process was killed, the
        same call resumes it: rollouts that have ended are not run again.

        Args:
            agent: what is trained.
            train_dataset, val_dataset: inputs of rollouts, by position.

        Raises:
            InvalidValue: the agent is not a ``LitAgent``, or a row of a dataset is not strict JSON.
            NothingToLearn: every rollout failed.
            Exception: what the algorithm raised, or the reason why no runner could be kept alive.
        """
        self._execute(agent, self.algorithm, train_dataset, val_dataset)

    def dev(
        self,
        agent: LitAgent[Any],
        train_dataset: Dataset[Any] | None = None,
        *,
        val_dataset: Dataset[Any] | None = None,
    ) -> None:
        """Try an agent out: like ``fit``, with an algorithm that is quick and does not learn (``Baseline``).

        At the end it prints input, output and reward of each rollout. A trainer without a store of its own keeps the
        traces in a new database file in ``runs_folder``; what is printed says how to look into it.

        Raises:
            TypeError: the trainer's algorithm is not a ``FastAlgorithm``.
            InvalidValue, NothingToLearn: as by ``fit``.
        """
        algorithm = self.algorithm or Baseline()
        if not isinstance(algorithm, FastAlgorithm):
            raise TypeError(
                f"dev() takes a FastAlgorithm, and the trainer has a {type(algorithm).__name__}; call fit(), or make a "
                "Trainer without algorithm="
            )
        began = time.time()
        if self._owns_store and self._store_path is None:
            self._store_path = dev_store_file(self._runs_folder, began)
            self.store = self._default_store()
        try:
            self._execute(agent, algorithm, train_dataset, val_dataset)
        finally:
            self._report_dev(began)

    def _report_dev(self, began: float) -> None:
        """Print what became of the rollouts since then."""
        place = str(self._store_path) if self._store_path is not None else getattr(self.store, "endpoint", None)
        outcome = Future[str]()
        threading.Thread(  # a loop may be running in this one
            target=settle, args=(outcome, lambda: asyncio.run(dev_report(self.store, began, place))), daemon=True
        ).start()
        try:
            if text := outcome.result():
                print(text)  # noqa: T201 - that is what the user has asked for
        except Exception as error:  # noqa: BLE001 - the store may be the user's; the run itself is over
            _logger.warning("the rollouts cannot be shown: %s: %s", type(error).__name__, error)
        finally:
            self._release_store()

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
        check_rows("train_dataset", train_dataset)
        check_rows("val_dataset", val_dataset)
        if self.run_folder is not None:
            self.run_folder.mkdir(parents=True, exist_ok=True)
        self._introduce(agent, algorithm)
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
            identity={}
            if self.run is None
            else identity_of(algorithm, agent, train_dataset=train_dataset, val_dataset=val_dataset),
        )
        runner_role = RunnerRole(self._make_runner, agent, self.hooks)

        def execute() -> None:
            try:
                self.strategy.execute(algorithm_role, runner_role, self.store)
            finally:
                self._release_store()

        if loop_is_running():
            run_beside_loop(execute, algorithm_role.interrupt)
        else:
            execute()

    def _introduce(self, agent: LitAgent[Any], algorithm: Algorithm | None) -> None:
        """Tell the parts of a run of each other."""
        serving = serving_of(self.strategy, self.store)
        agent.set_trainer(self)
        if algorithm is not None:
            algorithm.set_trainer(self)
            algorithm.set_serving(serving)
        if self.llm_proxy is not None:
            self.llm_proxy.follow(serving)

    def _release_store(self) -> None:
        """Close the file that this object opened, so that another trainer can open it, such as in a notebook.

        A new store object takes the place of the closed one, and opens the file when it is first asked for something.
        """
        if self._owns_store and isinstance(self.store, SqliteLightningStore):
            asyncio.run(self.store.close())
            self.store = self._default_store()

    def _default_store(self) -> LightningStore:
        return InMemoryLightningStore() if self._store_path is None else SqliteLightningStore(self._store_path)


def _warn_of_obsolete(dev: bool, daemon: bool) -> None:
    if dev:
        warnings.warn("Trainer(dev=True) has no effect; call trainer.dev(…)", DeprecationWarning, stacklevel=3)
    if not daemon:
        warnings.warn(
            "daemon=False has no effect: runners always end with the trainer", DeprecationWarning, stacklevel=3
        )


def _algorithm_of(spec: ComponentSpec[Algorithm]) -> Algorithm | None:
    return build_component(
        spec, expected_type=Algorithm, spec_name="algorithm", allow_none=True, registry=AlgorithmRegistry
    )


def _store_of(spec: ComponentSpec[LightningStore]) -> LightningStore:
    return build_required(spec, LightningStore, "store", registry=StoreRegistry)


def _config_of(given: RolloutConfig | None) -> RolloutConfig:
    if given is None:
        return DEFAULT_ROLLOUT_CONFIG
    if not isinstance(given, RolloutConfig):  # pyright: ignore[reportUnnecessaryIsInstance] - callers may not check types
        raise InvalidValue(f"rollout_config is {given!r}, a {type(given).__name__}; give an agl.RolloutConfig(…)")
    return given
