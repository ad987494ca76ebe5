"""``agl runs``: what trainers keep under a name."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

import agentlightning as agl_package
from agentlightning.cli.terminal import ExitCode
from command_line import agl, agl_process


@agl_package.algo
async def ends(store: agl_package.LightningStore, train_dataset: Any, run: agl_package.Run) -> None:
    for index, reward in enumerate(train_dataset):
        begun = await store.start_rollout(index)
        rollout_id, attempt_id = begun.rollout_id, begun.attempt.attempt_id
        span = agl_package.Span.from_attributes(
            name="r",
            attributes={"agentlightning.reward.0.value": reward},
            rollout_id=rollout_id,
            attempt_id=attempt_id,
        )
        await store.finish_attempt(rollout_id, attempt_id, "succeeded", [span])
    run.save_checkpoint({"step": 1})


@agl_package.rollout
def agent(task: Any) -> float:
    return 1.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, rewards in (("low", [0.0, 0.0, 0.5, 0.5]), ("high", [0.25, 1.0])):
        trainer = agl_package.Trainer(algorithm=ends, strategy="shm", run=name, runs_folder=tmp_path, progress="off")
        trainer.fit(agent, rewards)
    (tmp_path / "no run").mkdir()
    return tmp_path


def test_runs_are_listed_shown_and_compared(folder: Path) -> None:
    text = agl("runs", "ls", "--folder", folder).ok().out
    assert [line.split()[0] for line in text.splitlines()] == ["run", "high", "low"]
    assert "0 → 0.5" in text
    shown = agl("runs", "show", "low", "--folder", folder).ok().out
    for words in ("stopped", "test_runs.ends", "test_runs.agent", "of 4 rows", "4 succeeded", "mean 0.25", "step"):
        assert words in shown
    told = agl("runs", "compare", "low", "high", "--folder", folder, "-o", "json").ok().json
    assert [(each["name"], each["rollouts"], each["reward_mean"]) for each in told] == [
        ("low", 4, 0.25),
        ("high", 2, 0.625),
    ]
    assert "reward mean" in agl("runs", "compare", "low", "high", "--folder", folder).ok().out


def test_a_run_is_deleted_when_nobody_has_it_open(folder: Path) -> None:
    store = agl_package.SqliteLightningStore(folder / "low" / "store.db")
    server = agl_package.LightningStoreServer(store, host="127.0.0.1", port=0)
    server.start_blocking()
    try:
        agl("status", "--url", server.endpoint).ok()  # the file is opened by the first question
        refused = agl("runs", "rm", "low", "high", "--yes", "--folder", folder)
        assert (refused.code, "stop it first" in refused.err) == (ExitCode.USAGE, True)
        assert f"--url {server.endpoint}" in agl("runs", "show", "low", "--folder", folder).ok().out
    finally:
        server.stop_blocking()
        asyncio.run(store.close())
    assert (folder / "high").is_dir()
    agl("runs", "rm", "low", "--yes", "--folder", folder).ok()
    assert not (folder / "low").exists()
    assert agl("runs", "show", "low", "--folder", folder).code == ExitCode.NOT_FOUND
    assert agl("runs", "rm", "..", "--yes", "--folder", folder).code == ExitCode.USAGE
    assert "No runs" in agl("runs", "ls", "--folder", folder / "nowhere").ok().out


def test_resuming_begins_the_program_again_where_it_began(folder: Path) -> None:
    run = agl_package.Run("low", folder / "low")
    run.bind(
        {}, {"command": [sys.executable, "-c", "import os; print('again in', os.getcwd())"], "folder": str(folder)}
    )
    done = agl_process("runs", "resume", "low", "--folder", folder)
    assert (done.code, done.out) == (0, f"again in {folder}\n")
    run.bind({}, {"command": []})
    assert "notebook" in agl("runs", "resume", "low", "--folder", folder).err
