"""``LitAgent``: the base of every agent."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from agentlightning.types import NamedResources, Rollout, RolloutRawResult, Span, Task
from agentlightning.types.rollouts import ParallelWorkerBase

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from agentlightning.store.base import LightningStore
    from agentlightning.tracer.base import Tracer

T = TypeVar("T")


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
