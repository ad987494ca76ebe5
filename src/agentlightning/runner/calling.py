"""Calls the agent, and converts its result into what the store can keep."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import reprlib
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar, cast

from agentlightning.litagent.litagent import LitAgent, is_v0_1_rollout_api
from agentlightning.runner.main_thread import AgentInterrupted, MainThread
from agentlightning.types import AttemptedRollout, NamedResources, Span, SpanCoreFields

T = TypeVar("T")
_E = TypeVar("_E", bound=BaseException)
_MAIN_THREAD_SECONDS = 5.0
"""How long a call waits for the main thread, in which an agent that was given up may still be."""
_logger = logging.getLogger(__name__)


class AgentExit(RuntimeError):
    """The agent tried to end the process (``sys.exit``, ``KeyboardInterrupt``). Its attempt fails instead."""


def passes(error: BaseException) -> bool:
    """Whether an exception that comes out of a user's code is no failure of that code, but ends what runs it.

    That is a cancellation, and a Ctrl+C where Python raises it in whatever runs in the main thread. asyncio, strategies
    and ``agl runner`` handle SIGINT themselves.
    """
    if isinstance(error, KeyboardInterrupt):
        in_main_thread = threading.current_thread() is threading.main_thread()
        return in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return isinstance(error, (asyncio.CancelledError, GeneratorExit))


class AgentThreads:
    """Threads for agents that are plain functions. An idle thread is reused; otherwise a new one is started.

    There is no upper limit: a pool of fixed size would deadlock on agents that never return. ``main`` is used by
    ``run`` as long as it is free.
    """

    def __init__(self, name: str, main: MainThread | None = None) -> None:
        self._name = name
        self._main = main
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._free = 0
        self._threads = 0
        self._lock = threading.Lock()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Call ``function`` in a thread, in a copy of the current context. Its result or exception is the future's.

        Raises:
            RuntimeError: the system has no more threads.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._free > 0:
                self._free -= 1
            else:  # started before the call is queued: where no thread can be started, nothing is called
                name = f"{self._name}-{self._threads + 1}"
                threading.Thread(target=self._work, name=name, daemon=True).start()
                self._threads += 1
        self._calls.put(partial(_carry_out, future, function, contextvars.copy_context(), self._free_again))
        return future

    async def run(self, function: Callable[[], T]) -> T:
        """Call ``function`` in the main thread, or else in another one. Raises what it raises.

        If the waiting task is cancelled, a call in the main thread is interrupted; one in another thread goes on.
        """
        main = self._main
        if main is None or not await main.is_free(_MAIN_THREAD_SECONDS):
            if main is not None:
                _logger.warning("an agent that was given up does not leave the main thread; the next runs in another")
            return await asyncio.wrap_future(self.call(function))
        future: Future[T] = Future()
        main.put(future, partial(_carry_out, future, function, contextvars.copy_context(), main.release))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            main.interrupt(future)
            raise

    def close(self) -> None:
        """End each thread after its present call."""
        with self._lock:
            threads, self._threads, self._free = self._threads, 0, 0
        for _ in range(threads):
            self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # otherwise this frame keeps the result alive until the next call

    def _free_again(self) -> None:
        with self._lock:
            self._free += 1


def _carry_out(
    future: Future[T], function: Callable[[], T], context: contextvars.Context, release: Callable[[], None]
) -> None:
    wanted = future.set_running_or_notify_cancel()
    try:
        result = context.run(function) if wanted else None
    except BaseException as error:  # noqa: BLE001 - also SystemExit, which must not end this thread
        raised = error
        if isinstance(error, StopIteration):  # `await` cannot raise it; PEP 479 does the same
            raised = RuntimeError(f"a function raised StopIteration({error.value!r})")
        elif isinstance(error, (SystemExit, KeyboardInterrupt)) and not isinstance(error, AgentInterrupted):
            raised = _exit_of(error)  # those two would end the loop that waits for them
        if raised is not error:
            raised.__cause__ = without_runner_frames(error)
        release()
        future.set_exception(raised)
    else:
        release()  # first, so that a caller who learns of the result finds this thread idle
        if wanted:
            future.set_result(cast("T", result))


async def call_agent(
    agent: LitAgent[Any], threads: AgentThreads, resources: NamedResources, rollout: AttemptedRollout
) -> Any:
    """Call the agent's method for the rollout's mode: a coroutine in this loop, a plain function in a thread.

    Raises:
        AgentExit: the agent raised ``SystemExit`` or ``KeyboardInterrupt``.
        KeyboardInterrupt: Ctrl+C, see ``passes``; or as ``AgentInterrupted``, the attempt is given up.
        BaseException: what else the agent raises.
    """
    training = rollout.mode == "train"
    try:
        if agent.is_async():
            method = agent.training_rollout_async if training else agent.validation_rollout_async
            return await method(rollout.input, resources, rollout)
        plain: Callable[..., Any] = agent.training_rollout if training else agent.validation_rollout
        arguments: tuple[Any, ...] = (rollout.input, resources, rollout)
        for each in (plain, agent.rollout):
            if is_v0_1_rollout_api(each):
                plain, arguments = each, (rollout.input, rollout.rollout_id, resources)
                break
        return await threads.run(partial(plain, *arguments))
    except (SystemExit, KeyboardInterrupt) as error:
        if isinstance(error, AgentInterrupted) or passes(error):
            raise
        raise _exit_of(error) from without_runner_frames(error)


def _exit_of(error: SystemExit | KeyboardInterrupt) -> AgentExit:
    what = f"called sys.exit({error.code!r})" if isinstance(error, SystemExit) else "raised KeyboardInterrupt"
    return AgentExit(f"the agent {what}")


def without_runner_frames(error: _E) -> _E:
    """The exception with a traceback that begins in the agent's code, so that logs show only the user's part."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_globals.get("__name__", "").startswith("agentlightning."):
        frames = frames.tb_next
    return error if frames is None else error.with_traceback(frames)


def as_spans(result: Any, rollout: AttemptedRollout) -> list[Span]:
    """The spans that an agent returned, as spans of its attempt.

    Raises:
        TypeError: the result is no list of spans; the message names it.
        ValueError: the list mixes kinds of spans.
    """
    if not isinstance(result, list):
        raise TypeError(
            f"the agent returned {reprlib.repr(result)}, a {type(result).__name__}; it must return a number (the final "
            "reward), a list of spans, or None if it has emitted its rewards"
        )
    items = cast("list[Any]", result)
    if not items:
        _logger.warning("the agent returned an empty list for rollout %s: no spans, and no reward", rollout.rollout_id)
        return []
    kinds = {_kind(item) for item in items}
    if None in kinds:
        names = ", ".join(sorted({type(item).__name__ for item in items}))
        raise TypeError(
            f"the agent returned a list of {names}; it must hold OpenTelemetry spans, Span or SpanCoreFields"
        )
    if len(kinds) > 1:
        raise ValueError(f"the agent returned a list of {' and '.join(sorted(map(str, kinds)))}; use one kind of span")
    own = {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id}
    match kinds.pop():
        case "Span":
            return [item.model_copy(update=own) for item in items]
        case "SpanCoreFields":
            return [Span.from_core_fields(item, sequence_id=None, **own) for item in items]
        case _:
            return [Span.from_opentelemetry(item, sequence_id=0, **own) for item in items]


def _kind(item: Any) -> str | None:
    for kind in (Span, SpanCoreFields):
        if isinstance(item, kind):
            return kind.__name__
    return "ReadableSpan" if hasattr(item, "get_span_context") and hasattr(item, "end_time") else None
