"""One attempt: the agent works on a claimed rollout, and the end is reported to the store."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Coroutine, Sequence
from typing import Any, Literal, NamedTuple

from agentlightning.emitter.annotation import emit_annotation, emit_reward
from agentlightning.emitter.emit import emit_exception
from agentlightning.errors import AgentLightningError, Conflict, IdReused, InvalidValue, NotFound, StoreClosed
from agentlightning.litagent.litagent import AttemptFailed, Hook, LitAgent
from agentlightning.runner.calling import AgentThreads, as_spans, call_agent, passes, without_runner_frames
from agentlightning.runner.failures import FailureLog
from agentlightning.runner.main_thread import AgentInterrupted
from agentlightning.runner.resources import RolloutResources
from agentlightning.semconv import LightningSpanAttributes
from agentlightning.store.base import LightningStore
from agentlightning.telemetry.logs import CURRENT, WorkContext
from agentlightning.tracer.base import Tracer
from agentlightning.tracer.conversion import fits, sanitize_text
from agentlightning.tracer.sender import DeferredTrace
from agentlightning.types import AttemptedRollout, AttemptEnd, NamedResources, Span, Task
from agentlightning.types.attributes import full_qualified_name
from agentlightning.types.rewards import number_of

ReasonCode = Literal[
    "agent_error",  # the agent raised an exception
    "resource_exhausted",  # the agent got no more memory, which is not its mistake
    "bad_result",  # the agent returned neither a reward nor spans
    "missing_resources",  # the resources that the rollout was enqueued with are not in the store
    "trace_not_stored",  # the agent finished, but the store did not accept its spans
    "runner_error",  # the runner itself failed, which is a bug; its log has the traceback
    "aborted",  # the runner was told to stop
    "timeout",  # the attempt took longer than the rollout's `timeout_seconds`
]

REPORT_RETRY_SECONDS = 5.0
REPORT_TRIES = 24
"""How often the end of an attempt is reported to an unreachable store; the store's client has retried before that."""
_MESSAGE_CHARACTERS = 2000
_DEFAULT_RESOURCES = LightningSpanAttributes.DEFAULT_RESOURCES.value

_logger = logging.getLogger(__name__)


class AttemptOutcome(NamedTuple):
    """What is reported about an attempt."""

    status: AttemptEnd = "succeeded"
    reason_code: str | None = None  # a `ReasonCode`, or one of the agent's own
    reason_message: str | None = None
    error: BaseException | None = None  # the exception that ended it, for `LitAgentRunner.step`
    retry: bool | None = None  # what the agent wishes; None: as the rollout's config says


class AttemptParts(NamedTuple):
    """What all attempts of a runner share."""

    agent: LitAgent[Any]
    runner: Any
    store: LightningStore
    tracer: Tracer
    hooks: Sequence[Hook]
    threads: AgentThreads
    resources: RolloutResources
    failures: FailureLog


class AttemptRun:
    """Runs the agent on one claimed rollout, and reports how it ended."""

    def __init__(self, parts: AttemptParts, rollout: AttemptedRollout) -> None:
        self.rollout = rollout
        self.attempt_id = rollout.attempt.attempt_id
        self._parts = parts
        self._task: asyncio.Task[Any] | None = None
        self._given_up: AttemptOutcome | None = None
        self._ending = False
        self._trace: DeferredTrace | None = None
        self._own_spans: list[Span] = []
        """Spans that the tracer does not have: those that the agent returned."""

    def give_up(self, message: str, status: AttemptEnd = "failed", code: ReasonCode = "aborted") -> bool:
        """Cancel the agent and report this outcome instead; an agent that has already finished is left alone.

        Returns whether the attempt is given up by this call.
        """
        if self._task is None or self._ending or self._given_up is not None:
            return False
        self._given_up = AttemptOutcome(status, code, message)
        self._task.cancel()
        return True

    async def work(self) -> AttemptOutcome:
        """Run the agent and the hooks. Every failure becomes the outcome; only a cancellation by others is raised."""
        self._task = asyncio.current_task()
        CURRENT.set(WorkContext(ids={"rollout_id": self.rollout.rollout_id, "attempt_id": self.attempt_id}))
        timer, seconds = None, self.rollout.config.timeout_seconds
        if seconds is not None:
            message = f"not finished within {seconds:g} s"
            timer = asyncio.get_running_loop().call_later(seconds, self.give_up, message, "timeout", "timeout")
        try:
            outcome = await self._prepare_and_trace()
        except asyncio.CancelledError:
            if self._given_up is None or self._task is None:
                raise
            self._task.uncancel()
            outcome = self._given_up
        except BaseException as error:  # the boundary of an attempt: whatever failed, the rollout must reach an end
            if passes(error):
                raise
            _logger.exception("attempt %s could not be carried out", self.attempt_id)
            outcome = failed("runner_error", error)
        finally:
            if timer is not None:
                timer.cancel()
        self._ending = True
        if self._parts.hooks:
            known = self._parts.tracer.get_last_trace() if outcome.status == "succeeded" else ()
            own = self._own_spans if outcome.status == "succeeded" else ()
            await self._call_hooks("on_rollout_end", spans=[*known, *own])
        self._call_agent_hook("on_rollout_end", self.rollout)
        return outcome

    async def report(
        self, outcome: AttemptOutcome, *, claim_limit: int = 0, worker_id: str | None = None
    ) -> Sequence[AttemptedRollout]:
        """Send the remaining spans and the end of the attempt in one call, and claim the next rollouts with it.

        The call is retried under the same ``request_id`` while the store is unreachable, so that a lost reply neither
        ends the attempt twice nor claims twice.

        Returns:
            The claimed rollouts; none when the attempt had lost its rollout, or the store could not be told.
        """
        request_id = uuid.uuid4().hex if claim_limit else None
        if self._trace is not None and self._trace.wants_own_call():
            outcome = await self._send_spans(outcome)
        failures = 0
        while True:
            spans = [] if self._trace is None else [*self._trace.unsent(), *self._own_spans]
            wish: dict[str, Any] = {} if outcome.retry is None else {"retry": outcome.retry}
            try:
                finished = await self._parts.store.finish_attempt(
                    self.rollout.rollout_id,
                    self.attempt_id,
                    outcome.status,
                    spans,
                    reason_code=outcome.reason_code,
                    reason_message=outcome.reason_message,
                    **wish,
                    claim_limit=claim_limit,
                    worker_id=worker_id,
                    request_id=request_id,
                )
                self._spans_stored()
                return finished.claimed
            except (Conflict, NotFound) as error:
                if spans and isinstance(error, IdReused):  # a span has the id of another one
                    outcome = await self._send_spans(outcome)
                    continue
                self._spans_stored()  # a store keeps late spans under their attempt
                _logger.warning("attempt %s ended %s, too late: %s", self.attempt_id, outcome.status, error)
                return []
            except (AgentLightningError, OSError, TimeoutError) as error:
                if spans:
                    # Refused, or the store is unreachable. The span sender finds out which spans are refused, and the
                    # store's client keeps spans on disk while the server is away; the end is reported after them.
                    outcome = await self._send_spans(outcome)
                    continue
                failures += 1
                if failures == REPORT_TRIES or isinstance(error, (InvalidValue, StoreClosed)):
                    _logger.error("attempt %s ended %s, never reported: %s", self.attempt_id, outcome.status, error)
                    return []
                _logger.warning("attempt %s ended %s, not reported yet: %s", self.attempt_id, outcome.status, error)
                await asyncio.sleep(REPORT_RETRY_SECONDS)

    # --- The agent's work ------------------------------------------------------------------------

    async def _prepare_and_trace(self) -> AttemptOutcome:
        parts, rollout = self._parts, self.rollout
        try:
            resources, why_defaults = await parts.resources.find_or_default(rollout)
        except AgentLightningError as error:
            return failed("missing_resources", error)
        if resources is None:
            version = "" if rollout.resources_version is None else f" version {rollout.resources_version}"
            message = f"resources {rollout.resources_id!r}{version} are not in the store"
            return AttemptOutcome("failed", "missing_resources", message, NotFound(message))
        await self._call_hooks("on_rollout_start")
        self._call_agent_hook("on_rollout_start")
        try:
            return await self._call_in_trace(resources, why_defaults)
        except AgentLightningError as error:  # raised at the end of the trace: the store did not accept its spans
            return failed("trace_not_stored", error)

    async def _call_in_trace(self, resources: NamedResources, why_defaults: str | None) -> AttemptOutcome:
        """Call the agent in a trace of its own.

        Args:
            resources: what it gets.
            why_defaults: why these are the runner's default ones; None: they are those of the rollout.

        Raises:
            AgentLightningError: the trace has ended, and its spans are not in the store.
        """
        parts, rollout = self._parts, self.rollout
        trace = parts.tracer.trace_context(
            rollout.rollout_id, store=parts.store, rollout_id=rollout.rollout_id, attempt_id=self.attempt_id
        )
        # A hook at the end may look for the attempt's spans in the store. Only where there is none, the last spans
        # travel with the report of the attempt, which saves a durable call.
        if not parts.hooks and not self._overrides("on_rollout_end") and isinstance(trace, DeferredTrace):
            trace.defer()
            self._trace = trace
        async with trace:
            if why_defaults is not None:
                mark = emit_annotation({_DEFAULT_RESOURCES: why_defaults}, propagate=parts.tracer.records)
                self._own_spans = [] if parts.tracer.records else as_spans([mark], self.rollout)
            await self._call_hooks("on_trace_start", tracer=parts.tracer)
            outcome, result = await self._call_agent(resources)
            if isinstance(trace, DeferredTrace):
                trace.agent_returned()
            if outcome.status == "succeeded":
                await self._call_hooks("on_trace_end", tracer=parts.tracer)
                outcome = self._accept_result(result)
            if outcome.error is not None and parts.tracer.records:
                emit_exception(outcome.error)
        if self._own_spans and self._trace is None:
            await parts.store.add_many_spans(self._own_spans)
        return outcome

    async def _call_agent(self, resources: NamedResources) -> tuple[AttemptOutcome, Any]:
        parts = self._parts
        try:
            return AttemptOutcome(), await call_agent(parts.agent, parts.threads, resources, self.rollout)
        except asyncio.CancelledError as error:
            if self._given_up is not None or (self._task is not None and self._task.cancelling() > 0):
                raise
            return failed("agent_error", error), None  # the agent cancelled something of its own
        except AgentInterrupted as error:  # by SIGINT, which ends the runner, too
            return failed("aborted", error), None
        except AttemptFailed as error:
            told = failed("agent_error", error, error.message)._replace(reason_code=error.code, retry=error.retry)
            ids = self.rollout.rollout_id, self.attempt_id
            _logger.warning("rollout %s, attempt %s: the agent failed, %s: %s", *ids, error.code, told.reason_message)
            return told, None
        except BaseException as error:  # some libraries' failures are no ``Exception``, as those of pytest
            if passes(error):
                raise
            if isinstance(error, ValueError) and "only works in main thread" in str(error):
                error.add_note("plain functions run there with concurrency=1, in the processes of the strategy 'cs'")
            told = failed("resource_exhausted" if isinstance(error, MemoryError) else "agent_error", error)
            shown, why = without_runner_frames(error), told.reason_message or ""
            parts.failures.add(self.rollout.rollout_id, self.attempt_id, shown, why)
            return told, None

    def _accept_result(self, result: Any) -> AttemptOutcome:
        """Turn what the agent returned into spans."""
        tracer = self._parts.tracer
        try:
            if number_of(result) is not None:
                span = emit_reward(result, propagate=tracer.records)
                if not tracer.records:
                    self._own_spans += as_spans([span], self.rollout)
            elif result is not None:
                # An agent may return what its tracer has recorded already.
                known = {span.span_id for span in tracer.get_last_trace()}
                self._own_spans += [span for span in as_spans(result, self.rollout) if span.span_id not in known]
        except Exception as error:  # noqa: BLE001 - the returned object is of a class that we do not know
            _logger.warning("rollout %s, attempt %s: %s", self.rollout.rollout_id, self.attempt_id, error)
            return failed("bad_result", error)
        return AttemptOutcome()

    # --- Spans that travel with the report -------------------------------------------------------

    def _spans_stored(self) -> None:
        if self._trace is not None:
            self._trace.stored()
            self._trace = None

    async def _send_spans(self, outcome: AttemptOutcome) -> AttemptOutcome:
        """Send the spans by themselves; the outcome is a failure when the store does not accept them."""
        trace, self._trace = self._trace, None
        try:
            if trace is not None:
                await trace.send()
            if self._own_spans:
                await self._parts.store.add_many_spans(self._own_spans)
        except AgentLightningError as error:
            return failed("trace_not_stored", error)
        return outcome

    # --- Hooks -----------------------------------------------------------------------------------

    async def _call_hooks(self, name: str, **arguments: Any) -> None:
        parts = self._parts
        for hook in parts.hooks:
            try:
                called: Coroutine[Any, Any, None] = getattr(hook, name)(
                    agent=parts.agent, runner=parts.runner, rollout=self.rollout, **arguments
                )
                await called
            except BaseException as error:
                if passes(error):
                    raise
                _logger.exception("%s of %s failed; the rollout goes on", name, type(hook).__name__)

    def _call_agent_hook(self, name: str, *rollout: AttemptedRollout) -> None:
        parts, claimed = self._parts, self.rollout
        if not self._overrides(name):
            return
        task = Task(
            rollout_id=claimed.rollout_id, input=claimed.input, mode=claimed.mode, resources_id=claimed.resources_id
        )
        try:
            getattr(parts.agent, name)(task, *rollout, parts.runner, parts.tracer)
        except BaseException as error:
            if passes(error):
                raise
            _logger.exception("%s of %s failed; the rollout goes on", name, type(parts.agent).__name__)

    def _overrides(self, name: str) -> bool:
        """Whether the agent has this hook of its own; the base class's does nothing."""
        own: Any = getattr(self._parts.agent, name)
        return getattr(own, "__func__", own) is not getattr(LitAgent, name)


def failed(code: ReasonCode, error: BaseException, message: str | None = None) -> AttemptOutcome:
    """The outcome of an attempt that an exception ended. Default message: the exception's type and text."""
    try:
        text = str(error)
    except Exception as mistake:  # noqa: BLE001 - the exception is of the agent's class, whose __str__ may fail
        text = f"(its text is not available: {type(mistake).__name__})"
    message = f"{full_qualified_name(type(error))}: {text}" if message is None else str(message)
    message = message if fits(message) else sanitize_text(message)
    if len(message) > _MESSAGE_CHARACTERS:
        message = message[:_MESSAGE_CHARACTERS] + "…"
    return AttemptOutcome("failed", code, message, error)
