"""No span is lost while the store is slow, away, or refuses some of them; and nobody waits for ever."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider

from agentlightning.errors import InvalidValue, StoreClosed, StoreUnavailable
from agentlightning.store.sqlite.store import InMemoryLightningStore
from agentlightning.tracer.conversion import SpanConverter
from agentlightning.tracer.otel import OtelTracer
from agentlightning.tracer.recording import Recording
from agentlightning.tracer.sender import SpanSender
from agentlightning.types import AttemptedRollout, Span
from agentlightning.types.plain_spans import PlainSpan
from scenes import started


class FaultyStore(InMemoryLightningStore):
    """A store whose ``add_many_spans`` asks first what shall go wrong."""

    def __init__(self, fault: Callable[[Sequence[Span]], Exception | None]) -> None:
        super().__init__()
        self._fault = fault
        self.calls: list[int] = []
        self.threads: set[str] = set()

    async def add_many_spans(self, spans: Sequence[Span]) -> Sequence[Span]:
        self.calls.append(len(spans))
        self.threads.add(threading.current_thread().name)
        error = self._fault(spans)
        if error is not None:
            raise error
        return await super().add_many_spans(spans)


def of(rollout: AttemptedRollout) -> dict[str, Any]:
    return {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id}


async def test_one_call_from_a_thread_of_its_own_for_a_whole_trace() -> None:
    async with FaultyStore(lambda spans: None) as store:
        tracer = OtelTracer()
        with tracer.lifespan(store):
            rollout = await started(store)
            async with tracer.trace_context(**of(rollout)):
                for number in range(50):
                    tracer.create_span(f"{number}")
        assert store.calls == [50]
        assert store.threads == {"agentlightning-spans"}


async def test_a_store_that_is_away_gets_the_spans_when_it_is_back() -> None:
    faults = iter([StoreUnavailable("away"), OSError("reset"), TimeoutError()])
    async with FaultyStore(lambda spans: next(faults, None)) as store:
        tracer = OtelTracer()
        with tracer.lifespan(store):
            rollout = await started(store)
            async with tracer.trace_context(**of(rollout)):
                tracer.create_span("kept")
            assert [span.name for span in await store.query_spans(rollout.rollout_id)] == ["kept"]


@pytest.mark.parametrize(
    ("error", "patience"), [(StoreUnavailable("away"), 0.2), (StoreClosed("closed"), 60.0)], ids=["away", "closed"]
)
async def test_the_end_of_a_trace_says_when_its_spans_were_not_taken(error: Exception, patience: float) -> None:
    async with FaultyStore(lambda spans: error) as store:
        tracer = OtelTracer(patience_seconds=patience)
        with tracer.lifespan(store):
            rollout = await started(store)

            async def work() -> None:
                async with tracer.trace_context(**of(rollout)):
                    tracer.create_span("a")
                    tracer.create_span("b")

            began = time.monotonic()
            with pytest.raises(StoreUnavailable, match="2 of 2 spans") as raised:
                await work()
            assert raised.value.__cause__ is error
            assert time.monotonic() - began < 10


async def test_a_refused_span_leaves_its_place_and_does_not_hold_up_the_others() -> None:
    def fault(spans: Sequence[Span]) -> Exception | None:
        return InvalidValue("poison") if any(span.attributes.get("poison") for span in spans) else None

    async with FaultyStore(fault) as store:
        tracer = OtelTracer()
        with tracer.lifespan(store):
            rollout = await started(store)
            async with tracer.trace_context(**of(rollout)):
                for number in range(20):
                    tracer.create_span(f"{number}", {"poison": number == 7})
            spans = await store.query_spans(rollout.rollout_id)
        assert [span.name for span in spans] == [f"{number}" for number in range(20)]
        assert spans[7].attributes["agentlightning.refused"] == "poison"
        assert all("agentlightning.refused" not in span.attributes for span in spans if span.name != "7")


async def test_spans_of_an_unknown_attempt_do_not_hold_up_others() -> None:
    async with FaultyStore(lambda spans: None) as store:
        tracer = OtelTracer()
        with tracer.lifespan(store):
            rollout = await started(store)
            async with tracer.trace_context(rollout_id="ro-unknown", attempt_id="at-unknown"):
                tracer.create_span("lost")
            async with tracer.trace_context(**of(rollout)):
                tracer.create_span("kept")
            assert tracer._sender is not None
            assert tracer._sender.refused == 1
        assert [span.name for span in await store.query_spans(rollout.rollout_id)] == ["kept"]


async def test_traces_that_end_together_share_a_call() -> None:
    gate = threading.Event()

    def fault(spans: Sequence[Span]) -> Exception | None:
        gate.wait(10)
        return None

    async with FaultyStore(fault) as store:
        tracer = OtelTracer(interval_seconds=60)
        with tracer.lifespan(store):
            rollouts = [await started(store) for _ in range(20)]
            emitted = 0

            async def one(rollout: AttemptedRollout) -> None:
                nonlocal emitted
                async with tracer.trace_context(**of(rollout)):
                    tracer.create_span("a")
                    emitted += 1
                    if emitted == len(rollouts):
                        gate.set()

            async with asyncio.timeout(20):
                await asyncio.gather(*map(one, rollouts))
        assert sum(store.calls) == 20
        assert len(store.calls) <= 3


async def test_an_agent_is_never_held_up_by_a_store_that_hangs() -> None:
    gate = threading.Event()

    def fault(spans: Sequence[Span]) -> Exception | None:
        gate.wait(30)
        return None

    async with FaultyStore(fault) as store:
        tracer = OtelTracer(interval_seconds=0.01)
        with tracer.lifespan(store):
            rollout = await started(store)
            async with tracer.trace_context(**of(rollout)):
                tracer.create_span("first")
                while not store.calls:
                    await asyncio.sleep(0.01)
                began = time.monotonic()
                for number in range(1000):
                    tracer.create_span(f"{number}")
                took = time.monotonic() - began
                gate.set()
            assert took < 5  # the store hung all the time
            assert len(await store.query_spans(rollout.rollout_id)) == 1001


async def test_a_span_that_cannot_be_converted_holds_up_nobody(caplog: pytest.LogCaptureFixture) -> None:
    provider, ended = TracerProvider(shutdown_on_exit=False), []
    for name in ("good", "bad", "fine"):
        span = provider.get_tracer("test").start_span(name)
        span.end()
        ended.append(span)

    def convert(span: ReadableSpan, rollout_id: str, attempt_id: str) -> PlainSpan:
        if span.name == "bad":
            raise ArithmeticError("odd")
        return SpanConverter().convert(span, rollout_id, attempt_id)

    async with FaultyStore(lambda spans: None) as store:
        rollout = await started(store)
        recording = Recording(convert, store, rollout.rollout_id, rollout.attempt.attempt_id)
        sender = SpanSender()
        sender.start()
        sender.open(recording)
        for each in ended:
            recording.add(each)
        async with asyncio.timeout(10):
            await asyncio.wrap_future(sender.flush(recording))
        await asyncio.to_thread(sender.stop)
        assert [span.name for span in await store.query_spans(rollout.rollout_id)] == ["good", "fine"]
    assert "'bad'" in caplog.text


async def test_a_trace_that_ends_while_it_is_being_sent() -> None:
    """The sender takes spans at the very moment at which the end of the trace counts them."""
    async with FaultyStore(lambda spans: None) as store:
        tracer = OtelTracer(interval_seconds=0.0005)
        with tracer.lifespan(store):
            rollout = await started(store)
            for number in range(200):
                async with asyncio.timeout(10), tracer.trace_context(**of(rollout)):
                    for _ in range(number % 20):
                        tracer.create_span("a")
            assert (await store.statistics())["total_spans"] == sum(number % 20 for number in range(200))


async def test_what_is_left_is_sent_at_the_end() -> None:
    async with FaultyStore(lambda spans: None) as store:
        tracer = OtelTracer(interval_seconds=60)
        tracer.init_worker(0, store)
        rollout = await started(store)
        async with tracer.trace_context(**of(rollout)) as otel:
            late = otel.start_span("late")
        late.end()
        await asyncio.to_thread(tracer.teardown_worker, 0)
        assert [span.name for span in await store.query_spans(rollout.rollout_id)] == ["late"]
