"""The checks of ``agl doctor``: each looks at one thing, and says what it found and what to do.

A check that finds all well says so in a note, so that a reader knows what was looked at.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from agentlightning.cli.findings import Finding, Level
from agentlightning.cli.output import duration, size
from agentlightning.cli.probe import Answer, ask
from agentlightning.cli.target import Database, Server
from agentlightning.errors import AgentLightningError, BadRequest, NotAllowed, NotAuthenticated, StoreUnreachable
from agentlightning.types import LLM, ResourcesUpdate, Span
from agentlightning.types.rewards import find_final_reward

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
    from agentlightning.cli.owner import find_owner

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
                "Mend what makes them, then move the file away.",
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
