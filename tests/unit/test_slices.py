"""Large calls are carried out in slices: the writes of others go between, and no guarantee is lost."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from agentlightning.errors import NotFound
from agentlightning.store import bulk
from agentlightning.store.engine import EngineStore
from agentlightning.store.operations import attempts as attempt_ops, rollouts as rollout_ops, spans as span_ops
from agentlightning.store.slices import sized_slices, slices
from agentlightning.store.sqlite import group_commit
from agentlightning.store.sqlite.store import InMemoryLightningStore, SqliteLightningStore
from agentlightning.types import EnqueueRolloutRequest, Span
from clocks import ManualClock
from scenes import prompt, requests

MANY = 2_000
WORKERS = [f"w-{number}" for number in range(600)]
Call = Callable[[EngineStore], Awaitable[Any]]


def _spans(count: int, **fields: Any) -> list[Span]:
    return [
        Span.from_attributes(rollout_id="ro-a", attempt_id="at-a", span_id=f"{n:016x}", attributes={"n": n, **fields})
        for n in range(count)
    ]


CALLS: dict[str, tuple[str, Call]] = {
    "rollouts": ("ROLLOUTS", lambda store: store.enqueue_many_rollouts(requests(*range(MANY)))),
    "spans": ("SPANS", lambda store: store.add_many_spans(_spans(MANY))),
    "last spans": ("SPANS", lambda store: store.finish_attempt("ro-a", "at-a", "succeeded", _spans(MANY))),
    "sequence ids": ("IDS", lambda store: store.get_many_span_sequence_ids([("ro-a", "at-a")] * MANY)),
    "a heartbeat": ("IDS", lambda store: store.update_worker("w-1", attempt_ids=["at-a"] * MANY)),
    "a claim": ("ATTEMPTS", lambda store: store.dequeue_many_rollouts(limit=1_000, worker_id="w-1")),
    "a lost worker": ("ATTEMPTS", lambda store: store.report_worker_lost("w-lost", message="gone")),
    "directives": ("IDS", lambda store: store.direct_workers("drain", worker_ids=WORKERS)),
}


async def _prepare(store: EngineStore) -> None:
    await store.start_rollout(1, rollout_id="ro-a", attempt_id="at-a")
    await store.enqueue_many_rollouts(requests(*range(700)))
    await store.dequeue_many_rollouts(limit=300, worker_id="w-lost")
    for each in WORKERS:
        await store.update_worker(each)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("in_slices", [True, False])
async def test_others_go_between_the_slices_of_a_large_call(
    name: str, in_slices: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are queued at the same moment. In one piece, the large call would end with the same commit as the other."""
    most, call = CALLS[name]
    async with SqliteLightningStore(tmp_path / "s.db", "none") as store:
        await _prepare(store)
        if not in_slices:
            for module in (bulk, attempt_ops):
                monkeypatch.setattr(module, most, 10_000, raising=module is bulk)
        large = asyncio.ensure_future(call(store))
        await asyncio.sleep(0)
        await store.update_worker("other")
        assert large.done() != in_slices
        await large
        assert (await store.verify()).ok


@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize("size", [10, 3_000_000])
async def test_a_commit_carries_no_more_than_takes_little_time(
    size: int, limited: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many rows, or few that are large."""
    if not limited:
        monkeypatch.setattr(group_commit, "_BATCH_WORK", 10**9)
    calls, rows = (20, 200) if size == 10 else (12, 1)
    async with SqliteLightningStore(tmp_path / "s.db", "none") as store:
        before = _commits(store)
        async with asyncio.TaskGroup() as group:
            for _ in range(calls):
                group.create_task(store.enqueue_many_rollouts(requests(*["x" * size] * rows)))
        commits = _commits(store) - before
        assert commits >= 5 if limited else commits <= 2
        assert (await store.statistics())["total_rollouts"] == calls * rows


def _commits(store: EngineStore) -> Any:
    return next(each.value for each in store.measures() if each.name == "agl_store_commits")


@pytest.mark.parametrize("looked_up_once", [True, False])
async def test_all_rollouts_of_one_call_get_the_same_resources(
    looked_up_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look_up_nothing(*_: object) -> None:
        return

    if not looked_up_once:
        monkeypatch.setattr(bulk.BulkStore, "_check_drafts", look_up_nothing)
    async with InMemoryLightningStore() as store:
        await store.add_resources({"p": prompt("one")}, resources_id="rs-1")
        large = asyncio.ensure_future(store.enqueue_many_rollouts(requests(*range(MANY))))
        for _ in range(3):
            await store.update_resources("rs-1", {"p": prompt("more")})
            assert not large.done()
        versions = {each.resources_version for each in await large}
        assert (len(versions) == 1) == looked_up_once
        assert {each.resources_version for each in await store.enqueue_many_rollouts(requests(1))} == {4}


async def test_without_the_check_a_refused_call_would_leave_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the contract tests rely on: without the look ahead, the first slices would be stored."""

    async def look_at_nothing(*_: object) -> list[Any]:
        return []

    monkeypatch.setattr(rollout_ops, "check", look_at_nothing)
    monkeypatch.setattr(span_ops, "find_refused", look_at_nothing)
    async with InMemoryLightningStore() as store:
        await store.start_rollout(1, rollout_id="ro-a", attempt_id="at-a")
        with pytest.raises(NotFound):
            await store.enqueue_many_rollouts(
                [*requests(*range(MANY)), EnqueueRolloutRequest(input=1, resources_id="rs-none")]
            )
        with pytest.raises(NotFound):
            await store.add_many_spans(
                [*_spans(MANY), Span.from_attributes(rollout_id="ro-a", attempt_id="at-none", attributes={})]
            )
        statistics = await store.statistics()
        assert statistics["total_rollouts"] > 1
        assert statistics["total_spans"] > 0


_KILLED_BETWEEN = """
import asyncio, os, sys
from agentlightning.store.sqlite.store import SqliteLightningStore
from agentlightning.types import EnqueueRolloutRequest

async def main():
    store = SqliteLightningStore(sys.argv[1])
    await store.start_rollout(1, rollout_id="ro-first")
    asked = [EnqueueRolloutRequest(input=n, rollout_id=f"ro-{n}") for n in range(2_000)]
    large = asyncio.ensure_future(store.enqueue_many_rollouts(asked))
    await asyncio.sleep(0)
    await store.update_worker("other")
    await store.update_worker("another")
    os.kill(os.getpid(), 9)

asyncio.run(main())
"""


async def test_a_call_that_was_killed_between_two_slices_is_completed_by_its_repeat(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    killed = subprocess.run([sys.executable, "-c", _KILLED_BETWEEN, path], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    async with SqliteLightningStore(path) as store:
        part = (await store.statistics())["total_rollouts"]
        assert 1 < part < 2_001
        asked = [EnqueueRolloutRequest(input=n, rollout_id=f"ro-{n}") for n in range(2_000)]
        assert [each.input for each in await store.enqueue_many_rollouts(asked)] == [*range(2_000)]
        assert (await store.statistics())["total_rollouts"] == 2_001
        assert [each.rollout_id for each in await store.dequeue_many_rollouts(limit=2)] == ["ro-0", "ro-1"]
        assert (await store.verify()).ok


async def test_a_worker_that_held_very_many_expires_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ManualClock()
    monkeypatch.setattr(attempt_ops, "ATTEMPTS", 50)
    async with InMemoryLightningStore(clock=clock) as store:
        await store.enqueue_many_rollouts(requests(*range(300)))
        await store.dequeue_many_rollouts(limit=300, worker_id="w-1")
        await store.update_worker("w-1", lease_seconds=5.0)
        clock.advance(6)
        worker = await store.get_worker_by_id("w-1")
        assert worker is not None
        assert worker.status == "unknown"
        assert not await store.query_rollouts(status_in=["preparing", "running"], limit=1)
        assert (await store.verify()).ok


class _Piece:
    def __init__(self, size: int) -> None:
        self.size = size


def test_slices_are_moderate_in_number_and_in_bytes() -> None:
    def sizes(pieces: list[int]) -> list[list[int]]:
        return [[each.size for each in part] for part in sized_slices(map(_Piece, pieces), 3, 100)]

    assert sizes([]) == []
    assert sizes([1, 2, 3, 4]) == [[1, 2, 3], [4]]
    assert sizes([60, 60, 1, 200, 1]) == [[60, 60], [1, 200], [1]]
    assert list(slices([1, 2, 3], 2)) == [[1, 2], [3]]
    assert list(slices([], 2)) == []
