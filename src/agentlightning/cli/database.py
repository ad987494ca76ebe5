"""``agl verify``, ``agl backup`` and ``agl restore``: whether records are whole, and copies of a database."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from agentlightning.cli.target import Database, Server, Target
from agentlightning.cli.terminal import Column, ExitCode, Output, count, print_json, print_table, size
from agentlightning.errors import InvalidValue

if TYPE_CHECKING:
    from agentlightning.store.sqlite.store import ReadOnlySqliteStore
    from agentlightning.types import VerificationReport, Violation


def verify(target: Target, output: Output = "table") -> None:
    """Check every record against the rules, and name each one that breaks one.

    Rules are, for example: attempts are numbered without gaps, at most one is live, what has ended never changes,
    span numbers are unique and increasing, counters are true. Nothing is changed. A file may be in use.

    Exit code 0: all is well. 5: there are violations.

    [bold]Examples[/bold]

      agl verify
      agl verify --url agentlightning.db
      agl verify --url backup.db -o json | jq .violations
    """
    report = target.look(lambda store: store.verify())
    if output == "json":
        print_json(report)
    else:
        _print_report(report, str(target))
    if not report.ok:
        raise typer.Exit(ExitCode.VIOLATIONS)


def _print_report(report: VerificationReport, place: str) -> None:
    """Print what was looked at, and what is wrong."""
    looked_at = ", ".join(f"{number:,} {kind}" for kind, number in sorted(report.checked.items()))
    if report.ok:
        typer.echo(f"{place}: every rule holds ({looked_at}).")
        return
    columns: tuple[Column[Violation], ...] = (
        Column("rule", lambda each: each.rule, style="red"),
        Column("record", lambda each: each.record),
        Column("found", lambda each: each.detail),
    )
    print_table(columns, report.violations, empty="")
    more = "" if report.complete else " There are more than are named here."
    typer.echo(f"{place}: {count(len(report.violations), 'violation')} ({looked_at}).{more}", err=True)
    typer.echo("Keep the file as it is, and restore the newest backup that verifies: `agl restore`.", err=True)


def backup(
    target: Target,
    copy: Annotated[Path, typer.Argument(metavar="TARGET", help="The file to make. It must not exist.")],
    output: Output = "table",
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
    if isinstance(target, Server):
        raise InvalidValue(
            f"a backup is made from the file, not through {target}: on the machine of the server, "
            f"run `agl backup --url DATABASE.db {copy}` (it may go on serving)"
        )
    target.look(lambda store: cast("ReadOnlySqliteStore", store).backup(copy))
    report = Database(copy).look(lambda store: store.verify())
    number = copy.stat().st_size
    if output == "json":
        print_json({"backup": str(copy), "bytes": number, "verification": report})
    else:
        typer.echo(f"{copy}: {size(number)}, a whole copy of {target}")
        _print_report(report, str(copy))
    if not report.ok:
        raise typer.Exit(ExitCode.VIOLATIONS)


def restore(
    source: Annotated[Path, typer.Argument(metavar="BACKUP", help="The file that `agl backup` made.")],
    database: Annotated[Path, typer.Argument(metavar="DATABASE", help="The database to make. It must not exist.")],
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

    asyncio.run(SqliteLightningStore.restore(source, database))
    statistics = Database(database).look(lambda store: store.statistics())
    rollouts, spans = statistics.get("total_rollouts", 0), statistics.get("total_spans", 0)
    whole = f"{size(database.stat().st_size)}, every rule holds"
    typer.echo(f"{database}: {whole}; {rollouts:,} rollouts, {spans:,} spans")
