"""``LitAgent``: the base of every agent."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from agentlightning.types import NamedResources, Rollout, RolloutRawResult, Span, Task
from agentlightning.types.tasks import ParallelWorkerBase

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from agentlightning.store.base import LightningStore
    from agentlightning.tracer.base import Tracer

T = TypeVar("T")


class AgentRunner(Protocol):
    """What an agent may use of the runner that runs it."""

    @property
    def tracer(self) -> Tracer:
        """What traces the agent."""
        ...

    def get_store(self) -> LightningStore:
        """Where the rollout comes from."""
        ...

    def get_worker_id(self) -> str:
        """The name of the worker in the store."""
        ...


def is_v0_1_rollout_api(func: Callable[..., Any]) -> bool:
    """Whether a rollout method takes ``(task, rollout_id, resources)``, as in v0.1."""
    return "rollout_id" in inspect.signature(func).parameters


class LitAgent(Generic[T]):
    """An agent. A subclass writes ``rollout``, or ``rollout_async``; it may have others for training and validation.

    A rollout method returns the final reward (a number), or the spans of its run, or None when it has emitted what
    there is to say. One agent object works on several rollouts at once when its runner has a ``concurrency`` above 1.

    Args:
        trained_agents: a pattern (regular expression) of the names of those agents, in a system of several, that
            learn; kept for algorithms to read.
    """

    def __init__(self, *, trained_agents: str | None = None) -> None:
        self.trained_agents = trained_agents
        self._trainer: Any = None
        self._runner: AgentRunner | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without trainer and runner, which belong to the process they are in."""
        return self.__dict__ | {"_trainer": None, "_runner": None}

    def is_async(self) -> bool:
        """Whether one of the coroutine methods is written."""
        cls = type(self)
        names = ("rollout_async", "training_rollout_async", "validation_rollout_async")
        return any(getattr(cls, name) is not getattr(LitAgent, name) for name in names)

    # --- Who works with it -----------------------------------------------------------------------

    def set_trainer(self, trainer: Any) -> None:
        """Called by the trainer."""
        self._trainer = trainer

    def get_trainer(self) -> Any:
        """The trainer.

        Raises:
            ValueError: there is none in this process.
        """
        trainer = getattr(self, "_trainer", None)
        if trainer is None:
            raise ValueError("this agent has no trainer here; it is set by Trainer.fit, in the trainer's process")
        return trainer

    @property
    def trainer(self) -> Any:
        """See ``get_trainer``."""
        return self.get_trainer()

    def get_tracer(self) -> Tracer:
        """The tracer of the runner. Raises as ``get_runner``."""
        return self.get_runner().tracer

    @property
    def tracer(self) -> Tracer:
        """See ``get_tracer``."""
        return self.get_tracer()

    def set_runner(self, runner: AgentRunner) -> None:
        """Called by the runner."""
        self._runner = runner

    def get_runner(self) -> AgentRunner:
        """The runner.

        Raises:
            ValueError: none runs it.
        """
        runner = getattr(self, "_runner", None)
        if runner is None:
            raise ValueError("this agent has no runner; it is set when a runner takes the agent")
        return runner

    @property
    def runner(self) -> AgentRunner:
        """See ``get_runner``."""
        return self.get_runner()

    # --- What a subclass may write ---------------------------------------------------------------

    def on_rollout_start(self, task: Task, runner: AgentRunner, tracer: Tracer) -> None:
        """Called before each rollout, for agents written so; others use a ``Hook``. What it raises is logged."""

    def on_rollout_end(self, task: Task, rollout: Rollout, runner: AgentRunner, tracer: Tracer) -> None:
        """Called after each rollout, for agents written so; others use a ``Hook``. What it raises is logged."""

    def rollout(self, task: T, resources: NamedResources, rollout: Rollout) -> RolloutRawResult:
        """Work on one task.

        Args:
            task: the input of the rollout.
            resources: prompts and models to use, by name.
            rollout: the rollout with the attempt that this is (an ``AttemptedRollout``).

        Returns:
            The final reward; or spans, of one kind; or None.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither rollout nor rollout_async; write one")

    async def rollout_async(self, task: T, resources: NamedResources, rollout: Rollout) -> RolloutRawResult:
        """The same as a coroutine."""
        raise NotImplementedError(f"{type(self).__name__} has no rollout_async; write it, or only plain methods")

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


# --- ``Hook``: a user's code around each rollout ---


class Hook(ParallelWorkerBase):
    """Called by the runner, for each rollout in this order: ``on_rollout_start``, ``on_trace_start``, the agent,
    ``on_trace_end``, ``on_rollout_end``; then the rollout's end is reported to the store.

    When the agent fails, ``on_trace_end`` is left out, and ``on_rollout_end`` gets no spans. What a hook raises is
    logged and changes nothing else. All arguments are passed by name.
    """

    async def on_rollout_start(self, *, agent: LitAgent[Any], runner: Any, rollout: Rollout) -> None:
        """Before anything else is done for the rollout."""

    async def on_trace_start(self, *, agent: LitAgent[Any], runner: Any, tracer: Tracer, rollout: Rollout) -> None:
        """Inside of the trace, just before the agent is called. Spans made here belong to the attempt."""

    async def on_trace_end(self, *, agent: LitAgent[Any], runner: Any, tracer: Tracer, rollout: Rollout) -> None:
        """Inside of the trace, just after the agent has returned. Rewards emitted here count."""

    async def on_rollout_end(
        self, *, agent: LitAgent[Any], runner: Any, rollout: Rollout, spans: Sequence[ReadableSpan] | Sequence[Span]
    ) -> None:
        """After the trace, before the end is reported; ``spans`` are those of the attempt."""
