"""``agl doctor``: what is wrong, and how to fix it."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import typer
from rich.text import Text

from agentlightning.cli.overview import Finding, Level, explain, gather
from agentlightning.cli.target import Database, Server, Target, ask, find_owner
from agentlightning.cli.terminal import (
    ExitCode,
    Output,
    clean,
    console,
    count,
    duration,
    print_json,
    size,
)
from agentlightning.errors import (
    AgentLightningError,
    BadRequest,
    NotAllowed,
    NotAuthenticated,
    StoreUnavailable,
    StoreUnreachable,
)
from agentlightning.http.client.cache import default_folder
from agentlightning.security.hosts import is_loopback
from agentlightning.settings import LightningEnvVar, resolve_str_env_var
from agentlightning.types import LLM, ResourcesUpdate
from agentlightning.types.endpoints import without_key
from agentlightning.types.rewards import find_final_reward

if TYPE_CHECKING:
    from agentlightning.cli.overview import Overview
    from agentlightning.store.base import LightningStore
    from agentlightning.types import Span

_SAMPLE = 5
"""How many rollouts are looked at for spans."""
_SAMPLE_SPANS = 500
_CODES: dict[type[AgentLightningError], str] = {
    StoreUnreachable: "server_unreachable",
    StoreUnavailable: "server_unavailable",
    NotAuthenticated: "wrong_key",
    NotAllowed: "refused",
    BadRequest: "not_our_server",
}
"""What the errors of servers are called here; the others have their own code."""
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


def doctor(target: Target, output: Output = "table") -> None:
    """Find what is wrong, and say how to fix it.

    Looks at the way to the store (name, port, key, TLS), at versions and clocks of both sides, at the disks, at what
    waits and why, and at what the last rollouts left behind: spans, model calls, rewards. Changes nothing.

    Exit code 0: no problem (there may be warnings). 1: at least one problem.

    [bold]Examples[/bold]

      agl doctor
      agl doctor --url http://gpu-1:4747
      agl doctor --url agentlightning.db -o json | jq '.findings[] | select(.level=="problem")'
    """
    findings = [*_examine_store(target), *_check_spool()]
    problems = sum(each.level == "problem" for each in findings)
    if output == "json":
        print_json({"store": str(target), "ok": not problems, "findings": [each._asdict() for each in findings]})
    else:
        _print(findings, str(target), problems)
    if problems:
        raise typer.Exit(ExitCode.FAILED)


def _print(findings: Sequence[Finding], place: str, problems: int) -> None:
    screen = console()
    marks = {"problem": ("✗", "bold red"), "warning": ("!", "yellow"), "note": ("✓", "green")}
    for each in findings:
        mark = ("·", "dim") if each.level == "note" and each.fix else marks[each.level]
        screen.print(Text.assemble(mark, " ", clean(each.text)))
        if each.fix:
            screen.print(f"  → {clean(each.fix)}")
    warnings = sum(each.level == "warning" for each in findings)
    told = f"\n{place}: {count(problems, 'problem')}, {count(warnings, 'warning')}"
    screen.print(told, style="bold red" if problems else "bold")


def _examine_store(target: Target) -> Iterator[Finding]:
    try:
        if isinstance(target, Server):
            yield from check_server(target)
        if isinstance(target, Database):
            for found in _check_database(target.path):
                yield found
                if found.level == "problem":
                    return
        overview, traced, resources = target.look(lambda store: _ask(store, target))
    except AgentLightningError as error:  # its message becomes a sentence among others
        text = f"{error.message[:1].upper()}{error.message[1:]}{'' if error.message.endswith('.') else '.'}"
        yield Finding(_CODES.get(type(error), error.code), "problem", text)
        return
    host = overview.statistics.get("host", {})
    yield from check_disk(host.get("disk_free_bytes"), host.get("disk_total_bytes"), "the database")
    yield from explain(overview)
    yield from _check_models(resources)
    yield from check_spans(traced)


async def _ask(store: LightningStore, target: Target) -> tuple[Overview, list[Traced], ResourcesUpdate | None]:
    overview = await gather(store, target)
    carried_out = [each for each in overview.ended if each.status != "cancelled" and hasattr(each, "attempt")]
    traced: list[Traced] = []
    for each in carried_out[:_SAMPLE]:
        spans = await store.query_spans(each.rollout_id, "latest", sort_order="desc", limit=_SAMPLE_SPANS)
        traced.append(Traced(each.rollout_id, each.status, list(reversed(spans.items))))
    resources = await store.get_latest_resources() if overview.waiting or overview.running else None
    return overview, traced, resources


# --- The way to the store ------------------------------------------------------------------------------


def check_server(server: Server) -> Iterator[Finding]:
    """Whether it answers us, how far its clock and version are from ours, and who can listen in. Raises as ``ask``."""
    answer = ask(server)
    for _ in range(_TRIES - 1):  # one slow answer says nothing, and the quickest says most about clocks
        if answer.round_trip_seconds > _SLOW_SECONDS:
            answer = min(answer, ask(server), key=lambda each: each.round_trip_seconds)
    took = duration(answer.round_trip_seconds)
    if answer.round_trip_seconds > _SLOW_SECONDS:
        yield Finding(
            "server_slow",
            "warning",
            f"{server} took {took} for a simple question, and longer for others.",
            "Look at its load (/metrics, log) and at the network between.",
        )
    else:
        yield Finding("server_answers", "note", f"{server} answers within {took}.")
    host: dict[str, Any] = answer.statistics.get("host", {})
    yield from _check_version(host.get("version"))
    if "time" in host:
        yield _check_clock(host["time"] - answer.asked_at, answer.round_trip_seconds)
    yield from _check_wire(server)


def _check_version(theirs: str | None) -> Iterator[Finding]:
    ours = version("agentlightning")
    if theirs == ours:
        yield Finding("same_version", "note", f"Both sides run agentlightning {ours}.")
        return
    alike = theirs is not None and theirs.split(".")[:2] == ours.split(".")[:2]
    yield Finding(
        "version_mismatch",
        "warning" if alike else "problem",
        f"The server runs agentlightning {theirs or 'of an older version'}, and this machine {ours}.",
        f"Install the same on both sides: pip install agentlightning=={max(theirs or '', ours, key=_order)}",
    )


def _order(text: str) -> list[int]:
    return [int(part) if part.isdecimal() else 0 for part in text.split(".")]


def _check_clock(offset: float, round_trip_seconds: float) -> Finding:
    """Half the round trip is the most by which the measured offset can be wrong (as in NTP, RFC 5905)."""
    certain = abs(offset) - round_trip_seconds / 2
    for limit, level in _SKEW_SECONDS:
        if certain > limit:
            return Finding(
                "clock_skew",
                level,
                f"The server's clock is {duration(certain)} {'ahead of' if offset > 0 else 'behind'} this machine's.",
                "Nothing is lost by it (leases run on the server's clock alone), but traces and ages look wrong. "
                "Set both clocks by NTP.",
            )
    return Finding("clocks_agree", "note", "The server's clock and this machine's agree.")


def _check_wire(server: Server) -> Iterator[Finding]:
    parts = urlsplit(server.url)
    host = parts.hostname or ""
    if is_loopback(host) or host.endswith(".localhost"):
        return
    if parts.scheme == "http":
        yield Finding(
            "no_tls",
            "warning",
            f"{server} is not on this machine and has no TLS: whoever is on the way can read the key and all data.",
            "Serve with `agl store --tls-cert --tls-key` and use https://, or go through a tunnel.",
        )
    if server.credentials.api_key is None:
        yield Finding(
            "no_key",
            "warning",
            f"{server} is not on this machine and asks for no key: whoever reaches it can read and change everything.",
            "Serve with `agl store --api-key`, and set AGL_API_KEY where runners are.",
        )


def _check_database(path: Path) -> Iterator[Finding]:
    """Whether the file is there, who has it open, and who may read it."""
    if not path.is_file():
        text = f"There is no database {str(path)!r}."
        yield Finding("no_database", "problem", text, "Give the path of one with --url.")
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
        text = f"{path} can be read by other users of this machine, and has everything in it."
        yield Finding("readable_by_others", "warning", text, f"chmod 600 {path}")


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


def _check_spool() -> Iterator[Finding]:
    """What runners of this machine have not delivered yet, and what no server would take."""
    folder = Path(resolve_str_env_var(LightningEnvVar.AGL_SPOOL_DIR) or default_folder())
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
            with refused.open("rb") as lines:
                number = sum(1 for _ in lines)
            yield Finding(
                "spans_refused",
                "warning",
                f"Spans that a server refused for good lie in {refused}, each with the reason ({number}).",
                "Correct the code that makes them, then move the file away.",
            )


def _check_models(resources: ResourcesUpdate | None) -> Iterator[Finding]:
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
                f"Nobody answers at {without_key(endpoint)}, where the resource {name!r} says that its model is "
                f"({getattr(error, 'strerror', None) or error}).",
                "Start it, or the LLM proxy; all is well if only the runners' machines can reach it.",
            )


def check_spans(traced: Sequence[Traced]) -> Iterator[Finding]:
    """Whether the rollouts that ended last left spans, model calls and rewards.

    Args:
        traced: a few of those that were carried out, the newest first.
    """
    number = len(traced)
    enough = number >= _ENOUGH_TO_JUDGE
    bare = [each for each in traced if not each.spans]
    if len(bare) == number and enough:
        yield Finding(
            "no_spans",
            "problem",
            f"The last {number} rollouts left no spans: nothing can be learned from them.",
            "Run agents with a tracer (OtelTracer, the default), let them emit a reward, and call models through the "
            "proxy (resources from LLMProxy.as_resource).",
        )
        return
    if bare:
        first = bare[0]
        text = f"{len(bare)} of the last {number} rollouts left no spans, for example {first.rollout_id} "
        yield Finding(
            "some_without_spans", "warning", f"{text}({first.status}).", f"agl rollouts show {first.rollout_id}"
        )
    if not enough:
        return
    succeeded = [each for each in traced if each.status == "succeeded" and each.spans]
    if succeeded and all(find_final_reward(each.spans) is None for each in succeeded):
        yield Finding(
            "no_rewards",
            "warning",
            f"None of the last {len(succeeded)} rollouts that succeeded has a reward.",
            "Return a number from the agent, or call emit_reward(), if an algorithm is to learn from them.",
        )
        return
    names = (name for each in traced for span in each.spans for name in span.attributes)
    if any(name.startswith(("gen_ai.", "agentlightning.llm.")) for name in names):
        yield Finding("spans_arrive", "note", f"The last {number} rollouts left spans, model calls and rewards.")
    else:
        yield Finding(
            "no_model_calls",
            "note",
            f"None of the last {number} rollouts has a span of a model call.",
            "If they call models: use the endpoint from the resources, so that calls go through the proxy.",
        )
