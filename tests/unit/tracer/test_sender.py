"""No span is lost while the store is slow, away, or refuses some of them; and nobody waits for ever."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator

from agentlightning.errors import InvalidValue, StoreClosed, StoreUnavailable
from agentlightning.store.contract import LightningStoreCapabilities
from agentlightning.store.sqlite.store import InMemoryLightningStore
from agentlightning.tracer import otel
from agentlightning.tracer.conversion import SpanConverter
from agentlightning.tracer.otel import OtelTracer
from agentlightning.tracer.processor import attach_processor
from agentlightning.tracer.recording import Recording
from agentlightning.tracer.sender import SpanSender, add_spans_apart
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
        tracer = OtelTracer(interval_seconds=600)
        with tracer.lifespan(store):
            rollout = await started(store)
            async with tracer.trace_context(**of(rollout)):
                for number in range(50):
                    tracer.create_span(f"{number}")
        assert sum(store.calls) == 50
        assert len(store.calls) <= 2  # the thread may have started in the middle
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


class SameIds(IdGenerator):
    """As a program's own generator may be that is seeded for each step."""

    def generate_span_id(self) -> int:
        return 7

    generate_trace_id = generate_span_id


async def test_a_store_that_is_away_holds_up_one_reward_of_a_function_and_not_each(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(otel, "_REWARD_SECONDS", 1.0)
    away = True

    def rewards() -> None:
        for number in range(20):
            tracer.create_span("reward", {"agentlightning.reward.0.value": float(number)})

    async with FaultyStore(lambda spans: StoreUnavailable("away") if away else None) as store:
        tracer = OtelTracer()
        with tracer.lifespan(store):
            rollout = await started(store)
            async with tracer.trace_context(**of(rollout)):
                await asyncio.to_thread(rewards)
                away = False
            assert len(await store.query_spans(rollout.rollout_id)) == 20
    assert caplog.text.count("is not in the store yet") == 1


@pytest.mark.parametrize("deferred", [False, True])
async def test_spans_with_the_same_id_are_all_kept(deferred: bool) -> None:
    provider = TracerProvider(id_generator=SameIds(), shutdown_on_exit=False)
    library = provider.get_tracer("library")
    async with InMemoryLightningStore() as store:
        rollout = await started(store)
        processor, sender = attach_processor(provider), SpanSender()
        recording = processor.begin(store, **of(rollout), sender=sender)
        for name in ("a", "b", "c"):
            library.start_span(name).end()
        processor.end(recording)
        if deferred:  # a repeat whose first call had succeeded
            again = recording.unsent()[0]
            await add_spans_apart(store, again)
            assert await add_spans_apart(store, again) == 0
        await asyncio.wrap_future(sender.flush(recording))
        sender.stop()
        spans = await store.query_spans(rollout.rollout_id)
    assert [span.name for span in spans] == ["a", "b", "c"]
    assert len({span.span_id for span in spans}) == 3
    assert [span.attributes.get("agentlightning.repeated_span_id") for span in spans] == [None, *["0" * 15 + "7"] * 2]


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


# --- Spans that somebody else sends ----------------------------------------------------------------


class StoreOfRecords(InMemoryLightningStore):
    """A store that takes spans only as records."""

    @property
    def capabilities(self) -> LightningStoreCapabilities:
        return {**super().capabilities, "plain_spans": False}


@pytest.mark.parametrize(("made", "kind"), [(StoreOfRecords, Span), (InMemoryLightningStore, PlainSpan)])
async def test_who_sends_the_last_spans_gets_them_as_the_store_takes_them(
    made: type[InMemoryLightningStore], kind: type[Any]
) -> None:
    async with made() as store:
        tracer = OtelTracer()
        with tracer.lifespan(store):
            rollout = await started(store)
            trace = tracer.trace_context(**of(rollout))
            trace.defer()
            async with trace:
                tracer.create_span("last")
            spans = trace.unsent()
            assert list(map(type, spans)) == [kind]
            ended = await store.finish_attempt(
                rollout.rollout_id, rollout.attempt.attempt_id, "succeeded", spans, claim_limit=0
            )
            assert len(ended.sequence_ids) == 1
            trace.stored()
            assert list(trace.unsent()) == []


async def test_nobody_is_given_spans_that_are_to_stay_in_memory() -> None:
    async with InMemoryLightningStore() as store:
        tracer = OtelTracer()
        with tracer.lifespan(store):
            processor = tracer._wiring()[0]
            trace = tracer.trace_context(**of(await started(store)))
            trace.defer()
            processor.disable_store_submission = True
            try:
                async with trace:
                    tracer.create_span("kept")
            finally:
                processor.disable_store_submission = False
            assert list(trace.unsent()) == []
            assert [span.name for span in tracer.get_last_trace()] == ["kept"]


# --- What the log says -----------------------------------------------------------------------------


@asynccontextmanager
async def sending(interval_seconds: float = 0.5, patience_seconds: float = 120.0) -> AsyncIterator[SpanSender]:
    sender = SpanSender(interval_seconds, patience_seconds)
    sender.start()
    try:
        async with asyncio.timeout(30):
            yield sender
    finally:
        await asyncio.to_thread(sender.stop)


def one_span(store: InMemoryLightningStore, rollout: AttemptedRollout) -> Recording:
    """A trace with one span, that nobody has opened."""
    provider = TracerProvider(shutdown_on_exit=False)
    span = provider.get_tracer("test").start_span("one")
    span.end()
    recording = Recording(SpanConverter().convert, store, rollout.rollout_id, rollout.attempt.attempt_id)
    recording.add(span)
    return recording


def logged(caplog: pytest.LogCaptureFixture, level: str) -> list[str]:
    return [record.message for record in caplog.records if record.levelname == level]


async def test_each_kind_of_failure_is_told_when_it_begins(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentlightning.tracer.sender._FIRST_RETRY_SECONDS", 0.001)
    away, reset = StoreUnavailable("away"), OSError("reset")
    faults = iter([away, away, reset, reset, away])
    async with FaultyStore(lambda spans: next(faults, None)) as store, sending() as sender:
        rollout = await started(store)
        await asyncio.wrap_future(sender.flush(one_span(store, rollout)))
        said = "the store does not accept spans; they are kept in memory: "
        assert logged(caplog, "WARNING") == [f"{said}{error}" for error in (away, reset, away)]
        faults = iter([away])
        await asyncio.wrap_future(sender.flush(one_span(store, rollout)))
        assert len(logged(caplog, "WARNING")) == 4, "it had taken spans meanwhile"


async def test_a_store_that_never_takes_spans_again_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    async with FaultyStore(lambda spans: StoreClosed("closed")) as store, sending(interval_seconds=0.001) as sender:
        rollout = await started(store)
        for _ in range(3):
            with pytest.raises(StoreUnavailable, match="1 of 1 spans"):
                await asyncio.wrap_future(sender.flush(one_span(store, rollout)))
            while sender._failures:  # until a round in which there is nothing to send
                await asyncio.sleep(0.001)
    assert len(logged(caplog, "WARNING")) == 1


class Unspeakable(Exception):
    """An exception that a store of somebody else's may raise."""

    def __str__(self) -> str:
        raise ArithmeticError("no text")


async def test_a_sender_that_fails_says_what_waits_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    fault: list[Exception | None] = [Unspeakable()]
    async with FaultyStore(lambda spans: fault[0]) as store, sending(patience_seconds=0.2) as sender:
        rollout = await started(store)
        with pytest.raises(StoreUnavailable, match="ArithmeticError: no text"):
            await asyncio.wrap_future(sender.flush(one_span(store, rollout)))
        assert set(logged(caplog, "ERROR")) == {"the sender of spans has failed and tries again; 1 spans wait"}
        fault[0] = None
        await asyncio.wrap_future(sender.flush(one_span(store, rollout)))
        assert (await store.query_spans(rollout.rollout_id)).total == 1
