"""``agl restore``: a database from a backup."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer


def restore(
    source: Annotated[Path, typer.Argument(metavar="BACKUP", help="The file that `agl backup` made.")],
    target: Annotated[Path, typer.Argument(metavar="DATABASE", help="The database to make. It must not exist.")],
) -> None:
    """Make a new database from a backup, after checking it rule by rule.

    The file appears under its name only when it is whole and every rule holds. Nothing is overwritten: to replace a
    damaged database, move it away first, with the -wal and -shm files beside it.

    [bold]Examples[/bold]

      mv agentlightning.db agentlightning.db-wal agentlightning.db-shm damaged/
      agl restore backup.db agentlightning.db
      agl store --db agentlightning.db
    """
    from agentlightning.cli.output import size
    from agentlightning.cli.target import look
    from agentlightning.store.sqlite.store import SqliteLightningStore

    asyncio.run(SqliteLightningStore.restore(source, target))
    statistics = look(str(target), None, lambda store: store.statistics())
    typer.echo(
        f"{target}: {size(target.stat().st_size)}, every rule holds; {statistics.get('total_rollouts', 0):,} rollouts, "
        f"{statistics.get('total_spans', 0):,} spans"
    )
