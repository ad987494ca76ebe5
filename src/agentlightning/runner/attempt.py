"""One attempt, from the claim to the report."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, NamedTuple, Protocol

from agentlightning.emitter.emit import emit_exception
from agentlightning.emitter.reward import emit_reward
from agentlightning.errors import AgentLightningError, Conflict, NotFound, StoreClosed
from agentlightning.lifecycle.reasons import RESOURCE_EXHAUSTED
from agentlightning.litagent.litagent import Hook, LitAgent
from agentlightning.runner.calling import AgentThreads, agents_part, as_reward, as_spans, call_agent
from agentlightning.store.base import LightningStore
from agentlightning.telemetry.context import CURRENT, WorkContext
from agentlightning.tracer.base import Tracer
from agentlightning.tracer.sanitize import fits, mend_text
from agentlightning.types import AttemptedRollout, AttemptStatus, NamedResources, Span, Task
from agentlightning.types.attributes import full_qualified_name

# --- How an attempt ended, as it is reported to the store ---

AGENT_ERROR: Final = "agent_error"
"""The agent raised an exception."""
BAD_RESULT: Final = "bad_result"
"""The agent returned what is neither a reward nor spans."""
MISSING_RESOURCES: Final = "missing_resources"
"""The resources that the rollout was enqueued with are not in the store."""
TRACE_NOT_STORED: Final = "trace_not_stored"
"""The agent is done, but the store did not take its spans."""
RUNNER_ERROR: Final = "runner_error"
"""The runner failed at something of its own, which is a bug; its log says where."""
ABORTED: Final = "aborted"
"""The runner was told to stop."""
TIMEOUT: Final = "timeout"
"""It took longer than the rollout's ``timeout_seconds``."""

_MESSAGE_CHARACTERS = 2000


class Outcome(NamedTuple):
    """What is reported of an attempt."""

    status: AttemptStatus
    reason_code: str | None = None
    reason_message: str | None = None
    error: BaseException | None = None
    """What was raised, for ``step``."""


SUCCEEDED: Final = Outcome("succeeded")


def failed(code: str, error: BaseException) -> Outcome:
    """The outcome of an attempt that an exception has ended; its message begins with the exception's type."""
    message = f"{full_qualified_name(type(error))}: {_text_of(error)}"
    message = message if fits(message) else mend_text(message)
    if len(message) > _MESSAGE_CHARACTERS:
        message = message[:_MESSAGE_CHARACTERS] + "…"
    return Outcome("failed", code, message, error)


def agent_failed(error: BaseException) -> Outcome:
    """The outcome of an attempt whose agent has raised. Memory that could not be had is not a mistake of the agent."""
    return failed(RESOURCE_EXHAUSTED if isinstance(error, MemoryError) else AGENT_ERROR, error)


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as mistake:  # noqa: BLE001 - it is the agent's class, and may do anything
        return f"(its text cannot be had: {type(mistake).__name__})"


# ---

REPORT_RETRY_SECONDS = 5.0
REPORT_TRIES = 24
"""How often the end of an attempt is reported to a store that cannot be reached; its client has tried before."""

_logger = logging.getLogger(__name__)


class ResourceLookup(Protocol):
    """Finds the resources of a rollout."""

    async def of(self, rollout: AttemptedRollout) -> NamedResources | None:
        """The resources; None if they are not in the store."""
        ...


class Stage(NamedTuple):
    """What all attempts of a runner share."""

    agent: LitAgent[Any]
    runner: Any
    store: LightningStore
    tracer: Tracer
    hooks: Sequence[Hook]
    threads: AgentThreads
    resources: ResourceLookup


class AttemptRun:
    """Runs the agent on one claimed rollout, and reports how it ended.

    Args:
        stage: with whom.
        rollout: what was claimed.
    """

    def __init__(self, stage: Stage, rollout: AttemptedRollout) -> None:
        self.rollout = rollout
        self._stage = stage
        self._task: asyncio.Task[Any] | None = None
        self._given_up: Outcome | None = None
        self._ending = False
        self._spans: list[Span] = []

    @property
    def attempt_id(self) -> str:
        """Which attempt this is."""
        return self.rollout.attempt.attempt_id

    def give_up(self, outcome: Outcome) -> bool:
        """Stop working on it, and report this; nothing happens to an attempt whose agent is done already.

        Returns whether it is given up now.
        """
        if self._task is None or self._ending or self._given_up is not None:
            return False
        self._given_up = outcome
        self._task.cancel()
        return True

    async def run(self) -> Outcome:
        """Do it all. What goes wrong becomes the outcome; only a cancellation by others passes on."""
        self._task = asyncio.current_task()
        CURRENT.set(WorkContext(ids={"rollout_id": self.rollout.rollout_id, "attempt_id": self.attempt_id}))
        timer = self._set_timer()
        try:
            outcome = await self._worked()
        except asyncio.CancelledError:
            if self._given_up is None:
                raise
            if self._task is not None:
                self._task.uncancel()
            outcome = self._given_up
        except Exception as error:  # the boundary of an attempt: whatever it was, the rollout must not hang
            _logger.exception("attempt %s could not be carried out", self.attempt_id)
            outcome = failed(RUNNER_ERROR, error)
        finally:
            if timer is not None:
                timer.cancel()
        self._ending = True
        await self._call_hooks("on_rollout_end", spans=self._spans if outcome.status == "succeeded" else [])
        self._call_agent_hook(
            lambda agent, runner, tracer: agent.on_rollout_end(self._as_task(), self.rollout, runner, tracer)
        )
        await self._report(outcome)
        return outcome

    def _set_timer(self) -> asyncio.TimerHandle | None:
        seconds = self.rollout.config.timeout_seconds
        if seconds is None:
            return None
        outcome = Outcome("timeout", TIMEOUT, f"not finished within {seconds:g} s")
        return asyncio.get_running_loop().call_later(seconds, self.give_up, outcome)

    # --- The work --------------------------------------------------------------------------------

    async def _worked(self) -> Outcome:
        stage, rollout = self._stage, self.rollout
        try:
            resources = await stage.resources.of(rollout)
        except AgentLightningError as error:
            return failed(MISSING_RESOURCES, error)
        if resources is None:
            version = "" if rollout.resources_version is None else f" version {rollout.resources_version}"
            message = f"resources {rollout.resources_id!r}{version} are not in the store"
            return Outcome("failed", MISSING_RESOURCES, message, NotFound(message))
        await self._call_hooks("on_rollout_start")
        self._call_agent_hook(lambda agent, runner, tracer: agent.on_rollout_start(self._as_task(), runner, tracer))
        try:
            outcome = await self._traced(resources)
        except AgentLightningError as error:  # the trace has ended, and the store did not take it
            return failed(TRACE_NOT_STORED, error)
        if outcome.status == "succeeded" and stage.hooks:
            self._spans = [*stage.tracer.get_last_trace(), *self._spans]
        return outcome

    async def _traced(self, resources: NamedResources) -> Outcome:
        """Call the agent in a trace. After, its spans are in the store.

        Raises:
            AgentLightningError: they are not.
        """
        stage, rollout = self._stage, self.rollout
        trace = stage.tracer.trace_context(
            rollout.rollout_id, store=stage.store, rollout_id=rollout.rollout_id, attempt_id=self.attempt_id
        )
        async with trace:
            await self._call_hooks("on_trace_start", tracer=stage.tracer)
            outcome, result = await self._called(resources)
            if outcome.status == "succeeded":
                await self._call_hooks("on_trace_end", tracer=stage.tracer)
                outcome = self._taken(result)
            if outcome.error is not None and stage.tracer.records:
                emit_exception(outcome.error)
        if self._spans:
            await stage.store.add_many_spans(self._spans)
        return outcome

    async def _called(self, resources: NamedResources) -> tuple[Outcome, Any]:
        stage = self._stage
        try:
            return SUCCEEDED, await call_agent(stage.agent, stage.threads, resources, self.rollout)
        except asyncio.CancelledError as error:
            if self._given_up is not None or _is_cancelled():
                raise
            return failed(AGENT_ERROR, error), None  # the agent cancelled something of its own
        except Exception as error:
            _logger.warning(
                "rollout %s, attempt %s: the agent failed",
                self.rollout.rollout_id,
                self.attempt_id,
                exc_info=agents_part(error),
            )
            return agent_failed(error), None

    def _taken(self, result: Any) -> Outcome:
        """Turn what the agent returned into spans."""
        try:
            reward = as_reward(result)
            if reward is not None:
                span = emit_reward(reward, propagate=self._stage.tracer.records)
                if not self._stage.tracer.records:
                    self._spans = as_spans([span], self.rollout)
            elif result is not None:
                self._spans = self._new(as_spans(result, self.rollout))
        except Exception as error:  # noqa: BLE001 - what the agent returned may do anything, too
            _logger.warning("rollout %s, attempt %s: %s", self.rollout.rollout_id, self.attempt_id, error)
            return failed(BAD_RESULT, error)
        return SUCCEEDED

    def _new(self, spans: list[Span]) -> list[Span]:
        """Those that are not in the trace already: an agent may return what its tracer has recorded."""
        known = {span.span_id for span in self._stage.tracer.get_last_trace()}
        return [span for span in spans if span.span_id not in known]

    # --- Hooks -----------------------------------------------------------------------------------

    async def _call_hooks(self, name: str, **arguments: Any) -> None:
        stage = self._stage
        for hook in stage.hooks:
            try:
                called: Coroutine[Any, Any, None] = getattr(hook, name)(
                    agent=stage.agent, runner=stage.runner, rollout=self.rollout, **arguments
                )
                await called
            except Exception:
                _logger.exception("%s of %s failed; the rollout goes on", name, type(hook).__name__)

    def _call_agent_hook(self, call: Callable[[LitAgent[Any], Any, Tracer], None]) -> None:
        stage = self._stage
        try:
            call(stage.agent, stage.runner, stage.tracer)
        except Exception:
            _logger.exception("a rollout hook of %s failed; the rollout goes on", type(stage.agent).__name__)

    def _as_task(self) -> Task:
        rollout = self.rollout
        return Task(
            rollout_id=rollout.rollout_id, input=rollout.input, mode=rollout.mode, resources_id=rollout.resources_id
        )

    # --- The report ------------------------------------------------------------------------------

    async def _report(self, outcome: Outcome) -> None:
        """Tell the store. If it cannot be reached, try for as long as the work may be worth it."""
        rollout = self.rollout
        for tries_left in range(REPORT_TRIES, 0, -1):
            try:
                await self._stage.store.update_attempt(
                    rollout.rollout_id,
                    self.attempt_id,
                    outcome.status,
                    reason_code=outcome.reason_code,
                    reason_message=outcome.reason_message,
                )
                return
            except (Conflict, NotFound) as error:
                _logger.warning("attempt %s ended %s, too late: %s", self.attempt_id, outcome.status, error)
                return
            except (AgentLightningError, OSError, TimeoutError) as error:
                if tries_left == 1 or isinstance(error, StoreClosed):
                    _logger.error(
                        "attempt %s ended %s, and the store was not told: %s", self.attempt_id, outcome.status, error
                    )
                    return
                _logger.warning("attempt %s ended %s, not told yet: %s", self.attempt_id, outcome.status, error)
                await asyncio.sleep(REPORT_RETRY_SECONDS)


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
