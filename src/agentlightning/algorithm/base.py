"""`Algorithm`: the base of everything that learns."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from agentlightning.errors import InvalidValue
from agentlightning.store.base import LightningStore
from agentlightning.types import LLM, Dataset, NamedResources, RolloutConfig

if TYPE_CHECKING:
    from agentlightning.adapter.base import TraceAdapter
    from agentlightning.algorithm.run import Run

_logger = logging.getLogger(__name__)

Reporter: TypeAlias = Callable[[int, dict[str, float]], None]
"""Takes a step and the numbers that an algorithm has to say about it."""


class Algorithm:
    """Decides which rollouts to run, and learns from their spans.

    A subclass writes `run`. The trainer hands it what it works with before that: the store always,
    the rest if there is any.
    """

    _trainer: Any = None
    _llm_proxy: ModelProxy | None = None
    _adapter: TraceAdapter[Any] | None = None
    _store: LightningStore | None = None
    _initial_resources: NamedResources | None = None
    _rollout_config: RolloutConfig | None = None
    _run: Run | None = None
    _reporter: Reporter | None = None
    _client: Any = None

    def is_async(self) -> bool:
        """Whether `run` is a coroutine function."""
        return inspect.iscoroutinefunction(self.run)

    def run(
        self, train_dataset: Dataset[Any] | None = None, val_dataset: Dataset[Any] | None = None
    ) -> Awaitable[None] | None:
        """Do all the work, and return when it is done. A coroutine function may do it too.

        Args:
            train_dataset: inputs to learn from.
            val_dataset: inputs to measure with.
        """
        raise NotImplementedError(f"{type(self).__name__} has no run method; an algorithm must write one")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `run`."""
        return self.run(*args, **kwargs)

    # --- What it works with ----------------------------------------------------------------------

    def set_trainer(self, trainer: Any) -> None:
        """Say who runs this algorithm."""
        self._trainer = trainer

    def get_trainer(self) -> Any:
        """Return who runs this algorithm.

        Raises:
            InvalidValue: nobody does.
        """
        return _given(self._trainer, "trainer", self)

    def set_llm_proxy(self, llm_proxy: ModelProxy | None) -> None:
        """Give the proxy through which agents reach the model that is trained; None takes it away."""
        self._llm_proxy = llm_proxy

    def get_llm_proxy(self) -> ModelProxy | None:
        """Return the proxy, if there is one."""
        return self._llm_proxy

    def set_adapter(self, adapter: TraceAdapter[Any]) -> None:
        """Give what turns spans into training examples."""
        self._adapter = adapter

    def get_adapter(self) -> TraceAdapter[Any]:
        """Return what turns spans into training examples.

        Raises:
            InvalidValue: none was given.
        """
        return _given(self._adapter, "adapter", self)

    def set_store(self, store: LightningStore) -> None:
        """Give the store that rollouts are enqueued in."""
        self._store = store

    def get_store(self) -> LightningStore:
        """Return the store.

        Raises:
            InvalidValue: none was given.
        """
        return _given(self._store, "store", self)

    def set_initial_resources(self, resources: NamedResources) -> None:
        """Give the resources to begin with."""
        self._initial_resources = resources

    def get_initial_resources(self) -> NamedResources | None:
        """Return the resources to begin with, if there are any."""
        return self._initial_resources

    def set_rollout_config(self, config: RolloutConfig | None) -> None:
        """Give the config that rollouts are enqueued with. None: the store's default."""
        self._rollout_config = config

    def get_rollout_config(self) -> RolloutConfig | None:
        """Return the config that rollouts are to be enqueued with; None means the store's default."""
        return self._rollout_config

    def set_client(self, client: Any) -> None:
        """Give the client of the v0.1 server, for algorithms written for that interface."""
        self._client = client

    def get_client(self) -> Any:
        """Return the client of the v0.1 server.

        Raises:
            InvalidValue: none was given; algorithms since 0.2 work with the store instead.
        """
        return _given(self._client, "client", self)

    # --- Progress --------------------------------------------------------------------------------

    def set_run(self, run: Run | None) -> None:
        """Give the run under whose name this algorithm's progress is kept. None: nothing is kept."""
        self._run = run

    def get_run(self) -> Run | None:
        """Return the run to take up again, and to keep checkpoints in, if there is one."""
        return self._run

    def set_reporter(self, reporter: Reporter | None) -> None:
        """Say who takes the numbers that `report` is called with: ``reporter(step, numbers)``."""
        self._reporter = reporter

    def report(self, step: int, **numbers: float) -> None:
        """Say how far the work is. Without a reporter the numbers are logged.

        Args:
            step: counts the algorithm's own steps, from 0.
            numbers: what to show, by name, such as ``reward_mean``.
        """
        if self._reporter is not None:
            self._reporter(step, numbers)
        else:
            shown = ", ".join(f"{name} {number:.6g}" for name, number in numbers.items())
            _logger.info("%s, step %d: %s", type(self).__name__, step, shown)


def _given(value: Any, name: str, algorithm: Algorithm) -> Any:
    if value is None:
        raise InvalidValue(
            f"{type(algorithm).__name__} has no {name}; the Trainer gives it one, or call set_{name}() yourself"
        )
    return value


# --- What an algorithm needs of the LLM proxy. `LLMProxy` has it; so may a proxy of the user's  ---


class ModelProxy(Protocol):
    """Records the model calls of every attempt, and says which backend answers for which model."""

    @property
    def model_list(self) -> Sequence[Any]:
        """The backends, as `update_model_list` was given them."""
        ...

    def get_store(self) -> LightningStore | None:
        """Where the calls are recorded."""
        ...

    def set_store(self, store: LightningStore) -> None:
        """Say where the calls are to be recorded."""
        ...

    def is_running(self) -> bool:
        """Whether it takes calls."""
        ...

    def start(self) -> Awaitable[None]:
        """Begin to take calls."""
        ...

    def stop(self) -> Awaitable[None]:
        """End, and free the port. May be called again."""
        ...

    def update_model_list(self, model_list: list[Any]) -> None:
        """Replace the backends, also while it runs."""
        ...

    def as_resource(
        self,
        rollout_id: str | None = None,
        attempt_id: str | None = None,
        model: str | None = None,
        sampling_parameters: dict[str, Any] | None = None,
    ) -> LLM:
        """Return the resource by which an agent reaches it."""
        ...

    def pause(self) -> Awaitable[Any]:
        """Take no new calls, and return when those under way are done."""
        ...

    def resume(self) -> Awaitable[None]:
        """Take calls again."""
        ...

    def set_model_version(self, version: str) -> None:
        """Say which weights answer from now on; every call that is recorded carries it."""
        ...
