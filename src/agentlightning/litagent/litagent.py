"""Agents: ``LitAgent``, the base of every agent, and plain functions as agents (``@rollout``); hooks around them."""

from __future__ import annotations

import functools
import inspect
import logging
import pkgutil
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast, overload

from agentlightning.errors import InvalidValue
from agentlightning.lifecycle.reasons import STORE_ONLY
from agentlightning.types import (
    LLM,
    AttemptedRollout,
    NamedResources,
    PromptTemplate,
    ProxyLLM,
    Resource,
    Rollout,
    RolloutRawResult,
    Span,
    Task,
)
from agentlightning.types.rollouts import ParallelWorkerBase

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from agentlightning.store.base import LightningStore
    from agentlightning.tracer.base import Tracer

_REASON_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}")

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class AgentRunner(Protocol):
    """The part of a runner that an agent may use."""

    @property
    def tracer(self) -> Tracer:
        """The tracer that records the agent."""
        ...

    def get_store(self) -> LightningStore:
        """The store that rollouts come from."""
        ...

    def get_worker_id(self) -> str:
        """The name of the runner's worker in the store."""
        ...


class AttemptFailed(Exception):
    """Raised by an agent: its attempt fails, with a reason of the agent's own, and with a wish.

    Args:
        code: the attempt's ``reason_code``: up to 64 characters of ``a-z 0-9 _``.
        message: the attempt's ``reason_message``.
        retry: True: the rollout is tried again, up to its ``max_attempts``; False: it is not; None: as its
            ``retry_condition`` says.

    Raises:
        InvalidValue: the code has another form, or is one that only the store gives.
    """

    def __init__(self, code: str, message: str, retry: bool | None = None) -> None:
        if not isinstance(code, str) or not _REASON_CODE.fullmatch(code) or code in STORE_ONLY:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidValue(
                f"the code {code!r} of AttemptFailed is not valid; use up to 64 characters of a-z 0-9 _, beginning "
                f"with a letter, and none of {', '.join(sorted(STORE_ONLY))}"
            )
        super().__init__(code, message, retry)  # all of them, so that a process pool brings it back whole
        self.code, self.message, self.retry = code, message, retry

    def __str__(self) -> str:
        return self.message


def is_v0_1_rollout_api(func: Callable[..., Any]) -> bool:
    """Whether a rollout method takes ``(task, rollout_id, resources)``, as in v0.1."""
    return "rollout_id" in inspect.signature(func).parameters


class LitAgent(Generic[T]):
    """An agent. A subclass overrides ``rollout`` or ``rollout_async``, or the variants for training and validation.

    A rollout method returns the final reward (a number), or the spans of its run, or None when it emitted its rewards
    itself. One agent object works on several rollouts at once when its runner has a ``concurrency`` above 1.

    Args:
        trained_agents: a regular expression for the names of those agents, in a system of several, that are trained;
            read by algorithms.
    """

    def __init__(self, *, trained_agents: str | None = None) -> None:
        self.trained_agents = trained_agents
        self._trainer: Any = None
        self._runner: AgentRunner | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out trainer and runner, which belong to one process."""
        return self.__dict__ | {"_trainer": None, "_runner": None}

    def is_async(self) -> bool:
        """Whether a coroutine method is overridden."""
        cls = type(self)
        names = ("rollout_async", "training_rollout_async", "validation_rollout_async")
        return any(getattr(cls, name) is not getattr(LitAgent, name) for name in names)

    # --- Trainer, runner and tracer --------------------------------------------------------------

    def set_trainer(self, trainer: Any) -> None:
        """Set the trainer; called by the trainer itself."""
        self._trainer = trainer

    def get_trainer(self) -> Any:
        """The trainer.

        Raises:
            ValueError: this process has none.
        """
        trainer = getattr(self, "_trainer", None)
        if trainer is None:
            raise ValueError("this agent has no trainer in this process; Trainer.fit sets it, in the trainer's process")
        return trainer

    @property
    def trainer(self) -> Any:
        """The trainer; see ``get_trainer``."""
        return self.get_trainer()

    def get_tracer(self) -> Tracer:
        """The tracer of the runner. Raises as ``get_runner``."""
        return self.get_runner().tracer

    @property
    def tracer(self) -> Tracer:
        """The tracer of the runner; see ``get_tracer``."""
        return self.get_tracer()

    def set_runner(self, runner: AgentRunner) -> None:
        """Set the runner; called by the runner itself."""
        self._runner = runner

    def get_runner(self) -> AgentRunner:
        """The runner.

        Raises:
            ValueError: no runner has this agent.
        """
        runner = getattr(self, "_runner", None)
        if runner is None:
            raise ValueError("this agent has no runner; it is set when a runner takes the agent")
        return runner

    @property
    def runner(self) -> AgentRunner:
        """The runner; see ``get_runner``."""
        return self.get_runner()

    # --- Methods for subclasses ------------------------------------------------------------------

    def on_rollout_start(self, task: Task, runner: AgentRunner, tracer: Tracer) -> None:
        """Called before each rollout. An exception is logged. ``Hook`` does the same outside the agent."""

    def on_rollout_end(self, task: Task, rollout: Rollout, runner: AgentRunner, tracer: Tracer) -> None:
        """Called after each rollout. An exception is logged. ``Hook`` does the same outside the agent."""

    def rollout(self, task: T, resources: NamedResources, rollout: Rollout) -> RolloutRawResult:
        """Work on one task.

        Args:
            task: the input of the rollout.
            resources: prompts and models to use, by name.
            rollout: the rollout with this attempt (an ``AttemptedRollout``).

        Returns:
            The final reward; or spans, all of one kind; or None.
        """
        raise NotImplementedError(f"{type(self).__name__} overrides neither rollout nor rollout_async; override one")

    async def rollout_async(self, task: T, resources: NamedResources, rollout: Rollout) -> RolloutRawResult:
        """Work on one task, as a coroutine; see ``rollout``."""
        raise NotImplementedError(
            f"{type(self).__name__} does not override rollout_async; override it, or only plain methods"
        )

    def training_rollout(self, task: T, resources: NamedResources, rollout: Rollout) -> RolloutRawResult:
        """Work on a task of mode ``train``; by default ``rollout``."""
        return self.rollout(task, resources, rollout)

    def validation_rollout(self, task: T, resources: NamedResources, rollout: Rollout) -> RolloutRawResult:
        """Work on a task of any other mode, or none; by default ``rollout``."""
        return self.rollout(task, resources, rollout)

    async def training_rollout_async(self, task: T, resources: NamedResources, rollout: Rollout) -> RolloutRawResult:
        """Work on a task of mode ``train``; by default ``rollout_async``."""
        return await self.rollout_async(task, resources, rollout)

    async def validation_rollout_async(self, task: T, resources: NamedResources, rollout: Rollout) -> RolloutRawResult:
        """Work on a task of any other mode, or none; by default ``rollout_async``."""
        return await self.rollout_async(task, resources, rollout)


class Hook(ParallelWorkerBase):
    """A user's code around each rollout.

    The runner calls, in this order: ``on_rollout_start``, ``on_trace_start``, the agent, ``on_trace_end``,
    ``on_rollout_end``; then it reports the end of the attempt to the store.

    When the agent fails, ``on_trace_end`` is left out, and ``on_rollout_end`` gets no spans. An exception of a hook is
    logged and changes nothing else. All arguments are passed by name.
    """

    async def on_rollout_start(self, *, agent: LitAgent[Any], runner: Any, rollout: Rollout) -> None:
        """Called first, before the trace begins."""

    async def on_trace_start(self, *, agent: LitAgent[Any], runner: Any, tracer: Tracer, rollout: Rollout) -> None:
        """Called inside the trace, before the agent. Spans made here belong to the attempt."""

    async def on_trace_end(self, *, agent: LitAgent[Any], runner: Any, tracer: Tracer, rollout: Rollout) -> None:
        """Called inside the trace, after the agent has returned. Rewards emitted here count."""

    async def on_rollout_end(
        self, *, agent: LitAgent[Any], runner: Any, rollout: Rollout, spans: Sequence[ReadableSpan] | Sequence[Span]
    ) -> None:
        """Called after the trace, when the store has its spans; ``spans`` are those of the attempt."""


# --- Plain functions as agents -----------------------------------------------------------------------

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
        path = f"{self.__module__}:{self.__qualname__}"
        try:
            if self.__module__ != "__main__" and pkgutil.resolve_name(path) is self:
                return pkgutil.resolve_name, (path,)
        except (ImportError, AttributeError, ValueError):
            pass  # it was made inside a function, for example
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
    make = functools.partial(_agent_with, "llm", strip_proxy)
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
    make = functools.partial(_agent_with, "prompt_template", True)
    return make if func is None else make(func)


def rollout(func: Callable[..., Any]) -> FunctionalLitAgent[Any]:
    """Make an agent from a function, whose parameters say which arguments it gets; see ``FunctionalLitAgent``.

    Raises:
        NotImplementedError: the function has other required parameters.
    """
    return FunctionalLitAgent(func)


def _agent_with(parameter: str, strip_proxy: bool, function: Callable[..., Any]) -> FunctionalLitAgent[Any]:
    """The agent of a function that must have this parameter."""
    if parameter not in inspect.signature(function).parameters:
        raise NotImplementedError(
            f"{function.__name__} has no parameter {parameter}; write (task, {parameter}[, rollout]), or use @rollout"
        )
    return FunctionalLitAgent(function, strip_proxy=strip_proxy)
