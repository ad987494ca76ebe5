"""Bad input: each kind has its own error, which says what to mend, and nothing in the store has changed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from typing import Any

import pytest

from agentlightning.errors import AgentLightningError, InvalidId, InvalidValue, NotFound, NotJson, TooLarge
from agentlightning.store.base import LightningStore
from agentlightning.types import (
    LLM,
    AttemptedRollout,
    EnqueueRolloutRequest,
    Event,
    Resource,
    RolloutConfig,
    Span,
    TraceStatus,
)
from scenes import claimed, config, deep, enqueued, llm, prompt, requests, rollout_now, span_of, started, statuses
from store_state import unchanged
from stores import Stores

NAN, INFINITY, HUGE = math.nan, math.inf, 10**400
TEN_MB = "x" * 10_000_000
LONGEST_MESSAGE = 600

Use = Callable[[LightningStore, AttemptedRollout, Any], Awaitable[Any]]
"""Calls the store with a value in one place."""


async def _scene(store: LightningStore) -> AttemptedRollout:
    """A store with something of everything; returns the attempt that is called about."""
    await store.add_resources({"p": prompt("1")}, resources_id="rs-1")
    claim = await store.start_rollout(
        "input", config=config(), worker_id="worker", rollout_id="ro-1", attempt_id="at-1"
    )
    await store.add_span(span_of(claim))
    await enqueued(store, "waiting")
    return claim


async def _refused(error: type[AgentLightningError], call: Awaitable[Any], what: object = "") -> None:
    """The call raises exactly this error, with a message for people."""
    with pytest.raises(AgentLightningError) as caught:
        await call
    assert type(caught.value) is error, f"{what!s:.100}: {caught.value!r:.300}"
    assert isinstance(caught.value, ValueError)
    assert 10 < len(caught.value.message) < LONGEST_MESSAGE


def _event(**more: Any) -> Event:
    return Event(name="e", attributes={}, **more)


def _span(claim: AttemptedRollout, **changes: Any) -> Span:
    """A span with values that its own checks would refuse."""
    return span_of(claim).model_copy(update=changes)


# --- Ids -------------------------------------------------------------------------------------------

BAD_IDS: Sequence[Any] = (
    "",
    "a\0b",
    "x" * 129,
    "x" * 10_000,
    TEN_MB,
    "a/b",
    "a b",
    "a\n",
    "a%2e",
    "é",
    "\ud800",
    "latest",
    "search",
    "bulk",
    ".",
    "..",
    5,
    ["a"],
    deep(100_000),
)

ID_USES: Mapping[str, Use] = {
    "enqueue_rollout rollout_id": lambda s, c, x: s.enqueue_rollout(1, rollout_id=x),
    "enqueue_rollout resources_id": lambda s, c, x: s.enqueue_rollout(1, resources_id=x),
    "start_rollout rollout_id": lambda s, c, x: s.start_rollout(1, rollout_id=x),
    "start_rollout attempt_id": lambda s, c, x: s.start_rollout(1, attempt_id=x),
    "start_rollout worker_id": lambda s, c, x: s.start_rollout(1, worker_id=x),
    "start_rollout resources_id": lambda s, c, x: s.start_rollout(1, resources_id=x),
    "dequeue_rollout worker_id": lambda s, c, x: s.dequeue_rollout(x),
    "dequeue_rollout request_id": lambda s, c, x: s.dequeue_rollout(request_id=x),
    "dequeue_many_rollouts worker_id": lambda s, c, x: s.dequeue_many_rollouts(worker_id=x),
    "dequeue_many_rollouts request_id": lambda s, c, x: s.dequeue_many_rollouts(request_id=x),
    "start_attempt rollout_id": lambda s, c, x: s.start_attempt(x),
    "start_attempt worker_id": lambda s, c, x: s.start_attempt("ro-1", x),
    "start_attempt attempt_id": lambda s, c, x: s.start_attempt("ro-1", attempt_id=x),
    "update_rollout rollout_id": lambda s, c, x: s.update_rollout(x, metadata={}),
    "update_rollout resources_id": lambda s, c, x: s.update_rollout("ro-1", resources_id=x),
    "cancel_rollout rollout_id": lambda s, c, x: s.cancel_rollout(x),
    "update_attempt rollout_id": lambda s, c, x: s.update_attempt(x, "at-1"),
    "update_attempt attempt_id": lambda s, c, x: s.update_attempt("ro-1", x, "running") if x != "latest" else _bad_id(),
    "update_attempt worker_id": lambda s, c, x: s.update_attempt("ro-1", "at-1", worker_id=x),
    "get_rollout_by_id rollout_id": lambda s, c, x: s.get_rollout_by_id(x),
    "get_latest_attempt rollout_id": lambda s, c, x: s.get_latest_attempt(x),
    "query_attempts rollout_id": lambda s, c, x: s.query_attempts(x),
    "query_spans rollout_id": lambda s, c, x: s.query_spans(x),
    "query_spans attempt_id": lambda s, c, x: s.query_spans("ro-1", x) if x != "latest" else _bad_id(),
    "add_span rollout_id": lambda s, c, x: s.add_span(_span(c, rollout_id=x)),
    "add_span attempt_id": lambda s, c, x: s.add_span(_span(c, attempt_id=x)),
    "add_span span_id": lambda s, c, x: s.add_span(_span(c, span_id=x)),
    "get_next_span_sequence_id rollout_id": lambda s, c, x: s.get_next_span_sequence_id(x, "at-1"),
    "get_next_span_sequence_id attempt_id": lambda s, c, x: s.get_next_span_sequence_id("ro-1", x),
    "get_many_span_sequence_ids": lambda s, c, x: s.get_many_span_sequence_ids([("ro-1", "at-1"), ("ro-1", x)]),
    "add_resources resources_id": lambda s, c, x: s.add_resources({}, resources_id=x),
    "update_resources resources_id": lambda s, c, x: s.update_resources(x, {}),
    "update_resources request_id": lambda s, c, x: s.update_resources("rs-1", {}, request_id=x),
    "rollback_resources resources_id": lambda s, c, x: s.rollback_resources(x, 1),
    "rollback_resources request_id": lambda s, c, x: s.rollback_resources("rs-1", 1, request_id=x),
    "get_resources_by_id resources_id": lambda s, c, x: s.get_resources_by_id(x),
    "query_resource_versions resources_id": lambda s, c, x: s.query_resource_versions(x),
    "update_worker worker_id": lambda s, c, x: s.update_worker(x),
    "update_worker attempt_ids": lambda s, c, x: s.update_worker("worker", attempt_ids=["at-1", x]),
    "report_worker_lost worker_id": lambda s, c, x: s.report_worker_lost(x, message="why"),
    "get_worker_by_id worker_id": lambda s, c, x: s.get_worker_by_id(x),
}


async def _bad_id() -> None:
    """Stands for a call with an id that is fine in that place."""
    raise InvalidId("this id is allowed here and nowhere else")


@pytest.mark.parametrize("method", sorted({use.partition(" ")[0] for use in ID_USES}))
async def test_bad_ids(stores: Stores, method: str) -> None:
    async with stores.open() as (store, _):
        claim = await _scene(store)
        for use in (use for use in ID_USES if use.partition(" ")[0] == method):
            async with unchanged(store):
                for bad in BAD_IDS:
                    await _refused(InvalidId, ID_USES[use](store, claim, bad), use)


@pytest.mark.parametrize("good", ["x", "x" * 128, "A.b_c~d:e@f-0", "Latest", "...", "0"])
async def test_good_ids(stores: Stores, good: str) -> None:
    async with stores.open() as (store, _):
        await store.add_resources({}, resources_id=good)
        claim = await store.start_rollout(1, rollout_id=good, attempt_id=good, worker_id=good, resources_id=good)
        await store.add_span(span_of(claim, span_id=good))
        assert (await rollout_now(store, good)).resources_id == good
        assert (await store.query_spans(good, good))[0].span_id == good
        assert await store.get_worker_by_id(good) is not None
        await enqueued(store, 1)
        await claimed(store, request_id=good)


UNKNOWN_IDS: Mapping[str, Callable[[LightningStore], Awaitable[Any]]] = {
    "enqueue_rollout": lambda s: s.enqueue_rollout(1, resources_id="rs-0"),
    "start_rollout": lambda s: s.start_rollout(1, resources_id="rs-0", worker_id="new"),
    "start_attempt": lambda s: s.start_attempt("ro-0", "new"),
    "update_rollout": lambda s: s.update_rollout("ro-0", status="failed"),
    "update_rollout, nothing to change": lambda s: s.update_rollout("ro-0"),
    "update_rollout, foreign resources": lambda s: s.update_rollout("ro-1", resources_id="rs-0"),
    "cancel_rollout": lambda s: s.cancel_rollout("ro-0"),
    "update_attempt": lambda s: s.update_attempt("ro-0", "at-0", "running"),
    "update_attempt, latest": lambda s: s.update_attempt("ro-0", "latest", "running"),
    "add_span": lambda s: s.add_span(Span.from_attributes(attributes={}, rollout_id="ro-1", attempt_id="at-0")),
    "get_next_span_sequence_id": lambda s: s.get_next_span_sequence_id("ro-1", "at-0"),
    "rollback_resources": lambda s: s.rollback_resources("rs-0", 1),
    "rollback_resources, version": lambda s: s.rollback_resources("rs-1", 2),
    "report_worker_lost": lambda s: s.report_worker_lost("w0", message="why"),
}


@pytest.mark.parametrize("use", UNKNOWN_IDS)
async def test_unknown_ids(stores: Stores, use: str) -> None:
    async with stores.open() as (store, _):
        await _scene(store)
        async with unchanged(store):
            await _refused(NotFound, UNKNOWN_IDS[use](store))


# --- JSON ------------------------------------------------------------------------------------------


@dataclass
class _Point:
    x: int = 1


def _cycle() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


BAD_JSON: Mapping[str, tuple[type[InvalidValue], Any]] = {
    "object": (NotJson, object()),
    "set": (NotJson, {1, 2}),
    "bytes": (NotJson, b"x"),
    "class": (NotJson, dict),
    "decimal": (NotJson, Decimal(1)),
    "datetime": (NotJson, datetime(2026, 1, 1, tzinfo=UTC)),
    "dataclass": (NotJson, _Point()),
    "record": (NotJson, RolloutConfig()),
    "nan": (NotJson, NAN),
    "infinity": (NotJson, [{"a": -INFINITY}]),
    "int key": (NotJson, {1: 2}),
    "None key": (NotJson, {"a": [{None: 1}]}),
    "2**63": (NotJson, 2**63),
    "-2**63 - 1": (NotJson, -(2**63) - 1),
    "NUL": (NotJson, "a\0b"),
    "NUL after backslashes": (NotJson, "\\\\\0"),
    "NUL in a key": (NotJson, {"a\0": 1}),
    "surrogate": (NotJson, "\ud800"),
    "surrogate in a key": (NotJson, {"\udfff": 1}),
    "10 MB": (TooLarge, TEN_MB),
    "10 MB of parts": (TooLarge, [{"k": "x" * 1_000_000}] * 10),
    "deep": (TooLarge, deep(100)),
    "very deep": (TooLarge, deep(100_000)),
    "cycle": (TooLarge, _cycle()),
}

JSON_USES: Mapping[str, Use] = {
    "enqueue_rollout input": lambda s, c, x: s.enqueue_rollout(x),
    "enqueue_rollout metadata": lambda s, c, x: s.enqueue_rollout(1, metadata={"k": x}),
    "enqueue_many_rollouts": lambda s, c, x: s.enqueue_many_rollouts(requests(1, x)),
    "start_rollout input": lambda s, c, x: s.start_rollout(x),
    "start_rollout metadata": lambda s, c, x: s.start_rollout(1, metadata={"k": x}),
    "update_rollout input": lambda s, c, x: s.update_rollout("ro-1", input=x),
    "update_rollout metadata": lambda s, c, x: s.update_rollout("ro-1", metadata={"k": x}),
    "update_attempt metadata": lambda s, c, x: s.update_attempt("ro-1", "at-1", "failed", metadata={"k": x}),
    "update_worker heartbeat_stats": lambda s, c, x: s.update_worker("worker", {"k": x}, attempt_ids=["at-1"]),
    "add_resources": lambda s, c, x: s.add_resources({"p": prompt("x"), "m": llm(k=x)}),
    "update_resources": lambda s, c, x: s.update_resources("rs-1", {"m": llm(k=x)}),
}


@pytest.mark.parametrize("use", JSON_USES)
async def test_what_is_not_json(stores: Stores, use: str) -> None:
    async with stores.open() as (store, _):
        claim = await _scene(store)
        async with unchanged(store):
            for name, (error, value) in BAD_JSON.items():
                await _refused(error, JSON_USES[use](store, claim, value), name)


class _Number(IntEnum):
    ONE = 1


class _Word(StrEnum):
    A = "a"


class _OldWord(str, Enum):  # noqa: UP042 - its str() is another
    B = "b"


class _Named(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "another"


class _Fraction(float):
    pass


class _Table(dict[str, int]):
    pass


GOOD_JSON: Sequence[tuple[Any, Any]] = (
    ((1, ("a",)), [1, ["a"]]),
    ({"": {"é": "\u2028🎈\x01\x7f"}}, {"": {"é": "\u2028🎈\x01\x7f"}}),
    ([2**63 - 1, -(2**63), 0.1, 1e300, -0.0, True, None], [2**63 - 1, -(2**63), 0.1, 1e300, -0.0, True, None]),
    ([_Number.ONE, _Word.A, {_Word.A: 1}, {_OldWord.B: _OldWord.B}], [1, "a", {"a": 1}, {"b": "b"}]),
    ([_Named("name"), {_Named("key"): _Fraction(0.5)}, _Table(a=1)], ["name", {"key": 0.5}, {"a": 1}]),
    ("\\u0000 \\\\u0000", "\\u0000 \\\\u0000"),
    (deep(50), deep(50)),
    ("x" * 1_000_000, "x" * 1_000_000),
)


@pytest.mark.parametrize("number", range(len(GOOD_JSON)))
async def test_what_is_json(stores: Stores, number: int) -> None:
    given, expected = GOOD_JSON[number]
    async with stores.open() as (store, _):
        rollout = await store.enqueue_rollout(given, metadata={"k": given})
        assert (rollout.input, rollout.metadata) == (expected, {"k": expected})
        assert await rollout_now(store, rollout.rollout_id) == rollout
        assert (await store.update_worker("worker", {"k": given})).heartbeat_stats == {"k": expected}
        added = await store.add_resources({"m": llm(k=given)})
        assert added.resources == {"m": llm(k=expected)}


NOT_AN_OBJECT: Mapping[str, Use] = {
    "enqueue_rollout": lambda s, c, x: s.enqueue_rollout(1, metadata=x),
    "start_rollout": lambda s, c, x: s.start_rollout(1, metadata=x),
    "update_rollout": lambda s, c, x: s.update_rollout("ro-1", metadata=x),
    "update_attempt": lambda s, c, x: s.update_attempt("ro-1", "at-1", "failed", metadata=x),
    "update_worker": lambda s, c, x: s.update_worker("worker", x),
}


@pytest.mark.parametrize("use", NOT_AN_OBJECT)
async def test_metadata_and_statistics_are_objects_with_string_keys(stores: Stores, use: str) -> None:
    async with stores.open() as (store, _):
        claim = await _scene(store)
        async with unchanged(store):
            for bad in ([1], "x", 5, {1: 2}, {None: 1}, [("a", 1)], {"\ud800": 1}, object()):
                await _refused(NotJson, NOT_AN_OBJECT[use](store, claim, bad), bad)
            if use == "update_worker":
                await _refused(InvalidValue, store.update_worker("worker", None))  # pyright: ignore[reportArgumentType] - refused


# --- Values ----------------------------------------------------------------------------------------


def _mutated(**changes: Any) -> RolloutConfig:
    """A config that was changed after it was checked."""
    changed = RolloutConfig()
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def _mutated_request(**changes: Any) -> EnqueueRolloutRequest:
    request = EnqueueRolloutRequest(input=1)
    for name, value in changes.items():
        setattr(request, name, value)
    return request


BAD_CONFIGS: Sequence[Any] = (
    *(_mutated(timeout_seconds=bad) for bad in (0, -1, NAN, INFINITY, "x", HUGE)),
    *(_mutated(unresponsive_seconds=bad) for bad in (0, -1, NAN, INFINITY, "x")),
    *(_mutated(max_attempts=bad) for bad in (0, -1, 1001, 1.5, "x")),
    *(_mutated(retry_condition=bad) for bad in (["dead"], "failed", [1])),
    "config",
)
BAD_TEXTS: Sequence[Any] = (5, b"x", object(), ["x"], "a\0", "\ud800", deep(100_000))
BAD_STATUSES: Sequence[Any] = ("done", "", "RUNNING", None, 5, ["running"], TEN_MB, deep(100_000))
BAD_SECONDS: Sequence[Any] = (NAN, INFINITY, -INFINITY, HUGE, "1", None, True, [1])
BAD_LIMITS: Sequence[Any] = (0, -1, -2, 1001, 2**63, 1.0, True, "1", None)
BAD_VERSIONS: Sequence[Any] = (0, -1, 2**63, 1.0, True, "1")
BAD_CODES: Sequence[Any] = ("", "Bad Code", "é", "x" * 65, "_x", 5, "a\0", TEN_MB)


class _Foreign(Resource):
    resource_type: str = "foreign"


class _Disguised(LLM):
    resource_type: str = "foreign"


BAD_RESOURCES: Sequence[Any] = (
    None,
    [prompt("x")],
    {"p": {"resource_type": "prompt_template", "template": "x", "engine": "jinja"}},
    {"p": None},
    {"p": Resource(resource_type="llm")},
    {"p": _Foreign()},
    {"p": _Disguised(endpoint="e", model="m")},
    {"p": llm().model_copy(update={"model": 5})},
    {"p": llm().model_copy(update={"sampling_parameters": [1]})},
    {"": prompt("x")},
    {1: prompt("x")},
)

VALUE_USES: Mapping[str, tuple[Use, Sequence[Any]]] = {
    "enqueue_rollout mode": (lambda s, c, x: s.enqueue_rollout(1, mode=x), ("prod", "", 5, TEN_MB)),
    "enqueue_rollout priority": (
        lambda s, c, x: s.enqueue_rollout(1, priority=x),
        (2**31, -(2**31) - 1, 1.5, "x", NAN),
    ),
    "enqueue_rollout config": (lambda s, c, x: s.enqueue_rollout(1, config=x), BAD_CONFIGS),
    "start_rollout config": (lambda s, c, x: s.start_rollout(1, config=x), BAD_CONFIGS),
    "update_rollout config": (
        lambda s, c, x: s.update_rollout("ro-1", config=x),
        (*BAD_CONFIGS, {"max_attempts": 2}, None),
    ),
    "update_rollout mode": (lambda s, c, x: s.update_rollout("ro-1", mode=x), ("prod", "", 5, TEN_MB)),
    "update_rollout status": (lambda s, c, x: s.update_rollout("ro-1", status=x), BAD_STATUSES),
    "update_rollout reason_code": (
        lambda s, c, x: s.update_rollout("ro-1", status="failed", reason_code=x),
        BAD_CODES,
    ),
    "update_attempt status": (lambda s, c, x: s.update_attempt("ro-1", "at-1", x), BAD_STATUSES),
    "update_attempt reason_code": (
        lambda s, c, x: s.update_attempt("ro-1", "at-1", "failed", reason_code=x),
        BAD_CODES,
    ),
    "update_attempt last_heartbeat_time": (
        lambda s, c, x: s.update_attempt("ro-1", "at-1", last_heartbeat_time=x),
        BAD_SECONDS,
    ),
    "dequeue_many_rollouts limit": (lambda s, c, x: s.dequeue_many_rollouts(limit=x, worker_id="worker"), BAD_LIMITS),
    "dequeue_rollout wait_seconds": (lambda s, c, x: s.dequeue_rollout("worker", wait_seconds=x), BAD_SECONDS),
    "update_worker lease_seconds": (
        lambda s, c, x: s.update_worker("worker", {}, lease_seconds=x),
        (*BAD_SECONDS, 0, -1),
    ),
    "update_worker attempt_ids": (
        lambda s, c, x: s.update_worker("worker", attempt_ids=x),
        ("at-1", None, 5, {"at-1": 1}),
    ),
    "delete_finished_rollouts older_than_seconds": (
        lambda s, c, x: s.delete_finished_rollouts(older_than_seconds=x),
        (*BAD_SECONDS, -0.5),
    ),
    "get_resources_by_id version": (lambda s, c, x: s.get_resources_by_id("rs-1", version=x), BAD_VERSIONS),
    "rollback_resources version": (lambda s, c, x: s.rollback_resources("rs-1", x), (*BAD_VERSIONS, None)),
    "add_resources": (lambda s, c, x: s.add_resources(x, resources_id="rs-2"), BAD_RESOURCES),
    "update_resources": (lambda s, c, x: s.update_resources("rs-1", x), BAD_RESOURCES),
    "get_many_span_sequence_ids": (
        lambda s, c, x: s.get_many_span_sequence_ids(x),
        ([("ro-1",)], [("ro-1", "at-1", "x")], [5], None, "ab", [("ro-1", "at-1"), None]),
    ),
    "enqueue_many_rollouts": (
        lambda s, c, x: s.enqueue_many_rollouts(x),
        ([{"input": 1}], [None], None, [*requests(1), 5], [_mutated_request(priority=2**70)]),
    ),
    "add_many_spans": (lambda s, c, x: s.add_many_spans(x), ([{"name": "x"}], [None], None, 5)),
    "add_span sequence_id": (
        lambda s, c, x: s.add_span(_span(c, sequence_id=x)),
        (-1, 2**53, 2**63, 1.5, True, "1", None),
    ),
    "add_span reward": (
        lambda s, c, x: s.add_span(_span(c, attributes={"agentlightning.reward.0.value": x})),
        (NAN, INFINITY, -INFINITY),
    ),
    "add_span old reward": (lambda s, c, x: s.add_span(_span(c, attributes={"reward": x})), (NAN, INFINITY)),
    "add_span start_time": (lambda s, c, x: s.add_span(_span(c, start_time=x)), (NAN, INFINITY)),
    "add_span end_time": (lambda s, c, x: s.add_span(_span(c, end_time=x)), (NAN, -INFINITY)),
}


@pytest.mark.parametrize("use", VALUE_USES)
async def test_bad_values(stores: Stores, use: str) -> None:
    call, values = VALUE_USES[use]
    async with stores.open() as (store, _):
        claim = await _scene(store)
        async with unchanged(store):
            for bad in values:
                await _refused(InvalidValue, call(store, claim, bad), bad)


TEXT_USES: Mapping[str, Use] = {
    "cancel_rollout message": lambda s, c, x: s.cancel_rollout("ro-1", message=x),
    "report_worker_lost message": lambda s, c, x: s.report_worker_lost("worker", message=x),
    "update_rollout reason_message": lambda s, c, x: s.update_rollout("ro-1", status="failed", reason_message=x),
    "update_attempt reason_message": lambda s, c, x: s.update_attempt("ro-1", "at-1", "failed", reason_message=x),
}


@pytest.mark.parametrize("use", TEXT_USES)
async def test_bad_texts(stores: Stores, use: str) -> None:
    async with stores.open() as (store, _):
        claim = await _scene(store)
        async with unchanged(store):
            for bad in BAD_TEXTS:
                error = NotJson if isinstance(bad, str) else InvalidValue
                await _refused(error, TEXT_USES[use](store, claim, bad), bad)
            await _refused(TooLarge, TEXT_USES[use](store, claim, TEN_MB))


# --- Spans -----------------------------------------------------------------------------------------

BAD_SPANS: Mapping[str, tuple[type[InvalidValue], Callable[[AttemptedRollout], Span]]] = {
    "object": (NotJson, lambda c: _span(c, extra=object())),
    "object in an attribute": (NotJson, lambda c: _span(c, attributes={"a": object()})),
    "surrogate": (NotJson, lambda c: _span(c, name="\ud800")),
    "surrogate in an attribute": (NotJson, lambda c: _span(c, attributes={"a": "\ud800"})),
    "NUL": (NotJson, lambda c: _span(c, name="a\0")),
    "NUL in an event": (NotJson, lambda c: _span(c, events=[Event(name="e", attributes={"a\0": 1})])),
    "NUL in the status": (NotJson, lambda c: _span(c, status=TraceStatus(status_code="OK", description="\0"))),
    "10 MB": (TooLarge, lambda c: _span(c, attributes={"a": TEN_MB})),
    "deep": (TooLarge, lambda c: _span(c, extra=deep(100))),
    "as deep as a reader would refuse": (TooLarge, lambda c: _span(c, extra=deep(230))),
    "2**63": (NotJson, lambda c: _span(c, attributes={"a": 2**63})),
    "deep event": (TooLarge, lambda c: _span(c, events=[_event(extra=deep(230))])),
}


@pytest.mark.parametrize("name", BAD_SPANS)
async def test_a_span_that_no_store_would_take_is_refused_with_all_that_came_with_it(stores: Stores, name: str) -> None:
    error, bad = BAD_SPANS[name]
    async with stores.open() as (store, _):
        claim = await _scene(store)
        spoilt = bad(claim)
        async with unchanged(store):
            await _refused(error, store.add_many_spans([span_of(claim), spoilt, span_of(claim)]))
            with pytest.raises(error, match=spoilt.span_id):
                await store.add_span(spoilt)
        assert await store.get_next_span_sequence_id("ro-1", "at-1") == 2


async def test_brackets_in_texts_are_not_depth(stores: Stores) -> None:
    async with stores.open() as (store, _):
        claim = await started(store)
        text = '[{"' * 500 + '\\"' + "]" * 500
        await store.add_span(span_of(claim, attributes={text: text}))
        await store.add_span(span_of(claim, attributes={f"{n}": [n] for n in range(200)}))
        assert [len(span.attributes) for span in await store.query_spans(claim.rollout_id)] == [1, 200]


# --- Too many --------------------------------------------------------------------------------------

TOO_MANY: Mapping[str, Callable[[LightningStore, AttemptedRollout], Awaitable[Any]]] = {
    "rollouts": lambda s, c: s.enqueue_many_rollouts(requests(1) * 10_001),
    "spans": lambda s, c: s.add_many_spans([span_of(c)] * 10_001),
    "sequence ids": lambda s, c: s.get_many_span_sequence_ids([("ro-1", "at-1")] * 10_001),
    "attempts of a worker": lambda s, c: s.update_worker("worker", attempt_ids=["at-1"] * 10_001),
}


@pytest.mark.parametrize("what", TOO_MANY)
async def test_too_many_at_once(stores: Stores, what: str) -> None:
    async with stores.open() as (store, _):
        claim = await _scene(store)
        async with unchanged(store):
            await _refused(TooLarge, TOO_MANY[what](store, claim))


async def test_one_bad_call_does_not_hurt_those_beside_it(stores: Stores) -> None:
    """Also not when they share a transaction."""
    async with stores.open() as (store, _):
        claim = await _scene(store)
        calls: list[Any] = []
        for number in range(20):
            calls += [store.enqueue_rollout(number), store.cancel_rollout("ro-0"), store.add_span(span_of(claim))]
            calls.append(store.start_rollout(number, attempt_id="at-1", worker_id=f"w{number}"))
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [isinstance(result, AgentLightningError) for result in results] == [False, True, False, True] * 20
        assert await statuses(store, "ro-1") == ("running", ["running"])
        assert (await store.query_spans("ro-1")).total == 21
        assert (await store.query_workers()).total == 1
        assert (await store.query_rollouts()).total == 22
