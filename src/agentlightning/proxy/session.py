"""What all calls of a running proxy share: their admission, and the delivery of their spans to the store."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from agentlightning.errors import InvalidValue, StoreClosed
from agentlightning.http.signatures import ForwardingStore
from agentlightning.proxy.admission import CallAdmission
from agentlightning.proxy.dialects.base import CAPTURE_FIELDS, CaptureField, ProxyError
from agentlightning.proxy.prefixes import KnownCalls, outline_of
from agentlightning.proxy.recording import CallOrigin, CallRecord, refusal_of, retraction_of, spans_of
from agentlightning.proxy.sampling import ImposedSampling
from agentlightning.proxy.upstream import Upstream
from agentlightning.semconv import UnusableReason
from agentlightning.store.base import LightningStore, LightningStoreCapabilities
from agentlightning.tracer.recording import Recording
from agentlightning.tracer.sender import SpanSender
from agentlightning.types.plain_spans import PlainSpan

_logger = logging.getLogger(__name__)

_CANCEL_SECONDS = 2.0
_SMALL_SPAN_BYTES = 2_000
_MAX_REFUSALS = 100
_REFUSAL_SECONDS = 60.0
"""So many refused requests are recorded in this time: who has no key can make them."""


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """How a proxy behaves.

    Raises:
        InvalidValue: a number is out of its range.
    """

    num_retries: int = 2
    capture: frozenset[CaptureField] = CAPTURE_FIELDS
    max_calls: int = 4_096
    """How many calls may be in flight."""
    max_waiting_bytes: int = 128 * 1024 * 1024
    """How much may wait for the store before new calls are refused."""
    record_wait_seconds: float = 5.0
    """How long the end of a reply is held back until the store has accepted its span."""
    grace_seconds: float = 5.0
    """How long a stop waits for calls in flight, and then for spans that wait for the store."""

    def __post_init__(self) -> None:
        for name, count, least in (("num_retries", self.num_retries, 0), ("max_calls", self.max_calls, 1)):
            if type(count) is not int or count < least:
                raise InvalidValue(f"{name} is {count!r}; give at least {least}")
        for name in ("record_wait_seconds", "grace_seconds"):
            seconds: object = getattr(self, name)
            if not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
                raise InvalidValue(f"{name} is {seconds!r}; give seconds, 0 or more")


class _CurrentStore(ForwardingStore):
    """The store that the proxy has now."""

    def __init__(self, find: Callable[[], LightningStore | None]) -> None:
        self._find = find

    @property
    def capabilities(self) -> LightningStoreCapabilities:
        return self._target().capabilities

    def _target(self) -> LightningStore:
        store = self._find()
        if store is None:
            raise StoreClosed("the proxy has no store")
        return store


class ProxySession:
    """The shared parts of a running proxy, and the delivery of its spans in batches, while calls go on.

    Used by one event loop.

    Args:
        settings: how the proxy behaves.
        upstream: sends calls to backends.
        store: returns where spans go now.
        versions: versions of weights by model; the one of ``""`` holds for all models without one of their own.
        sampling: parameters to impose, see ``ImposedSampling``.
    """

    def __init__(
        self,
        settings: ProxySettings,
        upstream: Upstream,
        store: Callable[[], LightningStore | None],
        versions: dict[str, str],
        sampling: dict[str, dict[str, float | None]] | None = None,
    ) -> None:
        self.settings = settings
        self.upstream = upstream
        self.versions = versions
        self.imposed = {} if sampling is None else sampling
        self.sampling = ImposedSampling(self.imposed, store)
        self.admission = CallAdmission(settings.max_calls)
        self._find_store = store
        self._store = _CurrentStore(store)
        self._is_store_behind = False
        self._sender = SpanSender(patience_seconds=math.inf)
        self._sending: asyncio.Task[None] | None = None
        self._waiting: dict[asyncio.Future[None], int] = {}
        self._waiting_bytes = 0
        self._left_over = 0
        self._known_calls = KnownCalls()
        self._refusals: deque[float] = deque()
        self.unusable: Counter[str] = Counter()
        """How many recorded calls are no examples to learn from, by the reason."""
        self.refused = 0
        """How many requests below an attempt's URL were refused."""

    def start(self) -> None:
        """Begin to store spans."""
        self._sending = asyncio.create_task(self._sender.work(), name="agl-proxy-spans")

    @property
    def spans_waiting(self) -> int:
        """How many spans the store has not accepted yet."""
        return len(self._waiting)

    @property
    def spans_lost(self) -> int:
        """Spans that the store refused for good, or that were left over at the end."""
        return self._sender.refused + self._left_over

    def version_of(self, model: str) -> str | None:
        """Return the version of the weights that answer for a model, if somebody named it."""
        return self.versions.get(model) or self.versions.get("")

    def check_can_record(self, origin: CallOrigin | None) -> None:
        """Check that a call can be recorded, before it is made. Raises ``ProxyError`` if there is no store, or too
        much waits for it (503)."""
        if origin is None:
            return
        if self._find_store() is None:
            raise ProxyError(503, "no_store", "The proxy has no store to record this call in; give it one (set_store).")
        if self._waiting_bytes >= self.settings.max_waiting_bytes:
            why = f"{self.spans_waiting:,} recorded calls wait for the store; repeat this one later."
            raise ProxyError(503, "store_behind", why, retry_after_seconds=1.0)

    def record(self, record: CallRecord) -> asyncio.Future[None] | None:
        """Record a call that has ended.

        Returns:
            Done once the store has accepted or refused its span; None if the call belongs to no attempt.
        """
        record.ended = time.perf_counter()
        if record.origin is None:
            return None
        if record.unusable is not None:
            self.unusable[record.unusable.value] += 1
        attempt, outline = record.origin[:2], outline_of(record)
        prefix = None if outline is None else self._known_calls.find(attempt, outline)
        spans = spans_of(record, prefix)
        if outline is None or record.error_type is not None:
            return self._deliver(record.origin, spans, record.span_bytes())
        outline.is_shortened = record.is_shortened
        stored = partial(self._known_calls.add, attempt, outline, prefix)
        return self._deliver(record.origin, spans, record.span_bytes(), stored)

    def retract(self, record: CallRecord) -> None:
        """Record that the agent did not receive the reply of a call that was recorded."""
        if record.origin is not None and record.unusable is None:
            self.unusable[UnusableReason.NOT_RECEIVED.value] += 1
            self._deliver(record.origin, [retraction_of(record)], _SMALL_SPAN_BYTES)

    async def refuse(self, origin: CallOrigin, method: str, path: str, error: ProxyError) -> None:
        """Count a request below an attempt's URL that is refused, and record it, unless there are too many of them."""
        self.refused += 1
        _logger.warning(
            "a request of rollout %s, attempt %s was refused: %s %s: %s", *origin[:2], method, path[:200], error.message
        )
        now = time.monotonic()
        while self._refusals and self._refusals[0] < now - _REFUSAL_SECONDS:
            self._refusals.popleft()
        if len(self._refusals) < _MAX_REFUSALS and self._find_store() is not None:
            self._refusals.append(now)
            done = self._deliver(origin, [refusal_of(origin, method, path, error)], _SMALL_SPAN_BYTES)
            await asyncio.wait({done}, timeout=self.settings.record_wait_seconds)

    def _deliver(
        self, origin: CallOrigin, spans: Sequence[PlainSpan], size: int, stored: Callable[[], None] | None = None
    ) -> asyncio.Future[None]:
        """Send spans to the store. The future is done once it has accepted or refused them; ``stored`` is called if it
        has all of them as they are."""
        recording = Recording(lambda span, _rollout, _attempt: span, self._store, *origin[:2], size_bytes=size)
        for span in spans:
            recording.add(span)
        done = asyncio.wrap_future(self._sender.flush(recording))
        self._waiting[done] = size
        self._waiting_bytes += size

        def end_waiting(done: asyncio.Future[None]) -> None:
            self._waiting_bytes -= self._waiting.pop(done)
            if stored is not None and not (done.cancelled() or recording.has_refused):
                stored()

        done.add_done_callback(end_waiting)
        return done

    async def record_and_wait(self, record: CallRecord) -> None:
        """Record a call that has ended, and wait ``record_wait_seconds`` at most until the store has accepted it."""
        accepted = self.record(record)
        if accepted is None:
            return
        done, _ = await asyncio.wait({accepted}, timeout=self.settings.record_wait_seconds)
        if bool(done) is self._is_store_behind:  # logged when it changes, not for every call
            self._is_store_behind = not done
            if done:
                _logger.info("the store accepts spans of model calls in time again")
            else:
                _logger.warning(
                    "the store has not accepted the span of a model call within %g s; until it does, "
                    "replies go out before they are recorded",
                    self.settings.record_wait_seconds,
                )

    async def close(self) -> None:
        """Admit no new calls, let those in flight end, and bring all spans to the store."""
        grace = self.settings.grace_seconds
        self.admission.close()
        left = await self.admission.wait_idle(grace)
        if left:
            _logger.warning("the proxy is stopped; %d calls that are still in flight are cancelled", left)
            self.admission.cancel_calls()
            await self.admission.wait_idle(_CANCEL_SECONDS + self.settings.record_wait_seconds)
        if self._waiting:
            _, late = await asyncio.wait(self._waiting, timeout=grace)
            if late:
                self._left_over += len(late)
                why = "the store did not take them within %g s of the proxy's end"
                _logger.error(f"%d spans of model calls are lost: {why}", len(late), grace)
            for each in late:
                each.cancel()
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.gather(self._sending, return_exceptions=True)
            self._sending = None
