"""What stands still, and why: each situation made in a real store, and read from it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from agentlightning import InMemoryLightningStore
from agentlightning.cli.doctor import Traced, check_disk, check_spans
from agentlightning.cli.overview import RECENT, Finding, Overview, Pace, explain, gather
from agentlightning.types import Span
from clocks import ManualClock
from scenes import claimed, config, enqueued, finish

Scene = Callable[[InMemoryLightningStore, ManualClock], Awaitable[None]]


async def look_at(scene: Scene) -> tuple[Overview, list[Finding]]:
    clock = ManualClock()
    async with InMemoryLightningStore(clock=clock) as store:
        await scene(store, clock)
        overview = await gather(store)
    return overview, explain(overview)


async def fail(store: InMemoryLightningStore, message: str, code: str = "agent_error") -> None:
    attempted = await claimed(store, "w-1")
    await store.update_attempt(
        attempted.rollout_id, attempted.attempt.attempt_id, "failed", reason_code=code, reason_message=message
    )


# --- Scenes ------------------------------------------------------------------------------------------


async def nothing(store: InMemoryLightningStore, clock: ManualClock) -> None:
    pass


async def nobody_ever_came(store: InMemoryLightningStore, clock: ManualClock) -> None:
    await enqueued(store, "a", "b")


async def everybody_is_gone(store: InMemoryLightningStore, clock: ManualClock) -> None:
    await store.update_worker("w-1", lease_seconds=10)
    await store.update_worker("w-2", lease_seconds=10)
    await enqueued(store, "a")
    clock.advance(300)


async def gone_without_a_lease(store: InMemoryLightningStore, clock: ManualClock) -> None:
    await store.dequeue_rollout("w-1")
    await enqueued(store, "a")
    clock.advance(120)


async def leave(store: InMemoryLightningStore, worker_id: str) -> None:
    await store.update_worker(worker_id, lease_seconds=10)
    await store.report_worker_lost(worker_id, message="its runner has ended", reason_code="worker_left")


async def everybody_has_left(store: InMemoryLightningStore, clock: ManualClock) -> None:
    await leave(store, "w-1")
    await leave(store, "w-2")
    await enqueued(store, "a")
    clock.advance(60)


async def one_has_left_and_one_died(store: InMemoryLightningStore, clock: ManualClock) -> None:
    await store.update_worker("w-1", lease_seconds=10)
    clock.advance(1)
    await store.report_worker_lost("w-1", message="its process was killed by SIGKILL")
    await leave(store, "w-2")
    await enqueued(store, "a")
    clock.advance(59)


async def everybody_drains(store: InMemoryLightningStore, clock: ManualClock) -> None:
    await store.update_worker("w-1", lease_seconds=10)
    await store.direct_workers("drain")
    await enqueued(store, "a")


async def idle_beside_the_queue(store: InMemoryLightningStore, clock: ManualClock) -> None:
    await enqueued(store, "a")
    for _ in range(8):
        await store.update_worker("w-1", lease_seconds=10)
        clock.advance(5)


async def all_at_work(store: InMemoryLightningStore, clock: ManualClock) -> None:
    await store.update_worker("w-1", lease_seconds=100)
    await enqueued(store, "a", "b", "c", "d")
    await finish(store, await claimed(store, "w-1"))
    clock.advance(10)
    await finish(store, await claimed(store, "w-1"))
    await claimed(store, "w-1")


async def in_work(store: InMemoryLightningStore, clock: ManualClock) -> None:
    await enqueued(store, "a")
    await claimed(store, "w-1")


async def all_done(store: InMemoryLightningStore, clock: ManualClock) -> None:
    await enqueued(store, "a")
    await finish(store, await claimed(store, "w-1"))


async def silent_for_ever(store: InMemoryLightningStore, clock: ManualClock) -> None:
    await enqueued(store, "a")
    await claimed(store, "w-1")
    clock.advance(3_600)


async def retried(store: InMemoryLightningStore, clock: ManualClock) -> None:
    await store.update_worker("w-1", lease_seconds=100)
    await enqueued(store, "a", config=config())
    await fail(store, "boom")


async def most_fail(store: InMemoryLightningStore, clock: ManualClock) -> None:
    await enqueued(store, *range(6))
    await finish(store, await claimed(store, "w-1"))
    for number in range(4):
        await fail(store, f"boom {number}")
    await fail(store, "lost", "worker_lost")


async def some_fail(store: InMemoryLightningStore, clock: ManualClock) -> None:
    await enqueued(store, *range(6))
    for _ in range(4):
        await finish(store, await claimed(store, "w-1"))
    for number in range(2):
        await fail(store, f"boom {number}")


async def the_last_fail(store: InMemoryLightningStore, clock: ManualClock) -> None:
    await enqueued(store, *range(30))
    for _ in range(25):
        await finish(store, await claimed(store, "w-1"))
    clock.advance(1)
    for number in range(5):
        await fail(store, f"boom {number}")


async def the_first_fails(store: InMemoryLightningStore, clock: ManualClock) -> None:
    await enqueued(store, 1)
    await fail(store, "boom")


async def an_agent_blocks(store: InMemoryLightningStore, clock: ManualClock) -> None:
    await enqueued(store, 1)
    await store.update_worker("w-1", lease_seconds=10)
    held = await claimed(store, "w-1")
    await store.update_attempt(held.rollout_id, held.attempt.attempt_id, "running")
    for _ in range(100):
        clock.advance(9)
        await store.update_worker("w-1", lease_seconds=10)


@pytest.mark.parametrize(
    ("scene", "code", "level", "words"),
    [
        (nothing, "empty", "note", "nothing was ever enqueued"),
        (nobody_ever_came, "no_runner", "problem", "2 rollouts in the queue, and no runner has ever connected"),
        (everybody_is_gone, "no_runner", "problem", "all 2 workers are silent; the last was w-"),
        (gone_without_a_lease, "no_runner", "problem", "its one worker is silent; the last was w-1, 2 min ago"),
        (everybody_has_left, "no_runner", "problem", "every runner has ended in order or as asked; the last was w-"),
        (
            one_has_left_and_one_died,
            "no_runner",
            "problem",
            "its one worker is silent; the last was w-1, 60 s ago (its",
        ),
        (in_work, "no_time_limit", "note", "1 rollout in work without a time limit"),
        (everybody_drains, "all_directed", "problem", "its one worker is under the order to drain"),
        (idle_beside_the_queue, "idle_but_waiting", "problem", "the oldest for 40 s, though w-1 is idle"),
        (all_at_work, "queue_moves", "note", "1 rollout in the queue; 1 of 1 workers busy. At this pace"),
        (in_work, "working", "note", "The queue is empty; 1 rollout in work"),
        (all_done, "all_ended", "note", "every rollout has ended"),
        (silent_for_ever, "stuck", "problem", "1 rollout held by a silent attempt that nothing ends"),
        (retried, "retrying", "note", "waits for attempt 2; the last one ended as failed, agent_error: boom"),
        (most_fail, "failing", "problem", "5 of the last 6 rollouts failed, 4 of them with agent_error: boom 3"),
        (some_fail, "failing", "warning", "2 of the last 6 rollouts failed, 2 of them with agent_error: boom 1"),
        (the_last_fail, "failing", "problem", "The last 5 rollouts failed, the newest with agent_error: boom"),
        (the_first_fails, "failing", "warning", "The last 1 rollout failed, the newest with agent_error: boom"),
        (an_agent_blocks, "long_running", "warning", "1 rollout without a time limit at work for more than 10 min"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
async def test_each_situation_is_found_and_named(scene: Scene, code: str, level: str, words: str) -> None:
    _, findings = await look_at(scene)
    [found] = [each for each in findings if each.code == code]
    assert found.level == level
    assert words in found.text
    assert bool(found.fix) == (level != "note" or code == "no_time_limit")


async def test_rollouts_with_a_time_limit_are_not_told_to_have_one() -> None:
    async def limited(store: InMemoryLightningStore, clock: ManualClock) -> None:
        await enqueued(store, "a", config=config(timeout_seconds=60.0))
        await claimed(store, "w-1")

    _, findings = await look_at(limited)
    assert [each.code for each in findings] == ["working"]


async def test_workers_that_have_left_are_not_silent() -> None:
    overview, _ = await look_at(one_has_left_and_one_died)
    assert [each.worker_id for each in overview.silent] == ["w-1"]
    overview, _ = await look_at(everybody_is_gone)
    assert {each.worker_id for each in overview.silent} == {"w-1", "w-2"}


@pytest.mark.parametrize("scene", [nothing, all_at_work, in_work, all_done, retried], ids=lambda scene: scene.__name__)
async def test_where_all_is_well_there_is_no_problem(scene: Scene) -> None:
    _, findings = await look_at(scene)
    assert {each.level for each in findings} == {"note"}


async def test_the_worst_comes_first() -> None:
    async def both(store: InMemoryLightningStore, clock: ManualClock) -> None:
        await some_fail(store, clock)
        await enqueued(store, "more")
        clock.advance(300)

    _, findings = await look_at(both)
    assert [each.level for each in findings] == ["problem", "warning"]


async def test_the_pace_is_that_of_the_last_minute() -> None:
    async def scene(store: InMemoryLightningStore, clock: ManualClock) -> None:
        await enqueued(store, *range(RECENT + 50))
        for _ in range(3):
            await finish(store, await claimed(store, "w-1"))
        clock.advance(61)
        for _ in range(5):
            await finish(store, await claimed(store, "w-1"))

    overview, _ = await look_at(scene)
    assert overview.pace == Pace(5.0, 60.0)

    async def faster(store: InMemoryLightningStore, clock: ManualClock) -> None:
        await enqueued(store, *range(RECENT + 50))
        for _ in range(RECENT + 20):
            clock.advance(0.1)
            await finish(store, await claimed(store, "w-1"))

    overview, _ = await look_at(faster)
    assert overview.pace is not None
    assert overview.pace.per_minute == pytest.approx(600, rel=0.02)
    assert overview.pace.seconds == pytest.approx(20, rel=0.02)
    overview, _ = await look_at(nobody_ever_came)
    assert overview.pace is None


# --- Spans -------------------------------------------------------------------------------------------


def traced(*kinds: str, status: str = "succeeded") -> Traced:
    attributes: dict[str, dict[str, Any]] = {
        "plain": {"x": 1},
        "reward": {"agentlightning.reward.0.name": "primary", "agentlightning.reward.0.value": 1.0},
        "model": {"gen_ai.request.model": "m"},
    }
    spans = [Span.from_attributes(rollout_id="ro-1", attempt_id="at-1", attributes=attributes[kind]) for kind in kinds]
    return Traced("ro-1", status, spans)


@pytest.mark.parametrize(
    ("sample", "code", "level"),
    [
        ([traced()] * 3, "no_spans", "problem"),
        ([traced(status="failed")] * 5, "no_spans", "problem"),
        ([traced(), *[traced("reward", "model")] * 4], "some_without_spans", "warning"),
        ([traced("plain", "model")] * 3, "no_rewards", "warning"),
        ([traced("plain", "reward")] * 3, "no_model_calls", "note"),
        ([traced("model", "reward")] * 3, "spans_arrive", "note"),
    ],
)
def test_what_rollouts_left_behind_is_judged(sample: list[Traced], code: str, level: str) -> None:
    assert (code, level) in [(each.code, each.level) for each in check_spans(sample)]


@pytest.mark.parametrize("sample", [[], [traced("plain")] * 2])
def test_too_few_rollouts_say_nothing(sample: list[Traced]) -> None:
    assert list(check_spans(sample)) == []


# --- Disks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "total", "code"),
    [
        (100_000_000, 10**12, "disk_almost_full"),
        (2_000_000_000, 10**12, "disk_filling"),
        (2_000_000_000, 8 * 10**9, "disk_has_room"),
        (10**11, 10**13, "disk_has_room"),
    ],
)
def test_room_on_a_disk_is_judged_by_what_is_left(free: int, total: int, code: str) -> None:
    assert [each.code for each in check_disk(free, total, "the database")] == [code]


def test_an_unknown_disk_is_not_judged() -> None:
    assert list(check_disk(None, None, "the database")) == []
