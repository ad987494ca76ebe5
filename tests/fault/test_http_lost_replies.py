"""Replies that are lost, and all else that a network does to requests: every effect is there once (G2, G3).

The server and its SQLite file are real, and so is the proxy between (`chaos_proxy`).
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from agentlightning.errors import StoreUnreachable
from agentlightning.http.client.client import LightningStoreClient
from agentlightning.http.client.health import BreakerNumbers
from agentlightning.http.client.retry import Resilience
from agentlightning.http.server.server import LightningStoreServer
from agentlightning.store.sqlite.store import SqliteLightningStore
from agentlightning.types import AttemptedRollout, EnqueueRolloutRequest, PromptTemplate, RolloutConfig, Span
from chaos_proxy import ChaosProxy, Fault, Seen, chaos_proxy
from store_state import assert_sound

T = TypeVar("T")

EAGER = Resilience(
    backoff_base_seconds=0.005,
    backoff_cap_seconds=0.1,
    retries_per_second=100_000,
    breaker=BreakerNumbers(failure_rate=0.9),
)
"""Half of all tries fail here, on purpose and for good: a breaker that opens at 30 % would only make it slow."""
RUNNERS = 8


def _first_reply_of_every_post_is_lost(seen: Seen) -> Fault:
    return Fault.LOSE_REPLY if seen.method == "POST" and not seen.tries else Fault.NONE


class _Counted:
    """What was asked for, to be compared with what is there."""

    def __init__(self) -> None:
        self.requests = 0
        self.rollouts: list[str] = []
        self.spans = Counter[str]()
        self.worked_on = Counter[str]()


@asynccontextmanager
async def _served(
    folder: Path, decide: Callable[[Seen], Fault]
) -> AsyncIterator[tuple[SqliteLightningStore, ChaosProxy]]:
    async with SqliteLightningStore(folder / "store.db") as store, LightningStoreServer(store, port=0) as server:
        with chaos_proxy(server.endpoint, decide) as proxy:
            yield store, proxy
        await assert_sound(store)


async def _work(client: LightningStoreClient, number: int, rollouts: int, counted: _Counted) -> None:
    """A runner's day: enqueue, claim, confirm, trace, and finish together with the last span and the next claim."""
    worker = f"worker-{number}"
    ahead: list[AttemptedRollout] = []
    for left in reversed(range(rollouts)):
        [made] = await client.enqueue_many_rollouts([EnqueueRolloutRequest(input=number, config=RolloutConfig())])
        claim = ahead[0] if ahead else await client.dequeue_rollout(worker, wait_seconds=20)
        assert claim is not None
        ids = (claim.rollout_id, claim.attempt.attempt_id)
        await client.update_attempt(*ids, status="running")
        first, last = (
            Span.from_attributes(attributes={"n": number}, rollout_id=ids[0], attempt_id=ids[1]) for _ in range(2)
        )
        await client.add_span(first)
        await client.update_worker(worker, attempt_ids=[ids[1]])
        done = await client.finish_attempt(
            *ids, "succeeded", [last], claim_limit=min(left, 1), worker_id=worker, request_id=f"rq-{worker}-{left}"
        )
        assert done.sequence_ids in ([2], [0]), done  # 0: the reply to the try that stored it was lost
        ahead = done.claimed
        counted.spans.update((first.span_id, last.span_id))
        counted.requests += 5
        counted.rollouts.append(made.rollout_id)
        counted.worked_on[claim.rollout_id] += 1


async def _all_work(url: str, folder: Path, rollouts: int, numbers: Resilience) -> _Counted:
    counted = _Counted()
    async with LightningStoreClient(url, resilience=numbers, spool_dir=folder / "spool") as client:
        await asyncio.gather(*(_work(client, number, rollouts, counted) for number in range(RUNNERS)))
        for number in range(10):
            update = await client.add_resources({"p": PromptTemplate(template=f"{number}", engine="f-string")})
            await client.update_resources(update.resources_id, update.resources)
        counted.requests += 20
    return counted


async def _check(store: SqliteLightningStore, counted: _Counted) -> None:
    """Everything that was asked for is there, and nothing else."""
    rollouts = await store.query_rollouts()
    assert sorted(each.rollout_id for each in rollouts) == sorted(counted.rollouts), "a rollout is lost or doubled"
    assert {each.status for each in rollouts} == {"succeeded"}, "a rollout is stranded"
    assert set(counted.worked_on.values()) == {1}
    statistics = await store.statistics()
    assert statistics["total_attempts"] == len(counted.rollouts), "a claim was handed out twice"
    spans = Counter[str]()
    for rollout_id in counted.rollouts:
        found = await store.query_spans(rollout_id)
        assert [each.sequence_id for each in found] == [1, 2]
        spans.update(each.span_id for each in found)
    assert spans == counted.spans, "a span is lost or doubled"
    versions = [each.version for each in await store.query_resources()]
    assert versions == [2] * 10, "a version is lost or doubled"


@pytest.mark.parametrize("rollouts", [5, pytest.param(130, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
async def test_the_first_reply_of_every_request_is_lost(tmp_path: Path, rollouts: int) -> None:
    """The long form makes more than 5,000 requests."""
    async with _served(tmp_path, _first_reply_of_every_post_is_lost) as (store, proxy):
        counted = await _all_work(proxy.url, tmp_path, rollouts, EAGER)
        assert proxy.happened[Fault.LOSE_REPLY] >= counted.requests
        if rollouts > 100:
            assert counted.requests >= 5000
        await _check(store, counted)


@pytest.mark.parametrize(
    "fault", [each for each in Fault if each not in (Fault.NONE, Fault.LOSE_REPLY)], ids=lambda each: each.name
)
async def test_whatever_else_happens_on_the_way(tmp_path: Path, fault: Fault) -> None:
    chance = random.Random(fault.value)

    def every_third(seen: Seen) -> Fault:
        return fault if chance.random() < 0.33 else Fault.NONE

    async with _served(tmp_path, every_third) as (store, proxy):
        counted = await _all_work(proxy.url, tmp_path, 3, EAGER)
        assert proxy.happened[fault] > counted.requests / 5
        await _check(store, counted)


async def test_with_everything_as_users_get_it(tmp_path: Path) -> None:
    """The breaker and the budget of retries make it slow, and wrong in nothing."""
    async with _served(tmp_path, _first_reply_of_every_post_is_lost) as (store, proxy):
        async with LightningStoreClient(proxy.url, spool_dir=tmp_path / "spool") as client:
            counted = _Counted()
            await _work(client, 1, 1, counted)
        assert [each.status for each in await store.query_rollouts()] == ["succeeded"]
        assert (await store.statistics())["total_spans"] == 2


# --- Controls: the harness sees what it is meant to see --------------------------------------------------


async def test_a_client_that_makes_up_a_new_id_for_every_try_makes_duplicates(tmp_path: Path) -> None:
    numbers = itertools.count()

    def every_other(_: Seen) -> Fault:
        return Fault.NONE if next(numbers) % 2 else Fault.LOSE_REPLY

    async def insist(call: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await call()
            except StoreUnreachable:
                continue

    async with _served(tmp_path, every_other) as (store, proxy):
        async with LightningStoreClient(proxy.url, retry_delays=(), spool_dir=None) as client:
            for number in range(4):
                await insist(lambda n=number: client.enqueue_rollout(n))
            assert (await store.statistics())["total_rollouts"] == 8, "each of them twice"
            claims = itertools.count()
            for _ in range(4):
                assert await insist(lambda: client.dequeue_rollout("w", request_id=f"rq-{next(claims)}"))
        statuses = Counter(each.status for each in await store.query_rollouts())
        assert statuses == {"preparing": 8}, "half of them are with nobody"


async def test_a_claim_whose_call_failed_is_taken_up_by_the_next(tmp_path: Path) -> None:
    """As the one above, but the client may choose the ids."""
    numbers = itertools.count()

    def every_other(seen: Seen) -> Fault:
        return Fault.LOSE_REPLY if seen.path.endswith("dequeue") and next(numbers) % 2 == 0 else Fault.NONE

    async with _served(tmp_path, every_other) as (store, proxy):
        for number in range(4):
            await store.enqueue_rollout(number)
        async with LightningStoreClient(proxy.url, retry_delays=(), spool_dir=None) as client:
            for number in range(4):
                with pytest.raises(StoreUnreachable):
                    await client.dequeue_rollout("w")
                claim = await client.dequeue_rollout("w")
                assert claim is not None
                assert claim.input == number
                assert claim.attempt.sequence_id == 1
        assert (await store.statistics())["total_attempts"] == 4
