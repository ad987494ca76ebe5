"""`Algorithm`: base class of everything that learns. `@algo` makes one of a function."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeAlias, TypeVar

from agentlightning.algorithm.model_proxy import ModelProxy, running_proxy
from agentlightning.algorithm.run import Run
from agentlightning.errors import InvalidValue
from agentlightning.security.tls import Serving
from agentlightning.store.base import LightningStore
from agentlightning.types import Dataset, ResourceUnion, RolloutConfig

if TYPE_CHECKING:
    from agentlightning.adapter.adapters import TraceAdapter

A = TypeVar("A", bound="Algorithm")
P = ParamSpec("P")
R = TypeVar("R")
AF = TypeVar("AF", bound=bool)
"""Whether the function is a coroutine function."""

AlgorithmFunc: TypeAlias = Callable[..., Awaitable[None] | None]
"""A function, or a coroutine function, whose parameters have names that `FunctionalAlgorithm` knows."""

_logger = logging.getLogger(__name__)

Reporter: TypeAlias = Callable[[int, dict[str, float]], None]
"""Takes a step and the algorithm's numbers about it."""


class Algorithm:
    """Decides which rollouts to run, and learns from their spans.

    A subclass implements `run`. Before it is called, the trainer sets what the algorithm works with: the store always,
    the rest if there is any.
    """

    _trainer: Any = None
    _llm_proxy: ModelProxy | None = None
    _adapter: TraceAdapter[Any] | None = None
    _store: LightningStore | None = None
    _initial_resources: Mapping[str, ResourceUnion] | None = None
    _rollout_config: RolloutConfig | None = None
    _run: Run | None = None
    _reporter: Reporter | None = None
    _client: Any = None
    _served_at: Serving | None = None

    def is_async(self) -> bool:
        """Whether `run` is a coroutine function."""
        return inspect.iscoroutinefunction(self.run)

    def run(
        self, train_dataset: Dataset[Any] | None = None, val_dataset: Dataset[Any] | None = None
    ) -> Awaitable[None] | None:
        """Do all the work, and return when it is done. It may be a coroutine function.

        Args:
            train_dataset: inputs to learn from.
            val_dataset: inputs to measure with.
        """
        raise NotImplementedError(f"{type(self).__name__} has no run method; an algorithm must implement it")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `run`."""
        return self.run(*args, **kwargs)

    def set_trainer(self, trainer: Any) -> None:
        """Set the trainer that runs this algorithm."""
        self._trainer = trainer

    def get_trainer(self) -> Any:
        """Return the trainer that runs this algorithm.

        Raises:
            InvalidValue: there is none.
        """
        return _given(self._trainer, "trainer", self)

    def set_llm_proxy(self, llm_proxy: ModelProxy | None) -> None:
        """Set the proxy through which agents reach the model that is trained; None removes it."""
        self._llm_proxy = llm_proxy

    def get_llm_proxy(self) -> ModelProxy | None:
        """Return the proxy, if there is one."""
        return self._llm_proxy

    def set_serving(self, serving: Serving | None) -> None:
        """Set where the run serves its store, for models that agents have to reach, too. None: on this machine only."""
        self._served_at = serving

    def get_serving(self) -> Serving | None:
        """Return where the run serves its store, if other machines can reach it."""
        return self._served_at

    def why_no_guests(self) -> str | None:
        """Return why agents on other machines cannot reach the models of this algorithm, if it serves some without an
        LLM proxy, and what to do about it. None, the default: nothing is in their way."""
        return None

    def set_adapter(self, adapter: TraceAdapter[Any]) -> None:
        """Set the adapter, which turns spans into training examples."""
        self._adapter = adapter

    def get_adapter(self) -> TraceAdapter[Any]:
        """Return the adapter.

        Raises:
            InvalidValue: none was set.
        """
        return _given(self._adapter, "adapter", self)

    def set_store(self, store: LightningStore) -> None:
        """Set the store that rollouts are enqueued in."""
        self._store = store

    def get_store(self) -> LightningStore:
        """Return the store.

        Raises:
            InvalidValue: none was set.
        """
        return _given(self._store, "store", self)

    def set_initial_resources(self, resources: Mapping[str, ResourceUnion]) -> None:
        """Set the resources to begin with."""
        self._initial_resources = resources

    def get_initial_resources(self) -> Mapping[str, ResourceUnion] | None:
        """Return the resources to begin with, if there are any."""
        return self._initial_resources

    def set_rollout_config(self, config: RolloutConfig | None) -> None:
        """Set the config that rollouts are enqueued with. None: the store's default."""
        self._rollout_config = config

    def get_rollout_config(self) -> RolloutConfig | None:
        """Return the config to enqueue rollouts with; None means the store's default."""
        return self._rollout_config

    def set_client(self, client: Any) -> None:
        """Set the client of the v0.1 server, for algorithms written for that interface."""
        self._client = client

    def get_client(self) -> Any:
        """Return the client of the v0.1 server.

        Raises:
            InvalidValue: none was set; algorithms since 0.2 use the store instead.
        """
        return _given(self._client, "client", self)

    def set_run(self, run: Run | None) -> None:
        """Set the run under whose name this algorithm saves its progress. None: nothing is saved."""
        self._run = run

    def get_run(self) -> Run | None:
        """Return the run to resume and to save checkpoints in, if there is one."""
        return self._run

    def set_reporter(self, reporter: Reporter | None) -> None:
        """Set the function that gets the numbers of `report`, as ``reporter(step, numbers)``."""
        self._reporter = reporter

    def report(self, step: int, **numbers: float) -> None:
        """Report the numbers of a step. Without a reporter they are logged.

        Args:
            step: of the algorithm, counted from 0.
            numbers: by name, such as ``reward_mean``.
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


# --- Functions and methods that get what the algorithm works with ---

_DATASETS = ("train_dataset", "val_dataset")
_GETTERS = ("store", "llm_proxy", "adapter", "initial_resources", "rollout_config", "run", "report")
"""The names of parameters that a function may have, besides those of the datasets."""


class FunctionalAlgorithm(Algorithm, Generic[AF]):
    """An algorithm that is one function. The names of its parameters say what it gets.

    Args:
        algorithm_func: its parameters may be called `store`, `train_dataset`, `val_dataset`, `llm_proxy`,
            `adapter`, `initial_resources`, `rollout_config`, `run` and `report`.

    Raises:
        TypeError: a parameter has another name and no default.
    """

    def __init__(self, algorithm_func: AlgorithmFunc) -> None:
        self._func = algorithm_func
        self._names: list[str] = []
        for name, parameter in inspect.signature(algorithm_func).parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if parameter.kind is not parameter.POSITIONAL_ONLY and name in (*_GETTERS, *_DATASETS):
                self._names.append(name)
            elif parameter.default is parameter.empty:
                raise TypeError(
                    f"the parameter {name!r} of {algorithm_func!r} has no meaning for @algo, or is positional-only; "
                    f"the known names are: {', '.join(sorted([*_DATASETS, *_GETTERS]))}"
                )
        functools.update_wrapper(self, algorithm_func)

    def is_async(self) -> bool:
        """Whether the function is a coroutine function."""
        return inspect.iscoroutinefunction(self._func)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function itself with the given arguments."""
        return self._func(*args, **kwargs)

    def run(
        self, train_dataset: Dataset[Any] | None = None, val_dataset: Dataset[Any] | None = None
    ) -> Awaitable[None] | None:
        """Call the function with what its parameters name. The result of a coroutine function must be awaited.

        Raises:
            TypeError: a dataset is given that the function does not take.
            InvalidValue: the function takes a store or an adapter, and there is none.
        """
        known: dict[str, Any] = {"train_dataset": train_dataset, "val_dataset": val_dataset, "report": self.report}
        for name in _DATASETS:
            if known[name] is not None and name not in self._names:
                raise TypeError(f"{self._func!r} takes no {name}, but one was given; add a parameter of that name")
        return self._func(
            **{name: known[name] if name in known else getattr(self, f"get_{name}")() for name in self._names}
        )


def algo(func: AlgorithmFunc) -> FunctionalAlgorithm[Any]:
    """Make an algorithm of a function, or of a coroutine function. See `FunctionalAlgorithm`.

    Raises:
        TypeError: a parameter has an unknown name and no default.
    """
    return FunctionalAlgorithm(func)


def with_store(
    func: Callable[Concatenate[A, LightningStore, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[A, P], Coroutine[Any, Any, R]]:
    """Pass the algorithm's store to the decorated method, as the first argument after ``self``.

    Raises:
        InvalidValue: when called: the algorithm has no store.
    """

    @functools.wraps(func)
    async def wrapper(self: A, *args: P.args, **kwargs: P.kwargs) -> R:
        return await func(self, self.get_store(), *args, **kwargs)

    return wrapper


def with_llm_proxy(
    required: bool = False, auto_start: bool = True
) -> Callable[[Callable[..., Coroutine[Any, Any, Any]]], Callable[..., Coroutine[Any, Any, Any]]]:
    """Pass the algorithm's LLM proxy, or None, to the decorated method, as its argument ``llm_proxy``.

    Args:
        required: an algorithm without a proxy is an error.
        auto_start: a proxy that is not running is started before the method and stopped after it. It records in
            the algorithm's store if it has no other store.

    Raises:
        InvalidValue: when called: there is no proxy, and it is required; or it is to be started, and the
            algorithm has no store.
    """

    def decorate(func: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Coroutine[Any, Any, Any]]:
        @functools.wraps(func)
        async def wrapper(self: Algorithm, *args: Any, **kwargs: Any) -> Any:
            proxy = self.get_llm_proxy()
            if proxy is None and required:
                raise InvalidValue(
                    f"{type(self).__name__} needs an LLM proxy; pass llm_proxy= to the Trainer, or call set_llm_proxy()"
                )
            if proxy is None or not auto_start or proxy.is_running():
                return await func(self, *args, llm_proxy=proxy, **kwargs)
            async with running_proxy(proxy, self.get_store()):
                return await func(self, *args, llm_proxy=proxy, **kwargs)

        return wrapper

    return decorate
