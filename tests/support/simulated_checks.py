"""What must hold at the end of every simulation, whatever happened in it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from simulated_clients import LEASE_SECONDS
from simulated_ledger import Hardship, Ledger
from simulated_server import History

__all__ = ["Remains", "violations"]

_FINAL = ("succeeded", "failed", "cancelled")
_LIVE = ("preparing", "running")
_TERMS = {"worker_lost": LEASE_SECONDS, "unconfirmed": 10.0, "unresponsive": 12.0}
"""How long nothing was heard of an attempt that ended for a reason, in seconds."""
_LOSSES = 3
"""A runner stays alive if fewer of its signs of life are lost in a row."""
_HEARD_SECONDS = 2.0
"""How long a sign of life may take to be heard, at most, without any trouble: two ways, and a commit."""


class Remains(NamedTuple):
    """What the database holds in the end."""

    rollouts: dict[str, dict[str, Any]]
    attempts: dict[str, dict[str, Any]]
    spans: list[tuple[str, str, int]]
    """(attempt, span, sequence id) in the order in which they were stored."""
    history: History


def read_remains(connection: Any) -> Remains:
    """All that interests of a database."""

    def rows(table: str, *columns: str) -> list[dict[str, Any]]:
        found = connection.execute(f"SELECT {', '.join(columns)} FROM {table} ORDER BY seq")
        return [dict(zip(columns, row, strict=True)) for row in found]

    rollouts = rows("rollouts", "rollout_id", "status", "reason_code", "latest_attempt_id", "attempts")
    attempts = rows(
        "attempts", "attempt_id", "rollout_id", "sequence_id", "status", "reason_code", "worker_id", "request_id"
    )
    spans = connection.execute(
        "SELECT attempt_id, span_id, spans.sequence_id FROM spans JOIN attempts ON attempts.seq = attempt_seq "
        "ORDER BY spans.seq"
    ).fetchall()
    history = connection.execute("SELECT at, kind, id, before, after, reason FROM history ORDER BY seq").fetchall()
    return Remains(
        {each["rollout_id"]: each for each in rollouts}, {each["attempt_id"]: each for each in attempts}, spans, history
    )


def violations(remains: Remains, ledger: Ledger) -> Iterator[str]:
    """Each rule that was broken, with what broke it."""
    for check in (_nothing_lost, _nothing_doubled, _one_end_each, _fenced, _in_order, _living_not_dead):
        yield from check(remains, ledger)


def _nothing_lost(remains: Remains, ledger: Ledger) -> Iterator[str]:
    for rollout_id in sorted(ledger.enqueued - remains.rollouts.keys()):
        yield f"rollout {rollout_id} was acknowledged and is lost"
    stored = {(attempt_id, span_id) for attempt_id, span_id, _ in remains.spans}
    for attempt_id, span_id in sorted(ledger.accepted - stored):
        yield f"span {span_id} of {attempt_id} was accepted and is lost"
    for attempt_id, status in ledger.finished.items():
        if (known := remains.attempts.get(attempt_id, {}).get("status")) != status:
            yield f"attempt {attempt_id} was acknowledged as {status} and is {known}"
    for rollout_id, status in ledger.ends_seen.items():
        if remains.rollouts[rollout_id]["status"] != status:
            yield f"rollout {rollout_id} was shown as {status} and is {remains.rollouts[rollout_id]['status']}"


def _nothing_doubled(remains: Remains, ledger: Ledger) -> Iterator[str]:
    if len(remains.rollouts) > ledger.enqueue_calls:
        yield f"{ledger.enqueue_calls} rollouts were asked for, and there are {len(remains.rollouts)}"
    for attempt_id, times in ledger.executed.items():
        if times > 1:
            yield f"agents began {times} times on attempt {attempt_id}"
    for span, times in Counter((attempt_id, span_id) for attempt_id, span_id, _ in remains.spans).items():
        if times > 1:
            yield f"span {span} is stored {times} times"
    emitted = {(attempt_id, span_id) for attempt_id, spans in ledger.emitted.items() for span_id in spans}
    for attempt_id, span_id, _ in remains.spans:
        if (attempt_id, span_id) not in emitted:
            yield f"span {span_id} of {attempt_id} was made by nobody"
    claims = Counter(each["request_id"] for each in remains.attempts.values() if each["request_id"] is not None)
    for request_id, times in claims.items():
        if times > (asked := ledger.claims[request_id]):
            yield f"a claim asked for {asked} rollouts and got {times} attempts"


def _one_end_each(remains: Remains, ledger: Ledger) -> Iterator[str]:
    yield from ledger.changed_ends
    ends = Counter[str]()
    for _, kind, name, before, after, _ in remains.history:
        if kind != "rollouts":
            continue
        ends[name] += after in _FINAL
        if before in _FINAL:
            yield f"rollout {name} ended {before} and became {after}"
    for rollout_id, rollout in remains.rollouts.items():
        if rollout["status"] not in _FINAL or ends[rollout_id] != 1:
            yield f"rollout {rollout_id} is {rollout['status']} and reached {ends[rollout_id]} ends"


def _fenced(remains: Remains, ledger: Ledger) -> Iterator[str]:
    latest: dict[str, int] = {}
    for _, kind, name, before, after, _ in remains.history:
        if kind != "attempts":
            continue
        attempt = remains.attempts[name]
        if before is None:
            latest[attempt["rollout_id"]] = attempt["sequence_id"]
        elif attempt["sequence_id"] < latest[attempt["rollout_id"]] and before not in _LIVE:
            yield f"attempt {name} became {after} although it had a successor"
        if before in ("succeeded", "failed", "timeout"):  # a silent one may be heard again, until it has a successor
            yield f"attempt {name} ended {before} and became {after}"
    for rollout_id, rollout in remains.rollouts.items():
        of_rollout = [each for each in remains.attempts.values() if each["rollout_id"] == rollout_id]
        won = [each["attempt_id"] for each in of_rollout if each["status"] == "succeeded"]
        if won != ([rollout["latest_attempt_id"]] if rollout["status"] == "succeeded" else []):
            yield f"rollout {rollout_id} is {rollout['status']}, and {won} of its attempts succeeded"
        if len(of_rollout) != rollout["attempts"]:
            yield f"rollout {rollout_id} counts {rollout['attempts']} attempts, and has {len(of_rollout)}"
        for each in of_rollout:
            if each["status"] in ("preparing", "running"):
                yield f"attempt {each['attempt_id']} is {each['status']} in the end"


def _in_order(remains: Remains, ledger: Ledger) -> Iterator[str]:
    """The spans of an attempt have numbers that grow in the order in which they came, and come before its end."""
    ended = set[str]()
    for _, kind, name, _, after, _ in remains.history:
        if kind == "attempts" and after == "succeeded":
            ended.add(name)
        elif kind == "spans" and after in ended:
            yield f"span {name} was stored after its attempt had succeeded"
    last: dict[str, int] = {}
    for attempt_id, span_id, number in remains.spans:
        if number <= last.get(attempt_id, 0):
            yield f"span {span_id} got number {number} after {last[attempt_id]}"
        last[attempt_id] = number


def _living_not_dead(remains: Remains, ledger: Ledger) -> Iterator[str]:
    for at, kind, name, _, after, reason in remains.history:
        if kind != "attempts" or after != "unresponsive" or name not in ledger.began:
            continue  # or its runner did not know of it
        began, process = ledger.began[name]
        term = _TERMS.get(str(reason), math.inf)
        if ledger.deaths.get(process, math.inf) <= at or (reason != "worker_lost" and at - began < term):
            continue
        machine = process.partition("#")[0].partition(".")[0]
        if not any(_explains(each, machine, at - term - _HEARD_SECONDS, at) for each in ledger.hardships):
            yield f"attempt {name} was declared {reason} at {at:.3f} although {process} was alive"


def _explains(each: Hardship, machine: str, since: float, until: float) -> bool:
    if each.machine != machine or each.since > until or each.until < since:
        return False
    losses = [at for at in each.losses if since <= at <= until]
    return each.what != "bad network" or len(losses) >= _LOSSES
