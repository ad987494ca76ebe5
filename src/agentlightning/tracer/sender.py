"""Spans on their way to the store: recorded, sent in bulk, and sent again until the store has taken or refused them.

Whoever makes spans only appends to a recording. The sender looks at all open recordings twice a second, and at once
when somebody waits for the spans of one. It sends the new spans of all recordings in one call. The next batch gathers
while that call runs, so batches grow with the load. Tracer and proxy share this.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import TracebackType
from typing import Any, NamedTuple

from agentlightning.errors import (
    AgentLightningError,
    BadRequest,
    IdReused,
    InvalidValue,
    NotAllowed,
    NotAuthenticated,
    StoreClosed,
    StoreForked,
    StoreStopped,
    StoreUnavailable,
)
from agentlightning.semconv import LightningSpanAttributes
from agentlightning.store.base import LightningStore
from agentlightning.store.refusals import is_refusal, send_apart
from agentlightning.tracer.recording import Recording
from agentlightning.types import Span
from agentlightning.types.plain_spans import PlainSpan, SpanOrPlain

BATCH_SPANS = 1000
"""How many spans go into one call."""
_BATCH_BYTES = 4 * 1024 * 1024
_FIRST_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 0.1, 5.0

_PERMANENT = (StoreClosed, StoreForked, StoreStopped, NotAuthenticated, NotAllowed, BadRequest)
"""Errors about the store or the caller: any spans would be refused again."""
_REFUSAL = "agentlightning.refused"
_REPEATED_ID = "agentlightning.repeated_span_id"

_logger = logging.getLogger(__name__)

_CHANCE = random.SystemRandom().random
"""From 0 up to 1, for jitter; not from the generator that an agent's program may have seeded, and draws from."""


class _Waiter(NamedTuple):
    """A caller who waits until the first ``target`` spans of a trace are in the store."""

    recording: Recording
    target: int
    done: Future[None]
    give_up_at: float


class SpanSender:
    """Sends the spans of one process, from a thread of its own or in an event loop that exists.

    Args:
        interval_seconds: how often to send the spans of traces that nobody waits for yet.
        patience_seconds: how long ``flush`` waits for an unreachable store; infinite: whatever the error is.
        monotonic: seconds since some moment.
        chance: a number from 0 up to 1, for jitter; not from the generator that an agent's program draws from.
    """

    def __init__(
        self,
        interval_seconds: float = 0.5,
        patience_seconds: float = 120.0,
        monotonic: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = _CHANCE,
    ) -> None:
        self._chance = chance
        self.refused = 0
        """How many spans are lost because the store refused them; the log has each of them."""
        self._interval = interval_seconds
        self._patience = patience_seconds
        self._monotonic = monotonic
        self._open: dict[int, Recording] = {}
        self._waiters: list[_Waiter] = []
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()
        self._stopping = False
        self._pid = 0
        self._failures = 0
        self._told: dict[int, type[Exception]] = {}
        """What was logged last: of each store that takes no spans, by the id of the object; 0: of this sender."""
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the thread, unless it runs in this process."""
        with self._lock:
            if self._thread is not None and self._pid == os.getpid() and self._thread.is_alive():
                return
            self._pid, self._stopping = os.getpid(), False
            self._thread = threading.Thread(
                target=lambda: asyncio.run(self.work()), name="agentlightning-spans", daemon=True
            )
            self._thread.start()

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
        done.set_running_or_notify_cancel()  # a caller that stops waiting must not cancel what the sender completes
        target = len(recording.taken)
        if recording.settled >= target:
            self._forget(recording)
            done.set_result(None)
            return done
        with self._lock:
            self._waiters.append(_Waiter(recording, target, done, self._monotonic() + self._patience))
        self._notify()
        return done

    @property
    def is_failing(self) -> bool:
        """Whether the store did not accept the last spans."""
        return self._failures > 0

    def leave(self, recording: Recording) -> None:
        """Do not send the present spans of this trace; somebody else does. One that ends later is sent."""
        self._open.pop(id(recording), None)

    def _reopen(self, recording: Recording) -> None:
        self._open[id(recording)] = recording
        self._notify()

    def _forget(self, recording: Recording) -> None:
        if recording.closed and recording.settled >= len(recording.taken):
            self._open.pop(id(recording), None)

    def _notify(self) -> None:
        loop = self._loop
        if loop is not None:
            loop.call_soon_threadsafe(self._wake.set)

    # --- In the event loop -----------------------------------------------------------------------

    async def work(self) -> None:
        """Send spans until ``stop`` is called, or this is cancelled."""
        self._wake = wake = asyncio.Event()
        wake.set()  # for what has come before
        self._loop = asyncio.get_running_loop()
        try:
            while not self._stopping:
                try:
                    async with asyncio.timeout(self._interval):
                        await wake.wait()
                except TimeoutError:
                    pass
                if self._failures:  # no wake-up cuts the pause between retries
                    pause = min(_LONGEST_RETRY_SECONDS, _FIRST_RETRY_SECONDS * 2.0 ** min(self._failures - 1, 60))
                    await asyncio.sleep(pause * (0.5 + self._chance() / 2))
                wake.clear()
                await self._send_all()
                if self._failures:
                    wake.set()
        finally:
            self._loop = None

    async def _send_all(self) -> None:
        with self._lock:
            waiters, self._waiters = self._waiters, []
        recordings = dict[int, Recording]()
        for each in waiters:
            recordings[id(each.recording)] = each.recording
        recordings |= self._open
        try:
            errors = await self._send_new(recordings.values())
            self._failures = self._failures + 1 if errors else 0
            waiting = [each for each in waiters if not self._settle(each, errors.get(id(each.recording.store)))]
            self._told.pop(0, None)
        except Exception as error:  # without this loop, whoever waits would wait for ever
            self._failures += 1
            if self._is_news(0, error):
                left = sum(len(each.taken) - each.settled for each in recordings.values())
                _logger.exception("the sender of spans has failed and tries again; %d spans wait", left)
            waiting = [each for each in waiters if not (each.done.done() or self._settle(each, error))]
        with self._lock:
            self._waiters = waiting + self._waiters
        for recording in recordings.values():
            self._forget(recording)

    def _is_news(self, key: int, error: Exception) -> bool:
        """Whether the last failure told under this key was of another kind; it is now of this one."""
        before, self._told[key] = self._told.get(key), type(error)
        return before is not type(error)

    async def _send_new(self, recordings: Iterable[Recording]) -> Mapping[int, Exception]:
        """Send the new spans of some traces; returns the errors by store, of which each new kind is logged."""
        by_store: dict[int, list[Recording]] = {}
        for recording in recordings:
            if recording.store is not None and recording.settled < len(recording.taken):
                by_store.setdefault(id(recording.store), []).append(recording)
        errors: dict[int, Exception] = {}
        for key, group in by_store.items():
            try:
                await self._send_group(group)
                self._told.pop(key, None)
            except Exception as error:  # a store may fail in any way; waiting callers get the error
                errors[key] = error
                if self._is_news(key, error):
                    trace = None if isinstance(error, (AgentLightningError, OSError)) else error
                    _logger.warning(
                        "the store does not accept spans; they are kept in memory: %s", error, exc_info=trace
                    )
        return errors

    def _settle(self, waiter: _Waiter, error: Exception | None) -> bool:
        """Complete the future of a waiting caller; False if the caller has to wait on."""
        recording = waiter.recording
        now = self._monotonic()
        if recording.settled >= waiter.target:
            waiter.done.set_result(None)
        elif error is not None and (
            now >= waiter.give_up_at or (isinstance(error, _PERMANENT) and waiter.give_up_at - now < float("inf"))
        ):
            self._open.pop(id(recording), None)
            lost = len(recording.taken) - recording.settled
            failure = StoreUnavailable(
                f"{lost} of {len(recording.taken)} spans of {recording.name} are not in the store: "
                f"{type(error).__name__}: {error}"
            )
            failure.__cause__ = error
            waiter.done.set_exception(failure)
        else:
            return False
        return True

    async def _send_group(self, group: Sequence[Recording]) -> None:
        """Send the new spans of some traces to their store, as many as one call takes; then there is more to do."""
        store = group[0].store
        assert store is not None
        parts: list[tuple[Recording, int, Sequence[SpanOrPlain]]] = []
        spans: list[SpanOrPlain] = []
        size = 0
        for recording in group:
            size += recording.size_bytes
            if len(spans) >= BATCH_SPANS or (parts and size > _BATCH_BYTES):
                self._wake.set()
                break
            more, end = recording.unsent(BATCH_SPANS - len(spans))
            spans += more
            parts.append((recording, end, more))
        try:
            if spans:
                await store.add_many_spans(spans)
        except AgentLightningError as error:
            if not is_refusal(error):
                raise
            refused: set[int] = set()
            self.refused += await add_spans_apart(store, spans, refused, error=error)
            for recording, _, more in parts:
                recording.has_refused = recording.has_refused or not refused.isdisjoint(map(id, more))
        for recording, end, _ in parts:
            recording.mark_stored(end)
            if end < len(recording.taken) and len(spans) >= BATCH_SPANS:
                self._wake.set()


async def add_spans_apart(
    store: LightningStore,
    spans: Sequence[SpanOrPlain],
    refused: set[int] | None = None,
    *,
    error: AgentLightningError | None = None,
) -> int:
    """Store spans so that those that the store refuses do not hold up the others (see ``store.refusals``).

    A stub is stored in place of a refused span: it keeps the place in the trace, and says why the span was refused. A
    span whose id another one has is stored under an id that is made of its content, so that a repeat is known.

    Args:
        refused: gets the identity (``id``) of each span that is not stored as it is.
        error: what storing all of them has raised already; None: that has not been tried yet.

    Returns:
        How many spans are lost, because the store does not know their attempt or refuses what is in them. The log names
        them.

    Raises:
        Exception: what the store raises when it is not about these spans. A repeat is safe.
    """
    lost = 0
    substitutes: dict[int, SpanOrPlain] = {}

    async def replace(given: Sequence[SpanOrPlain], error: AgentLightningError) -> Sequence[SpanOrPlain]:
        nonlocal lost
        if refused is not None:
            refused.update(map(id, given))
        if isinstance(error, (InvalidValue, IdReused)) and id(given[0]) not in substitutes:
            if isinstance(error, IdReused):
                _logger.warning("a span of rollout %s gets another id: %s", given[0].rollout_id, error)
            other = _renamed(given[0]) if isinstance(error, IdReused) else _stub(given[0], error)
            substitutes[id(other)] = other
            return [other]
        lost += len(given)
        _logger.error(
            "the store refuses %d span(s) of rollout %s, attempt %s, which are lost; the first is %r: %s",
            len(given),
            given[0].rollout_id,
            given[0].attempt_id,
            given[0].name,
            error,
        )
        return ()

    def attempt_of(span: SpanOrPlain) -> tuple[str, str]:
        return span.rollout_id, span.attempt_id

    await send_apart(spans, store.add_many_spans, replace, attempt_of=attempt_of, error=error)
    return lost


def _renamed(span: SpanOrPlain) -> Span:
    record = span.to_span() if isinstance(span, PlainSpan) else span
    content = record.model_dump_json(exclude={"sequence_id"}).encode()
    attributes = {**record.attributes, _REPEATED_ID: span.span_id}
    span_id = hashlib.blake2b(content, digest_size=8).hexdigest()
    return record.model_copy(update={"span_id": span_id, "context": None, "attributes": attributes})


def _stub(span: SpanOrPlain, error: Exception) -> Span:
    attributes = {
        LightningSpanAttributes.MENDED.value: ["attributes", "events", "links"],
        _REFUSAL: str(error)[:1000].encode("ascii", "backslashreplace").decode(),
    }
    record = span.to_span() if isinstance(span, PlainSpan) else span
    return record.model_copy(
        update={"attributes": attributes, "events": list[Any](), "links": list[Any](), "name": span.name[:200]}
    )


class DeferredTrace(AbstractAsyncContextManager[Any]):
    """A ``trace_context`` that can leave its last spans to whoever reports the end of the attempt.

    A runner sends them in the same call as the report, which saves a durable call per rollout.

    Args:
        scope: opens the trace for the block.
        given: what the block gets.
        sender: sends the spans at the end of the block, unless that is deferred.
    """

    def __init__(self, scope: AbstractContextManager[Recording], given: Any, sender: SpanSender) -> None:
        self._scope = scope
        self._given = given
        self._sender = sender
        self._recording: Recording | None = None
        self._deferred = False
        self._taken = 0

    async def __aenter__(self) -> Any:
        self._recording = self._scope.__enter__()
        return self._given

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace_back: TracebackType | None
    ) -> None:
        self._scope.__exit__(kind, error, trace_back)
        if not self._deferred and self._recording is not None and self._recording.store is not None:
            await asyncio.wrap_future(self._sender.flush(self._recording))

    def defer(self) -> None:
        """Do not send the last spans at the end of the block. To be called before the block is entered."""
        self._deferred = True

    def agent_returned(self) -> None:
        """Note that the agent has returned: the spans that come now are not followed by any of it."""
        if self._recording is not None:
            self._recording.is_ending = True

    def wants_own_call(self) -> bool:
        """Whether there are more spans than fit into a report; then ``send`` them."""
        recording = self._recording
        return recording is not None and len(recording.taken) - recording.settled > BATCH_SPANS

    def unsent(self) -> Sequence[SpanOrPlain]:
        """The spans that the store does not have yet; from now on it is the caller who sends them."""
        if self._recording is None or self._recording.store is None:
            return ()
        self._sender.leave(self._recording)
        spans, self._taken = self._recording.unsent()
        return spans

    def stored(self) -> None:
        """Note that the store has the spans that ``unsent`` returned last."""
        if self._recording is not None:
            self._recording.mark_stored(self._taken)

    async def send(self) -> None:
        """Send the unsent spans by themselves; each one that the store refuses is replaced by a stub.

        Raises:
            StoreUnavailable: the store did not accept the spans.
        """
        if self._recording is not None and self._recording.store is not None:
            await asyncio.wrap_future(self._sender.flush(self._recording))
