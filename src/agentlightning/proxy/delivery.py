"""Delivers the spans of model calls to the store, in batches, while calls go on."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from agentlightning.errors import (
    AgentLightningError,
    StoreClosed,
    StoreForked,
    StoreStopped,
)
from agentlightning.store.base import LightningStore
from agentlightning.tracer.sender import add_spans_apart
from agentlightning.types.plain_spans import PlainSpan

_logger = logging.getLogger(__name__)

_MAX_BATCH_SPANS = 500
_MAX_BATCH_BYTES = 4 * 1024 * 1024
_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 5.0
_GONE_FOR_GOOD = (StoreClosed, StoreForked, StoreStopped)


class _Parcel(NamedTuple):
    span: PlainSpan
    size: int
    accepted: asyncio.Future[bool]


class SpanDelivery:
    """A queue of spans and the task that empties it. To be used from one event loop.

    Args:
        store: where the spans go, asked before each batch.
        max_waiting_bytes: how much may wait.
    """

    def __init__(self, store: Callable[[], LightningStore | None], *, max_waiting_bytes: int) -> None:
        self._store = store
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting: deque[_Parcel] = deque()
        self._waiting_bytes = 0
        self._news = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._task: asyncio.Task[None] | None = None
        self.lost = 0
        """Spans that the store refused for good, or that were left over at the end."""

    def start(self) -> None:
        """Begin to bring spans to the store."""
        if self._task is None:
            self._task = asyncio.create_task(self._work(), name="agl-proxy-spans")

    @property
    def waiting(self) -> int:
        """How many spans the store has not accepted yet."""
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether no more should be put in."""
        return self._waiting_bytes >= self._max_waiting_bytes

    def put(self, span: PlainSpan, size: int) -> asyncio.Future[bool]:
        """Take in one span of about ``size`` bytes.

        Returns:
            True once the store has accepted it, False if it never will. Need not be awaited.
        """
        accepted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Parcel(span, size, accepted))
        self._waiting_bytes += size
        self._empty.clear()
        self._news.set()
        return accepted

    async def close(self, timeout_seconds: float) -> int:
        """Bring what waits to the store, for at most so long, and end. Returns how many spans are lost in all."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._empty.wait()
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
        pause = _FIRST_PAUSE_SECONDS
        while True:
            await self._news.wait()
            self._news.clear()
            while self._waiting:
                batch = self._next_batch()
                try:
                    await self._deliver(batch)
                except Exception as error:  # noqa: BLE001 - whatever is wrong with the store, the spans are kept
                    self._report(error, len(self._waiting), pause)
                    await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                    pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)
                else:
                    pause = _FIRST_PAUSE_SECONDS
            self._empty.set()

    def _next_batch(self) -> list[_Parcel]:
        batch: list[_Parcel] = []
        size = 0
        for parcel in self._waiting:
            size += parcel.size
            if batch and (size > _MAX_BATCH_BYTES or len(batch) >= _MAX_BATCH_SPANS):
                break
            batch.append(parcel)
        return batch

    async def _deliver(self, batch: list[_Parcel]) -> None:
        """Store the first parcels of the queue; a span that the store refuses does not hold up the others."""
        store = self._store()
        if store is None:
            raise StoreClosed("the proxy has no store")
        takes_plain = store.capabilities.get("plain_spans", False)
        spans = [parcel.span if takes_plain else parcel.span.to_span() for parcel in batch]
        lost = {id(span) for span in await add_spans_apart(store, spans)}
        for parcel, span in zip(batch, spans, strict=True):
            self.lost += id(span) in lost
            self._remove([parcel], accepted=id(span) not in lost)

    def _drop(self, parcels: list[_Parcel]) -> None:
        self.lost += len(parcels)
        self._remove(parcels, accepted=False)

    def _remove(self, parcels: list[_Parcel], *, accepted: bool) -> None:
        for parcel in parcels:
            self._waiting.popleft()
            self._waiting_bytes -= parcel.size
            if not parcel.accepted.done():
                parcel.accepted.set_result(accepted)

    @staticmethod
    def _report(error: Exception, waiting: int, pause: float) -> None:
        known = isinstance(error, (AgentLightningError, OSError))
        level = logging.ERROR if isinstance(error, _GONE_FOR_GOOD) or not known else logging.WARNING
        _logger.log(
            level,
            "the store does not take spans of model calls; %d wait, next try in about %g s: %s",
            waiting,
            pause,
            error,
            exc_info=None if known else error,
        )
