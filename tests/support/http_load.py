"""Clients that work without pause on a server that comes and goes, and a journal of what it promised them.

As a program (`main`), it is one such client in a process of its own, until its standard input is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from agentlightning.errors import StaleAttempt
from agentlightning.http.client.client import LightningStoreClient
from agentlightning.store.base import LightningStore
from agentlightning.types import AttemptedRollout, RolloutConfig, Span

__all__ = ["Journal", "Promised", "check", "main", "read_journals", "spans_accepted", "work"]

SPANS = 3
LASTING = RolloutConfig(max_attempts=1000, retry_condition=["unresponsive", "timeout"])


class Journal:
    """What calls returned, a line each, appended by one write that SIGKILL does not take back."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, kind: str, *ids: str) -> None:
        os.write(self._handle, f"{kind} {' '.join(ids)}\n".encode())

    def close(self) -> None:
        os.close(self._handle)


async def work(client: LightningStore, worker: str, journal: Journal, stop: asyncio.Event) -> None:
    """Enqueue, claim, trace and finish until told to stop. Any error but that of a lost attempt is the caller's."""
    ahead: AttemptedRollout | None = None
    while not stop.is_set():
        rollout = await client.enqueue_rollout(worker, config=LASTING)
        journal.note("enqueued", rollout.rollout_id)
        claim = ahead or await client.dequeue_rollout(worker, wait_seconds=0.5)
        ahead = None
        if claim is None:
            continue
        try:
            ahead = await _attempt(client, claim, worker, journal)
        except StaleAttempt:
            journal.note("stale", claim.rollout_id, claim.attempt.attempt_id)
    if ahead is not None:
        with contextlib.suppress(StaleAttempt):
            await client.release_attempt(ahead.rollout_id, ahead.attempt.attempt_id)
            journal.note("released", ahead.rollout_id, ahead.attempt.attempt_id)


async def _attempt(
    client: LightningStore, claim: AttemptedRollout, worker: str, journal: Journal
) -> AttemptedRollout | None:
    """Returns the rollout that was claimed with the end of this one."""
    ids = (claim.rollout_id, claim.attempt.attempt_id)
    await client.update_attempt(*ids, status="running")
    for number in range(SPANS):
        span = Span.from_attributes(attributes={"n": number}, rollout_id=ids[0], attempt_id=ids[1])
        await client.add_span(span)
        journal.note("span", *ids, span.span_id, str(number))
        await client.update_worker(worker, attempt_ids=[ids[1]])
    last = Span.from_attributes(attributes={"n": SPANS}, rollout_id=ids[0], attempt_id=ids[1])
    done = await client.finish_attempt(*ids, "succeeded", [last], claim_limit=1, worker_id=worker)
    journal.note("span", *ids, last.span_id, str(SPANS))
    journal.note("succeeded", *ids)
    return done.claimed[0] if done.claimed else None


class Promised(NamedTuple):
    """All that the journals say."""

    enqueued: list[str]
    spans: list[tuple[str, str, str, int]]
    """(rollout_id, attempt_id, span_id, number)"""
    succeeded: list[str]
    stale: int
    released: list[str]
    """Attempts that were given back."""


def read_journals(folder: Path) -> Promised:
    promised = Promised([], [], [], 0, [])
    for path in folder.glob("*.journal"):
        for line in path.read_text().splitlines():
            kind, *ids = line.split()
            match kind:
                case "enqueued":
                    promised.enqueued.extend(ids)
                case "span":
                    promised.spans.append((ids[0], ids[1], ids[2], int(ids[3])))
                case "succeeded":
                    promised.succeeded.append(ids[0])
                case "released":
                    promised.released.append(ids[1])
                case _:
                    promised = promised._replace(stale=promised.stale + 1)
    return promised


def spans_accepted(folder: Path) -> int:
    """How many spans have been accepted up to now."""
    return sum(path.read_bytes().count(b"span ") for path in folder.glob("*.journal"))


async def check(store: LightningStore, promised: Promised, *, all_ended: bool = True) -> None:
    """Everything that was promised is there, once, and the spans of an attempt are in order.

    Args:
        store: what is left.
        promised: what its callers were told.
        all_ended: whether every call has returned; then nothing else may be there.
    """
    rollouts = {each.rollout_id: each for each in await store.query_rollouts()}
    assert len(set(promised.enqueued)) == len(promised.enqueued)
    missing = set(promised.enqueued) - rollouts.keys()
    assert not missing, f"{len(missing)} acknowledged rollouts are lost: {sorted(missing)[:3]}"
    if all_ended:
        extra = rollouts.keys() - set(promised.enqueued)
        assert not extra, f"{len(extra)} rollouts that nobody was told of: {sorted(extra)[:3]}"
    assert len(set(promised.succeeded)) == len(promised.succeeded), "a rollout has succeeded twice"
    states = Counter(rollouts[each].status for each in promised.succeeded)
    assert set(states) <= {"succeeded"}, f"acknowledged ends are lost: {states}"
    for rollout in rollouts.values():
        for attempt in await store.query_attempts(rollout.rollout_id):
            if attempt.attempt_id in promised.released:
                assert attempt.reason_code == "released", f"a release is lost: {attempt}"
    found: dict[tuple[str, str], list[Span]] = {}
    for rollout_id in {each[0] for each in promised.spans}:
        for span in await store.query_spans(rollout_id):
            found.setdefault((rollout_id, span.attempt_id), []).append(span)
    there = Counter(span.span_id for spans in found.values() for span in spans)
    lost = [each for each in promised.spans if there[each[2]] != 1]
    assert not lost, f"{len(lost)} accepted spans are not there exactly once: {lost[:3]}"
    for spans in found.values():
        numbers: list[Any] = [span.attributes["n"] for span in sorted(spans, key=lambda each: each.sequence_id)]
        assert numbers == sorted(numbers), f"the spans of {spans[0].attempt_id} are out of order: {numbers}"


def main(url: str, worker: str, journal_path: str, spool_dir: str) -> None:
    """One client, until standard input is closed; then it delivers what it still has, and says ``done``."""

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(sys.stdin.fileno(), lambda: os.read(sys.stdin.fileno(), 1) or stop.set())
        journal = Journal(Path(journal_path))
        client = LightningStoreClient(url, spool_dir=spool_dir)
        os.write(1, b"working\n")
        await work(client, worker, journal, stop)
        report = client.health
        await client.close(grace_seconds=30.0)
        os.write(1, f"done {report.spool.spooled if report.spool else 0}\n".encode())

    asyncio.run(run())


if __name__ == "__main__":
    main(*sys.argv[1:])
