"""A run's name belongs to one algorithm, agent and dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import agentlightning as agl
from agentlightning.errors import InvalidValue
from agentlightning.trainer.identity import identity_of


@agl.rollout
def one(task: int) -> float:
    return 1.0


@agl.rollout
def other(task: int) -> float:
    return 0.0


@agl.algo
async def learn(store: agl.LightningStore, run: agl.Run, train_dataset: Any) -> None:
    run.save_checkpoint({"learned": ((run.load_checkpoint() or {}).get("learned", 0)) + 1})


@agl.algo
async def forget(store: agl.LightningStore, run: agl.Run, train_dataset: Any) -> None:
    run.save_checkpoint({})


def fit(folder: Path, algorithm: Any, agent: Any, data: Any) -> None:
    agl.Trainer(algorithm=algorithm, strategy="shm", run="r", runs_folder=folder, progress="off").fit(agent, data)


@pytest.mark.parametrize(
    ("algorithm", "agent", "data", "named"),
    [
        (forget, one, [1, 2], r"algorithm \S+\.learn, and this is the algorithm \S+\.forget"),
        (learn, other, [1, 2], r"agent \S+\.one, and this is the agent \S+\.other"),
        (learn, one, [1, 3], r"train_dataset of 2 rows, \w+, and this is the train_dataset of 2 rows, \w+"),
        (learn, one, [1, 2, 3], r"of 2 rows, \w+, and this is the train_dataset of 3 rows"),
        (agl.Baseline(), one, [1, 2], r"learn, and this is the algorithm agentlightning\.algorithm\.fast\.Baseline"),
    ],
)
def test_a_name_of_something_else_is_refused_and_nothing_is_lost(
    tmp_path: Path, algorithm: Any, agent: Any, data: Any, named: str
) -> None:
    fit(tmp_path, learn, one, [1, 2])
    with pytest.raises(InvalidValue, match=named):
        fit(tmp_path, algorithm, agent, data)
    assert agl.Run("r", tmp_path / "r").load_checkpoint() == {"learned": 1}
    fit(tmp_path, learn, one, [1, 2])
    assert agl.Run("r", tmp_path / "r").load_checkpoint() == {"learned": 2}


def test_a_run_of_a_version_that_bound_none_is_bound_when_it_goes_on(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "r.checkpoint.json").write_text(json.dumps({"learned": 7}))
    fit(tmp_path, learn, one, [1, 2])
    assert agl.Run("r", tmp_path / "r").load_checkpoint() == {"learned": 8}
    with pytest.raises(InvalidValue, match="begun with the agent"):
        fit(tmp_path, learn, other, [1, 2])


def test_a_name_is_bound_before_anything_is_saved(tmp_path: Path) -> None:
    run = agl.Run("r", tmp_path)
    run.bind({"algorithm": "a"}, {"command": ["x"]})
    assert run.load_checkpoint() is None
    assert agl.Run("r", tmp_path).identity() == {"algorithm": "a", "command": ["x"]}
    agl.Run("r", tmp_path).save_checkpoint({"step": 1})
    assert agl.Run("r", tmp_path).identity()["algorithm"] == "a"


def test_what_a_dataset_is_known_by() -> None:
    def known(data: Any) -> str:
        return identity_of(learn, one, data=data)["data"]

    assert known(list(range(10**5))) == known(range(10**5))
    assert known([{"a": 1, "b": 2}]) == known([{"b": 2, "a": 1}])
    assert len({known(each) for each in (None, [], [1], [1, 1], [2], {"a": 1})}) == 6
