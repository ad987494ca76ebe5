"""Building a component from whatever a user gives for it.

A spec is one of: an object of the right type; a class; a function that returns one; a name of a
registry (``"cs"``); the dotted path of a class or function (``"my.module.MyAlgorithm"``); or a dict
with ``type`` (a dotted path) or ``name`` (of a registry) and the keyword arguments beside it. The same
shapes as in agentlightning 0.3.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

from agentlightning.adapter.base import TraceAdapter
from agentlightning.adapter.triplet import TracerTraceToTriplet
from agentlightning.algorithm.base import Algorithm
from agentlightning.errors import InvalidValue
from agentlightning.execution.base import ExecutionStrategy
from agentlightning.execution.client_server import ClientServerExecutionStrategy
from agentlightning.litagent.litagent import Hook
from agentlightning.store.base import LightningStore

if TYPE_CHECKING:
    from agentlightning.proxy.llm_proxy import LLMProxy

T = TypeVar("T")

ComponentSpec: TypeAlias = T | type[T] | Callable[[], T] | str | dict[str, Any] | None
"""What may be given for a component of type ``T``; ``None`` means the default."""


def load_class(path: str) -> Callable[..., Any]:
    """Import the class or function named by a dotted path.

    Raises:
        InvalidValue: there is no such module, or nothing callable of that name in it.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise InvalidValue(f"{path!r} is no dotted path; write package.module.ClassName")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that exists and needs another one which does not is that module's error, not this name's.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise InvalidValue(f"{path!r} cannot be imported: there is no module {error.name!r}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise InvalidValue(f"module {module_name!r} has no class or function {name!r}")
    return cast("Callable[..., Any]", found)


def build_component(
    spec: ComponentSpec[T],
    *,
    expected_type: type[T],
    spec_name: str,
    default_factory: Callable[[], T] | None = None,
    allow_none: bool = False,
    optional_defaults: Mapping[str, Callable[[], Any]] | None = None,
    dict_default_cls: type[T] | None = None,
    registry: Mapping[str, str] | None = None,
) -> T | None:
    """Make a component of ``expected_type`` from its spec.

    Args:
        spec: see the module.
        expected_type: what must come out.
        spec_name: the argument the spec was given for, for messages.
        default_factory: makes the component when ``spec`` is None.
        allow_none: whether None may come out when there is no default.
        optional_defaults: arguments by name, with what computes them, passed to a class or factory that takes
            an argument of that name and was not given one.
        dict_default_cls: the class of a dict that names none.
        registry: dotted paths by short name.

    Raises:
        InvalidValue: the spec is none of these, names what does not exist, or made something else. (It is a
            ``ValueError``, too.)
        TypeError: the class does not take the arguments given.
    """
    if spec is None:
        if default_factory is not None:
            return default_factory()
        if allow_none:
            return None
        raise InvalidValue(f"{spec_name} is None and has no default; give one")
    if isinstance(spec, expected_type):
        return cast("T", spec)  # the type checker still thinks of classes and functions that happen to be a T
    factory, arguments = _factory_of(spec, spec_name, expected_type, dict_default_cls, registry or {})
    made = factory(**arguments, **_missing(factory, arguments, optional_defaults or {}))
    if not isinstance(made, expected_type):
        raise InvalidValue(
            f"{spec_name}={spec!r} made a {type(made).__name__}, and a {expected_type.__name__} is needed"
        )
    return made


def _factory_of(
    spec: object,
    spec_name: str,
    expected_type: type[Any],
    dict_default_cls: type[Any] | None,
    registry: Mapping[str, str],
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What makes the component, and the arguments that the spec gives it."""
    if isinstance(spec, str):
        return load_class(_path_of(spec, spec_name, registry)), {}
    if isinstance(spec, dict):
        arguments = dict(cast("dict[str, Any]", spec))
        type_name, short_name = arguments.pop("type", None), arguments.pop("name", None)
        if type_name is not None and short_name is not None:
            raise InvalidValue(f"{spec_name}={spec!r} has both 'type' and 'name'; give one of them")
        named = type_name if type_name is not None else short_name
        if named is None:
            if dict_default_cls is None:
                raise InvalidValue(f"{spec_name}={spec!r} does not say what to make; add 'type' or 'name'")
            return dict_default_cls, arguments
        if isinstance(named, str):
            return load_class(_path_of(named, spec_name, registry)), arguments
        if callable(named):
            return cast("Callable[..., Any]", named), arguments
        raise InvalidValue(f"{spec_name}={spec!r}: 'type' is a {type(named).__name__}; give a dotted path or a class")
    if callable(spec):
        return cast("Callable[..., Any]", spec), {}
    raise InvalidValue(
        f"{spec_name} is {spec!r:.60}, of type {type(spec).__name__}; give an object of type {expected_type.__name__}, "
        "its class, a function that returns one, a name, or a dict with 'type' or 'name'"
    )


def _path_of(name: str, spec_name: str, registry: Mapping[str, str]) -> str:
    if name in registry:
        return registry[name]
    if "." not in name:
        known = ", ".join(sorted(registry)) or "none here"
        raise InvalidValue(f"{spec_name}={name!r} is neither a dotted path nor a known name ({known})")
    return name


def _missing(
    factory: Callable[..., Any], given: Mapping[str, Any], defaults: Mapping[str, Callable[[], Any]]
) -> dict[str, Any]:
    """Those defaults that the factory has a place for and was not given."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # a builtin that does not tell
        return {}
    named = {each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    return {name: make() for name, make in defaults.items() if name in named and name not in given}


# --- Short names of components, for specs such as ``strategy="cs"`` and ``algorithm={"name": "g ---

ExecutionStrategyRegistry: Mapping[str, str] = {
    "shm": "agentlightning.execution.shared_memory.SharedMemoryExecutionStrategy",
    "cs": "agentlightning.execution.client_server.ClientServerExecutionStrategy",
}
"""How roles are run: ``shm`` as threads of one process, ``cs`` as processes on one or more machines."""

AlgorithmRegistry: Mapping[str, str] = {
    "baseline": "agentlightning.algorithm.fast.Baseline",
    "grpo": "agentlightning.algorithm.grpo.GRPO",
    "apo": "agentlightning.algorithm.apo.APO",
}

StoreRegistry: Mapping[str, str] = {
    "memory": "agentlightning.store.sqlite.store.InMemoryLightningStore",
    "sqlite": "agentlightning.store.sqlite.store.SqliteLightningStore",
}

TracerRegistry: Mapping[str, str] = {
    "otel": "agentlightning.tracer.otel.OtelTracer",
    "dummy": "agentlightning.tracer.dummy.DummyTracer",
}


# --- The parts of a trainer, each from what a user gives for it, and from a default ---


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
