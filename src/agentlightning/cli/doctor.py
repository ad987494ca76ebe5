"""``agl doctor``: what is wrong, and how to fix it."""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import typer

from agentlightning.cli.options import ApiKey, ExitCode, Format, Output, Url
from agentlightning.cli.output import clean, console, duration, print_json, size
from agentlightning.cli.overview import Finding, Level, explain, gather
from agentlightning.cli.target import Answer, Database, Server, ask, find_owner, locate, look
from agentlightning.errors import AgentLightningError, BadRequest, NotAllowed, NotAuthenticated, StoreUnreachable
from agentlightning.types import LLM, ResourcesUpdate, Span
from agentlightning.types.rewards import find_final_reward

if TYPE_CHECKING:
    from agentlightning.cli.overview import Overview
    from agentlightning.store.base import LightningStore

_SAMPLE = 5
"""How many rollouts are looked at for spans."""
_SAMPLE_SPANS = 500


def doctor(url: Url = None, api_key: ApiKey = None, output: Output = Format.TABLE) -> None:
    """Find what is wrong, and say how to fix it.

    Looks at the way to the store (name, port, key, TLS), at versions and clocks of both sides, at the disks, at what
    waits and why, and at what the last rollouts left behind: spans, model calls, rewards. Changes nothing.

    Exit code 0: no problem (there may be warnings). 1: at least one problem.

    [bold]Examples[/bold]

      agl doctor
      agl doctor --url http://gpu-1:4747
      agl doctor --url agentlightning.db -o json | jq '.findings[] | select(.level=="problem")'
    """
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


# --- The checks of ``agl doctor``: each looks at one thing, and says what it found and what to  ---

_SKEW_SECONDS: tuple[tuple[float, Level], ...] = ((5.0, "problem"), (1.0, "warning"))
_SLOW_SECONDS = 0.5
_TRIES = 3
_CONNECT_SECONDS = 2.0
_FULL_BYTES = 500_000_000
"""So little room is an emergency: the store stops for good when a write finds none."""
_LOW_BYTES, _LOW_SHARE = 5_000_000_000, 0.1
_ENOUGH_TO_JUDGE = 3


class Traced(NamedTuple):
    """A rollout that succeeded or failed, and the spans of its latest attempt."""

    rollout_id: str
    status: str
    spans: Sequence[Span]


# --- The way to the store ------------------------------------------------------------------------------


def check_server(server: Server) -> tuple[Answer | None, list[Finding]]:
    """Whether it answers us, how far its clock and version are from ours, and who can listen in."""
    try:
        answer = ask(server)
        for _ in range(_TRIES - 1):  # one slow answer says nothing, and the quickest says most about clocks
            if answer.round_trip_seconds > _SLOW_SECONDS:
                answer = min(answer, ask(server), key=lambda each: each.round_trip_seconds)
    except AgentLightningError as error:
        return None, [Finding(_code_of(error), "problem", sentence(error.message))]
    seconds = answer.round_trip_seconds
    found = [Finding("server_answers", "note", f"{server} answers within {duration(seconds)}.")]
    if seconds > _SLOW_SECONDS:
        found = [
            Finding(
                "server_slow",
                "warning",
                f"{server} took {duration(seconds)} for a simple question, and longer for others.",
                "Look at its load (/metrics, log) and at the network between.",
            )
        ]
    host: dict[str, Any] = answer.statistics.get("host", {})
    found += [*_check_version(host.get("version")), *_check_clock(host.get("time"), answer), *_check_wire(server)]
    return answer, found


def sentence(message: str) -> str:
    """The message of an error, as one sentence among others."""
    return f"{message[:1].upper()}{message[1:]}{'' if message.endswith('.') else '.'}"


def _code_of(error: AgentLightningError) -> str:
    match error:
        case StoreUnreachable():
            return "server_unreachable"
        case NotAuthenticated():
            return "wrong_key"
        case NotAllowed():
            return "refused"
        case BadRequest():
            return "not_our_server"
        case _:
            return "server_unavailable"


def _check_version(theirs: str | None) -> Iterator[Finding]:
    ours = version("agentlightning")
    if theirs == ours:
        yield Finding("same_version", "note", f"Both sides run agentlightning {ours}.")
        return
    level: Level = "warning" if theirs is not None and theirs.split(".")[:2] == ours.split(".")[:2] else "problem"
    yield Finding(
        "version_mismatch",
        level,
        f"The server runs agentlightning {theirs or 'of an older version'}, and this machine {ours}.",
        f"Install the same on both sides: pip install agentlightning=={max(theirs or '', ours, key=_order)}",
    )


def _order(text: str) -> list[int]:
    return [int(part) if part.isdecimal() else 0 for part in text.split(".")]


def _check_clock(theirs: float | None, answer: Answer) -> Iterator[Finding]:
    """Half the round trip is the most by which the measured offset can be wrong (as in NTP, RFC 5905)."""
    if theirs is None:
        return
    offset = theirs - answer.asked_at
    certain = max(0.0, abs(offset) - answer.round_trip_seconds / 2)
    for limit, level in _SKEW_SECONDS:
        if certain > limit:
            yield Finding(
                "clock_skew",
                level,
                f"The server's clock is {duration(certain)} {'ahead of' if offset > 0 else 'behind'} this machine's.",
                "Nothing is lost by it (leases run on the server's clock alone), but traces and ages look wrong. "
                "Set both clocks by NTP.",
            )
            return
    yield Finding("clocks_agree", "note", "The server's clock and this machine's agree.")


def _check_wire(server: Server) -> Iterator[Finding]:
    parts = urlsplit(server.url)
    if _is_loopback(parts.hostname or ""):
        return
    if parts.scheme == "http":
        yield Finding(
            "no_tls",
            "warning",
            f"{server} is not on this machine and has no TLS: whoever is on the way can read the key and all data.",
            "Serve with `agl store --tls-cert --tls-key` and use https://, or go through a tunnel.",
        )
    if server.api_key is None:
        yield Finding(
            "no_key",
            "warning",
            f"{server} is not on this machine and asks for no key: whoever reaches it can read and change everything.",
            "Serve with `agl store --api-key`, and set AGL_API_KEY where runners are.",
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def check_database(database: Database) -> Iterator[Finding]:
    """Whether the file is there, who has it open, and who may read it."""
    path = database.path
    if not path.is_file():
        yield Finding(
            "no_database", "problem", f"There is no database {str(path)!r}.", "Give the path of one with --url."
        )
        return
    if not os.access(path, os.R_OK):
        yield Finding("unreadable", "problem", f"{path} cannot be read by this user.", "Run this as its owner.")
        return
    owner = find_owner(path)
    if owner is None:
        yield Finding("not_served", "note", f"No process has {path} open; what is in it stands still.")
    else:
        where = f" and serves it at {' or '.join(owner.server_urls)}" if owner.server_urls else ""
        yield Finding("owned", "note", f"Process {owner.pid} ({owner.command}) has {path} open{where}.")
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        yield Finding(
            "readable_by_others",
            "warning",
            f"{path} can be read by other users of this machine, and has everything in it.",
            f"chmod 600 {path}",
        )


# --- The disk ------------------------------------------------------------------------------------------


def check_disk(free: int | None, total: int | None, what: str) -> Iterator[Finding]:
    """Whether there is room.

    Args:
        free, total: bytes; None if that is not known.
        what: what lies on the disk, for the sentence.
    """
    if free is None or total is None:
        return
    room = f"{size(free)} of {size(total)} free on the disk of {what}"
    fix = "Make room: `agl rollouts prune` deletes old ones, and their room is used again; move backups elsewhere."
    if free < _FULL_BYTES:
        yield Finding("disk_almost_full", "problem", f"{room}. When it is full, writes are refused.", fix)
    elif free < _LOW_BYTES and free < total * _LOW_SHARE:
        yield Finding("disk_filling", "warning", f"{room}.", fix)
    else:
        yield Finding("disk_has_room", "note", f"{room}.")


def check_spool(folder: Path) -> Iterator[Finding]:
    """What runners of this machine have not delivered yet, and what no server would take.

    Args:
        folder: the spools of all servers, each in a folder of its own.
    """
    if not folder.is_dir():
        return
    room = os.statvfs(folder)
    free, total = room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize
    yield from (each for each in check_disk(free, total, f"the spool, {folder}") if each.level != "note")
    for server in sorted(each for each in folder.iterdir() if each.is_dir()):
        waiting = sum(each.stat().st_size for each in server.glob("*.spool/*.seg"))
        if waiting:
            yield Finding(
                "spans_wait",
                "warning",
                f"Up to {size(waiting)} of spans wait on this machine for the server {server.name}.",
                "The runners here deliver them when it answers; those of dead ones are taken over by the next.",
            )
        refused = server / "quarantine.jsonl"
        if refused.is_file():
            yield Finding(
                "spans_refused",
                "warning",
                f"Spans that a server refused for good lie in {refused}, each with the reason ({_lines_in(refused)}).",
                "Correct the code that makes them, then move the file away.",
            )


def _lines_in(file: Path) -> int:
    with file.open("rb") as lines:
        return sum(1 for _ in lines)


# --- What is left behind ------------------------------------------------------------------------------------------


def check_models(resources: ResourcesUpdate | None) -> Iterator[Finding]:
    """Whether somebody listens where the newest resources say that models are.

    Args:
        resources: those that a rollout enqueued now would get; None if there are none, or there is nothing to do.
    """
    for name, resource in (resources.resources if resources is not None else {}).items():
        if not isinstance(resource, LLM):
            continue
        endpoint = resource.get_base_url()
        try:
            parts = urlsplit(endpoint)
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname or "", port), timeout=_CONNECT_SECONDS).close()
        except (OSError, ValueError) as error:
            yield Finding(
                "model_unreachable",
                "warning",
                f"Nobody answers at {endpoint}, where the resource {name!r} says that its model is "
                f"({getattr(error, 'strerror', None) or error}).",
                "Start it, or the LLM proxy; all is well if only the runners' machines can reach it.",
            )


def check_spans(traced: Sequence[Traced]) -> Iterator[Finding]:
    """Whether the rollouts that ended last left spans, model calls and rewards.

    Args:
        traced: a few of those that were carried out, the newest first.
    """
    if not traced:
        return
    number = len(traced)
    bare = [each for each in traced if not each.spans]
    if len(bare) == number and number >= _ENOUGH_TO_JUDGE:
        yield Finding(
            "no_spans",
            "problem",
            f"The last {number} rollouts left no spans: nothing can be learned from them.",
            "Run agents with a tracer (OtelTracer, the default), let them emit a reward, and call models through the "
            "proxy (resources from LLMProxy.as_resource).",
        )
        return
    if bare:
        yield Finding(
            "some_without_spans",
            "warning",
            f"{len(bare)} of the last {number} rollouts left no spans, for example {bare[0].rollout_id} "
            f"({bare[0].status}).",
            f"agl rollouts show {bare[0].rollout_id}",
        )
    if number < _ENOUGH_TO_JUDGE:
        return
    succeeded = [each for each in traced if each.status == "succeeded" and each.spans]
    if succeeded and all(find_final_reward(each.spans) is None for each in succeeded):
        yield Finding(
            "no_rewards",
            "warning",
            f"None of the last {len(succeeded)} rollouts that succeeded has a reward.",
            "Return a number from the agent, or call emit_reward(), if an algorithm is to learn from them.",
        )
    elif not any(_calls_a_model(span) for each in traced for span in each.spans):
        yield Finding(
            "no_model_calls",
            "note",
            f"None of the last {number} rollouts has a span of a model call.",
            "If they call models: use the endpoint from the resources, so that calls go through the proxy.",
        )
    else:
        yield Finding("spans_arrive", "note", f"The last {number} rollouts left spans, model calls and rewards.")


def _calls_a_model(span: Span) -> bool:
    return any(name.startswith(("gen_ai.", "agentlightning.llm.")) for name in span.attributes)
