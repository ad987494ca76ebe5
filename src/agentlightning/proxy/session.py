"""What all calls of a running proxy share, and the order in which it is taken up and laid down."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp

from agentlightning.proxy.admission import Access, Gate
from agentlightning.proxy.errors import Refused
from agentlightning.proxy.models import Ask
from agentlightning.proxy.recording import Caller, CallRecord, SpanDelivery, span_of
from agentlightning.proxy.upstream import Routing, Upstream
from agentlightning.security.keys import ApiKey
from agentlightning.store.base import LightningStore

_logger = logging.getLogger(__name__)

_SPAN_OVERHEAD_BYTES = 1_000
_TOKEN_BYTES = 36
"""Of a number in a list, as Python keeps it."""
_READ_BYTES = 16 * 1024
"""How much of a reply is read ahead, times two: a thousand streams that come faster than they go must fit."""
_KEEPALIVE_SECONDS = 4.0
"""Shorter than servers keep connections (uvicorn: 5), so that none is used that is just being closed."""
_CUT_OFF_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """How a proxy behaves."""

    num_retries: int = 2
    ask_for: frozenset[Ask] = frozenset({"token_ids", "logprobs", "usage"})
    max_calls: int = 4_096
    """How many calls may be in flight."""
    max_request_bytes: int = 32 * 1024 * 1024
    max_bytes: int = 256 * 1024 * 1024
    """How much the requests and whole replies of calls in flight may take up together."""
    max_waiting_bytes: int = 128 * 1024 * 1024
    """How much may wait for the store before new calls are refused."""
    record_wait_seconds: float = 5.0
    """How long the end of a reply is held back for the store to accept its span."""
    grace_seconds: float = 5.0
    """How long calls in flight, and then spans that wait, have when the proxy is stopped."""


class Exchange:
    """The shared parts of a running proxy. To be used from its event loop."""

    def __init__(
        self,
        settings: ProxySettings,
        access: Access,
        upstream: Upstream,
        routing: Routing,
        store: Callable[[], LightningStore | None],
        versions: Mapping[str, str],
    ) -> None:
        self._settings = settings
        self._store = store
        self._versions = versions
        self._is_store_behind = False
        self.access = access
        self.upstream = upstream
        self.routing = routing
        self.gate = Gate(settings.max_calls, settings.max_bytes)
        self.delivery = SpanDelivery(store, max_waiting_bytes=settings.max_waiting_bytes)

    @property
    def max_request_bytes(self) -> int:
        """The largest request that is read."""
        return self._settings.max_request_bytes

    def version_of(self, model: str) -> str | None:
        """Which weights answer for a model, if anybody said so."""
        return self._versions.get(model) or self._versions.get("")

    def check_room_for(self, caller: Caller | None) -> None:
        """Make sure that the call can be recorded, if it is to be.

        Raises:
            Refused: there is no store, or it has not taken spans for a long time (503).
        """
        if caller is None:
            return
        if self._store() is None:
            raise Refused(503, "no_store", "The proxy has no store to record this call in; give it one (set_store).")
        if self.delivery.is_full:
            raise Refused(
                503,
                "store_behind",
                f"{self.delivery.waiting:,} recorded calls wait for the store; repeat this one later.",
                retry_after_seconds=1.0,
            )

    def deliver(self, record: CallRecord) -> asyncio.Future[bool] | None:
        """Record a call that has ended; None if it belongs to no attempt."""
        record.ended = time.perf_counter()
        if record.caller is None:
            return None
        answer = record.answer
        tokens = len(answer.prompt_token_ids or ()) + 2 * len(answer.token_ids or ())
        size = _SPAN_OVERHEAD_BYTES + len(record.request) + len(answer.body) + _TOKEN_BYTES * tokens
        return self.delivery.put(span_of(record), size)

    async def deliver_and_wait(self, record: CallRecord) -> None:
        """Record a call that has ended, and wait until the store has accepted that, for a short time."""
        accepted = self.deliver(record)
        if accepted is None:
            return
        done, _ = await asyncio.wait({accepted}, timeout=self._settings.record_wait_seconds)
        if bool(done) is self._is_store_behind:
            self._is_store_behind = not done
            if done:
                _logger.info("the store accepts spans of model calls in time again")
            else:
                _logger.warning(
                    "the store has not accepted the span of a model call within %g s; until it does, "
                    "replies go out before they are recorded",
                    self._settings.record_wait_seconds,
                )

    async def close(self) -> None:
        """Take no new calls, let those in flight end, and bring all spans to the store."""
        self.gate.close()
        left = await self.gate.wait_empty(self._settings.grace_seconds)
        if left:
            _logger.warning("the proxy is stopped; %d calls that are still in flight are cut off", left)
            self.gate.cut_off()
            await self.gate.wait_empty(_CUT_OFF_SECONDS + self._settings.record_wait_seconds)
        await self.delivery.close(self._settings.grace_seconds)


@asynccontextmanager
async def open_exchange(
    settings: ProxySettings,
    api_key: ApiKey | None,
    routing: Routing,
    store: Callable[[], LightningStore | None],
    versions: Mapping[str, str],
) -> AsyncGenerator[Exchange]:
    """The shared parts of a proxy, from its start to its end.

    Args:
        settings: how it behaves.
        api_key: what callers must show; None: nothing.
        routing: models and backends; may be replaced while it runs.
        store: says where spans go now.
        versions: weights by model; the one of ``""`` stands for all others.
    """
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_SECONDS)
    async with aiohttp.ClientSession(
        connector=connector, read_bufsize=_READ_BYTES, cookie_jar=aiohttp.DummyCookieJar()
    ) as session:
        upstream = Upstream(session, num_retries=settings.num_retries, wanted=settings.ask_for)
        exchange = Exchange(settings, Access(api_key), upstream, routing, store, versions)
        exchange.delivery.start()
        try:
            yield exchange
        finally:
            await exchange.close()
