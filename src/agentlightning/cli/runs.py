"""``agl runs``: the runs that trainers keep under a name, each in a folder of its own."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from agentlightning.algorithm.run import Run
from agentlightning.cli.rewards import mean, rewards_of, trend
from agentlightning.cli.target import Database, Owner, clock_of, find_owner
from agentlightning.cli.terminal import Column, Output, ago, duration, print_facts, print_json, print_table
from agentlightning.errors import AgentLightningError, InvalidValue, NotFound
from agentlightning.store.base import LightningStore

_IDENTITY = ("algorithm", "agent", "train_dataset", "val_dataset")
_REWARDS = 1_000
"""So many rollouts of a run, the newest, are asked for their rewards."""

Folder = Annotated[Path, typer.Option("--folder", help="Where the runs lie: runs_folder of the Trainer.")]
Name = Annotated[str, typer.Argument(metavar="RUN", help="Its name.")]


@dataclass(frozen=True)
class _Told:
    """What is known of a run."""

    name: str
    folder: Path
    identity: dict[str, Any]
    checkpoint: dict[str, Any] | None
    owner: Owner | None
    by_status: dict[str, int]
    rewards: Sequence[float]
    """The oldest first."""
    began: float | None
    ended: float | None
    now: float
    trouble: str = ""
    """Why its store or its checkpoint cannot be read."""

    @property
    def state(self) -> str:
        return "running" if self.owner is not None else "unreadable" if self.trouble else "stopped"

    @property
    def seconds(self) -> float | None:
        return None if self.began is None or self.ended is None else self.ended - self.began

    def facts(self) -> dict[str, Any]:
        """For programs, and for comparisons."""
        return {
            "name": self.name,
            "state": self.state,
            **{name: self.identity.get(name) for name in _IDENTITY},
            "rollouts": sum(self.by_status.values()),
            **{status: self.by_status.get(status, 0) for status in ("succeeded", "failed", "cancelled")},
            "rewards": len(self.rewards),
            "reward_mean": mean(self.rewards),
            "reward_trend": trend(self.rewards) or None,
            "seconds": self.seconds,
        }


def ls(folder: Folder = Path("agl-runs"), output: Output = "table") -> None:
    """List runs, the one that was used last first.

    [bold]Examples[/bold]

      agl runs ls
      agl runs ls --folder experiments -o json
    """
    names = [each.name for each in folder.iterdir() if _is_run(each)] if folder.is_dir() else []
    told = sorted((_read(folder, each) for each in names), key=lambda each: -(each.ended or each.began or 0.0))
    if output == "json":
        print_json([each.facts() for each in told])
        return
    columns: tuple[Column[_Told], ...] = (
        Column("run", lambda each: each.name),
        Column("state", lambda each: each.state),
        Column("algorithm", lambda each: str(each.identity.get("algorithm", "?"))),
        Column("rollouts", lambda each: f"{sum(each.by_status.values()):,}", right=True),
        Column("failed", lambda each: f"{each.by_status.get('failed', 0):,}", right=True),
        Column("reward", lambda each: trend(each.rewards) or _figure(mean(each.rewards)), right=True),
        Column("ended", lambda each: ago(each.ended, each.now), right=True),
        Column("trouble", lambda each: each.trouble, wide=True),
    )
    print_table(columns, told, empty=f"No runs in {folder}. A Trainer makes one: Trainer(run='NAME', …).")


def show(name: Name, folder: Folder = Path("agl-runs"), output: Output = "table") -> None:
    """Show one run: what it trains, how far it is, its rewards, and how it goes on.

    [bold]Examples[/bold]

      agl runs show tuesday
      agl runs show tuesday -o json | jq .checkpoint
    """
    told = _found(folder, name)
    if output == "json":
        print_json({**told.facts(), "checkpoint": told.checkpoint, "command": told.identity.get("command")})
        return
    place = told.folder / "store.db"
    served = " or ".join(told.owner.server_urls) if told.owner is not None else ""
    states = ", ".join(f"{number:,} {status}" for status, number in told.by_status.items() if number)
    print_facts(
        {
            "run": told.name,
            "state": told.state + (f", process {told.owner.pid}" if told.owner is not None else ""),
            **{each.replace("_dataset", " rows"): str(told.identity.get(each, "")) for each in _IDENTITY},
            "rollouts": states or "none",
            "rewards": f"{len(told.rewards):,}, mean {_figure(mean(told.rewards))}, trend {trend(told.rewards) or '?'}"
            if told.rewards
            else "none",
            "time": "" if told.seconds is None else f"{duration(told.seconds)}, ended {ago(told.ended, told.now)}",
            "checkpoint": "none yet" if told.checkpoint is None else ", ".join(told.checkpoint),
            "trouble": told.trouble,
            "command": shlex.join(told.identity.get("command") or ()),
        }
    )
    typer.echo(f"\nLook into it: agl status --url {served or place}")
    if told.owner is None and told.identity.get("command"):
        typer.echo(f"Go on with it: agl runs resume {told.name}")


def resume(name: Name, folder: Folder = Path("agl-runs")) -> None:
    """Go on with a run: begin the program that trained it again, in its folder, with the same words.

    Rollouts that have ended are not run again.

    [bold]Examples[/bold]

      agl runs resume tuesday
    """
    told = _found(folder, name)
    _require_stopped(told)
    command, place = told.identity.get("command"), told.identity.get("folder")
    if not command or not place:
        raise InvalidValue(f"how {name!r} was begun is not known (in a notebook?); call the same fit() again there")
    typer.echo(f"in {place}: {shlex.join(command)}", err=True)
    os.chdir(place)
    os.execvp(command[0], command)


def rm(
    names: Annotated[list[str], typer.Argument(metavar="RUN", help="Their names.")],
    folder: Folder = Path("agl-runs"),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete runs, with all their rollouts, spans and checkpoints. There is no way back but a backup.

    [bold]Examples[/bold]

      agl runs rm monday tuesday
    """
    told = [_found(folder, each) for each in names]
    for each in told:
        _require_stopped(each)
    if not yes:
        rollouts = sum(sum(each.by_status.values()) for each in told)
        typer.confirm(f"Delete {', '.join(names)}, with {rollouts:,} rollouts?", abort=True)
    for each in told:
        shutil.rmtree(each.folder)
        typer.echo(f"{each.name} deleted")


def compare(
    names: Annotated[list[str], typer.Argument(metavar="RUN…", help="Their names, two or more.")],
    folder: Folder = Path("agl-runs"),
    output: Output = "table",
) -> None:
    """Put runs side by side: what they train, how many rollouts ended how, and their rewards.

    [bold]Examples[/bold]

      agl runs compare monday tuesday
      agl runs compare monday tuesday -o json | jq '.[].reward_mean'
    """
    if len(set(names)) < 2:
        raise InvalidValue("give the names of two runs or more; `agl runs ls` lists them")
    told = [_found(folder, each).facts() for each in names]
    if output == "json":
        print_json(told)
        return
    columns: list[Column[str]] = [Column("", lambda fact: fact.replace("_", " "))]
    columns += [_column(each) for each in told]
    print_table(columns, [fact for fact in told[0] if fact != "name"], empty="")


def _column(facts: dict[str, Any]) -> Column[str]:
    return Column(str(facts["name"]), lambda fact: _figure(facts[fact]))


def _figure(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_run(place: Path) -> bool:
    return (place / "store.db").is_file() or (place / f"{place.name}.checkpoint.json").is_file()


def _found(folder: Path, name: str) -> _Told:
    Run(name, folder)  # a name that no run can have, such as .., is refused
    if not _is_run(folder / name):
        raise NotFound(f"there is no run {name!r} in {folder}; `agl runs ls` lists them, --folder names another place")
    return _read(folder, name)


def _require_stopped(told: _Told) -> None:
    if told.owner is not None:
        raise InvalidValue(f"{told.name!r} runs in process {told.owner.pid} ({told.owner.command}); stop it first")


def _read(folder: Path, name: str) -> _Told:
    place, run, trouble = folder / name, Run(name, folder / name), ""
    identity, checkpoint = dict[str, Any](), None
    try:
        identity, checkpoint = run.identity(), run.load_checkpoint()
    except AgentLightningError as error:
        trouble = error.message
    unread: _Store = ({}, [], None, None, 0.0)
    try:
        found = Database(place / "store.db").look(_of_store) if (place / "store.db").is_file() else unread
    except AgentLightningError as error:
        found, trouble = unread, error.message
    return _Told(name, place, identity, checkpoint, find_owner(place / "store.db"), *found, trouble)


_Store = tuple[dict[str, int], Sequence[float], float | None, float | None, float]


async def _of_store(store: LightningStore) -> _Store:
    """Rollouts by state, rewards, the first beginning, the last end, and the time."""
    statistics, newest = await asyncio.gather(
        store.statistics(), store.query_rollouts(sort_order="desc", limit=_REWARDS)
    )
    oldest = await store.query_rollouts(limit=1)
    rewards = await rewards_of(store, newest)
    in_order = [rewards[each.rollout_id] for each in reversed(newest) if each.rollout_id in rewards]
    ends = [each.end_time for each in newest if each.end_time is not None]
    began = oldest[0].start_time if len(oldest) else None
    by_status: dict[str, int] = dict(statistics.get("rollouts_by_status", {}))
    return by_status, in_order, began, max(ends, default=None), clock_of(statistics)
