"""Pages: every filter, every order, every cut, of every kind of record, against plain Python."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from pydantic import BaseModel

from agentlightning.errors import InvalidValue
from agentlightning.store.base import LightningStore
from agentlightning.types import AttemptedRollout, PaginatedResult
from scenes import claimed, config, enqueued, finish, prompt, requests, span_of, started
from stores import Stores

Query = Callable[..., Awaitable[PaginatedResult[Any]]]


# --- A store with something of everything ----------------------------------------------------------


async def _fill(store: LightningStore, clock: Any) -> None:
    """Rollouts in every status, and in each field values that differ, that are equal, and that are missing."""
    for number, mode in enumerate(["train", None, "val", "test", "train"]):
        await store.update_resources(f"rs-{number % 2}", {"p": prompt(f"{number}")})
        clock.advance(1)
        await store.enqueue_many_rollouts(
            requests(number, f"other {number}", mode=mode, priority=number % 3, config=config())
        )
    for worker_id, end in [
        ("w-b", "succeeded"),
        ("w-a", "failed"),
        (None, "running"),
        ("W-C", "timeout"),
        ("w-a", None),
    ]:
        clock.advance(1)
        claim = await claimed(store, worker_id)
        if end is not None:
            await finish(store, claim, end)
    clock.advance(1)
    for number, claim in enumerate(await store.dequeue_many_rollouts(limit=3, worker_id="w_1")):
        await store.update_attempt(claim.rollout_id, claim.attempt.attempt_id, "failed", reason_code=f"r{number % 2}")
    waiting = await store.query_rollouts(status_in=["queuing"])
    await store.cancel_rollout(waiting[0].rollout_id)
    await store.update_worker("w_2", lease_seconds=5)


@pytest.fixture
def rollout_id() -> str:
    """The rollout whose attempts and spans are queried."""
    return "ro-queried"


async def _fill_attempts(store: LightningStore, clock: Any, rollout_id: str) -> None:
    """Five attempts and their spans, next to those of another rollout."""
    await store.add_span(span_of(await started(store)))
    for number, worker_id in enumerate(["b", None, "a", "a", None]):
        claim = await (
            store.start_attempt(rollout_id, worker_id)
            if number
            else store.start_rollout("input", rollout_id=rollout_id, worker_id=worker_id)
        )
        clock.advance(1)
        if number % 2:
            await store.add_many_spans(_spans(claim, number))


def _spans(claim: AttemptedRollout, number: int) -> list[Any]:
    span = span_of(
        claim,
        span_id=f"{number}a",
        trace_id=f"T{number % 3}%",
        parent_id=None,
        name="llm.Call",
        start_time=5.0 - number,
        end_time=9.0,
    )
    return [
        span,
        span.model_copy(update={"span_id": f"{number}b_", "parent_id": f"{number}a", "start_time": None}),
        span.model_copy(update={"span_id": "c", "name": "tool_é", "sequence_id": 1, "end_time": None}),
        span.model_copy(update={"span_id": "d", "name": "llm", "trace_id": "t", "parent_id": "c"}),
    ]


async def _filled(store: LightningStore, clock: Any, rollout_id: str) -> dict[str, Query]:
    """The queries, of a store that has something to find."""
    await _fill(store, clock)
    await _fill_attempts(store, clock, rollout_id)

    async def attempts(**arguments: Any) -> PaginatedResult[Any]:
        return await store.query_attempts(rollout_id, **arguments)

    async def spans(**arguments: Any) -> PaginatedResult[Any]:
        return await store.query_spans(rollout_id, **arguments)

    return {
        "rollouts": store.query_rollouts,
        "attempts": attempts,
        "spans": spans,
        "resources": store.query_resources,
        "workers": store.query_workers,
    }


# --- Order -----------------------------------------------------------------------------------------

SORTABLE = [
    *(
        ("rollouts", field)
        for field in (
            *("rollout_id", "start_time", "end_time", "mode", "resources_id", "resources_version"),
            *("priority", "status", "reason_code", "reason_message"),
        )
    ),
    *(
        ("attempts", field)
        for field in (
            *("rollout_id", "attempt_id", "sequence_id", "start_time", "end_time", "status"),
            *("worker_id", "last_heartbeat_time", "reason_code", "reason_message"),
        )
    ),
    *(
        ("spans", field)
        for field in (
            *("rollout_id", "attempt_id", "trace_id", "span_id", "parent_id"),
            *("name", "start_time", "end_time"),
        )
    ),
    *(("resources", field) for field in ("resources_id", "create_time", "update_time", "version")),
    *(
        ("workers", field)
        for field in (
            *("worker_id", "status", "last_heartbeat_time", "last_dequeue_time", "last_busy_time"),
            *("last_idle_time", "current_rollout_id", "current_attempt_id", "lease_seconds"),
        )
    ),
]
NOT_SORTABLE = {
    "rollouts": ("input", "config", "metadata", "attempt"),
    "attempts": ("metadata",),
    "spans": ("status", "attributes", "events", "links", "context", "parent", "resource"),
    "resources": ("resources",),
    "workers": ("heartbeat_stats", "stale_attempt_ids"),
}


def _place(field: str) -> Callable[[BaseModel], tuple[int, Any]]:
    """Where a record stands: a missing time is later than all, any other missing value less than all."""

    def key(record: BaseModel) -> tuple[int, Any]:
        value = getattr(record, field)
        if value is None:
            return (1 if field.endswith("_time") else -1, 0)
        return (0, value)

    return key


@pytest.mark.parametrize("table", NOT_SORTABLE)
async def test_every_order(stores: Stores, rollout_id: str, table: str) -> None:
    async with stores.open() as (store, clock):
        query = (await _filled(store, clock, rollout_id))[table]
        unsorted = list(await query(sort_by=None))
        assert len(unsorted) > 1
        assert list(await query(sort_by=None, sort_order="desc")) == unsorted[::-1]
        for field in (field for of, field in SORTABLE if of == table):
            expected = sorted(unsorted, key=_place(field))
            assert list(await query(sort_by=field)) == expected, field
            assert list(await query(sort_by=field, sort_order="desc")) == expected[::-1], field
            page = await query(sort_by=field, sort_order="desc", limit=2, offset=1)
            assert list(page) == expected[::-1][1:3], field
            assert page.total == len(expected)


async def test_spans_by_sequence_id_are_sorted_by_attempt_first(stores: Stores, rollout_id: str) -> None:
    async with stores.open() as (store, clock):
        await _filled(store, clock, rollout_id)
        order = {attempt.attempt_id: attempt.sequence_id for attempt in await store.query_attempts(rollout_id)}
        spans = await store.query_spans(rollout_id)
        assert [(order[span.attempt_id], span.sequence_id, span.span_id) for span in spans] == [
            *((2, n, i) for n, i in [(1, "1a"), (1, "c"), (2, "1b_"), (3, "d")]),
            *((4, n, i) for n, i in [(1, "3a"), (1, "c"), (2, "3b_"), (3, "d")]),
        ]
        assert list(await store.query_spans(rollout_id, sort_order="desc")) == list(spans)[::-1]
        assert [attempt.sequence_id for attempt in await store.query_attempts(rollout_id)] == [1, 2, 3, 4, 5]


async def test_records_are_in_the_order_in_which_they_were_stored_unless_told_otherwise(stores: Stores) -> None:
    async with stores.open() as (store, clock):
        for name in ("b", "a", "c"):
            await store.enqueue_rollout(1, rollout_id=name)
            await store.update_worker(name)
            await store.add_resources({}, resources_id=name)
            clock.jump_wall(-5)
        assert [each.rollout_id for each in await store.query_rollouts()] == ["b", "a", "c"]
        assert [each.worker_id for each in await store.query_workers()] == ["b", "a", "c"]
        assert [each.resources_id for each in await store.query_resources()] == ["b", "a", "c"]


@pytest.mark.parametrize("table", NOT_SORTABLE)
async def test_fields_without_an_order_are_refused(stores: Stores, rollout_id: str, table: str) -> None:
    async with stores.open() as (store, clock):
        query = (await _filled(store, clock, rollout_id))[table]
        for field in (*NOT_SORTABLE[table], "", "seq", "rollout_id;", 1):
            with pytest.raises(InvalidValue, match="sort"):
                await query(sort_by=field)


# --- Pages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["rollouts", "attempts", "spans", "resources", "workers"])
async def test_pages_cut_the_same_list(stores: Stores, rollout_id: str, table: str) -> None:
    async with stores.open() as (store, clock):
        query = (await _filled(store, clock, rollout_id))[table]
        whole = await query()
        assert (whole.limit, whole.offset, whole.total) == (-1, 0, len(whole))
        for limit in (1, 2, len(whole), len(whole) + 1, 10**6, -1):
            for offset in (0, 1, len(whole) - 1, len(whole), len(whole) + 5):
                page = await query(limit=limit, offset=offset)
                end = None if limit == -1 else offset + limit
                assert list(page) == list(whole)[offset:end]
                assert (page.limit, page.offset, page.total) == (limit, offset, len(whole))


BAD_PAGES: dict[str, tuple[Any, ...]] = {
    "limit": (0, -2, 2**63, 1.0, True, None, "1"),
    "offset": (-1, 2**63, 0.5, None),
    "sort_order": ("up", None),
}


@pytest.mark.parametrize("table", ["rollouts", "attempts", "spans", "resources", "workers", "versions"])
async def test_bad_pages_are_refused(stores: Stores, rollout_id: str, table: str) -> None:
    async def versions(**arguments: Any) -> PaginatedResult[Any]:
        return await store.query_resource_versions("rs-0", **arguments)

    async with stores.open() as (store, clock):
        queries = {"versions": versions} | await _filled(store, clock, rollout_id)
        for name, values in BAD_PAGES.items():
            for value in values:
                with pytest.raises(InvalidValue, match=name):
                    await queries[table](**{name: value})


async def test_long_results_are_whole(stores: Stores) -> None:
    async with stores.open() as (store, _):
        ids = await enqueued(store, *range(700))
        for limit in (-1, 700, 699, 257, 256):
            page = await store.query_rollouts(limit=limit)
            assert [rollout.rollout_id for rollout in page] == ids[: None if limit == -1 else limit]
            assert page.total == 700
        page = await store.query_rollouts(status_in=["queuing"], limit=3, offset=698)
        assert [rollout.rollout_id for rollout in page] == ids[698:]
        assert page.total == 700


# --- Filters ---------------------------------------------------------------------------------------

Keep = Callable[[Any], bool]


async def _check(query: Query, keep: Keep, **filters: Any) -> list[Any]:
    """The filters find what plain Python finds, also in pages; returns it."""
    expected = [record for record in await query(sort_by=None) if keep(record)]
    page = await query(sort_by=None, **filters)
    assert list(page) == expected, filters
    assert page.total == len(expected), filters
    first = await query(sort_by=None, limit=1, **filters)
    assert list(first) == expected[:1], filters
    assert first.total == len(expected), filters
    return expected


async def test_filters_of_rollouts(stores: Stores, rollout_id: str) -> None:
    async with stores.open() as (store, clock):
        query: Query = (await _filled(store, clock, rollout_id))["rollouts"]
        every = list(await query())
        ids = [rollout.rollout_id for rollout in every]
        some, part = [ids[4], ids[1], "ro-unknown", ids[1]], ids[2][3:]
        statuses = ["running", "requeuing", "cancelled", "running"]
        assert await _check(query, lambda r: r.status in statuses, status_in=statuses)
        assert await _check(query, lambda r: r.rollout_id in some, rollout_id_in=some)
        assert await _check(query, lambda r: part in r.rollout_id, rollout_id_contains=part)
        assert await _check(query, lambda r: True, rollout_id_contains="")
        for nothing in ("%", "_", "RO-", "ro-%", "é", "'"):
            assert not await _check(query, lambda r: False, rollout_id_contains=nothing)
        for none in ({"status_in": []}, {"rollout_id_in": []}, {"rollout_id_in": ["not an id!", ""]}):
            assert not await _check(query, lambda r: False, **none)
        both = {"status_in": statuses, "rollout_id_in": ids[3:8]}
        assert await _check(query, lambda r: r.status in statuses and r.rollout_id in ids[3:8], **both)
        either = await _check(
            query, lambda r: r.status in statuses or r.rollout_id in ids[3:8], **both, filter_logic="or"
        )
        assert len(every) > len(either) > 5
        all_three = {**both, "rollout_id_contains": ids[0]}
        assert not await _check(query, lambda r: False, **all_three, filter_logic="and")
        assert await _check(
            query,
            lambda r: r.status in statuses or r.rollout_id in ids[3:8] or r.rollout_id == ids[0],
            **all_three,
            filter_logic="or",
        )
        assert not await _check(query, lambda r: False, status_in=[], rollout_id_in=[], filter_logic="or")
        assert list(await query(filter_logic="or")) == every


async def test_old_names_of_filters(stores: Stores, rollout_id: str) -> None:
    async with stores.open() as (store, clock):
        query: Query = (await _filled(store, clock, rollout_id))["rollouts"]
        ids = [rollout.rollout_id for rollout in await query()][:2]
        assert await _check(query, lambda r: r.status == "running", status=["running"])
        assert await _check(query, lambda r: r.rollout_id in ids, rollout_ids=ids)
        for double in ({"status": [], "status_in": []}, {"rollout_ids": ids, "rollout_id_in": ids}):
            with pytest.raises(InvalidValue, match=next(iter(double))):
                await query(**double)


async def test_filters_of_spans(stores: Stores, rollout_id: str) -> None:
    async with stores.open() as (store, clock):
        query: Query = (await _filled(store, clock, rollout_id))["spans"]
        for field, exact, part in (
            ("trace_id", "T1%", "%"),
            ("span_id", "c", "b_"),
            ("parent_id", "c", "a"),
            ("name", "llm", "llm"),
        ):
            equal = await _check(query, lambda s, f=field, v=exact: getattr(s, f) == v, **{field: exact})
            within = await _check(
                query, lambda s, f=field, v=part: v in (getattr(s, f) or ""), **{f"{field}_contains": part}
            )
            assert equal
            assert within
            for nothing in ("zz", "LLM", "T%%", "_é_"):
                assert not await _check(query, lambda s: False, **{field: nothing})
                assert not await _check(query, lambda s: False, **{f"{field}_contains": nothing})
        assert await _check(query, lambda s: "é" in s.name, name_contains="é")
        both = {"name_contains": "llm", "parent_id": "c"}
        assert await _check(query, lambda s: "llm" in s.name and s.parent_id == "c", **both)
        assert await _check(query, lambda s: "llm" in s.name or s.parent_id == "c", **both, filter_logic="or")


async def test_spans_of_one_attempt_and_of_the_latest(stores: Stores, rollout_id: str) -> None:
    async with stores.open() as (store, clock):
        await _filled(store, clock, rollout_id)
        attempts = list(await store.query_attempts(rollout_id))
        every = list(await store.query_spans(rollout_id))
        for attempt in attempts:
            expected = [span for span in every if span.attempt_id == attempt.attempt_id]
            assert list(await store.query_spans(rollout_id, attempt.attempt_id)) == expected
            # Rollout and attempt always apply, whatever joins the other filters.
            narrowed = await store.query_spans(
                rollout_id, attempt.attempt_id, name="llm", span_id="c", filter_logic="or"
            )
            assert list(narrowed) == [span for span in expected if span.name == "llm" or span.span_id == "c"]
        # The newest attempt, not the one of the newest span: it has none.
        assert list(await store.query_spans(rollout_id, "latest")) == []
        mine = await store.add_span(span_of(await store.start_attempt(rollout_id)))
        assert list(await store.query_spans(rollout_id, "latest")) == [mine]
        assert list(await store.query_spans(rollout_id, "at-unknown")) == []
        [other] = [r for r in await store.query_rollouts(status_in=["running"]) if r.rollout_id != rollout_id][-1:]
        assert list(await store.query_spans(other.rollout_id, attempts[1].attempt_id)) == []


async def test_filters_of_workers(stores: Stores, rollout_id: str) -> None:
    async with stores.open() as (store, clock):
        query: Query = (await _filled(store, clock, rollout_id))["workers"]
        assert {worker.status for worker in await query()} == {"idle", "busy", "unknown"}
        for states in (["busy"], ["idle", "unknown"], ["idle", "busy", "unknown"]):
            assert await _check(query, lambda w, s=states: w.status in s, status_in=states)
        assert not await _check(query, lambda w: False, status_in=[])
        for part in ("w-", "W", "_", "", "a"):
            assert await _check(query, lambda w, p=part: p in w.worker_id, worker_id_contains=part)
        assert not await _check(query, lambda w: False, worker_id_contains="%")
        both = {"status_in": ["idle"], "worker_id_contains": "a"}
        await _check(query, lambda w: w.status == "idle" and "a" in w.worker_id, **both)
        await _check(query, lambda w: w.status == "idle" or "a" in w.worker_id, **both, filter_logic="or")


async def test_filters_of_resources(stores: Stores, rollout_id: str) -> None:
    async with stores.open() as (store, clock):
        query: Query = (await _filled(store, clock, rollout_id))["resources"]
        assert [(each.resources_id, each.version) for each in await query()] == [("rs-1", 2), ("rs-0", 3)]
        assert await _check(query, lambda r: r.resources_id == "rs-0", resources_id="rs-0")
        assert await _check(query, lambda r: "-1" in r.resources_id, resources_id_contains="-1")
        assert not await _check(query, lambda r: False, resources_id="rs-0", resources_id_contains="1")


BAD_FILTERS: dict[str, tuple[dict[str, Any], ...]] = {
    "rollouts": (
        {"status_in": ["dead"]},
        {"status_in": "running"},
        {"rollout_id_in": "ro-1"},
        {"rollout_id_in": ["a\0"]},
        {"rollout_id_in": [1]},
        {"rollout_id_in": ["x"] * 10_001},
        {"rollout_id_contains": "\ud800"},
        {"filter_logic": "xor"},
    ),
    "workers": ({"status_in": ["running"]}, {"worker_id_contains": 1}, {"filter_logic": None}),
    "spans": ({"name": 1}, {"trace_id_contains": b"x"}, {"filter_logic": "AND"}),
    "resources": ({"resources_id": 1}, {"resources_id_contains": "\0"}),
}


@pytest.mark.parametrize("table", BAD_FILTERS)
async def test_bad_filters_are_refused(stores: Stores, rollout_id: str, table: str) -> None:
    async with stores.open() as (store, clock):
        query = (await _filled(store, clock, rollout_id))[table]
        for bad in BAD_FILTERS[table]:
            with pytest.raises(InvalidValue, match=next(iter(bad)).removesuffix("_in")):
                await query(**bad)


async def test_up_to_ten_thousand_ids_at_once(stores: Stores) -> None:
    async with stores.open() as (store, _):
        ids = await enqueued(store, 1, 2)
        wanted: Sequence[str] = [*(f"ro-{n}" for n in range(9_998)), *ids]
        assert [rollout.rollout_id for rollout in await store.query_rollouts(rollout_id_in=wanted)] == ids
