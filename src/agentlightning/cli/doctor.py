"""``agl doctor``: what is wrong, and how to mend it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from agentlightning.cli.exits import ExitCode
from agentlightning.cli.options import ApiKey, Format, Output, Url

if TYPE_CHECKING:
    from pathlib import Path

    from agentlightning.cli.checkup import Traced
    from agentlightning.cli.findings import Finding
    from agentlightning.cli.overview import Overview
    from agentlightning.store.base import LightningStore
    from agentlightning.types import ResourcesUpdate


_SAMPLE = 5
"""How many rollouts are looked at for spans."""
_SAMPLE_SPANS = 500


def doctor(url: Url = None, api_key: ApiKey = None, output: Output = Format.TABLE) -> None:
    """Find what is wrong, and say how to mend it.

    Looks at the way to the store (name, port, key, TLS), at versions and clocks of both sides, at the disks, at what
    waits and why, and at what the last rollouts left behind: spans, model calls, rewards. Changes nothing.

    Exit code 0: no problem (there may be warnings). 1: at least one problem.

    [bold]Examples[/bold]

      agl doctor
      agl doctor --url http://gpu-1:4747
      agl doctor --url agentlightning.db -o json | jq '.findings[] | select(.level=="problem")'
    """
    from agentlightning.cli.output import print_json
    from agentlightning.cli.target import locate

    place = locate(url, api_key)
    findings = _examine(url, api_key)
    problems = sum(each.level == "problem" for each in findings)
    if output is Format.JSON:
        print_json({"store": str(place), "ok": not problems, "findings": [each._asdict() for each in findings]})
    else:
        _print(findings, str(place))
    if problems:
        raise typer.Exit(ExitCode.FAILED)


def _examine(url: str | None, api_key: str | None) -> list[Finding]:
    from agentlightning.cli.checkup import check_database, check_server, check_spool
    from agentlightning.cli.target import Server, locate

    place = locate(url, api_key)
    if isinstance(place, Server):
        answer, findings = check_server(place)
        usable = answer is not None
    else:
        findings = list(check_database(place))
        usable = all(each.level != "problem" for each in findings)
    if usable:
        findings += _examine_work(url, api_key)
    findings += check_spool(_spool_folder())
    return findings


def _examine_work(url: str | None, api_key: str | None) -> list[Finding]:
    """What can be asked of the store itself."""
    from agentlightning.cli.checkup import check_disk, check_models, check_spans, sentence
    from agentlightning.cli.findings import Finding, explain
    from agentlightning.cli.target import look
    from agentlightning.errors import AgentLightningError

    try:
        overview, traced, resources = look(url, api_key, _ask)
    except AgentLightningError as error:
        return [Finding(error.code, "problem", sentence(error.message))]
    host = overview.statistics.get("host", {})
    disk = check_disk(host.get("disk_free_bytes"), host.get("disk_total_bytes"), "the database")
    return [*disk, *explain(overview), *check_models(resources), *check_spans(traced)]


def _spool_folder() -> Path:
    from pathlib import Path

    from agentlightning.http.client.cache import default_folder
    from agentlightning.settings import LightningEnvVar, resolve_str_env_var

    chosen = resolve_str_env_var(LightningEnvVar.AGL_SPOOL_DIR)
    return Path(chosen) if chosen else default_folder()


async def _ask(store: LightningStore) -> tuple[Overview, list[Traced], ResourcesUpdate | None]:
    from agentlightning.cli.checkup import Traced
    from agentlightning.cli.overview import gather

    overview = await gather(store)
    carried_out = [each for each in overview.ended if each.status != "cancelled" and hasattr(each, "attempt")]
    traced: list[Traced] = []
    for each in carried_out[:_SAMPLE]:
        spans = await store.query_spans(each.rollout_id, "latest", sort_order="desc", limit=_SAMPLE_SPANS)
        traced.append(Traced(each.rollout_id, each.status, list(reversed(spans.items))))
    resources = await store.get_latest_resources() if overview.waiting or overview.running else None
    return overview, traced, resources


def _print(findings: Sequence[Finding], place: str) -> None:
    from rich.text import Text

    from agentlightning.cli.output import clean, console

    screen = console()
    marks = {"problem": ("✗", "bold red"), "warning": ("!", "yellow"), "note": ("✓", "green")}
    for each in findings:
        mark = ("·", "dim") if each.level == "note" and each.fix else marks[each.level]
        screen.print(Text.assemble(mark, " ", clean(each.text)))
        if each.fix:
            screen.print(Text.assemble("  → ", clean(each.fix)))
    counts = {level: sum(each.level == level for each in findings) for level in marks}
    screen.print()
    screen.print(
        f"{place}: {counts['problem']} problem{'' if counts['problem'] == 1 else 's'}, "
        f"{counts['warning']} warning{'' if counts['warning'] == 1 else 's'}",
        style="bold red" if counts["problem"] else "bold",
    )
