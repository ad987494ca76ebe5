"""`@algo`: a plain function as an algorithm."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Generic, TypeAlias, TypeVar

from agentlightning.algorithm.base import Algorithm
from agentlightning.types import Dataset

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
"""What a function may ask for by the name of a parameter, beside the datasets."""


class FunctionalAlgorithm(Algorithm, Generic[AF]):
    """An algorithm that is one function, which gets what it names.

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
        """Call the function as it is, with the arguments given."""
        return self._func(*args, **kwargs)

    def run(
        self, train_dataset: Dataset[Any] | None = None, val_dataset: Dataset[Any] | None = None
    ) -> Awaitable[None] | None:
        """Call the function with what its parameters name; for a coroutine function, await the result.

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
    """Make an algorithm of a function, or a coroutine function. See `FunctionalAlgorithm`.

    Raises:
        TypeError: a parameter has a name that means nothing here, and no default.
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
                f"the parameter {name!r} of {func!r} means nothing to @algo, or is positional-only; "
                f"the names are: {', '.join(sorted([*_DATASETS, *_GETTERS]))}"
            )
    return known
