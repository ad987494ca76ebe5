"""Our own spans are recorded, whole and with ids of their own, whatever the host program's OpenTelemetry is set to."""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, TraceIdRatioBased

from agentlightning.emitter.annotation import emit_reward
from agentlightning.store.base import LightningStore
from agentlightning.store.sqlite.store import InMemoryLightningStore
from agentlightning.tracer import otel
from agentlightning.tracer.otel import OtelTracer
from agentlightning.types import AttemptedRollout, Span
from agentlightning.types.rewards import find_final_reward
from fresh_process import run_fresh
from scenes import started
from tracing_programs import logfire_configured, train_disabled_and_seeded

Traced = tuple[LightningStore, OtelTracer, AttemptedRollout]


class Hosted:
    """A tracer in a program that has a provider of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    @asynccontextmanager
    async def by(self, provider: Any) -> AsyncIterator[Callable[[], Any]]:
        """Trace a rollout; the block gets a function that returns the stored spans after the rollout's trace."""
        self._monkeypatch.setattr(otel, "get_tracer_provider", lambda: provider)
        async with InMemoryLightningStore() as store:
            tracer = OtelTracer()
            with tracer.lifespan(store):
                rollout = await started(store)
                context = tracer.trace_context(
                    rollout_id=rollout.rollout_id, attempt_id=rollout.attempt.attempt_id, store=store
                )
                stack = await context.__aenter__()
                assert stack is not None
                ended: list[Span] = []

                async def end() -> list[Span]:
                    await context.__aexit__(None, None, None)
                    ended.extend(await store.query_spans(rollout.rollout_id))
                    return ended

                yield end


@pytest.fixture
def hosted(monkeypatch: pytest.MonkeyPatch) -> Hosted:
    return Hosted(monkeypatch)


def exporting(**settings: Any) -> tuple[TracerProvider, InMemorySpanExporter]:
    """A provider as programs set it up, and what it exports."""
    provider, exporter = TracerProvider(shutdown_on_exit=False, **settings), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider, exporter


def ids(spans: list[Span]) -> int:
    return len({span.span_id for span in spans})


async def test_seeding_random_repeats_no_id_and_is_not_disturbed(hosted: Hosted) -> None:
    provider, _ = exporting()
    library = provider.get_tracer("library")  # made before ours, with the generator of the provider
    async with hosted.by(provider) as end:
        drawn: list[float] = []
        for _ in range(4):
            random.seed(42)
            emit_reward(1.0)
            library.start_span("call").end()
            drawn.append(random.random())
        assert set(drawn) == {random.Random(42).random()}
        spans = await end()
    assert len(spans) == ids(spans) == 8


async def test_an_id_generator_of_the_program_is_kept(hosted: Hosted) -> None:
    class Counting(IdGenerator):
        count = 0

        def generate_span_id(self) -> int:
            self.count += 1
            return self.count

        generate_trace_id = generate_span_id

    provider, _ = exporting(id_generator=Counting())
    async with hosted.by(provider) as end:
        provider.get_tracer("library").start_span("call").end()
        emit_reward(1.0)
        call, reward = await end()
    assert call.span_id == f"{2:016x}"
    assert int(reward.span_id, 16) > 1000


@pytest.mark.parametrize("sampler", [ALWAYS_OFF, ParentBased(TraceIdRatioBased(0.0))])
async def test_a_sampler_drops_no_reward_and_exports_no_more(
    hosted: Hosted, sampler: Any, caplog: pytest.LogCaptureFixture
) -> None:
    provider, exporter = exporting(sampler=sampler)
    async with hosted.by(provider) as end:
        with otel_operation():
            emit_reward(0.5)
            provider.get_tracer("library").start_span("call").end()
        spans = await end()
    assert find_final_reward(spans) == 0.5
    assert [span.name for span in spans][-1] == "operation"
    assert len(spans) == 2
    assert exporter.get_finished_spans() == ()
    assert "samples its OpenTelemetry spans" in caplog.text


def otel_operation() -> Any:
    from agentlightning.tracer.base import get_active_tracer

    tracer = get_active_tracer()
    assert tracer is not None
    return tracer.operation_context("operation")


async def test_a_complete_sampler_exports_our_spans_and_says_nothing(
    hosted: Hosted, caplog: pytest.LogCaptureFixture
) -> None:
    provider, exporter = exporting()
    with caplog.at_level(logging.WARNING):
        async with hosted.by(provider) as end:
            emit_reward(0.5)
            (span,) = await end()
    assert [each.name for each in exporter.get_finished_spans()] == [span.name]
    assert caplog.text == ""


async def test_limits_of_the_program_cut_none_of_our_spans(hosted: Hosted) -> None:
    provider, _ = exporting(span_limits=SpanLimits(max_attributes=1, max_attribute_length=2))
    async with hosted.by(provider) as end:
        emit_reward({"quality": 0.25, "speed": 0.75}, primary_key="speed")
        (span,) = await end()
    assert find_final_reward([span]) == 0.75
    assert len(span.attributes) == 4


async def test_a_disabled_sdk_records_rewards(
    hosted: Hosted, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    provider, exporter = exporting()
    async with hosted.by(provider) as end:
        emit_reward(0.5)
        with provider.get_tracer("library").start_as_current_span("call"):
            pass
        (span,) = await end()
    assert find_final_reward([span]) == 0.5
    assert exporter.get_finished_spans() == ()
    assert "OTEL_SDK_DISABLED is set" in caplog.text


async def test_a_provider_that_the_agent_shut_down_still_records(hosted: Hosted) -> None:
    provider, _ = exporting()
    async with hosted.by(provider) as end:
        provider.shutdown()
        emit_reward(0.5)
        assert find_final_reward(await end()) == 0.5


async def test_a_provider_of_another_class_that_takes_processors(hosted: Hosted) -> None:
    class Wrapper(trace.TracerProvider):
        """As Logfire's: not of the SDK's class, and its tracers neither; without a hash."""

        __hash__ = None  # type: ignore[assignment]

        def __init__(self) -> None:
            self.inner = TracerProvider(shutdown_on_exit=False)

        def get_tracer(self, *args: Any, **kwargs: Any) -> trace.Tracer:
            inner = self.inner.get_tracer("inner")

            class Wrapped(trace.Tracer):
                def start_span(self, name: str, *args: Any, **kwargs: Any) -> trace.Span:
                    return inner.start_span(name, *args, **kwargs)

                def start_as_current_span(self, *args: Any, **kwargs: Any) -> Any:
                    return inner.start_as_current_span(*args, **kwargs)

            return Wrapped()

        def add_span_processor(self, processor: SpanProcessor) -> None:
            self.inner.add_span_processor(processor)

    provider = Wrapper()
    async with hosted.by(provider) as end:
        provider.get_tracer("library").start_span("call").end()
        emit_reward(0.5)
        spans = await end()
    assert [span.name for span in spans] == ["call", "agentlightning.annotation"]


def test_a_run_with_a_disabled_sdk_and_an_agent_that_seeds_random() -> None:
    assert run_fresh(train_disabled_and_seeded) == ["4 spans, reward 1.0"] * 2


@pytest.mark.slow
def test_logfire_itself() -> None:
    """Seen with logfire 5.4.0."""
    pytest.importorskip("logfire")
    assert run_fresh(logfire_configured) == ["call, agentlightning.annotation"]


def test_spans_of_the_sdk_are_what_we_think() -> None:
    """The fact behind all this: the SDK draws its ids from the generator that programs seed."""
    ended: list[ReadableSpan] = []

    class Taking(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            ended.append(span)

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(Taking())
    for _ in range(2):
        random.seed(42)
        provider.get_tracer("library").start_span("call").end()
    contexts = [span.context for span in ended]
    assert contexts[0] is not None
    assert contexts[0] == contexts[1]
