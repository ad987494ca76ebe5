"""GRPO killed with SIGKILL in the middle of a step, and started again."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from agentlightning.algorithm.grpo import GRPO
from agentlightning.algorithm.run import Run
from agentlightning.demo import game
from agentlightning.demo.softmax_policy import SoftmaxPolicy
from agentlightning.errors import IdReused, InvalidValue
from agentlightning.store.sqlite.store import InMemoryLightningStore, SqliteLightningStore
from agentlightning.types import AttemptedRollout, Rollout
from game_runners import SECRETS, GameRunners
from grpo_process import BATCH_SIZE, GROUP_SIZE, train_in_process

STEPS = 4
ROLLOUTS_IN_STEP = BATCH_SIZE * GROUP_SIZE
KILL_AT_CLAIM = 2 * ROLLOUTS_IN_STEP + 9
"""In the third step, when some of its rollouts have ended, some run and some wait."""


async def rollouts_in(folder: Path) -> dict[str, Rollout]:
    async with SqliteLightningStore(folder / "store.db") as store:
        report = await store.verify()
        assert report.ok, report
        return {rollout.rollout_id: rollout for rollout in await store.query_rollouts()}


async def test_the_step_is_done_again_with_the_rollouts_that_had_finished(tmp_path: Path) -> None:
    assert train_in_process(tmp_path, "survivor", STEPS, KILL_AT_CLAIM) == (-signal.SIGKILL, [0, 1])
    before = await rollouts_in(tmp_path)
    finished = {rollout_id: each for rollout_id, each in before.items() if each.status == "succeeded"}
    assert 2 * ROLLOUTS_IN_STEP < len(finished) < 3 * ROLLOUTS_IN_STEP, "killed in the middle of a step"

    assert train_in_process(tmp_path, "survivor", STEPS, None) == (0, [2, 3])
    after = await rollouts_in(tmp_path)
    again = {rollout_id for rollout_id in after if ":again" in rollout_id}
    assert len(after.keys() - again) == STEPS * ROLLOUTS_IN_STEP
    failed = {rollout_id for rollout_id, each in after.items() if each.status == "failed"}
    assert len(failed) == len(again), "what tried to reach the model of the killed process was run once more"
    assert failed <= before.keys() - finished.keys()
    assert {each.status for rollout_id, each in after.items() if rollout_id not in failed} == {"succeeded"}
    assert {rollout_id: after[rollout_id] for rollout_id in finished} == finished, "none was run again"
    retried = {
        rollout_id
        for rollout_id, each in after.items()
        if isinstance(each, AttemptedRollout) and each.attempt.sequence_id > 1
    }
    assert retried
    assert retried <= before.keys() - finished.keys()

    assert train_in_process(tmp_path, "survivor", STEPS, None) == (0, []), "a run that is done stays done"
    assert await rollouts_in(tmp_path) == after


async def test_without_a_name_everything_is_run_again(tmp_path: Path) -> None:
    """The negative control: it is the name that saves the rollouts."""
    train_in_process(tmp_path, None, STEPS, KILL_AT_CLAIM)
    assert train_in_process(tmp_path, None, STEPS, None) == (0, [0, 1, 2, 3])
    assert len(await rollouts_in(tmp_path)) > STEPS * ROLLOUTS_IN_STEP


def grpo(run: Run, **settings: int) -> GRPO:
    numbers: dict[str, Any] = {"group_size": 2, "batch_size": 2, "n_steps": 1, **settings}
    algorithm = GRPO(SoftmaxPolicy(game.VOCABULARY), **numbers)
    algorithm.set_run(run)
    return algorithm


async def test_the_policy_of_the_checkpoint_is_what_goes_on(tmp_path: Path) -> None:
    run = Run("again", tmp_path)
    async with InMemoryLightningStore() as store, GameRunners(store):
        first = grpo(run, group_size=8, batch_size=8)
        first.set_store(store)
        await first.run(SECRETS)
    second = grpo(run, group_size=8, batch_size=8)
    await second.run(SECRETS)  # has nothing to do, so it needs no store
    assert second.policy.to_json() == first.policy.to_json()
    assert list(second.policy.contexts())


async def test_a_run_cannot_go_on_with_other_settings_or_other_tasks(tmp_path: Path) -> None:
    run = Run("fixed", tmp_path)
    async with InMemoryLightningStore() as store, GameRunners(store):
        algorithm = grpo(run)
        algorithm.set_store(store)
        await algorithm.run(SECRETS)
        other = grpo(run, group_size=4, n_steps=2)
        other.set_store(store)
        with pytest.raises(InvalidValue, match="was begun with"):
            await other.run(SECRETS)
        run.checkpoint_path.unlink()
        other = grpo(run)
        other.set_store(store)
        with pytest.raises(IdReused, match="begun with other tasks"):
            await other.run([{"secret": 1}])
