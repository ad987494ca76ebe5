"""``agl backup``: a copy of a database, taken while it is used."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agentlightning.cli.options import ApiKey, ExitCode, Format, Output, Url
from agentlightning.cli.output import print_json, size
from agentlightning.cli.target import Server, locate, look
from agentlightning.cli.verify import print_report
from agentlightning.errors import InvalidValue

if TYPE_CHECKING:
    from agentlightning.store.base import LightningStore


def backup(
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The file to make. It must not exist.")],
    url: Url = None,
    api_key: ApiKey = None,
    output: Output = Format.TABLE,
) -> None:
    """Copy a database into a new file, while it is used, and check the copy.

    The copy has everything that was acknowledged before it began, and the file appears under its name only when
    it is whole, readable by you alone. It is then checked rule by rule, as by [bold]agl verify[/bold].

    It is made beside the database: --url must be its file, on the machine of the process that has it open.

    Exit code 0: the copy is good. 5: it is there, and has what the database has: records that break rules.

    [bold]Examples[/bold]

      agl backup --url agentlightning.db backup.db
      agl backup --url agentlightning.db "nightly-$(date +%F).db"
    """
    source = locate(url, api_key)
    if isinstance(source, Server):
        raise InvalidValue(
            f"a backup is made from the file, not through {source}: on the machine of the server, "
            f"run `agl backup --url DATABASE.db {target}` (it may go on serving)"
        )
    look(str(source.path), None, lambda store: _copy(store, target))
    report = look(str(target), None, lambda copy: copy.verify())
    number = target.stat().st_size
    if output is Format.JSON:
        print_json({"backup": str(target), "bytes": number, "verification": report})
    else:
        typer.echo(f"{target}: {size(number)}, a whole copy of {source}")
        print_report(report, str(target))
    if not report.ok:
        raise typer.Exit(ExitCode.VIOLATIONS)


async def _copy(store: LightningStore, target: Path) -> None:
    from agentlightning.store.sqlite.store import ReadOnlySqliteStore

    assert isinstance(store, ReadOnlySqliteStore), "a path opens a file"
    await store.backup(target)


# --- ``agl restore``: a database from a backup ---


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
    from agentlightning.store.sqlite.store import SqliteLightningStore

    asyncio.run(SqliteLightningStore.restore(source, target))
    statistics = look(str(target), None, lambda store: store.statistics())
    typer.echo(
        f"{target}: {size(target.stat().st_size)}, every rule holds; {statistics.get('total_rollouts', 0):,} rollouts, "
        f"{statistics.get('total_spans', 0):,} spans"
    )
