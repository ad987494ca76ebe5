"""Agents that are plain functions run in the main thread of their process, and can be interrupted there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import agentlightning as agl
import plain_agents
from agentlightning.errors import NothingToLearn
from agentlightning.runner import calling, worker_loop
from execution_programs import alive, noted, until


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AGL_TEST_FOLDER", str(tmp_path))
    monkeypatch.setenv("AGL_SPOOL_DIR", str(tmp_path / "spool"))
    return tmp_path


class Inputs(agl.Algorithm):
    """Runs these inputs one after the other. One with a ``meanwhile`` need not end.

    Args:
        inputs: of the rollouts.
        meanwhile: called with the store while the first one runs.
        config: of the first one.
    """

    def __init__(
        self, *inputs: Any, meanwhile: Callable[[Any], Any] | None = None, config: agl.RolloutConfig | None = None
    ) -> None:
        self.inputs, self.meanwhile, self.config = inputs, meanwhile, config
        self.rewards: list[float | None] = []
        self.ids: list[str] = []
        self.reasons: list[str | None] = []

    async def run(self, train_dataset: Any = None, val_dataset: Any = None) -> None:
        store = self.get_store()
        for number, each in enumerate(self.inputs):
            config = self.config if number == 0 and self.config else agl.RolloutConfig()
            rollout_id = (await store.enqueue_rollout(each, config=config)).rollout_id
            self.ids.append(rollout_id)
            if number == 0 and self.meanwhile is not None:
                await self.meanwhile(store)
                continue
            await store.wait_for_rollouts(rollout_ids=[rollout_id], timeout=60)
            attempts = await store.query_attempts(rollout_id)
            self.reasons.append(attempts[-1].reason_message if attempts[-1].status == "failed" else None)
            self.rewards.append(agl.find_final_reward(await store.query_spans(rollout_id, "latest")))


def fit(algorithm: Inputs, agent: Any, store: Any = None, *, runner: Any = None, **strategy: Any) -> None:
    """A run with one runner."""
    options = {"type": "cs", "server_host": "127.0.0.1", "server_port": 0, **strategy}
    more = {} if store is None else {"store": store}
    trainer = agl.Trainer(algorithm=algorithm, strategy=options, n_runners=1, runner=runner, progress="off", **more)
    trainer.fit(agent, [0])


# --- In the main thread ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_an_agent_may_limit_its_time_by_an_alarm(method: str, folder: Path) -> None:
    algorithm = Inputs(1, 2)
    fit(algorithm, plain_agents.alarms, start_method=method)
    assert algorithm.rewards == [1.0, 1.0], algorithm.reasons
    assert len(set(noted(folder, "process"))) == 1


def test_with_more_than_one_at_once_it_may_not(folder: Path) -> None:
    algorithm = Inputs(1)
    with pytest.raises(NothingToLearn, match="signal only works in main thread"):
        fit(algorithm, plain_agents.alarms, runner={"concurrency": 2})
    assert algorithm.rewards == [None]
    assert "signal only works in main thread" in str(algorithm.reasons)


def test_coroutines_are_there_too(folder: Path) -> None:
    algorithm = Inputs(1)
    fit(algorithm, plain_agents.where)
    assert algorithm.rewards == [1.0]


def test_a_runner_inside_an_agent_takes_nothing_from_that_outside(folder: Path) -> None:
    algorithm = Inputs(1)
    fit(algorithm, plain_agents.has_a_runner)
    assert algorithm.rewards == [1.0]


def test_an_alarm_that_an_agent_leaves_behind_hits_nobody(folder: Path) -> None:
    algorithm = Inputs(1, 2, 3)
    fit(algorithm, plain_agents.leaves_an_alarm)
    assert algorithm.rewards == [1.0, 1.0, 1.0], algorithm.reasons


# --- Interrupted there -----------------------------------------------------------------------------


def test_an_agent_that_takes_too_long_is_interrupted_and_the_next_has_the_thread(folder: Path) -> None:
    algorithm = Inputs("sleep", 2, config=agl.RolloutConfig(timeout_seconds=0.3))
    fit(algorithm, plain_agents.sleeps)
    assert algorithm.rewards == [None, 1.0], algorithm.reasons
    assert len(noted(folder, "cleaned-up")) == 1
    assert len(set(noted(folder, "process"))) == 1


def test_one_that_swallows_that_keeps_the_thread_and_the_next_has_another(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calling, "_MAIN_THREAD_SECONDS", 0.1)
    algorithm = Inputs("keep on", 2, config=agl.RolloutConfig(timeout_seconds=0.3))
    fit(algorithm, plain_agents.keeps_on, start_method="fork", graceful_timeout=5.0)
    assert algorithm.rewards == [None, 0.0], algorithm.reasons


def test_the_second_stage_of_an_abort_interrupts_it(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    store = agl.InMemoryLightningStore()
    algorithm = Inputs("sleep", meanwhile=lambda _: until(lambda: noted(folder, "asleep")))
    fit(algorithm, plain_agents.sleeps, store, graceful_timeout=0.2, terminate_timeout=10.0)
    assert len(noted(folder, "cleaned-up")) == 1
    [attempt] = asyncio.run(store.query_attempts(algorithm.ids[0]))
    assert (attempt.status, attempt.reason_code) == ("failed", "aborted")
    assert "was ended by SIGINT, stage 2" in caplog.text


def test_a_runner_that_is_asked_to_stop_ends_also_with_an_agent_that_does_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_loop, "GRACE_SECONDS", 0.3)

    async def stop(store: Any) -> None:
        await until(lambda: noted(folder, "at-it"))
        await store.direct_workers("stop")
        await until(lambda: noted(folder, "swallowed") and not alive(folder))

    algorithm = Inputs("keep on", meanwhile=stop)
    with pytest.raises(NothingToLearn, match="aborted: 1"):
        fit(algorithm, plain_agents.keeps_on, start_method="fork")


# --- Real packages ---------------------------------------------------------------------------------


@agl.rollout
def verifies(task: dict[str, str]) -> float:
    from math_verify import parse, verify  # pyright: ignore[reportMissingImports, reportUnknownVariableType]

    return float(verify(parse(task["gold"]), parse(task["answer"])))  # pyright: ignore[reportUnknownArgumentType]


@pytest.mark.slow
def test_math_verify_as_it_is(folder: Path) -> None:
    """Seen with math-verify 0.9.0."""
    pytest.importorskip("math_verify")
    algorithm = Inputs(
        {"gold": "$\\frac{1}{2}$", "answer": "$0.5$"},
        {"gold": "$\\frac{1}{2}$", "answer": "$0.4$"},
        {"gold": "$\\{1, 2\\}$", "answer": "$\\{2, 1\\}$"},
    )
    fit(algorithm, verifies, start_method="fork")
    assert algorithm.rewards == [1.0, 0.0, 1.0], algorithm.reasons
