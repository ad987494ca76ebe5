"""Spans get to their attempt, however many rollouts run at once, and are in the store when its trace ends."""

from __future__ import annotations

import asyncio
import contextvars
import pickle
import threading
import tracemalloc
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import pytest
from opentelemetry import trace

from agentlightning.errors import InvalidValue
from agentlightning.store.base import LightningStore
from agentlightning.store.sqlite.store import InMemoryLightningStore
from agentlightning.tracer.base import DummyTracer, clear_active_tracer, get_active_tracer, set_active_tracer
from agentlightning.tracer.otel import OtelTracer
from agentlightning.tracer.processor import (
    OPEN_SPANS_LIMIT,
    LightningSpanProcessor,
    attach_processor,
    get_span_processors,
)
from agentlightning.tracer.provider import get_tracer_provider
from agentlightning.tracer.recording import current
from agentlightning.types import AttemptedRollout, Span
from scenes import started


@asynccontextmanager
async def tracing() -> AsyncIterator[tuple[LightningStore, OtelTracer]]:
    async with InMemoryLightningStore() as store:
        tracer = OtelTracer()
        tracer.init_worker(0, store)
        try:
            yield store, tracer
        finally:
            tracer.teardown_worker(0)


def of(rollout: AttemptedRollout) -> dict[str, Any]:
    return {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id}


async def names(store: LightningStore, rollout: AttemptedRollout) -> list[str]:
    return [span.name for span in await store.query_spans(rollout.rollout_id)]


async def test_a_trace_is_in_the_store_when_it_ends() -> None:
    async with tracing() as (store, tracer):
        rollout = await started(store)
        async with tracer.trace_context(**of(rollout)) as otel:
            with otel.start_as_current_span("outer") as outer, otel.start_as_current_span("inner"):
                outer.add_event("event")
        inner, outer = await store.query_spans(rollout.rollout_id)
        assert (inner.name, outer.name) == ("inner", "outer")
        assert inner.parent_id == outer.span_id
        assert outer.parent_id is None
        assert [event.name for event in outer.events] == ["event"]
        assert [span.span_id for span in tracer.get_last_trace()] == [inner.span_id, outer.span_id]


async def test_any_tracer_of_the_process_is_recorded() -> None:
    async with tracing() as (store, tracer):
        rollout = await started(store)
        async with tracer.trace_context(**of(rollout)):
            with trace.get_tracer("some.library").start_as_current_span("library"):
                pass
        assert await names(store, rollout) == ["library"]


async def test_an_exception_passes_and_its_spans_are_kept() -> None:
    async with tracing() as (store, tracer):
        rollout = await started(store)

        async def failing() -> None:
            async with tracer.trace_context(**of(rollout)) as otel:
                with otel.start_as_current_span("failing"):
                    raise KeyError("inside")

        with pytest.raises(KeyError):
            await failing()
        (span,) = await store.query_spans(rollout.rollout_id)
        assert span.status.status_code == "ERROR"
        assert span.events[0].attributes["exception.type"] == "KeyError"


async def test_many_rollouts_at_once_keep_their_spans_apart() -> None:
    async with tracing() as (store, tracer):
        rollouts = [await started(store) for _ in range(30)]

        def in_thread(otel: trace.Tracer, mine: str) -> None:
            with otel.start_as_current_span(mine):
                tracer.create_span(mine)

        async def one(rollout: AttemptedRollout) -> None:
            mine = rollout.rollout_id
            async with tracer.trace_context(**of(rollout)) as otel:
                with otel.start_as_current_span(mine):
                    await asyncio.sleep(0)
                    with tracer.operation_context(mine):
                        await asyncio.to_thread(in_thread, otel, mine)
            assert {span.name for span in tracer.get_last_trace()} == {mine}

        await asyncio.gather(*map(one, rollouts))
        for rollout in rollouts:
            assert await names(store, rollout) == [rollout.rollout_id] * 4


async def test_a_span_costs_the_same_however_many_never_end() -> None:
    async with tracing() as (store, tracer):
        rollout = await started(store)
        async with tracer.trace_context(**of(rollout)) as otel:
            processor, recording = tracer._wiring()[0], current.get()
            assert recording is not None
            never_ending = range(1, OPEN_SPANS_LIMIT + 1)
            processor._starting.update(dict.fromkeys(never_ending, recording))
            first = otel.start_span("first")
            tracemalloc.start()
            try:
                second = otel.start_span("second")
                _, most = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert most < OPEN_SPANS_LIMIT, "bytes"
            assert len(processor._starting) == OPEN_SPANS_LIMIT
            for each in never_ending:
                processor._starting.pop(each, None)
            first.end()
            second.end()
        assert await names(store, rollout) == ["first", "second"]


async def test_a_span_belongs_to_the_trace_it_began_in_wherever_it_ends() -> None:
    async with tracing() as (store, tracer):
        first, second = await started(store), await started(store)
        async with tracer.trace_context(**of(first)) as otel:
            span = otel.start_span("streamed")
        async with tracer.trace_context(**of(second)):
            span.end()
        tracer.teardown_worker(0)  # sends what came late
        assert await names(store, first) == ["streamed"]
        assert await names(store, second) == []


async def test_a_bare_thread_works_for_the_only_rollout_there_is() -> None:
    async with tracing() as (store, tracer):
        rollout = await started(store)
        async with tracer.trace_context(**of(rollout)):
            thread = threading.Thread(target=lambda: tracer.create_span("from a thread"))
            thread.start()
            thread.join()
        assert await names(store, rollout) == ["from a thread"]


async def test_a_bare_thread_must_not_guess_between_two() -> None:
    async with tracing() as (store, tracer):
        first, second = await started(store), await started(store)
        both_open, done = asyncio.Barrier(2), asyncio.Barrier(2)

        async def one(rollout: AttemptedRollout) -> None:
            async with tracer.trace_context(**of(rollout)):
                await both_open.wait()
                with ThreadPoolExecutor(1) as pool:
                    with pytest.raises(RuntimeError, match="which of 2 running rollouts"):
                        pool.submit(tracer.create_span, "lost").result()
                    pool.submit(contextvars.copy_context().run, tracer.create_span, "kept").result()
                await done.wait()

        await asyncio.gather(one(first), one(second))
        assert await names(store, first) == await names(store, second) == ["kept"]


async def test_a_parent_tells_whose_a_span_is() -> None:
    async with tracing() as (store, tracer):
        rollouts = [await started(store), await started(store)]
        both_open = asyncio.Barrier(2)

        async def one(rollout: AttemptedRollout) -> None:
            async with tracer.trace_context(**of(rollout)) as otel:
                with otel.start_as_current_span("parent") as parent:
                    await both_open.wait()
                    within = trace.set_span_in_context(parent)
                    with ThreadPoolExecutor(1) as pool:
                        pool.submit(lambda: otel.start_span(rollout.rollout_id, context=within).end()).result()
                await both_open.wait()

        await asyncio.gather(*map(one, rollouts))
        for rollout in rollouts:
            assert await names(store, rollout) == [rollout.rollout_id, "parent"]


async def test_a_span_around_the_runner_is_no_parent_of_the_agents_spans() -> None:
    async with tracing() as (store, tracer):
        rollout = await started(store)
        with get_tracer_provider().get_tracer("user").start_as_current_span("around"):
            async with tracer.trace_context(**of(rollout)):
                tracer.create_span("inside")
        (span,) = await store.query_spans(rollout.rollout_id)
        assert (span.name, span.parent_id) == ("inside", None)


async def test_spans_are_sent_while_the_trace_goes_on() -> None:
    async with InMemoryLightningStore() as store:
        tracer = OtelTracer(interval_seconds=0.01)
        with tracer.lifespan(store):
            rollout = await started(store)
            async with tracer.trace_context(**of(rollout)):
                tracer.create_span("early")
                async with asyncio.timeout(10):
                    while await names(store, rollout) != ["early"]:
                        await asyncio.sleep(0.01)


async def test_more_spans_than_fit_into_one_call() -> None:
    async with tracing() as (store, tracer):
        rollout = await started(store)
        async with tracer.trace_context(**of(rollout)):
            for number in range(2500):
                tracer.create_span(f"{number}")
        assert await names(store, rollout) == [f"{number}" for number in range(2500)]


async def test_a_trace_without_a_rollout_goes_nowhere() -> None:
    async with tracing() as (store, tracer):
        async with tracer.trace_context("local"):
            tracer.create_span("a")
        assert [span.name for span in tracer.get_last_trace()] == ["a"]
        assert tracer.trace_run(lambda: tracer.create_span("b").name) == "b"
        assert [span.name for span in tracer.get_last_trace()] == ["b"]

        async def work() -> str:
            return tracer.create_span("c").name

        assert await tracer.trace_run_async(work) == "c"
        assert [span.name for span in tracer.get_last_trace()] == ["c"]
        assert (await store.statistics())["total_spans"] == 0


async def test_ids_come_together_and_with_a_store() -> None:
    async with tracing() as (_, tracer):
        with pytest.raises(InvalidValue, match="give both"):
            async with tracer.trace_context(rollout_id="ro-1"):
                pass
    with pytest.raises(InvalidValue, match="no store"):
        async with OtelTracer().trace_context(rollout_id="ro-1", attempt_id="at-1"):
            pass


async def test_operations_say_how_they_ended() -> None:
    async with tracing() as (_, tracer):
        async with tracer.trace_context():
            with tracer.operation_context("good", {"a": 1}, start_time=1.0, end_time=2.0) as span:
                span.record_attributes({"b": 2})
                assert span.get_recorded_span().attributes == {"a": 1, "b": 2}
            with pytest.raises(ValueError), tracer.operation_context("bad"):
                raise ValueError("no")
        good, bad = tracer.get_last_trace()
        assert (good.status.status_code, good.start_time, good.end_time) == ("OK", 1.0, 2.0)
        assert (bad.status.status_code, bad.status.description) == ("ERROR", "ValueError: no")
        assert [event.attributes["exception.message"] for event in bad.events] == ["no"]


async def test_a_tracer_may_be_sent_to_another_process() -> None:
    async with tracing() as (_, tracer):
        copied = pickle.loads(pickle.dumps(tracer))
        assert isinstance(copied, OtelTracer)
        assert copied.worker_id is None


async def test_the_processor_by_itself() -> None:
    async with InMemoryLightningStore() as store:
        rollout = await started(store)
        provider = get_tracer_provider()
        processor = attach_processor(provider)
        assert get_span_processors(provider, LightningSpanProcessor) == [processor]

        def work() -> list[Span]:
            with processor.with_context(store, rollout.rollout_id, rollout.attempt.attempt_id) as context:
                assert (context.store, context.rollout_id) == (store, rollout.rollout_id)
                provider.get_tracer("x").start_span("a").end()
                assert processor.force_flush()
            return processor.spans()

        spans = await asyncio.to_thread(work)
        assert [span.name for span in spans] == ["a"]
        assert await names(store, rollout) == ["a"]
        processor.shutdown()


def test_the_active_tracer() -> None:
    assert get_active_tracer() is None
    one, other = DummyTracer(), DummyTracer()
    set_active_tracer(one)
    with other.lifespan():
        assert get_active_tracer() is other
    assert get_active_tracer() is one
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(get_active_tracer).result() is one
    clear_active_tracer()
    assert get_active_tracer() is None


async def test_a_dummy_keeps_nothing() -> None:
    tracer = DummyTracer()
    async with tracer.trace_context():
        assert get_active_tracer() is tracer
        assert tracer.create_span("a", {"x": 1}, timestamp=5.0).start_time == 5.0
        with pytest.raises(KeyError), tracer.operation_context("b") as span:
            raise KeyError("x")
    assert span.get_recorded_span().status.status_code == "ERROR"
    assert tracer.get_last_trace() == []
    assert tracer.trace_run(lambda: 3) == 3
