"""Decorators of algorithms: `@algo`, and those that hand a method the store or the LLM proxy."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Concatenate, Generic, ParamSpec, TypeAlias, TypeVar

from agentlightning.algorithm.base import Algorithm
from agentlightning.algorithm.model_proxy import running_proxy
from agentlightning.errors import InvalidValue
from agentlightning.store.base import LightningStore
from agentlightning.types import Dataset

A = TypeVar("A", bound=Algorithm)
P = ParamSpec("P")
R = TypeVar("R")
AF = TypeVar("AF", bound=bool)
"""Whether the function is a coroutine function."""

AlgorithmFunc: TypeAlias = Callable[..., Awaitable[None] | None]
"""A function, or a coroutine function, whose parameters have names that `FunctionalAlgorithm` knows."""

_DATASETS = ("train_dataset", "val_dataset")

_GETTERS: Mapping[str, Callable[[Algorithm], Any]] = {
    "store": Algorithm.get_store,
    "llm_proxy": Algorithm.get_llm_proxy,
    "adapter": Algorithm.get_adapter,
    "initial_resources": Algorithm.get_initial_resources,
    "rollout_config": Algorithm.get_rollout_config,
    "run": Algorithm.get_run,
    "report": lambda algorithm: algorithm.report,
}
"""Names of parameters that a function may have, besides those of the datasets, and what they get."""


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
        self._names = _known_parameters(algorithm_func)
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
        datasets = dict(zip(_DATASETS, (train_dataset, val_dataset), strict=True))
        for name, dataset in datasets.items():
            if dataset is not None and name not in self._names:
                raise TypeError(f"{self._func!r} takes no {name}, but one was given; add a parameter of that name")
        return self._func(
            **{name: datasets[name] if name in datasets else _GETTERS[name](self) for name in self._names}
        )


def algo(func: AlgorithmFunc) -> FunctionalAlgorithm[Any]:
    """Make an algorithm of a function, or of a coroutine function. See `FunctionalAlgorithm`.

    Raises:
        TypeError: a parameter has an unknown name and no default.
    """
    return FunctionalAlgorithm(func)


def _known_parameters(func: AlgorithmFunc) -> list[str]:
    known: list[str] = []
    for name, parameter in inspect.signature(func).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.kind is not parameter.POSITIONAL_ONLY and (name in _GETTERS or name in _DATASETS):
            known.append(name)
        elif parameter.default is parameter.empty:
            raise TypeError(
                f"the parameter {name!r} of {func!r} has no meaning for @algo, or is positional-only; "
                f"the known names are: {', '.join(sorted([*_DATASETS, *_GETTERS]))}"
            )
    return known


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
