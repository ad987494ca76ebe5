"""``agl rollouts cancel`` and ``prune``: what changes rollouts."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from agentlightning.cli.options import ApiKey, Url

if TYPE_CHECKING:
    from agentlightning.store.base import LightningStore
    from agentlightning.types import Rollout


_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}


def cancel(
    rollouts: Annotated[
        list[str], typer.Argument(metavar="ROLLOUT", help="Their ids, or parts of them that no others have.")
    ],
    message: Annotated[str | None, typer.Option("--message", "-m", help="Why, for those who look later.")] = None,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """End rollouts that nobody wants any more, whether they wait or are worked on.

    An attempt at work fails with reason cancelled; its runner hears of it with its next heartbeat. A rollout that
    has ended otherwise stays as it is, which is an error.

    [bold]Examples[/bold]

      agl rollouts cancel ro-01a2 --message "wrong prompt"
      agl rollouts ls -s queuing -o json | jq -r '.items[].rollout_id' | xargs agl rollouts cancel
    """
    from agentlightning.cli.lookup import find_rollout
    from agentlightning.cli.target import act

    async def action(store: LightningStore) -> list[Rollout]:
        found = [await find_rollout(store, each) for each in rollouts]  # all are known before one is cancelled
        return [await store.cancel_rollout(each.rollout_id, message=message) for each in found]

    for each in act(url, api_key, action):
        typer.echo(f"{each.rollout_id}  {each.status}")


def _parse_age(text: str) -> float:
    """An age in seconds.

    Raises:
        typer.BadParameter: the text is none.
    """
    match = _AGE.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is no age; write a number and s, m, h or d, such as 7d")
    return float(match[1]) * _SECONDS[match[2]]


def prune(
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="AGE", help="How long ago they ended: 90m, 12h, 7d.")
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Delete rollouts that ended long ago, with their attempts and spans. There is no way back but a backup.

    A database file does not become smaller by it; the room in it is used again.

    [bold]Examples[/bold]

      agl rollouts prune --older-than 30d
      agl rollouts prune --older-than 12h --yes
    """
    from agentlightning.cli.target import act, locate

    seconds = _parse_age(older_than)
    if not yes:
        typer.confirm(
            f"Delete all rollouts in {locate(url, api_key)} that ended more than {older_than} ago?", abort=True
        )
    deleted = act(url, api_key, lambda store: store.delete_finished_rollouts(older_than_seconds=seconds))
    typer.echo(f"{deleted:,} rollouts deleted")
