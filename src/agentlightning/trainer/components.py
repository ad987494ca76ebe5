"""Components of a trainer, from their specs.

A spec is one of: an object of the right type; a class; a function that returns one; a short name (``"cs"``); the dotted
path of a class or function (``"my.module.MyAlgorithm"``); or a dict with ``type`` (a dotted path or a class) or
``name`` (a short name), and keyword arguments beside it. agentlightning 0.3 has the same specs.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast
from urllib.parse import urlsplit

from agentlightning.errors import InvalidValue
from agentlightning.execution.base import ExecutionStrategy
from agentlightning.execution.client_server import ClientServerExecutionStrategy
from agentlightning.litagent.litagent import Hook
from agentlightning.security.hosts import is_loopback, outward_address
from agentlightning.security.tls import Serving
from agentlightning.store.base import LightningStore

if TYPE_CHECKING:
    from agentlightning.proxy.llm_proxy import LLMProxy

T = TypeVar("T")

ComponentSpec: TypeAlias = T | type[T] | Callable[[], T] | str | dict[str, Any] | None
"""What may be given for a component of type ``T``; ``None`` means the default."""

AlgorithmRegistry: Mapping[str, str] = {
    "baseline": "agentlightning.algorithm.fast.Baseline",
    "grpo": "agentlightning.algorithm.grpo.GRPO",
    "apo": "agentlightning.algorithm.apo.APO",
}
"""Dotted paths by short name, as in all registries."""

ExecutionStrategyRegistry: Mapping[str, str] = {
    "shm": "agentlightning.execution.shared_memory.SharedMemoryExecutionStrategy",
    "cs": "agentlightning.execution.client_server.ClientServerExecutionStrategy",
}
"""``shm``: both sides as threads of one process. ``cs``: as processes on one or more machines."""

StoreRegistry: Mapping[str, str] = {
    "memory": "agentlightning.store.sqlite.store.InMemoryLightningStore",
    "sqlite": "agentlightning.store.sqlite.store.SqliteLightningStore",
}

TracerRegistry: Mapping[str, str] = {
    "otel": "agentlightning.tracer.otel.OtelTracer",
    "dummy": "agentlightning.tracer.base.DummyTracer",
}


def load_class(path: str) -> Callable[..., Any]:
    """Import the class or function named by a dotted path.

    Raises:
        InvalidValue: there is no such module, or it has nothing callable of that name.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise InvalidValue(f"{path!r} is not a dotted path; write package.module.ClassName")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # The module may exist and fail to import another one. That is an error in the module, not in the path.
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
    """Make a component of ``expected_type`` from its spec; the module describes specs.

    Args:
        spec: describes the component.
        expected_type: class of the result.
        spec_name: argument that the spec was given for, for messages.
        default_factory: makes the component if ``spec`` is None.
        allow_none: whether the result may be None if there is no default.
        optional_defaults: functions that compute arguments, by name of the argument. A class or factory gets those
            that it takes and that the spec does not give.
        dict_default_cls: class of a dict that names none.
        registry: dotted paths by short name.

    Raises:
        InvalidValue: the spec has another form, names what does not exist, or makes something else. (It is a
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
        return cast("T", spec)  # for the type checker a class or a function could be a T, too
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
    """Return what makes the component, and the arguments that the spec gives it."""
    arguments: dict[str, Any] = {}
    named: object = spec
    if isinstance(spec, dict):
        arguments = dict(cast("dict[str, Any]", spec))
        words: list[object] = [arguments.pop("type", None), arguments.pop("name", None)]
        if None not in words:
            raise InvalidValue(f"{spec_name}={spec!r} has both 'type' and 'name'; give one of them")
        named = next((each for each in words if each is not None), dict_default_cls)
        if named is None:
            raise InvalidValue(f"{spec_name}={spec!r} does not say what to make; add 'type' or 'name'")
        if not callable(named) and not isinstance(named, str):
            kind = type(named).__name__
            raise InvalidValue(f"{spec_name}={spec!r}: 'type' is a {kind}; give a dotted path or a class")
    if isinstance(named, str):
        if named not in registry and "." not in named:
            known = ", ".join(sorted(registry)) or "none here"
            raise InvalidValue(f"{spec_name}={named!r} is neither a dotted path nor a known name ({known})")
        return load_class(registry.get(named, named)), arguments
    if callable(named):
        return cast("Callable[..., Any]", named), arguments
    raise InvalidValue(
        f"{spec_name} is {named!r:.60}, of type {type(named).__name__}; give an object of type "
        f"{expected_type.__name__}, its class, a function that returns one, a name, or a dict with 'type' or 'name'"
    )


def _missing(
    factory: Callable[..., Any], given: Mapping[str, Any], defaults: Mapping[str, Callable[[], Any]]
) -> dict[str, Any]:
    """Return the defaults for arguments that the factory takes and was not given."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return {}
    named = {each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    return {name: make() for name, make in defaults.items() if name in named and name not in given}


def build_required(spec: ComponentSpec[T], expected_type: type[T], spec_name: str, **options: Any) -> T:
    """Make a component that has a default. See ``build_component``, also for ``options``."""
    made = build_component(spec, expected_type=expected_type, spec_name=spec_name, **options)
    assert made is not None
    return made


def one_of(name: str, value: T | None, old_name: str, old_value: T | None) -> T | None:
    """Return the value of an argument that also has an old name, with a warning if that was used."""
    if old_value is None:
        return value
    if value is not None:
        raise InvalidValue(f"{old_name} is the old name of {name}, and both are given; leave out {old_name}")
    warnings.warn(f"{old_name} is now called {name}", DeprecationWarning, stacklevel=3)
    return old_value


def number_of(name: str, value: int | None, least: int) -> int | None:
    """Return the value, which must be None or a whole number of at least ``least``."""
    if value is not None and (type(value) is not int or value < least):
        raise InvalidValue(f"{name} is {value!r}; give a whole number, at least {least}, or leave it out")
    return value


def hooks_of(given: Hook | Sequence[Hook] | None) -> tuple[Hook, ...]:
    """Return the hooks as a tuple."""
    hooks: Sequence[Any] = given if isinstance(given, Sequence) else (given,)
    for each in hooks:
        if each is not None and not isinstance(each, Hook):
            raise InvalidValue(
                f"hooks has {each!r}, a {type(each).__name__}; give objects of classes derived from Hook"
            )
    return tuple(each for each in hooks if each is not None)


def store_file(spec: object) -> Path | None:
    """The database file that ``store=`` names: ``x.db``, a path, or ``sqlite://PATH``; None if it names none.

    Raises:
        InvalidValue: it is the URL of something else; the message says how that is given.
    """
    if isinstance(spec, Path):
        return spec
    if not isinstance(spec, str):
        return None
    scheme, separator, rest = spec.partition("://")
    if separator and scheme in ("http", "https"):
        raise InvalidValue(
            f"store={spec!r} is a server; give store=agl.LightningStoreClient({spec!r}) and "
            "strategy={'type': 'cs', 'managed_store': False}"
        )
    if separator and scheme != "sqlite":
        raise InvalidValue(f"store={spec!r} is no store; give the path of a file (x.db), or an agl.LightningStore")
    is_file = bool(separator) or "/" in spec or spec.endswith((".db", ".sqlite", ".sqlite3"))
    return Path(rest if separator else spec) if is_file else None


def strategy_of(spec: ComponentSpec[ExecutionStrategy], n_runners: int | None, port: int | None) -> ExecutionStrategy:
    """Make the strategy. It gets the number of runners and the port, if it takes them and its spec has no others."""
    count = n_runners or 1
    defaults: dict[str, Callable[[], Any]] = {"n_runners": lambda: count, "server_port": lambda: port}
    if count > 1:  # one thread runs one runner, so the algorithm must have the main thread
        defaults["main_thread"] = lambda: "algorithm"
    return build_required(
        spec,
        ExecutionStrategy,
        "strategy",
        default_factory=lambda: ClientServerExecutionStrategy(n_runners=count, server_port=port),
        optional_defaults=defaults,
        registry=ExecutionStrategyRegistry,
    )


def proxy_of(spec: ComponentSpec[LLMProxy], store: LightningStore) -> LLMProxy | None:
    """Make the LLM proxy, if one is wanted. Unless its spec says otherwise, it records in ``store``."""
    if spec is None:
        return None
    from agentlightning.proxy.llm_proxy import LLMProxy  # imports a web server, which most trainers do not need

    return build_component(
        spec,
        expected_type=LLMProxy,
        spec_name="llm_proxy",
        optional_defaults={"store": lambda: store},
        dict_default_cls=LLMProxy,
    )


def serving_of(strategy: ExecutionStrategy, store: LightningStore) -> Serving | None:
    """Where a run serves its store to other machines, and so its models; None: on this machine only.

    A store that is served elsewhere has runners on other machines. They reach this machine by the address from which
    it reaches the store.
    """
    serving = strategy.serving()
    if serving is not None:
        return None if is_loopback(serving.host) else serving
    root: str | None = getattr(store, "server_address_root", None)
    host = None if root is None else urlsplit(root).hostname
    address = None if host is None or is_loopback(host) else outward_address(host)
    return None if address is None else Serving(address)


def warn_of_ignored(component: str, made: object, given: object, **arguments: object) -> None:
    """Warn of arguments for making a component that was given as an object with other values."""
    for name, value in arguments.items():
        if made is given and value is not None and getattr(made, name, None) != value:
            warnings.warn(
                f"{name} {value!r} has no effect: {component}= is an object, which has its own; give it to that, or "
                f"give {component}= as a class, a name or a dict",
                stacklevel=3,
            )
