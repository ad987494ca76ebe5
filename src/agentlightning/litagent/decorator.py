"""Plain functions as agents: ``@rollout``, ``@llm_rollout``, ``@prompt_rollout``."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar, cast, overload

from agentlightning.errors import InvalidValue
from agentlightning.litagent.litagent import LitAgent
from agentlightning.types import (
    LLM,
    AttemptedRollout,
    NamedResources,
    PromptTemplate,
    ProxyLLM,
    Resource,
    Rollout,
    RolloutRawResult,
)

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)
_R = TypeVar("_R", bound=Resource)

_PARAMETERS = ("llm", "prompt_template", "resources", "rollout")
"""Names of parameters that a function may have besides the task."""
_SHAPES = "(task, llm), (task, prompt_template), (task, resources) or (task), each with or without rollout at the end"

_logger = logging.getLogger(__name__)


class FunctionalLitAgentFunc(Protocol[T_contra]):
    """A rollout function."""

    def __call__(self, task: T_contra, *args: Any, **kwargs: Any) -> RolloutRawResult | Awaitable[RolloutRawResult]:
        """Work on a task; the result is that of ``LitAgent.rollout``."""
        ...


class FunctionalLitAgent(LitAgent[T]):
    """An agent that calls a function. The names of the function's parameters say which arguments it gets.

    ``llm`` is the first model among the resources, ``prompt_template`` the first template, ``resources`` all of
    them, ``rollout`` the rollout with its attempt. Calling the agent calls the function.

    Args:
        rollout_func: a function or coroutine function; its first parameter is called ``task``.
        strip_proxy: give a plain ``LLM``, whose URL leads to this attempt, in place of a ``ProxyLLM``.

    Raises:
        NotImplementedError: the function has other required parameters.
    """

    __name__: str
    __qualname__: str

    def __init__(self, rollout_func: FunctionalLitAgentFunc[T], *, strip_proxy: bool = True) -> None:
        super().__init__()
        self.__name__ = self.__qualname__ = type(rollout_func).__name__  # of callables that have no names of their own
        self._rollout_func = rollout_func
        self._strip_proxy = strip_proxy
        self._parameters = _parameters_of(rollout_func)
        self._is_async = inspect.iscoroutinefunction(rollout_func)
        functools.update_wrapper(self, rollout_func)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function as if it were not decorated."""
        return self._rollout_func(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle an agent that can be imported by its name, as functions are pickled."""
        module = sys.modules.get(self.__module__)
        found: Any = module
        for part in self.__qualname__.split("."):
            found = getattr(found, part, None)
        if found is self and self.__module__ != "__main__":
            return _imported, (self.__module__, self.__qualname__)
        return super().__reduce_ex__(protocol)

    def is_async(self) -> bool:
        """Whether it is a coroutine function."""
        return self._is_async

    def rollout(self, task: T, resources: NamedResources, rollout: Rollout) -> RolloutRawResult:
        """Call the function.

        Raises:
            InvalidValue: there is no resource of a kind that a parameter names.
            RuntimeError: it is a coroutine function.
        """
        if self._is_async:
            raise RuntimeError(f"{self.__name__} is a coroutine function; await rollout_async instead")
        return cast(RolloutRawResult, self._rollout_func(task, **self._arguments(resources, rollout)))

    async def rollout_async(self, task: T, resources: NamedResources, rollout: Rollout) -> RolloutRawResult:
        """Call the coroutine function.

        Raises:
            InvalidValue: there is no resource of a kind that a parameter names.
            RuntimeError: it is a plain function.
        """
        if not self._is_async:
            raise RuntimeError(f"{self.__name__} is a plain function; call rollout instead")
        result = self._rollout_func(task, **self._arguments(resources, rollout))
        return await cast("Awaitable[RolloutRawResult]", result)

    def _arguments(self, resources: NamedResources, rollout: Rollout) -> dict[str, Any]:
        makers: dict[str, Callable[[], Any]] = {
            "llm": lambda: self._llm(_first(resources, LLM, "LLM", self.__name__), rollout),
            "prompt_template": lambda: _first(resources, PromptTemplate, "prompt template", self.__name__),
            "resources": lambda: resources,
            "rollout": lambda: rollout,
        }
        return {name: makers[name]() for name in self._parameters}

    def _llm(self, llm: LLM, rollout: Rollout) -> LLM:
        if not self._strip_proxy or not isinstance(llm, ProxyLLM):
            return llm
        if not isinstance(rollout, AttemptedRollout):
            raise InvalidValue(
                f"rollout {rollout.rollout_id!r} comes without its attempt, so the proxy cannot know which attempt "
                "its calls belong to; pass an AttemptedRollout, or use strip_proxy=False"
            )
        return llm.with_attempted_rollout(rollout)


def _parameters_of(function: Callable[..., Any]) -> list[str]:
    """The names of a function's parameters that it is called with, besides the task."""
    parameters = list(inspect.signature(function).parameters.values())
    names = [each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    required = {each.name for each in parameters if each.default is each.empty}
    if not names or names[0] != "task":
        first = names[0] if names else "missing"
        raise NotImplementedError(
            f"the first parameter of {function.__name__} is {first}; it must be called task: {_SHAPES}"
        )
    wanted = [name for name in names[1:] if name in _PARAMETERS]
    unknown = sorted(required - {"task", *wanted})
    if unknown or {"llm", "prompt_template"} <= set(wanted):
        shown = ", ".join(names)
        raise NotImplementedError(f"{function.__name__}({shown}) is no rollout function; it must be one of {_SHAPES}")
    return wanted


def _first(resources: NamedResources, kind: type[_R], what: str, agent: str) -> _R:
    found = [(name, each) for name, each in resources.items() if isinstance(each, kind)]
    if not found:
        has = ", ".join(f"{name} ({type(each).__name__})" for name, each in resources.items()) or "none"
        raise InvalidValue(
            f"{agent} asks for a resource that is a {what}, and the resources of this rollout are: {has}; give one by "
            "initial_resources= of Trainer, or by store.add_resources before enqueuing"
        )
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        _logger.warning("%s gets %r, the first of several %ss: %s", agent, found[0][0], what, names)
    return found[0][1]


def _imported(module: str, qualname: str) -> Any:
    """The object of this name; called by pickle."""
    __import__(module)
    found: Any = sys.modules[module]
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


@overload
def llm_rollout(func: Callable[..., Any], *, strip_proxy: bool = True) -> FunctionalLitAgent[Any]: ...
@overload
def llm_rollout(
    func: None = None, *, strip_proxy: bool = True
) -> Callable[[Callable[..., Any]], FunctionalLitAgent[Any]]: ...
def llm_rollout(
    func: Callable[..., Any] | None = None, *, strip_proxy: bool = True
) -> FunctionalLitAgent[Any] | Callable[[Callable[..., Any]], FunctionalLitAgent[Any]]:
    """Make an agent from a function ``(task, llm[, rollout])``.

    Args:
        func: the function; left out when the decorator is used with arguments.
        strip_proxy: give a plain ``LLM``, whose URL leads to this attempt, in place of a ``ProxyLLM``.

    Raises:
        NotImplementedError: the function has other required parameters.
    """

    def make(function: Callable[..., Any]) -> FunctionalLitAgent[Any]:
        _check_has_parameter(function, "llm")
        return FunctionalLitAgent(function, strip_proxy=strip_proxy)

    return make if func is None else make(func)


@overload
def prompt_rollout(func: Callable[..., Any]) -> FunctionalLitAgent[Any]: ...
@overload
def prompt_rollout(func: None = None) -> Callable[[Callable[..., Any]], FunctionalLitAgent[Any]]: ...
def prompt_rollout(
    func: Callable[..., Any] | None = None,
) -> FunctionalLitAgent[Any] | Callable[[Callable[..., Any]], FunctionalLitAgent[Any]]:
    """Make an agent from a function ``(task, prompt_template[, rollout])``.

    Raises:
        NotImplementedError: the function has other required parameters.
    """

    def make(function: Callable[..., Any]) -> FunctionalLitAgent[Any]:
        _check_has_parameter(function, "prompt_template")
        return FunctionalLitAgent(function)

    return make if func is None else make(func)


def rollout(func: Callable[..., Any]) -> FunctionalLitAgent[Any]:
    """Make an agent from a function, whose parameters say which arguments it gets; see ``FunctionalLitAgent``.

    Raises:
        NotImplementedError: the function has other required parameters.
    """
    return FunctionalLitAgent(func)


def _check_has_parameter(function: Callable[..., Any], name: str) -> None:
    if name not in inspect.signature(function).parameters:
        raise NotImplementedError(
            f"{function.__name__} has no parameter {name}; write (task, {name}[, rollout]), or use @rollout"
        )
