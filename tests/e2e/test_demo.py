"""``agl demo``: the first command of the README, with everything that it promises."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import agentlightning as agl
from agentlightning.demo import game, game as strategy
from agentlightning.demo.softmax_policy import SoftmaxPolicy
from agentlightning.demo.training import DemoResult, StoreAudit
from agentlightning.store.sqlite.store import ReadOnlySqliteStore

AGL = Path(sys.executable).with_name("agl")
MAX_SECONDS = 90.0
"""Of the two minutes that clone, installation and demo may take."""


def agl_command(folder: Path, *arguments: str, timeout: float = MAX_SECONDS) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AGL_", "COV_"))}
    return subprocess.run(
        [str(AGL), *arguments],
        cwd=folder,
        env=environment | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def retried(database: Path) -> list[list[agl.Attempt]]:
    """The attempts of every rollout that has more than one."""

    async def read() -> list[list[agl.Attempt]]:
        async with ReadOnlySqliteStore(database) as store:
            rollouts = await store.query_rollouts()
            assert all(rollout.status == "succeeded" for rollout in rollouts)
            attempts = [list(await store.query_attempts(rollout.rollout_id)) for rollout in rollouts]
            return [each for each in attempts if len(each) > 1]

    return asyncio.run(read())


def check_killed(folder: Path, out: str, database: str) -> None:
    """A runner was killed, what it held was tried again and counted once, and the commands shown do work."""
    assert re.search(r"Runner \S+ was killed \(SIGKILL\)", out)
    assert "0 lost, 0 counted twice, 0 records that break a rule" in out
    rescued = retried(folder / database)
    assert rescued, "the runner held nothing when it was killed"
    for attempts in rescued:
        assert [attempt.status for attempt in attempts[:-1]] == ["unresponsive"] * (len(attempts) - 1)
        assert attempts[0].reason_code in ("worker_lost", "unconfirmed")
        assert attempts[-1].status == "succeeded"
        assert attempts[0].worker_id is not None
    assert any(attempts[0].reason_code == "worker_lost" for attempts in rescued), "none of them had begun"
    shown = re.findall(r"^  \S+ (.+ --url \S+)$", out, re.MULTILINE)
    assert len(shown) == 3
    for command in shown:
        done = agl_command(folder, *command.split())
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert done.stdout


def check_verdict(done: subprocess.CompletedProcess[str]) -> int:
    """The exit code says whether the policy has learned; returns its win rate in per cent."""
    wins = re.search(r"it wins\s+(\d+)%", done.stdout)
    assert wins is not None, done.stdout + done.stderr
    learned = int(wins[1]) >= 85
    assert done.returncode == (0 if learned else 1), done.stdout + done.stderr
    assert ("It has not learned" in done.stdout) is not learned
    return int(wins[1])


@pytest.mark.timeout(2 * MAX_SECONDS + 30)
def test_a_demo_loses_nothing_says_whether_it_has_learned_and_replaces_the_last_one(tmp_path: Path) -> None:
    """Unless it is told to keep that."""
    left = tmp_path / "agl-runs" / "demo" / "of-the-last-one"
    left.parent.mkdir(parents=True)
    left.touch()
    beside = agl_command(tmp_path, "demo", "--steps", "1", "--no-kill", "--keep")
    check_verdict(beside)
    assert "SIGKILL" not in beside.stdout
    assert retried(tmp_path / "agl-runs" / "demo-2" / "store.db") == []
    assert left.exists()
    instead = agl_command(tmp_path, "demo", "--steps", "2")
    check_verdict(instead)
    assert not instead.stderr
    check_killed(tmp_path, instead.stdout, "agl-runs/demo/store.db")
    assert not left.exists()
    assert sorted(path.name for path in (tmp_path / "agl-runs").iterdir()) == ["demo", "demo-2"]


@pytest.mark.slow
@pytest.mark.timeout(MAX_SECONDS + 30)
@pytest.mark.parametrize("seed", range(5))
def test_the_policy_learns_the_game(seed: int, tmp_path: Path) -> None:
    started = time.monotonic()
    done = agl_command(tmp_path, "demo", "--seed", str(seed))
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - started < MAX_SECONDS
    assert check_verdict(done) >= 85
    assert "first guess" in done.stdout
    check_killed(tmp_path, done.stdout, "agl-runs/demo/store.db")


def test_the_strategy_of_a_policy_in_words() -> None:
    """A policy that was taught to halve what is left wins always; one that knows nothing, hardly ever."""
    halving = SoftmaxPolicy(game.VOCABULARY)
    for left in range(1, game.HIGHEST - game.LOWEST + 2):
        now = game.Game(secret=game.LOWEST, low=game.LOWEST, high=game.LOWEST + left - 1)
        row = [0.0] * len(halving.action_ids)
        row[(left + 1) // 2 - 1] = 5.0
        halving.set_logits(tuple(halving.encode(game.prompt(now))), row)
    assert strategy.in_words(halving) == "first guess 8; if higher 12, if lower 4"
    assert strategy.win_rate(halving) == 1.0
    blind = SoftmaxPolicy(game.VOCABULARY)
    assert strategy.win_rate(blind) < 0.5


@pytest.mark.parametrize(("win_rate", "learned"), [(0.27, False), (0.8, False), (0.87, True)])
def test_what_counts_as_learned(win_rate: float, learned: bool) -> None:
    audit = StoreAudit(rollouts=1, rescued=(), lost=0, counted_twice=0, violations=0)
    outcome = DemoResult(0.27, win_rate, "", audit, None, 1.0, Path("store.db"))
    assert outcome.learned is learned


@pytest.mark.parametrize("wrong", ["lost", "counted_twice", "violations"])
def test_what_is_lost_or_doubled_is_not_clean(wrong: str) -> None:
    numbers = {"lost": 0, "counted_twice": 0, "violations": 0}
    assert StoreAudit(rollouts=1, rescued=(), **numbers).clean
    assert not StoreAudit(rollouts=1, rescued=(), **(numbers | {wrong: 1})).clean
