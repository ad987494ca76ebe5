"""Spans: each is kept once (G7), whole, under its own attempt, in the order of its sequence id (G8)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.trace import Link as OtelLink, Status, StatusCode

from agentlightning.errors import IdReused, InvalidValue, NotFound
from agentlightning.store.base import LightningStore
from agentlightning.types import AttemptedRollout, Event, Link, OtelResource, Span, SpanContext, TraceStatus
from scenes import attempts_of, enqueued, finish, rollout_now, span_of, started, statuses
from store_state import unchanged
from stores import Stores


async def _sequence_ids(store: LightningStore, claim: AttemptedRollout) -> list[int]:
    return [span.sequence_id for span in await store.query_spans(claim.rollout_id, claim.attempt.attempt_id)]


async def test_a_span_comes_back_as_it_went_in(stores: Stores) -> None:
    async with stores.open() as (store, _):
        claim = await started(store)
        context = SpanContext(trace_id="a" * 32, span_id="b" * 16, is_remote=True, trace_state={"k": "v"})
        extra: dict[str, Any] = {"kind": "CLIENT", "extra": {"deep": [1, {"x": None}]}}
        span = Span(
            rollout_id=claim.rollout_id,
            attempt_id=claim.attempt.attempt_id,
            sequence_id=3,
            trace_id="a" * 32,
            span_id="b" * 16,
            parent_id="c" * 16,
            name='llm.call \\u0000 "quoted" \u2028 🎈',
            status=TraceStatus(status_code="ERROR", description="it broke"),
            attributes={"s": "é", "b": True, "i": -(2**63), "f": 0.1, "ss": ["a", "b"], "ff": [1.5, 2.5], "none": []},
            events=[Event(name="exception", attributes={"type": "ValueError"}, timestamp=1.25)],
            links=[Link(context=context, attributes=None)],
            start_time=1.5,
            end_time=None,
            context=context,
            parent=None,
            resource=OtelResource(attributes={"service.name": "agent"}, schema_url="http://schema"),
            **extra,
        )
        stored = await store.add_span(span)
        assert stored == span
        assert list(await store.query_spans(claim.rollout_id)) == [span]


@pytest.mark.parametrize("status", ["preparing", "running"])
async def test_a_span_is_a_sign_that_the_attempt_runs(stores: Stores, status: Any) -> None:
    async with stores.open() as (store, clock):
        claim = await started(store, "worker")
        await finish(store, claim, status)
        clock.advance(2)
        await store.add_span(span_of(claim))
        assert await statuses(store, claim.rollout_id) == ("running", ["running"])
        assert (await attempts_of(store, claim.rollout_id))[0].last_heartbeat_time == clock.wall()


async def test_a_span_is_stored_once(stores: Stores) -> None:
    async with stores.open() as (store, _):
        claim = await started(store)
        span = span_of(claim, name="first")
        stored = await store.add_span(span)
        async with unchanged(store):
            assert await store.add_span(span) is None
            assert await store.add_span(span.model_copy(update={"sequence_id": 9})) is None
            assert await store.add_many_spans([span, span]) == []
        assert list(await store.query_spans(claim.rollout_id)) == [stored]
        assert await store.get_next_span_sequence_id(claim.rollout_id, claim.attempt.attempt_id) == 2


@pytest.mark.parametrize(
    "other", [{"attributes": {"agentlightning.reward.0.value": 1.0}}, {"name": "second", "parent_id": "p"}]
)
async def test_another_span_under_a_known_id_is_refused(stores: Stores, other: dict[str, Any]) -> None:
    async with stores.open() as (store, _):
        claim = await started(store)
        first, new = await store.add_span(span_of(claim)), span_of(claim)
        assert first is not None
        second = first.model_copy(update={"sequence_id": 0, **other})
        async with unchanged(store):
            with pytest.raises(IdReused, match=first.span_id):
                await store.add_span(second)
            with pytest.raises(IdReused, match=first.span_id):
                await store.add_many_spans([new, second])
            with pytest.raises(IdReused, match=new.span_id):
                await store.add_many_spans([new, new.model_copy(update=other)])
            with pytest.raises(IdReused, match=first.span_id):
                await store.finish_attempt(claim.rollout_id, claim.attempt.attempt_id, "succeeded", [second])


async def test_a_repeat_may_tell_less_of_its_origin(stores: Stores) -> None:
    """An exporter of OTLP and our tracer send the same span with different resources."""
    async with stores.open() as (store, _):
        claim = await started(store)
        span = span_of(claim)
        await store.add_span(span)
        resource = span.resource.model_copy(update={"attributes": {"service.name": "other"}})
        async with unchanged(store):
            assert await store.add_span(span.model_copy(update={"resource": resource, "context": None})) is None


async def test_a_repeat_within_one_call_is_passed_over(stores: Stores) -> None:
    async with stores.open() as (store, _):
        claim = await started(store)
        old, new = span_of(claim), span_of(claim)
        await store.add_span(old)
        stored = await store.add_many_spans([old, new, new])
        assert [span.span_id for span in stored] == [new.span_id]
        assert len(await store.query_spans(claim.rollout_id)) == 2


async def test_a_span_is_known_by_rollout_attempt_and_id(stores: Stores) -> None:
    async with stores.open() as (store, _):
        first, other = await started(store), await started(store)
        second = await store.start_attempt(first.rollout_id)
        for claim in (first, second, other):
            stored = await store.add_span(span_of(claim, span_id="abc", trace_id="def"))
            assert stored is not None
            assert stored.sequence_id == 1


async def test_sequence_ids_are_issued_per_attempt_from_one(stores: Stores) -> None:
    async with stores.open() as (store, _):
        first = await started(store)
        second = await store.start_attempt(first.rollout_id)
        assert [span.sequence_id for span in await store.add_many_spans([span_of(first) for _ in range(3)])] == [
            1,
            2,
            3,
        ]
        mixed = await store.add_many_spans([span_of(second), span_of(first), span_of(second)])
        assert [(span.attempt_id, span.sequence_id) for span in mixed] == [
            (second.attempt.attempt_id, 1),
            (first.attempt.attempt_id, 4),
            (second.attempt.attempt_id, 2),
        ]


async def test_explicit_sequence_ids_are_kept_and_push_the_counter_up(stores: Stores) -> None:
    async with stores.open() as (store, _):
        claim = await started(store)
        ids = (claim.rollout_id, claim.attempt.attempt_id)
        given = [0, 7, 7, 0, 3, 0]
        stored = await store.add_many_spans([span_of(claim, sequence_id=number) for number in given])
        assert [span.sequence_id for span in stored] == [1, 7, 7, 8, 3, 9]
        assert await store.get_next_span_sequence_id(*ids) == 10
        await store.add_span(span_of(claim, sequence_id=2**52))
        assert await store.get_next_span_sequence_id(*ids) == 2**52 + 1
        assert await _sequence_ids(store, claim) == [1, 3, 7, 7, 8, 9, 2**52]


async def test_sequence_ids_can_be_had_in_advance(stores: Stores) -> None:
    async with stores.open() as (store, _):
        first, other = await started(store), await started(store)
        one = (first.rollout_id, first.attempt.attempt_id)
        two = (other.rollout_id, other.attempt.attempt_id)
        assert await store.get_next_span_sequence_id(*one) == 1
        assert await store.get_many_span_sequence_ids([one, two, one, one]) == [2, 1, 3, 4]
        assert await store.get_many_span_sequence_ids([]) == []
        assert (await store.add_many_spans([span_of(first), span_of(other)]))[0].sequence_id == 5
        await finish(store, first)
        assert await store.get_next_span_sequence_id(*one) == 6


async def test_asking_for_a_sequence_id_is_no_sign_of_life(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        claim = await started(store, unresponsive_seconds=10)
        clock.advance(9)
        await store.get_next_span_sequence_id(claim.rollout_id, claim.attempt.attempt_id)
        assert await statuses(store, claim.rollout_id) == ("preparing", ["preparing"])
        clock.advance(1)
        assert await statuses(store, claim.rollout_id) == ("requeuing", ["unresponsive"])


async def test_all_refused_spans_are_named(stores: Stores) -> None:
    """So one more call stores the rest."""
    async with stores.open() as (store, _):
        known, other = await started(store), await started(store)
        before = [span_of(known), span_of(other)]
        await store.add_many_spans(before)
        spans = [span_of((known, other)[number % 2]) for number in range(12)]
        gone = {"rollout_id": known.rollout_id, "attempt_id": "at-gone"}
        for place, span in {1: before[1], 4: before[0]}.items():
            spans[place] = span.model_copy(update={"name": "another"})
        for place in (6, 7):
            spans[place] = spans[place].model_copy(update=gone)
        async with unchanged(store):
            with pytest.raises((IdReused, NotFound)) as raised:
                await store.add_many_spans(spans)
        refused = raised.value.refused_spans
        assert [(each.place, each.span_id, type(each.error)) for each in refused] == [
            (1, before[1].span_id, IdReused),
            (4, before[0].span_id, IdReused),
            (6, spans[6].span_id, NotFound),
            (7, spans[7].span_id, NotFound),
        ]
        assert all(each.span_id in str(each.error) for each in refused[:2])
        assert type(raised.value) is type(refused[0].error)
        rest = [span for place, span in enumerate(spans) if place not in (1, 4, 6, 7)]
        assert len(await store.add_many_spans(rest)) == 8


async def test_all_spans_that_are_not_valid_are_named(stores: Stores) -> None:
    async with stores.open() as (store, _):
        attempted = await started(store)
        spans = [span_of(attempted) for _ in range(8)]
        spans[2] = spans[2].model_copy(update={"sequence_id": -1})
        spans[3] = spans[3].model_copy(update={"attributes": {"k": object()}})
        spans[5] = spans[5].model_copy(update={"span_id": "no id"})
        async with unchanged(store):
            with pytest.raises(InvalidValue) as raised:
                await store.add_many_spans(spans)
        named = [(each.place, each.span_id, each.error.code) for each in raised.value.refused_spans]
        assert named == [
            (2, spans[2].span_id, "invalid_value"),
            (3, spans[3].span_id, "not_json"),
            (5, "no id", "invalid_id"),
        ]


async def test_spans_of_unknown_attempts_are_refused_all_or_none(stores: Stores) -> None:
    async with stores.open() as (store, _):
        claim, other = await started(store), await started(store)
        [waiting] = await enqueued(store, 1)
        for ids in (
            {"rollout_id": "ro-unknown"},
            {"attempt_id": "at-unknown"},
            {"attempt_id": other.attempt.attempt_id},
            {"rollout_id": waiting},
        ):
            async with unchanged(store):
                with pytest.raises(NotFound):
                    await store.add_many_spans([span_of(claim), span_of(claim, **ids), span_of(other)])
                span = span_of(claim, **ids)
                with pytest.raises(NotFound):
                    await store.get_many_span_sequence_ids(
                        [(claim.rollout_id, claim.attempt.attempt_id), (span.rollout_id, span.attempt_id)]
                    )
        assert await store.get_next_span_sequence_id(claim.rollout_id, claim.attempt.attempt_id) == 1


async def test_no_spans_is_nothing(stores: Stores) -> None:
    async with stores.open() as (store, _):
        await started(store)
        async with unchanged(store):
            assert await store.add_many_spans([]) == []


async def test_many_spans_in_one_call(stores: Stores) -> None:
    async with stores.open() as (store, _):
        claim = await started(store)
        spans = [span_of(claim, attributes={"i": i}) for i in range(2000)]
        stored = await store.add_many_spans(spans)
        assert [span.sequence_id for span in stored] == [*range(1, 2001)]
        read = await store.query_spans(claim.rollout_id)
        assert list(read) == stored
        assert read.total == 2000


@pytest.mark.parametrize("status", ["succeeded", "failed", "timeout", "unresponsive"])
async def test_spans_may_come_after_the_end(stores: Stores, status: Any) -> None:
    async with stores.open() as (store, clock):
        claim = await store.start_rollout("input")
        await store.add_span(span_of(claim))
        await finish(store, claim, status)
        before = await rollout_now(store, claim.rollout_id)
        clock.advance(1)
        late = await store.add_span(span_of(claim))
        assert late is not None
        assert late.sequence_id == 2
        assert await rollout_now(store, claim.rollout_id) == before


async def test_numbers_that_json_lacks_become_words(stores: Stores) -> None:
    async with stores.open() as (store, _):
        claim = await started(store)
        attributes = {"loss": float("nan"), "max": float("inf"), "all": [1.0, float("-inf")]}
        await store.add_span(span_of(claim, attributes=attributes))
        [span] = await store.query_spans(claim.rollout_id)
        assert (span.attributes["loss"], span.attributes["max"]) == ("NaN", "Infinity")
        assert json.loads(span.model_dump_json())["attributes"]["all"] == [1.0, "-Infinity"]


# --- OpenTelemetry ---------------------------------------------------------------------------------


def _recorded() -> ReadableSpan:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")
    parent = tracer.start_span("parent")
    with tracer.start_as_current_span(
        "work", attributes={"k": [1, 2]}, links=[OtelLink(parent.get_span_context())]
    ) as span:
        span.add_event("step", {"n": 1})
        span.set_status(Status(StatusCode.ERROR, "no luck"))
    assert isinstance(span, ReadableSpan)
    return span


@pytest.mark.parametrize(("given", "expected"), [(None, 1), (0, 1), (5, 5)])
async def test_an_opentelemetry_span_is_stored(stores: Stores, given: int | None, expected: int) -> None:
    async with stores.open() as (store, _):
        claim = await started(store)
        ids = (claim.rollout_id, claim.attempt.attempt_id)
        recorded = _recorded()
        stored = await store.add_otel_span(*ids, recorded, given)
        assert stored == Span.from_opentelemetry(recorded, *ids, expected)
        assert list(await store.query_spans(*ids)) == [stored]
        assert await store.add_otel_span(*ids, recorded, given) is None
        with pytest.raises(NotFound):
            await store.add_otel_span("ro-unknown", "at-unknown", recorded)
