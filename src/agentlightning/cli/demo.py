"""``agl demo``: train a policy from nothing, here and now."""

from __future__ import annotations

import os
import shutil
import sys
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agentlightning.cli.target import find_owner
from agentlightning.cli.terminal import ExitCode
from agentlightning.errors import StoreOwned

if TYPE_CHECKING:
    from rich.console import Console

    from agentlightning.demo.training import DemoResult


_RUNS = Path("agl-runs")
_NAME = "demo"
_STEPS = 26


def demo(
    seed: Annotated[int, typer.Option(help="Seed of what is left to chance.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="How many times the policy learns.")] = _STEPS,
    no_kill: Annotated[bool, typer.Option("--no-kill", help="Do not kill a runner half-way.")] = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the database of the last demo, and write a new one beside it.")
    ] = False,
) -> None:
    """Train a policy from nothing, here and now: no GPU, key or network.

    An agent plays a guessing game: find a number from 1 to 15 in four guesses, told "higher" or "lower". Its
    model is a small table behind an OpenAI-shaped endpoint, which at first guesses blindly, and learns by GRPO from
    nothing but won or lost. All parts are the real ones: the store on SQLite, the HTTP server, the LLM proxy, and two
    runner processes, one of which is killed half-way to show that nothing is lost.

    Exit code 0: the policy has learned the game. 1: it has not, or a rollout was lost.

    [bold]Examples[/bold]

      agl demo
      agl demo --seed 7 --keep
    """
    from rich.console import Console

    from agentlightning.demo.training import DemoLines, DemoTable, train

    console = Console(highlight=False)
    others = (f"{_NAME}-{number}" for number in count(2))
    name = next(each for each in others if not (_RUNS / each).exists()) if keep else _cleared(_NAME)
    console.print(
        "[bold]A number from 1 to 15, four guesses, told higher or lower.[/bold] The policy begins by guessing blindly."
    )
    view = DemoTable(console) if console.is_terminal else DemoLines(console)
    result = train(name, _RUNS, seed=seed, steps=steps, kill=not no_kill, view=view)
    _print_result(console, result, wanted_kill=not no_kill)
    raise typer.Exit(ExitCode.OK if result.learned and result.audit.clean else ExitCode.FAILED)


def _cleared(name: str) -> str:
    """The name, with what an earlier demo left under it deleted."""
    database = _RUNS / name / "store.db"
    owner = find_owner(database)
    if owner is not None:
        raise StoreOwned(f"another demo (process {owner.pid}) is writing {database}; wait for it, or use --keep")
    if (_RUNS / name).exists():
        shutil.rmtree(_RUNS / name)
    return name


def _print_result(console: Console, result: DemoResult, *, wanted_kill: bool) -> None:
    audit = result.audit
    console.print()
    verdict = "[green]The policy has learned the game[/green]" if result.learned else "[red]It has not learned[/red]"
    console.print(
        f"{verdict}: {result.strategy}. With its best guesses it wins {result.win_rate:.0%} of all games "
        f"({result.win_rate_before:.0%} before)."
    )
    console.print(
        f"{audit.rollouts} rollouts in {result.seconds:.0f} s; {audit.lost} lost, {audit.counted_twice} counted "
        f"twice, {audit.violations} records that break a rule."
    )
    if wanted_kill:
        rescued = audit.rescued
        games = "the game" if len(rescued) == 1 else f"the {len(rescued)} games"
        console.print(
            f"Runner {result.killed} was killed (SIGKILL) in the middle of its work; "
            f"{games} it was playing went to the other one, and "
            f"{sum(each.status == 'succeeded' for each in rescued)} succeeded."
            if result.killed
            else "No runner was killed: there was none at work at the time."
        )
    database = os.path.relpath(result.database)
    console.print(f"\nEverything is in [bold]{database}[/bold]. Look into it:")
    rollouts = f"rollouts show {audit.rescued[0].rollout_id}" if audit.rescued else "rollouts ls"
    for command in ("status", rollouts, "verify"):
        console.print(f"  {_program()} {command} --url {database}", soft_wrap=True)


def _program() -> str:
    """How the user called us, so that the commands can be copied."""
    called = sys.argv[0]
    found = shutil.which("agl")
    return "agl" if found is not None and os.path.samefile(found, called) else os.path.relpath(called)
