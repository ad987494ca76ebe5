"""``Trainer.fit`` and ``dev``, in one process and in several, with real runners."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import agentlightning as agl
from agentlightning.errors import InvalidValue, NothingToLearn
from agentlightning.trainer.roles import DEFAULT_ROLLOUT_CONFIG

SHM = {"type": "shm"}
CS = {"type": "cs", "server_host": "127.0.0.1", "server_port": 0}
STRATEGIES = pytest.mark.parametrize("strategy", [SHM, CS], ids=["shm", "cs"])
PROMPT = {"prompt_template": agl.PromptTemplate(template="Double {n}", engine="f-string")}


@agl.rollout
def double(task: int, prompt_template: agl.PromptTemplate) -> float:
    agl.emit_message(prompt_template.format(n=task))
    return 2.0 * task


class Collect(agl.Algorithm):
    """Runs every input once and remembers its reward."""

    def __init__(self) -> None:
        self.rewards: dict[int, float | None] = {}
        self.configs: list[agl.RolloutConfig] = []

    async def run(self, train_dataset: Any = None, val_dataset: Any = None) -> None:
        store = self.get_store()
        resources = await store.add_resources(self.get_initial_resources() or {})
        enqueued = [
            await store.enqueue_rollout(task, mode="train", resources_id=resources.resources_id)
            for task in train_dataset
        ]
        ended = await store.wait_for_rollouts(rollout_ids=[each.rollout_id for each in enqueued], timeout=60)
        for rollout in ended:
            assert rollout.status == "succeeded", rollout.reason_message
            spans = await store.query_spans(rollout.rollout_id, "latest")
            self.rewards[rollout.input] = agl.find_final_reward(spans)
            self.configs.append(rollout.config)


@STRATEGIES
def test_fit_runs_every_input_and_brings_back_its_reward(strategy: dict[str, Any]) -> None:
    algorithm = Collect()
    trainer = agl.Trainer(algorithm=algorithm, strategy=strategy, initial_resources=PROMPT, n_runners=1)
    trainer.fit(double, [1, 2, 3, 4])
    assert algorithm.rewards == {1: 2.0, 2: 4.0, 3: 6.0, 4: 8.0}
    assert algorithm.configs == [DEFAULT_ROLLOUT_CONFIG] * 4


def test_two_runners_in_processes_and_a_config_of_ones_own() -> None:
    algorithm = Collect()
    mine = agl.RolloutConfig(max_attempts=2, retry_condition=["failed"])
    trainer = agl.Trainer(algorithm=algorithm, strategy=CS, initial_resources=PROMPT, n_runners=2, rollout_config=mine)
    trainer.fit(double, list(range(8)))
    assert algorithm.rewards == {n: 2.0 * n for n in range(8)}
    assert algorithm.configs == [mine] * 8


def test_a_run_can_be_called_again_in_the_same_process(tmp_path: Path) -> None:
    """As a cell of a notebook is."""
    algorithm = agl.Baseline(polling_interval=0.05)

    def trainer() -> agl.Trainer:
        return agl.Trainer(
            algorithm=algorithm, strategy=SHM, run="cell", runs_folder=tmp_path, initial_resources=PROMPT
        )

    first, second = trainer(), trainer()
    first.fit(double, [1, 2])
    second.fit(double, [1, 2])
    second.fit(double, [1, 2])

    async def count() -> int:
        async with second.store as store:  # pyright: ignore - a file's
            return (await store.statistics())["total_rollouts"]

    assert asyncio.run(count()) == 2
    with pytest.raises(InvalidValue, match="train_dataset of 2 rows"):
        first.fit(double, [1, 2, 3])


@STRATEGIES
def test_what_the_algorithm_raises_comes_out(strategy: dict[str, Any]) -> None:
    @agl.algo
    async def broken(store: agl.LightningStore, train_dataset: Any) -> None:
        raise LookupError("no such idea")

    with pytest.raises(LookupError, match="no such idea"):
        agl.Trainer(algorithm=broken, strategy=strategy, initial_resources=PROMPT).fit(double, [1])


@STRATEGIES
def test_a_blocking_algorithm_runs_in_a_thread(strategy: dict[str, Any]) -> None:
    seen: list[int] = []

    @agl.algo
    def blocking(store: agl.LightningStore, train_dataset: Any) -> None:
        async def one() -> None:
            enqueued = await store.enqueue_rollout(train_dataset[0])
            ended = await store.wait_for_rollouts(rollout_ids=[enqueued.rollout_id], timeout=60)
            seen.extend(rollout.input for rollout in ended if rollout.status == "failed")

        asyncio.run(one())  # only possible where no loop runs

    # Without resources the agent cannot work, and the run says so instead of hanging.
    with pytest.raises(NothingToLearn, match=r"every rollout failed, 1 in all .*asks for a resource"):
        agl.Trainer(algorithm=blocking, strategy=strategy).fit(double, [7])
    assert seen == [7]


def test_dev_runs_the_baseline_and_refuses_what_is_not_fast() -> None:
    trainer = agl.Trainer(strategy=SHM, initial_resources=PROMPT)
    trainer.dev(double, [1, 2])

    async def count() -> int:
        return (await trainer.store.statistics())["total_rollouts"]

    assert asyncio.run(count()) == 2
    with pytest.raises(TypeError, match="FastAlgorithm"):
        agl.Trainer(algorithm=Collect(), strategy=SHM).dev(double, [1])


@STRATEGIES
def test_fit_inside_a_running_event_loop(strategy: dict[str, Any]) -> None:
    algorithm = Collect()

    async def cell() -> None:
        agl.Trainer(algorithm=algorithm, strategy=strategy, initial_resources=PROMPT).fit(double, [5])

    asyncio.run(cell())
    assert algorithm.rewards == {5: 10.0}


NOTEBOOK = """
import asyncio
import agentlightning as agl

@agl.rollout
def agent(task, prompt_template: agl.PromptTemplate) -> float:
    return float(offset + task)

offset = 40

@agl.algo
async def once(store, train_dataset, initial_resources):
    await store.add_resources(initial_resources)
    enqueued = await store.enqueue_rollout(train_dataset[0])
    await store.wait_for_rollouts(rollout_ids=[enqueued.rollout_id], timeout=60)
    print("REWARD", agl.find_final_reward(await store.query_spans(enqueued.rollout_id)))

async def cell():
    trainer = agl.Trainer(
        algorithm=once,
        strategy={"type": "cs", "server_host": "127.0.0.1", "server_port": 0},
        initial_resources={"p": agl.PromptTemplate(template="x", engine="f-string")},
        progress="off",
    )
    trainer.fit(agent, [2])

asyncio.run(cell())
"""


def test_a_notebook_has_no_file_that_children_could_import(tmp_path: Path) -> None:
    """As in a notebook: everything was defined in ``__main__``, which has no file, and a loop is running."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AGL_", "COV_"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-"],
        input=NOTEBOOK,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "REWARD 42.0" in done.stdout
    assert not done.stderr


def test_arguments_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match=r"decorate a function with @agl\.rollout"):
        agl.Trainer(strategy=SHM).fit(print, [1])  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match=r"v0\.1 servers"):
        agl.Trainer(strategy=SHM).fit(double, "http://127.0.0.1:8000")  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match="both are given"):
        agl.Trainer(n_runners=1, n_workers=2)
    with pytest.raises(InvalidValue, match="run name"):
        agl.Trainer(run="../elsewhere", runs_folder=tmp_path)
    with pytest.raises(InvalidValue, match="neither a dotted path nor a known name"):
        agl.Trainer(strategy="css")
