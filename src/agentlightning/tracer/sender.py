"""Sends spans to the store, in bulk, from a thread of its own.

The agent's thread only appends to its recording. The sender looks at all open recordings twice a second, and at
once when somebody waits for the spans of a trace. It sends the new spans of all traces in one call. The next batch
gathers while that call runs, so batches grow with the load.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from agentlightning.errors import (
    AgentLightningError,
    BadRequest,
    Conflict,
    InvalidValue,
    NotAllowed,
    NotAuthenticated,
    NotFound,
    StoreClosed,
    StoreForked,
    StoreStopped,
    StoreUnavailable,
)
from agentlightning.semconv import LightningSpanAttributes
from agentlightning.store.base import LightningStore
from agentlightning.tracer.recording import Recording
from agentlightning.types import Span
from agentlightning.types.plain_spans import PlainSpan, SpanOrPlain

BATCH_SPANS = 1000
"""How many spans go into one call."""
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.1, 5.0

_PERMANENT = (StoreClosed, StoreForked, StoreStopped, NotAuthenticated, NotAllowed, BadRequest)
"""Errors about the store or the caller: any spans would be refused again."""
_REFUSAL = "agentlightning.refused"

_logger = logging.getLogger(__name__)


class _Waiter(NamedTuple):
    """A caller who waits until the first ``target`` spans of a trace are in the store."""

    recording: Recording
    target: int
    done: Future[None]
    give_up_at: float


class SpanSender:
    """Sends the spans of one process.

    Args:
        interval_seconds: how often to send the spans of traces that nobody waits for yet.
        patience_seconds: how long ``flush`` waits for an unreachable store.
    """

    def __init__(self, interval_seconds: float = 0.5, patience_seconds: float = 120.0) -> None:
        self.refused = 0
        """How many spans the store has refused; the log has each of them."""
        self._interval = interval_seconds
        self._patience = patience_seconds
        self._open: dict[int, Recording] = {}
        self._waiters: list[_Waiter] = []
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None
        self._stopping = False
        self._pid = 0
        self._failures = 0
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the thread, unless it runs in this process."""
        with self._lock:
            if self._thread is not None and self._pid == os.getpid() and self._thread.is_alive():
                return
            self._pid, self._stopping = os.getpid(), False
            ready = threading.Event()
            self._thread = threading.Thread(
                target=lambda: asyncio.run(self._work(ready)), name="agentlightning-spans", daemon=True
            )
            self._thread.start()
            ready.wait()

    def stop(self) -> None:
        """Send what is left, for at most ``patience_seconds``, and end the thread."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is None or self._pid != os.getpid():
            return
        for recording in list(self._open.values()):
            try:
                self.flush(recording).result()
            except AgentLightningError as error:
                _logger.error("%s", error)
        self._stopping = True
        self._notify()
        thread.join()

    def open(self, recording: Recording) -> None:
        """Send the spans of this trace from now on, as they end."""
        self._open[id(recording)] = recording
        recording.on_late = self._reopen

    def flush(self, recording: Recording) -> Future[None]:
        """Send the spans that the trace has so far, at once; the future is done when the store has them.

        The future fails with ``StoreUnavailable`` when the store has not accepted them within ``patience_seconds``, or
        never will.
        """
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # a caller that stops waiting must not cancel what the thread completes
        target = recording.total
        if recording.settled >= target:
            self._forget(recording)
            done.set_result(None)
            return done
        with self._lock:
            self._waiters.append(_Waiter(recording, target, done, time.monotonic() + self._patience))
        self._notify()
        return done

    def leave(self, recording: Recording) -> None:
        """Do not send the present spans of this trace; somebody else does. One that ends later is sent."""
        self._open.pop(id(recording), None)

    def _reopen(self, recording: Recording) -> None:
        self._open[id(recording)] = recording
        self._notify()

    def _forget(self, recording: Recording) -> None:
        if recording.closed and recording.settled >= recording.total:
            self._open.pop(id(recording), None)

    def _notify(self) -> None:
        loop, wake = self._loop, self._wake
        if loop is not None and wake is not None:
            loop.call_soon_threadsafe(wake.set)

    # --- In the thread -------------------------------------------------------------------------------

    async def _work(self, ready: threading.Event) -> None:
        self._loop, self._wake = asyncio.get_running_loop(), asyncio.Event()
        ready.set()
        while not self._stopping:
            try:
                async with asyncio.timeout(self._pause()):
                    await self._wake.wait()
            except TimeoutError:
                pass
            if self._failures:  # a wake-up while the store is unreachable must not cut the pause between retries
                await asyncio.sleep(self._pause())
            self._wake.clear()
            await self._send_all()
        self._loop = self._wake = None

    def _pause(self) -> float:
        """Seconds until the next call."""
        if self._failures:
            return min(LONGEST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2 ** (self._failures - 1))
        return self._interval

    async def _send_all(self) -> None:
        with self._lock:
            waiters, self._waiters = self._waiters, []
        recordings = {id(each.recording): each.recording for each in waiters} | self._open
        by_store: dict[int, list[Recording]] = {}
        for recording in recordings.values():
            if recording.store is not None and recording.settled < recording.total:
                by_store.setdefault(id(recording.store), []).append(recording)
        errors: dict[int, Exception] = {}
        more = False
        for key, group in by_store.items():
            try:
                more |= await self._send_group(group)
            except Exception as error:  # noqa: BLE001 - a store may fail in any way; waiting callers get the error
                errors[key] = error
        self._failures = self._failures + 1 if errors else 0
        if self._failures == 1:
            _logger.warning("the store does not accept spans; they are kept in memory: %s", next(iter(errors.values())))
        for waiter in waiters:
            self._settle(waiter, errors.get(id(waiter.recording.store)))
        for recording in recordings.values():
            self._forget(recording)
        if more and not errors and self._wake is not None:
            self._wake.set()

    def _settle(self, waiter: _Waiter, error: Exception | None) -> None:
        """Complete the future of a waiting caller, or keep the caller waiting."""
        recording = waiter.recording
        if recording.settled >= waiter.target:
            waiter.done.set_result(None)
        elif error is not None and (isinstance(error, _PERMANENT) or time.monotonic() >= waiter.give_up_at):
            self._open.pop(id(recording), None)
            lost = recording.total - recording.settled
            failure = StoreUnavailable(
                f"{lost} of {recording.total} spans of {recording.name} are not in the store: "
                f"{type(error).__name__}: {error}"
            )
            failure.__cause__ = error
            waiter.done.set_exception(failure)
        else:
            with self._lock:
                self._waiters.append(waiter)

    async def _send_group(self, group: Sequence[Recording]) -> bool:
        """Send the new spans of some traces to their store; returns whether there are more than one call takes."""
        parts: list[tuple[Recording, Sequence[SpanOrPlain], int]] = []
        room = BATCH_SPANS
        for recording in group:
            spans, end = recording.unsent(room)
            parts.append((recording, spans, end))
            room -= len(spans)
            if not room:
                break
        store = group[0].store
        assert store is not None
        self.refused += len(await add_spans_apart(store, [span for _, spans, _ in parts for span in spans]))
        for recording, _, end in parts:
            recording.mark_stored(end)
        return not room


async def add_spans_apart(store: LightningStore, spans: Sequence[SpanOrPlain]) -> list[SpanOrPlain]:
    """Store spans so that one that the store refuses does not hold up the others; it is found by bisection.

    A stub is stored in place of a refused span: it keeps the place in the trace, and says why the span was refused.
    Tracer and proxy share this rule.

    Returns:
        The spans that are lost, because the store does not know their attempt or refuses the stub, too. The log names
        them.

    Raises:
        Exception: what the store raises when it is not about these spans. A repeat is safe.
    """
    try:
        await store.add_many_spans(spans)
    except (NotFound, Conflict) as error:
        if len({(span.rollout_id, span.attempt_id) for span in spans}) > 1:
            return await _add_halves(store, spans)
        return _lost(spans, error)  # the attempt is unknown, so none of its spans can be stored
    except InvalidValue as error:
        if len(spans) > 1:
            return await _add_halves(store, spans)
        if _REFUSAL in spans[0].attributes:  # this is the stub
            return _lost(spans, error)
        return await add_spans_apart(store, [_stub(spans[0], error)]) and list(spans)
    return []


async def _add_halves(store: LightningStore, spans: Sequence[SpanOrPlain]) -> list[SpanOrPlain]:
    middle = len(spans) // 2
    return await add_spans_apart(store, spans[:middle]) + await add_spans_apart(store, spans[middle:])


def _lost(spans: Sequence[SpanOrPlain], error: Exception) -> list[SpanOrPlain]:
    _logger.error(
        "the store refuses %d span(s) of rollout %s, attempt %s, which are lost; the first is %r: %s",
        len(spans),
        spans[0].rollout_id,
        spans[0].attempt_id,
        spans[0].name,
        error,
    )
    return list(spans)


def _stub(span: SpanOrPlain, error: Exception) -> Span:
    """A span in place of one that the store refuses: it keeps the place in the trace, and says why it was refused."""
    attributes = {
        LightningSpanAttributes.MENDED.value: ["attributes", "events", "links"],
        _REFUSAL: str(error)[:1000].encode("ascii", "backslashreplace").decode(),
    }
    record = span.to_span() if isinstance(span, PlainSpan) else span
    return record.model_copy(
        update={"attributes": attributes, "events": list[Any](), "links": list[Any](), "name": span.name[:200]}
    )
