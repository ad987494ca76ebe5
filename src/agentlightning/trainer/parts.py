"""The parts of a trainer, each from what a user gives for it, and from a default."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from agentlightning.adapter.base import TraceAdapter
from agentlightning.adapter.triplet import TracerTraceToTriplet
from agentlightning.algorithm.base import Algorithm
from agentlightning.errors import InvalidValue
from agentlightning.execution.base import ExecutionStrategy
from agentlightning.execution.client_server import ClientServerExecutionStrategy
from agentlightning.litagent.hooks import Hook
from agentlightning.store.base import LightningStore
from agentlightning.trainer.components import ComponentSpec, build_component
from agentlightning.trainer.registry import AlgorithmRegistry, ExecutionStrategyRegistry, StoreRegistry

if TYPE_CHECKING:
    from agentlightning.proxy.llm_proxy import LLMProxy

__all__ = [
    "adapter_of",
    "algorithm_of",
    "hooks_of",
    "number_of",
    "one_of",
    "proxy_of",
    "store_of",
    "strategy_of",
    "warn_of_ignored",
]

T = TypeVar("T")


def one_of(name: str, value: T | None, old_name: str, old_value: T | None) -> T | None:
    """The value of an argument that has an old name, too.

    Raises:
        InvalidValue: both were given.
    """
    if old_value is None:
        return value
    if value is not None:
        raise InvalidValue(f"{old_name} is the old name of {name}, and both are given; leave out {old_name}")
    warnings.warn(f"{old_name} is now called {name}", DeprecationWarning, stacklevel=3)
    return old_value


def number_of(name: str, value: int | None, least: int) -> int | None:
    """A whole number of at least ``least``, or None.

    Raises:
        InvalidValue: it is not.
    """
    if value is not None and (type(value) is not int or value < least):
        raise InvalidValue(f"{name} is {value!r}; give a whole number, at least {least}, or leave it out")
    return value


def hooks_of(given: Hook | Sequence[Hook] | None) -> tuple[Hook, ...]:
    """One hook, or several, or none.

    Raises:
        InvalidValue: something else is among them.
    """
    hooks: Sequence[Any] = (given,) if given is None or not isinstance(given, Sequence) else given
    for each in hooks:
        if each is not None and not isinstance(each, Hook):
            raise InvalidValue(
                f"hooks has {each!r}, a {type(each).__name__}; give objects of classes derived from Hook"
            )
    return tuple(each for each in hooks if each is not None)


def algorithm_of(spec: ComponentSpec[Algorithm]) -> Algorithm | None:
    """The algorithm, if there is one. Raises as ``build_component``."""
    return build_component(
        spec, expected_type=Algorithm, spec_name="algorithm", allow_none=True, registry=AlgorithmRegistry
    )


def adapter_of(spec: ComponentSpec[TraceAdapter[Any]]) -> TraceAdapter[Any]:
    """The adapter. Raises as ``build_component``."""
    return _built(spec, TraceAdapter, "adapter", TracerTraceToTriplet)


def store_of(spec: ComponentSpec[LightningStore], default: Callable[[], LightningStore]) -> LightningStore:
    """The store. Raises as ``build_component``."""
    return _built(spec, LightningStore, "store", default, registry=StoreRegistry)


def strategy_of(spec: ComponentSpec[ExecutionStrategy], n_runners: int | None, port: int | None) -> ExecutionStrategy:
    """The strategy, which gets what it has a place for and was not given. Raises as ``build_component``."""
    count = n_runners or 1
    defaults: dict[str, Callable[[], Any]] = {"n_runners": lambda: count, "server_port": lambda: port}
    if count > 1:  # a thread runs one runner, so the main thread is the algorithm's
        defaults["main_thread"] = lambda: "algorithm"
    return _built(
        spec,
        ExecutionStrategy,
        "strategy",
        lambda: ClientServerExecutionStrategy(n_runners=count, server_port=port),
        defaults=defaults,
        registry=ExecutionStrategyRegistry,
    )


def proxy_of(spec: ComponentSpec[LLMProxy], store: LightningStore) -> LLMProxy | None:
    """The LLM proxy, if there is one; one that is made here records in ``store``. Raises as ``build_component``."""
    if spec is None:
        return None
    from agentlightning.proxy.llm_proxy import LLMProxy  # brings a web server, which few trainers need

    return build_component(
        spec,
        expected_type=LLMProxy,
        spec_name="llm_proxy",
        optional_defaults={"store": lambda: store},
        dict_default_cls=LLMProxy,
    )


def warn_of_ignored(component: str, made: object, given: object, **arguments: object) -> None:
    """Warn of arguments that are for making a component, when it was given ready made, with others."""
    for name, value in arguments.items():
        if made is given and value is not None and getattr(made, name, None) != value:
            warnings.warn(
                f"{name} {value!r} has no effect: {component}= is an object, which has its own; give it to that, or "
                f"give {component}= as a class, a name or a dict",
                stacklevel=3,
            )


def _built(
    spec: ComponentSpec[T],
    expected_type: type[T],
    spec_name: str,
    default_factory: Callable[[], T],
    *,
    defaults: Mapping[str, Callable[[], Any]] | None = None,
    registry: Mapping[str, str] | None = None,
) -> T:
    made = build_component(
        spec,
        expected_type=expected_type,
        spec_name=spec_name,
        default_factory=default_factory,
        optional_defaults=defaults,
        registry=registry,
    )
    assert made is not None  # there is a default
    return made
