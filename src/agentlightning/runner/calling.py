"""Calls the agent, and converts its result into what the store can keep."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from numbers import Real
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from agentlightning.litagent.litagent import LitAgent, is_v0_1_rollout_api
from agentlightning.types import AttemptedRollout, NamedResources, Span, SpanCoreFields

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

T = TypeVar("T")
_E = TypeVar("_E", bound=BaseException)
_logger = logging.getLogger(__name__)


class AgentExit(RuntimeError):
    """The agent tried to end the process (``sys.exit``). Its attempt fails instead."""


class _Call(NamedTuple):
    future: Future[object]
    function: Callable[[], object]
    context: contextvars.Context


class AgentThreads:
    """Threads for agents that are plain functions. An idle thread is reused; otherwise a new one is started.

    There is no upper limit: a pool of fixed size would deadlock on agents that never return.

    Args:
        name: prefix of the threads' names.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._free = 0
        self._threads = 0
        self._lock = threading.Lock()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Call ``function`` in a thread, in a copy of the current context. Its result or exception is the future's."""
        future: Future[T] = Future()
        with self._lock:
            new = self._free == 0
            if new:
                self._threads += 1
            else:
                self._free -= 1
        if new:
            threading.Thread(target=self._work, name=f"{self._name}-{self._threads}", daemon=True).start()
        self._calls.put(_Call(future, function, contextvars.copy_context()))  # pyright: ignore[reportArgumentType]
        return future

    def close(self) -> None:
        """End each thread after its present call."""
        with self._lock:
            threads, self._threads, self._free = self._threads, 0, 0
        for _ in range(threads):
            self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if call.future.set_running_or_notify_cancel():
                self._carry_out(call)
            else:
                self._free_again()
            del call  # otherwise this frame keeps the result alive until the next call

    def _carry_out(self, call: _Call) -> None:
        try:
            result = call.context.run(call.function)
        except BaseException as error:  # noqa: BLE001 - also SystemExit, which must not end this thread
            self._free_again()
            call.future.set_exception(_awaitable(error))
        else:
            self._free_again()  # first, so that a caller who learns of the result finds this thread idle
            call.future.set_result(result)

    def _free_again(self) -> None:
        with self._lock:
            self._free += 1


def _awaitable(error: BaseException) -> BaseException:
    """The error; StopIteration, which ``await`` cannot raise, becomes a RuntimeError, as PEP 479 does it."""
    if not isinstance(error, StopIteration):
        return error
    replacement = RuntimeError(f"a function raised StopIteration({error.value!r})")
    replacement.__cause__ = error
    return replacement


async def call_agent(
    agent: LitAgent[Any], threads: AgentThreads, resources: NamedResources, rollout: AttemptedRollout
) -> Any:
    """Call the agent's method for the rollout's mode: a coroutine in this loop, a plain function in a thread.

    Raises:
        AgentExit: the agent called ``sys.exit``.
        Exception: what the agent raises.
    """
    training = rollout.mode == "train"
    try:
        if agent.is_async():
            method = agent.training_rollout_async if training else agent.validation_rollout_async
            return await method(rollout.input, resources, rollout)
        plain = agent.training_rollout if training else agent.validation_rollout
        return await asyncio.wrap_future(threads.call(_bound(agent, plain, resources, rollout)))
    except SystemExit as error:
        raise AgentExit(f"the agent called sys.exit({error.code!r})") from without_runner_frames(error)


def _bound(
    agent: LitAgent[Any], method: Callable[..., Any], resources: NamedResources, rollout: AttemptedRollout
) -> Callable[[], Any]:
    """The call of a plain method, with the arguments in the order of v0.1 where its signature has that."""
    if is_v0_1_rollout_api(method):
        return lambda: method(rollout.input, rollout.rollout_id, resources)
    if is_v0_1_rollout_api(agent.rollout):
        old = cast("Callable[..., Any]", agent.rollout)
        return lambda: old(rollout.input, rollout.rollout_id, resources)
    return lambda: method(rollout.input, resources, rollout)


def without_runner_frames(error: _E) -> _E:
    """The exception with a traceback that begins in the agent's code, so that logs show only the user's part."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_globals.get("__name__", "").startswith("agentlightning."):
        frames = frames.tb_next
    return error if frames is None else error.with_traceback(frames)


def as_reward(result: Any) -> float | None:
    """The reward that an agent returned, any kind of number (also numpy's); None if it returned something else."""
    return cast("float", result) if isinstance(result, Real) else None


def as_spans(result: Any, rollout: AttemptedRollout) -> list[Span]:
    """The spans that an agent returned, as spans of its attempt.

    Raises:
        TypeError: the result is no list of spans; the message names it.
        ValueError: the list mixes kinds of spans.
    """
    rollout_id, attempt_id = rollout.rollout_id, rollout.attempt.attempt_id
    if not isinstance(result, list):
        raise TypeError(
            f"the agent returned {_shown(result)}, a {type(result).__name__}; it must return a number (the final "
            "reward), a list of spans, or None if it has emitted its rewards"
        )
    items = cast("list[Any]", result)
    if not items:
        _logger.warning("the agent returned an empty list for rollout %s: no spans, and no reward", rollout_id)
        return []
    kinds = {_kind(item) for item in items}
    if None in kinds:
        names = ", ".join(sorted({type(item).__name__ for item in items}))
        raise TypeError(
            f"the agent returned a list of {names}; it must hold OpenTelemetry spans, Span or SpanCoreFields"
        )
    if len(kinds) > 1:
        raise ValueError(f"the agent returned a list of {' and '.join(sorted(map(str, kinds)))}; use one kind of span")
    match kinds.pop():
        case "Span":
            own = {"rollout_id": rollout_id, "attempt_id": attempt_id}
            return [item.model_copy(update=own) for item in cast("Sequence[Span]", items)]
        case "SpanCoreFields":
            cores = cast("Sequence[SpanCoreFields]", items)
            return [Span.from_core_fields(item, rollout_id=rollout_id, attempt_id=attempt_id) for item in cores]
        case _:
            readable = cast("Sequence[ReadableSpan]", items)
            return [Span.from_opentelemetry(item, rollout_id, attempt_id, 0) for item in readable]


def _kind(item: Any) -> str | None:
    if isinstance(item, Span):
        return "Span"
    if isinstance(item, SpanCoreFields):
        return "SpanCoreFields"
    return "ReadableSpan" if hasattr(item, "get_span_context") and hasattr(item, "end_time") else None


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - the value is of the agent's class, whose __repr__ may fail
        text = object.__repr__(value)
    return text if len(text) <= 200 else text[:200] + "…"
