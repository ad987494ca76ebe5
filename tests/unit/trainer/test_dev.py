"""What ``Trainer.dev`` prints, and that its traces can be looked into afterwards."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import agentlightning as agl
from agentlightning.errors import NothingToLearn


@agl.rollout
def agent(task: Any) -> float:
    if task == "bad":
        raise ValueError("this one is bad")
    agl.emit_message(f"the answer to {task['question']}")
    return 0.25


def test_input_output_and_reward_are_printed_and_the_traces_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = agl.Trainer(strategy="shm", runs_folder=tmp_path / "runs", progress="off")
    trainer.dev(agent, [{"question": "how many"}, "bad"])
    printed = capsys.readouterr().out
    assert 'input   {"question": "how many"}\n  output  the answer to how many\n  reward  0.25' in printed
    assert "input   bad\n  output  nothing was recorded\n  reward  none\n  why     agent_error: " in printed
    command = re.search(r"^  agl (trace .*)$", printed, re.MULTILINE)
    assert command is not None
    shown = subprocess.run(
        [sys.executable, "-m", "agentlightning", *command[1].split()], capture_output=True, text=True, check=True
    )
    assert "ValueError" in shown.stdout


def test_a_second_time_only_the_new_ones_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = agl.Trainer(strategy="shm", store=str(tmp_path / "x.db"), progress="off")
    for question in ("first", "second"):
        trainer.dev(agent, [{"question": question}])
    assert capsys.readouterr().out.count("first") == 2  # as input and as output


def test_it_is_printed_also_if_all_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NothingToLearn):
        agl.Trainer(strategy="shm", runs_folder=tmp_path, progress="off").dev(agent, ["bad"])
    assert "this one is bad" in capsys.readouterr().out


def test_a_store_in_memory_that_was_given_is_where_the_traces_are(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = agl.Trainer(strategy="shm", store=agl.InMemoryLightningStore(), progress="off")
    trainer.dev(agent, [{"question": "x"}])
    assert "read the traces from trainer.store" in capsys.readouterr().out
