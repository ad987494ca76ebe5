"""What all calls of a running proxy share, and the delivery of their spans to the store."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from agentlightning.errors import InvalidValue, StoreClosed
from agentlightning.http.signatures import ForwardingStore
from agentlightning.proxy.admission import CallAdmission
from agentlightning.proxy.dialects.base import CAPTURE_FIELDS, CaptureField, ProxyError
from agentlightning.proxy.recording import CallOrigin, CallRecord, span_of
from agentlightning.proxy.upstream import Upstream
from agentlightning.store.base import LightningStore, LightningStoreCapabilities
from agentlightning.tracer.sender import Recording, SpanSender

_logger = logging.getLogger(__name__)

_CANCEL_SECONDS = 2.0


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
    """

    def __init__(
        self,
        settings: ProxySettings,
        upstream: Upstream,
        store: Callable[[], LightningStore | None],
        versions: dict[str, str],
    ) -> None:
        self.settings = settings
        self.upstream = upstream
        self.versions = versions
        self.admission = CallAdmission(settings.max_calls)
        self._find_store = store
        self._store = _CurrentStore(store)
        self._is_store_behind = False
        self._sender = SpanSender(patience_seconds=math.inf)
        self._sending: asyncio.Task[None] | None = None
        self._waiting: dict[asyncio.Future[None], int] = {}
        self._waiting_bytes = 0
        self._left_over = 0

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
        """Check that a call can be recorded, before it is made.

        Raises:
            ProxyError: there is no store, or too much waits for it (503).
        """
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
        size = record.span_bytes()
        recording = Recording(lambda span, _rollout, _attempt: span, self._store, *record.origin[:2], size_bytes=size)
        recording.add(span_of(record))
        done = asyncio.wrap_future(self._sender.flush(recording))
        self._waiting[done] = size
        self._waiting_bytes += size
        done.add_done_callback(self._end_waiting)
        return done

    def _end_waiting(self, done: asyncio.Future[None]) -> None:
        self._waiting_bytes -= self._waiting.pop(done)

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
