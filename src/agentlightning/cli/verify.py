"""``agl verify``: check every record against the rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from agentlightning.cli.options import ApiKey, ExitCode, Format, Output, Url
from agentlightning.cli.output import Cell, Column, print_json, print_table
from agentlightning.cli.target import locate, look

if TYPE_CHECKING:
    from agentlightning.types import VerificationReport


def verify(url: Url = None, api_key: ApiKey = None, output: Output = Format.TABLE) -> None:
    """Check every record against the rules, and name each one that breaks one.

    Rules are, for example: attempts are numbered without gaps, at most one is live, what has ended never changes,
    span numbers are unique and increasing, counters are true. Nothing is changed. A file may be in use.

    Exit code 0: all is well. 5: there are violations.

    [bold]Examples[/bold]

      agl verify
      agl verify --url agentlightning.db
      agl verify --url backup.db -o json | jq .violations
    """
    report = look(url, api_key, lambda store: store.verify())
    if output is Format.JSON:
        print_json(report)
    else:
        print_report(report, str(locate(url, api_key)))
    if not report.ok:
        raise typer.Exit(ExitCode.VIOLATIONS)


def print_report(report: VerificationReport, place: str) -> None:
    """Print what was looked at, and what is wrong."""
    looked_at = ", ".join(f"{number:,} {kind}" for kind, number in sorted(report.checked.items()))
    if report.ok:
        typer.echo(f"{place}: every rule holds ({looked_at}).")
        return
    columns = (Column("rule"), Column("record"), Column("found"))
    print_table(columns, [[Cell(each.rule, "red"), each.record, each.detail] for each in report.violations], empty="")
    more = "" if report.complete else " There are more than are named here."
    number = len(report.violations)
    typer.echo(f"{place}: {number} violation{'' if number == 1 else 's'} ({looked_at}).{more}", err=True)
    typer.echo("Keep the file as it is, and restore the newest backup that verifies: `agl restore`.", err=True)
