"""`Baseline`: runs every input once for each epoch, and says what came of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from agentlightning.algorithm.fast import Baseline, FastAlgorithm
from agentlightning.algorithm.run import Run
from agentlightning.errors import InvalidValue
from agentlightning.proxy.llm_proxy import LLMProxy
from agentlightning.store.base import LightningStore
from agentlightning.store.sqlite.store import InMemoryLightningStore
from agentlightning.types import AttemptedRollout, ProxyLLM
from scenes import finish, llm, span_of


class Workers:
    """Run whatever is in the queue: the input is the reward, or None for a failure."""

    def __init__(self, store: LightningStore, after_claim: Callable[[], Any] | None = None) -> None:
        self._store = store
        self._after_claim = after_claim
        self.claimed: list[AttemptedRollout] = []
        self.longest_queue = 0

    async def work(self) -> None:
        while True:
            attempted = await self._store.dequeue_rollout(wait_seconds=20)
            if attempted is None:
                continue
            queue = (await self._store.query_rollouts(status_in=["queuing"], limit=1)).total
            self.longest_queue = max(self.longest_queue, queue + 1)
            self.claimed.append(attempted)
            if self._after_claim is not None:
                self._after_claim()
            if attempted.input is not None:
                reward = {"agentlightning.reward.0.value": attempted.input}
                await self._store.add_span(span_of(attempted, name="agentlightning.annotation", attributes=reward))
            await finish(self._store, attempted, "failed" if attempted.input is None else "succeeded")


@asynccontextmanager
async def working(baseline: Baseline, store: LightningStore, **more: Any) -> AsyncIterator[tuple[Workers, list[Any]]]:
    workers, told = Workers(store, **more), list[Any]()
    baseline.set_store(store)
    baseline.set_reporter(lambda step, numbers: told.append((step, numbers)))
    task = asyncio.create_task(workers.work())
    try:
        yield workers, told
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_every_input_is_run_in_every_epoch_and_a_failure_is_no_reward_of_zero() -> None:
    baseline = Baseline(n_epochs=2, train_split=0.5, polling_interval=0.01, max_queue_length=2)
    async with InMemoryLightningStore() as store, working(baseline, store) as (workers, told):
        await baseline.run([1.0, 3.0, None, 2.0])
    assert [(each.input, each.mode) for each in workers.claimed[:4]] == [
        (1.0, "train"),
        (3.0, "train"),
        (None, "val"),
        (2.0, "val"),
    ]
    assert len(workers.claimed) == 8
    assert workers.longest_queue <= 2
    assert [step for step, _ in told] == [0, 1]
    assert told[0][1] == {
        "rollouts": 4,
        "rewarded": 3,
        "on_defaults": 0,
        "succeeded": 3,
        "failed": 1,
        "cancelled": 0,
        "reward_mean": 2.0,
    }
    assert isinstance(baseline, FastAlgorithm)


async def test_a_validation_dataset_is_what_is_validated() -> None:
    baseline = Baseline(train_split=0.0)
    baseline.set_initial_resources({"llm": llm()})
    async with InMemoryLightningStore() as store, working(baseline, store) as (workers, _):
        await baseline.run([1.0], [5.0])
        resources = await store.get_latest_resources()
    assert [(each.input, each.mode) for each in workers.claimed] == [(1.0, "train"), (5.0, "val")]
    assert resources is not None
    assert {each.resources_id for each in workers.claimed} == {resources.resources_id}


async def test_a_proxy_is_started_and_its_model_handed_out() -> None:
    backend = {"model_name": "m", "litellm_params": {"model": "openai/m", "api_base": "http://127.0.0.1:9/v1"}}
    proxy = LLMProxy(model_list=[backend])
    baseline = Baseline()
    baseline.set_llm_proxy(proxy)
    ran_meanwhile: list[bool] = []
    async with InMemoryLightningStore() as store:
        async with working(baseline, store, after_claim=lambda: ran_meanwhile.append(proxy.is_running())):
            await baseline.run([1.0])
        resources = await store.get_latest_resources()
        assert proxy.get_store() is store
    assert resources is not None
    assert isinstance(resources.resources["llm"], ProxyLLM)
    assert ran_meanwhile == [True]
    assert not proxy.is_running()


@pytest.mark.parametrize(
    ("verbosity", "shown", "hidden"), [("none", "", ".value"), ("keys", ".value", "7.5"), ("key_values", "7.5", "\0")]
)
async def test_how_much_of_a_span_is_logged(
    verbosity: Any, shown: str, hidden: str, caplog: pytest.LogCaptureFixture
) -> None:
    baseline = Baseline(span_verbosity=verbosity)
    with caplog.at_level(logging.INFO):
        async with InMemoryLightningStore() as store, working(baseline, store):
            await baseline.run([7.5])
    (line,) = [record.message for record in caplog.records if "span 1" in record.message]
    assert "agentlightning.annotation" in line
    assert shown in line
    assert hidden not in line


async def test_a_run_that_was_cut_off_goes_on_and_runs_nothing_twice(tmp_path: Path) -> None:
    inputs = [float(number) for number in range(6)]
    async with InMemoryLightningStore() as store:
        first = Baseline(n_epochs=2, max_queue_length=1)
        first.set_run(Run("r", tmp_path))
        cut = asyncio.Event()
        claims = iter(range(100))
        async with working(first, store, after_claim=lambda: cut.set() if next(claims) == 8 else None) as (done, _):
            running = asyncio.create_task(first.run(inputs))
            await cut.wait()
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
        second = Baseline(n_epochs=2, max_queue_length=1)
        second.set_run(Run("r", tmp_path))
        async with working(second, store) as (rest, told):
            await second.run(inputs)
        rollouts = await store.query_rollouts()
    assert [step for step, _ in told] == [1], "the first epoch was done"
    assert len(rollouts) == 12
    assert len(done.claimed) == 9
    finished_before = {each.rollout_id for each in done.claimed[:8]}
    assert not finished_before & {each.rollout_id for each in rest.claimed}


async def test_without_inputs_there_is_nothing_to_do(caplog: pytest.LogCaptureFixture) -> None:
    await Baseline().run([])
    assert "no inputs" in caplog.text


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_epochs": 0},
        {"max_queue_length": 0},
        {"train_split": 1.5},
        {"polling_interval": 0},
        {"span_verbosity": "all"},
    ],
)
def test_arguments_out_of_range(wrong: Any) -> None:
    with pytest.raises(InvalidValue, match=next(iter(wrong))):
        Baseline(**wrong)
