"""What all calls of a running proxy share, and the order in which it is opened and closed."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple

import aiohttp

from agentlightning.errors import AgentLightningError, StoreClosed, StoreForked, StoreStopped
from agentlightning.proxy.admission import CallAdmission, ProxyAccess
from agentlightning.proxy.capture import CAPTURE_FIELDS, CaptureField
from agentlightning.proxy.errors import ProxyError
from agentlightning.proxy.recording import CallOrigin, CallRecord, span_of
from agentlightning.proxy.upstream import Routing, Upstream
from agentlightning.store.base import LightningStore
from agentlightning.tracer.sender import add_spans_apart
from agentlightning.types.plain_spans import PlainSpan

_logger = logging.getLogger(__name__)

_READ_BYTES = 16 * 1024
"""aiohttp reads up to twice as much of a reply ahead. A thousand streams must fit into memory when their agents read
more slowly than the backend writes."""
_KEEPALIVE_SECONDS = 4.0
"""Shorter than servers keep idle connections (uvicorn: 5 s), so that no call goes out on one that is being closed."""
_CANCEL_SECONDS = 2.0
_MAX_BATCH_SPANS = 500
_MAX_BATCH_BYTES = 4 * 1024 * 1024
_FIRST_RETRY_SECONDS = 0.05
_LONGEST_RETRY_SECONDS = 5.0
_PERMANENT = (StoreClosed, StoreForked, StoreStopped)


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """How a proxy behaves."""

    num_retries: int = 2
    capture: frozenset[CaptureField] = CAPTURE_FIELDS
    max_calls: int = 4_096
    """How many calls may be in flight."""
    max_request_bytes: int = 32 * 1024 * 1024
    max_bytes: int = 256 * 1024 * 1024
    """How much memory the requests and kept replies of calls in flight may take together."""
    max_waiting_bytes: int = 128 * 1024 * 1024
    """How much may wait for the store before new calls are refused."""
    record_wait_seconds: float = 5.0
    """How long the end of a reply is held back until the store has accepted its span."""
    grace_seconds: float = 5.0
    """How long a stop waits for calls in flight, and then for spans that wait for the store."""


class _WaitingSpan(NamedTuple):
    span: PlainSpan
    size: int
    accepted: asyncio.Future[bool]


class CallDelivery:
    """Delivers the spans of calls to the store, in batches, while calls go on. Used by one event loop.

    Args:
        store: returns where spans go; called before each batch, because the store may be replaced.
        max_waiting_bytes: how much may wait before ``is_full``.
    """

    def __init__(self, store: Callable[[], LightningStore | None], *, max_waiting_bytes: int) -> None:
        self._store = store
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting: deque[_WaitingSpan] = deque()
        self._waiting_bytes = 0
        self._work_waiting = asyncio.Event()
        self._all_stored = asyncio.Event()
        self._all_stored.set()
        self._task: asyncio.Task[None] | None = None
        self.lost = 0
        """Spans that the store refused for good, or that were left over at the end."""

    def start(self) -> None:
        """Begin to store spans."""
        if self._task is None:
            self._task = asyncio.create_task(self._work(), name="agl-proxy-spans")

    @property
    def waiting(self) -> int:
        """How many spans the store has not accepted yet."""
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether so much waits that no more calls should be taken."""
        return self._waiting_bytes >= self._max_waiting_bytes

    def put(self, span: PlainSpan, size: int) -> asyncio.Future[bool]:
        """Queue one span of about ``size`` bytes.

        Returns:
            True once the store has accepted it, False if it never will. Need not be awaited.
        """
        accepted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append(_WaitingSpan(span, size, accepted))
        self._waiting_bytes += size
        self._all_stored.clear()
        self._work_waiting.set()
        return accepted

    async def close(self, timeout_seconds: float) -> int:
        """Store what waits, for at most ``timeout_seconds``, and end. Returns how many spans are lost in all."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._all_stored.wait()
        except TimeoutError:
            _logger.error(
                "%d spans of model calls are lost: the store did not take them within %g s of the proxy's end",
                len(self._waiting),
                timeout_seconds,
            )
            self._drop(list(self._waiting))
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        return self.lost

    async def _work(self) -> None:
        pause = _FIRST_RETRY_SECONDS
        while True:
            await self._work_waiting.wait()
            self._work_waiting.clear()
            while self._waiting:
                batch = self._next_batch()
                try:
                    await self._deliver(batch)
                except Exception as error:  # noqa: BLE001 - a store may fail in any way; the spans are kept
                    self._report(error, len(self._waiting), pause)
                    await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                    pause = min(pause * 2, _LONGEST_RETRY_SECONDS)
                else:
                    pause = _FIRST_RETRY_SECONDS
            self._all_stored.set()

    def _next_batch(self) -> list[_WaitingSpan]:
        batch: list[_WaitingSpan] = []
        size = 0
        for each in self._waiting:
            size += each.size
            if batch and (size > _MAX_BATCH_BYTES or len(batch) >= _MAX_BATCH_SPANS):
                break
            batch.append(each)
        return batch

    async def _deliver(self, batch: list[_WaitingSpan]) -> None:
        """Store the spans at the head of the queue; a span that the store refuses does not hold up the others."""
        store = self._store()
        if store is None:
            raise StoreClosed("the proxy has no store")
        takes_plain = store.capabilities.get("plain_spans", False)
        spans = [each.span if takes_plain else each.span.to_span() for each in batch]
        lost = {id(span) for span in await add_spans_apart(store, spans)}
        for each, span in zip(batch, spans, strict=True):
            self.lost += id(span) in lost
            self._remove([each], accepted=id(span) not in lost)

    def _drop(self, waiting_spans: list[_WaitingSpan]) -> None:
        self.lost += len(waiting_spans)
        self._remove(waiting_spans, accepted=False)

    def _remove(self, waiting_spans: list[_WaitingSpan], *, accepted: bool) -> None:
        for each in waiting_spans:
            self._waiting.popleft()
            self._waiting_bytes -= each.size
            if not each.accepted.done():
                each.accepted.set_result(accepted)

    @staticmethod
    def _report(error: Exception, waiting: int, pause: float) -> None:
        known = isinstance(error, (AgentLightningError, OSError))
        level = logging.ERROR if isinstance(error, _PERMANENT) or not known else logging.WARNING
        _logger.log(
            level,
            "the store does not take spans of model calls; %d wait, next try in about %g s: %s",
            waiting,
            pause,
            error,
            exc_info=None if known else error,
        )


class ProxySession:
    """The shared parts of a running proxy. Used by one event loop.

    Args:
        settings: how the proxy behaves.
        access: decides who may use which route.
        upstream: sends calls to backends.
        routing: models and backends; replaced when the model list changes.
        store: returns where spans go now.
        versions: versions of weights by model; the one of ``""`` holds for all models without one of their own.
    """

    def __init__(
        self,
        settings: ProxySettings,
        access: ProxyAccess,
        upstream: Upstream,
        routing: Routing,
        store: Callable[[], LightningStore | None],
        versions: dict[str, str],
    ) -> None:
        self.settings = settings
        self.access = access
        self.upstream = upstream
        self.routing = routing
        self.versions = versions
        self.admission = CallAdmission(settings.max_calls, settings.max_bytes)
        self.delivery = CallDelivery(store, max_waiting_bytes=settings.max_waiting_bytes)
        self._store = store
        self._is_store_behind = False

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
        if self._store() is None:
            raise ProxyError(503, "no_store", "The proxy has no store to record this call in; give it one (set_store).")
        if self.delivery.is_full:
            raise ProxyError(
                503,
                "store_behind",
                f"{self.delivery.waiting:,} recorded calls wait for the store; repeat this one later.",
                retry_after_seconds=1.0,
            )

    def record(self, record: CallRecord) -> asyncio.Future[bool] | None:
        """Record a call that has ended.

        Returns:
            Whether the store accepted its span, once that is known; None if the call belongs to no attempt.
        """
        record.ended = time.perf_counter()
        if record.origin is None:
            return None
        return self.delivery.put(span_of(record), record.span_bytes())

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
        self.admission.close()
        left = await self.admission.wait_idle(self.settings.grace_seconds)
        if left:
            _logger.warning("the proxy is stopped; %d calls that are still in flight are cancelled", left)
            self.admission.cancel_calls()
            await self.admission.wait_idle(_CANCEL_SECONDS + self.settings.record_wait_seconds)
        await self.delivery.close(self.settings.grace_seconds)


@asynccontextmanager
async def open_session(
    settings: ProxySettings,
    access: ProxyAccess,
    routing: Routing,
    store: Callable[[], LightningStore | None],
    versions: dict[str, str],
) -> AsyncGenerator[ProxySession]:
    """Open the shared parts of a proxy for the length of the block. The arguments are those of ``ProxySession``."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_SECONDS)
    async with aiohttp.ClientSession(
        connector=connector, read_bufsize=_READ_BYTES, cookie_jar=aiohttp.DummyCookieJar()
    ) as client:
        upstream = Upstream(client, num_retries=settings.num_retries, capture=settings.capture)
        session = ProxySession(settings, access, upstream, routing, store, versions)
        session.delivery.start()
        try:
            yield session
        finally:
            await session.close()
