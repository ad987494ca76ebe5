"""Spans on their way to the store: in bulk, in order, never too many, none twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import msgspec
import pytest

from agentlightning import InMemoryLightningStore
from agentlightning.errors import InvalidValue, StoreUnavailable
from agentlightning.proxy.dialects import ChatCompletions
from agentlightning.proxy.dialects.base import ProxyError
from agentlightning.proxy.recording import CallOrigin, CallRecord, spans_of
from agentlightning.proxy.session import ProxySession, ProxySettings
from agentlightning.semconv import LLMCallAttributes
from agentlightning.types.plain_spans import AnySpan

WAIT_SECONDS = 20.0
CHAT = ChatCompletions()


class GatedStore(InMemoryLightningStore):
    """A store that takes spans while its gate is open, and says with which calls they came."""

    def __init__(self) -> None:
        super().__init__()
        self.open = asyncio.Event()
        self.open.set()
        self.batches: list[int] = []
        self.failures: list[Exception] = []

    async def add_many_spans(self, spans: Sequence[AnySpan]) -> Sequence[AnySpan]:
        await self.open.wait()
        if self.failures:
            raise self.failures.pop(0)
        stored = await super().add_many_spans(spans)
        self.batches.append(len(spans))
        return stored


@asynccontextmanager
async def delivering(
    make: type[GatedStore] = GatedStore, **options: Any
) -> AsyncIterator[tuple[GatedStore, ProxySession, CallOrigin]]:
    """A store with an attempt, and a session of a proxy that delivers to it."""
    async with make() as store:
        rollout = await store.start_rollout({})
        no_upstream = cast("Any", None)
        session = ProxySession(ProxySettings(grace_seconds=0, **options), no_upstream, lambda: store, {}, {})
        session.start()
        try:
            yield store, session, CallOrigin(rollout.rollout_id, rollout.attempt.attempt_id)
        finally:
            await session.close()


def recorded(session: ProxySession, origin: CallOrigin, number: int = 0, **more: Any) -> asyncio.Future[None]:
    """The delivery of a call that has just ended, and is known by its number."""
    done = session.record(CallRecord(CHAT, origin, retries=number, **more))
    assert done is not None
    return done


async def test_what_gathers_while_the_store_is_busy_goes_in_one_call() -> None:
    async with delivering() as (store, session, origin):
        store.open.clear()
        accepted = [recorded(session, origin)]
        await asyncio.sleep(0)  # the first is on its way
        accepted += [recorded(session, origin, number) for number in range(1, 10)]
        assert (session.spans_waiting, any(each.done() for each in accepted)) == (10, False)
        store.open.set()
        await asyncio.gather(*accepted)
        assert store.batches == [1, 9]
        stored = list(await store.query_spans(origin.rollout_id))
        assert [span.attributes[LLMCallAttributes.RETRIES.value] for span in stored] == list(range(10))


async def test_a_store_that_failed_gets_the_same_spans_again_and_keeps_each_once() -> None:
    async with delivering() as (store, session, origin):
        store.failures = [StoreUnavailable("away"), OSError("cable"), RuntimeError("what?")]
        await recorded(session, origin)
        await recorded(session, origin)
        assert len(list(await store.query_spans(origin.rollout_id))) == 2
        await session.close()
        assert session.spans_lost == 0


class PickyStore(GatedStore):
    """A store that refuses spans of requests in which it is said that they are bad."""

    async def add_many_spans(self, spans: Sequence[AnySpan]) -> Sequence[AnySpan]:
        if any("bad" in str(span.attributes.get(LLMCallAttributes.REQUEST.value)) for span in spans):
            raise InvalidValue("bad")
        return await super().add_many_spans(spans)


async def test_a_call_that_the_store_refused_is_not_referred_to() -> None:
    async with delivering(PickyStore) as (store, session, origin):

        async def record(*said: str) -> Mapping[str, Any]:
            messages = [{"role": "user", "content": each * 1_000} for each in said]
            await asyncio.wait_for(
                recorded(session, origin, raw_request=msgspec.json.encode({"messages": messages})), 20
            )
            return list(await store.query_spans(origin.rollout_id))[-1].attributes

        assert "agentlightning.refused" in await record("first", "bad")
        assert LLMCallAttributes.PREFIX_SPAN_ID.value not in await record("first", "next")
        assert LLMCallAttributes.PREFIX_SPAN_ID.value in await record("first", "next", "last")


async def test_more_than_is_allowed_to_wait_stops_new_calls() -> None:
    async with delivering(max_waiting_bytes=1, record_wait_seconds=WAIT_SECONDS) as (store, session, origin):
        store.open.clear()
        session.check_can_record(origin)
        recording = asyncio.create_task(session.record_and_wait(CallRecord(CHAT, origin)))
        await asyncio.sleep(0)
        with pytest.raises(ProxyError, match="1 recorded calls wait") as caught:
            session.check_can_record(origin)
        assert (caught.value.status, caught.value.headers()["retry-after"]) == (503, "1")
        session.check_can_record(None)
        store.open.set()
        await recording
        session.check_can_record(origin)


async def test_a_call_of_nobody_has_no_span() -> None:
    with pytest.raises(ValueError, match="belongs to no attempt"):
        spans_of(CallRecord(CHAT, None))


def test_a_request_of_odd_numbers_is_recorded_as_text_only() -> None:
    record = CallRecord(CHAT, CallOrigin("ro-1", "at-1"), raw_request=b'{"model":"m","seed":1e999,"max_tokens":"9"}')
    with pytest.raises(ProxyError):
        CHAT.read_request(record.raw_request, {})
    huge = b'{"model":"m","seed":123456789012345678901234567890,"temperature":true}'
    record = CallRecord(CHAT, CallOrigin("ro-1", "at-1"), raw_request=huge, request=CHAT.read_request(huge, {}))
    attributes = spans_of(record)[-1].attributes
    assert "gen_ai.request.seed" not in attributes
    assert "gen_ai.request.temperature" not in attributes
    assert attributes["agentlightning.llm.request"] == huge.decode()
