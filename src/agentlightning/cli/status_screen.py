"""What ``agl status`` shows: an overview as one screen, or as a record."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from agentlightning.cli.findings import Finding, explain
from agentlightning.cli.output import STATUS_STYLES, Cell, Column, ago, clean, duration, one_line, size, table
from agentlightning.cli.overview import Overview, last_heard, reason_of
from agentlightning.types import Worker

_SHOWN_WORKERS = 12
_SHOWN_FAILURES = 5


def record_of(overview: Overview, place: str) -> dict[str, Any]:
    """What `agl status -o json` prints. Times are seconds since the Unix epoch, on the store's clock."""
    statistics = overview.statistics
    oldest = overview.oldest_waiting
    return {
        "store": place,
        "time": overview.now,
        "version": statistics.get("host", {}).get("version"),
        "uptime_seconds": statistics.get("uptime"),
        "answer_seconds": overview.answer_seconds,
        "rollouts": statistics.get("rollouts_by_status", {}),
        "attempts": statistics.get("total_attempts", 0),
        "spans": statistics.get("total_spans", 0),
        "span_bytes": statistics.get("total_span_bytes", 0),
        "disk_free_bytes": statistics.get("host", {}).get("disk_free_bytes"),
        "oldest_waiting": None
        if oldest is None
        else {"rollout_id": oldest.rollout_id, "waits_seconds": max(0.0, overview.now - oldest.start_time)},
        "ended_per_minute": None if overview.pace is None else overview.pace.per_minute,
        "workers": [
            {
                "worker_id": each.worker_id,
                "status": each.status,
                "alive": overview.is_alive(each),
                "directive": each.directive,
                "last_heard": last_heard(each),
                "current_rollout_id": each.current_rollout_id,
            }
            for each in overview.workers
        ],
        "failures": [
            {"reason": each.reason, "count": each.count, "newest": each.newest.rollout_id} for each in overview.failures
        ],
        "findings": [each._asdict() for each in explain(overview)],
    }


# --- As a screen -----------------------------------------------------------------------------------


def screen_of(overview: Overview, place: str) -> RenderableType:
    """Numbers first, then workers and failures, and at the end, where the eye is, what they mean."""
    parts: list[RenderableType] = [_headline(overview, place), Text()]
    parts += [_fact(name, text) for name, text in _facts(overview)]
    for block in (_workers(overview), _failures(overview)):
        if block is not None:
            parts += [Text(), block]
    parts.append(Text())
    parts += [line for each in explain(overview) for line in _finding(each)]
    return Group(*parts)


def _headline(overview: Overview, place: str) -> Text:
    statistics = overview.statistics
    version = statistics.get("host", {}).get("version", "version unknown")
    more = [statistics.get("name", "store"), version]
    if place.startswith("http"):
        more.append(f"up {duration(statistics.get('uptime', 0.0))}")
        more.append(f"answers within {duration(overview.answer_seconds)}")
    return Text.assemble((clean(place), "bold"), ("  " + ", ".join(more), "dim"))


def _facts(overview: Overview) -> Iterator[tuple[str, Text]]:
    statistics = overview.statistics
    states = ("queuing", "requeuing", "preparing", "running", "succeeded", "failed", "cancelled")
    counts = [(state, overview.count(state)) for state in states]
    line = Text(f"{statistics.get('total_rollouts', 0):,}")
    for state, number in counts:
        if number:
            line.append(f"   {number:,} {state}", style=STATUS_STYLES.get(state, ""))
    yield "rollouts", line
    if overview.oldest_waiting is not None:
        oldest = overview.oldest_waiting
        yield "oldest waiting", Text(f"enqueued {ago(oldest.start_time, overview.now)}   {oldest.rollout_id}")
    if overview.waiting or overview.running:
        pace = overview.pace
        told = f"{pace.per_minute:,.0f} rollouts a minute, within the last {duration(pace.seconds)}" if pace else ""
        yield "pace", Text(told or "nothing ended within a minute")
    elif overview.ended:
        yield "newest end", Text(ago(max(each.end_time or 0.0 for each in overview.ended), overview.now))
    yield "attempts", Text(f"{statistics.get('total_attempts', 0):,}")
    spans = f"{statistics.get('total_spans', 0):,}   {size(statistics.get('total_span_bytes', 0))}"
    free = statistics.get("host", {}).get("disk_free_bytes")
    yield "spans", Text(spans if free is None else f"{spans}   {size(free)} free on the disk")


def _fact(name: str, value: Text) -> Text:
    return Text.assemble((f"{name:<16}", "bold"), value)


def _workers(overview: Overview) -> RenderableType | None:
    if not overview.workers:
        return None
    alive = overview.alive
    silent = [each for each in overview.workers if each not in alive]
    gone = sum(each.directive is not None for each in silent)
    columns = (
        Column("worker"),
        Column("state"),
        Column("heard", right=True),
        Column("works on"),
        Column("asked to"),
    )
    rows: list[list[Cell | str]] = [_worker(each, overview) for each in alive[:_SHOWN_WORKERS]]
    hidden = len(alive) - len(rows)
    remarks = [f"{hidden} more alive"] if hidden else []
    if gone:
        remarks.append(f"{gone} gone as asked")
    if len(silent) > gone:
        remarks.append(f"{len(silent) - gone} silent")
    parts: list[RenderableType] = [table(columns, rows)] if rows else []
    if remarks:
        parts.append(Text(f"{', '.join(remarks)}: `agl workers ls`", style="dim"))
    return Group(*parts)


def _worker(worker: Worker, overview: Overview) -> list[Cell | str]:
    return [
        worker.worker_id,
        Cell(worker.status, STATUS_STYLES[worker.status]),
        ago(last_heard(worker), overview.now),
        worker.current_rollout_id or "",
        Cell(worker.directive or "", "yellow"),
    ]


def _failures(overview: Overview) -> RenderableType | None:
    if not overview.failures:
        return None
    columns = (Column("failed", right=True), Column("reason"), Column("the newest said", wide=True), Column("rollout"))
    return table(
        columns,
        [
            [
                f"{each.count} of {len(overview.ended)}",
                Cell(each.reason, "red"),
                one_line(reason_of(each.newest)[1], 60),
                each.newest.rollout_id,
            ]
            for each in overview.failures[:_SHOWN_FAILURES]
        ],
    )


def _finding(finding: Finding) -> Iterator[Text]:
    mark, style = {"problem": ("✗", "bold red"), "warning": ("!", "yellow"), "note": ("·", "dim")}[finding.level]
    yield Text.assemble((f"{mark} ", style), clean(finding.text))
    if finding.fix:
        yield Text.assemble("  ", (clean(finding.fix), "dim"))
