"""Kill a store process with SIGKILL, again and again, and hold the store to every promise that it made.

`Nursery` begins and ends the lives of store processes (`store_process`), `Ledger` adds up what their journals
promise and compares it with what a store holds, and `Campaign` plays lives on database files and checks after each.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Self

import msgspec

import store_process
from agentlightning import SqliteLightningStore
from agentlightning.types import Attempt, PromptTemplate, Rollout, Span
from store_process import AnyCall, Finish, Life, Line, Memory, Order, Promise, input_of, span_of

FINAL = ("succeeded", "failed", "cancelled")
ENDED = ("succeeded", "failed", "timeout", "unresponsive")
ENDED_FOR_GOOD = ("succeeded", "failed", "timeout")


class Nursery:
    """A process that has imported the store and forks a store process for each life, in a few milliseconds.

    A context manager; at its end the process is gone.
    """

    def __enter__(self) -> Self:
        self._process: subprocess.Popen[bytes] = subprocess.Popen(
            [sys.executable, store_process.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        return self

    def __exit__(self, *_: object) -> None:
        with self._process as process:
            self._pipe(process.stdin).close()
            process.wait()

    def begin(self, life: Life) -> int:
        """Fork a store process; returns its pid, which stays its own until `kill` or `wait`."""
        self._order(Order(life=life))
        return self._answer()["pid"]

    def wait_until_closing(self) -> None:
        """Return when the store process says that it closes its store."""
        assert self._answer()["closing"]

    def kill(self, pid: int) -> int:
        """Send SIGKILL, then `wait`.

        Raises:
            AssertionError: it had failed by itself; the message has its traceback.
        """
        os.kill(pid, signal.SIGKILL)
        return self.wait(pid)

    def wait(self, pid: int) -> int:
        """Wait until the process has ended; returns its exit code, or minus the number of the signal it died of."""
        self._order(Order(reap=pid))
        while "status" not in (answer := self._answer()):
            assert answer == {"closing": True}
        return os.waitstatus_to_exitcode(answer["status"])

    def _order(self, order: Order) -> None:
        pipe = self._pipe(self._process.stdin)
        pipe.write(msgspec.json.encode(order) + b"\n")
        pipe.flush()

    def _answer(self) -> dict[str, Any]:
        line = self._pipe(self._process.stdout).readline()
        assert line, "the nursery died; its last words are on stderr"
        answer = msgspec.json.decode(line, type=dict[str, Any])
        assert "failed" not in answer, answer["failed"]
        return answer

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe


# --- What was promised, and what is there ------------------------------------------------------------------


@dataclass
class Findings:
    """What is wrong with a store, sentence by sentence."""

    lost: list[str] = field(default_factory=list)
    """Promised, and not there, or there with other content."""
    doubled: list[str] = field(default_factory=list)
    """There, and explained by no call: something has had its effect twice."""
    broken: list[str] = field(default_factory=list)
    """Rules that `verify` found broken."""

    def __iadd__(self, other: Findings) -> Self:
        self.lost += other.lost
        self.doubled += other.doubled
        self.broken += other.broken
        return self

    def __bool__(self) -> bool:
        return bool(self.lost or self.doubled or self.broken)


@dataclass
class Contents:
    """All that a store holds, read through its public methods."""

    rollouts: dict[str, Rollout] = field(default_factory=dict)
    attempts: dict[str, Attempt] = field(default_factory=dict)
    spans: dict[tuple[str, str], Span] = field(default_factory=dict)
    repeated_spans: list[str] = field(default_factory=list)
    resources: dict[tuple[str, int], str] = field(default_factory=dict)
    stats: dict[str, int] = field(default_factory=dict)

    @classmethod
    async def of(cls, store: SqliteLightningStore) -> Contents:
        self = cls()
        for rollout in (await store.query_rollouts()).items:
            self.rollouts[rollout.rollout_id] = rollout
            if not hasattr(rollout, "attempt"):
                continue
            for attempt in (await store.query_attempts(rollout.rollout_id)).items:
                self.attempts[attempt.attempt_id] = attempt
            for span in (await store.query_spans(rollout.rollout_id)).items:
                key = (span.attempt_id, span.span_id)
                if key in self.spans:
                    self.repeated_spans.append(span.span_id)
                self.spans[key] = span
        for newest in (await store.query_resources()).items:
            for update in (await store.query_resource_versions(newest.resources_id)).items:
                prompt = update.resources["prompt"]
                assert isinstance(prompt, PromptTemplate)
                self.resources[update.resources_id, update.version] = prompt.template
        for worker in (await store.query_workers()).items:
            self.stats[worker.worker_id] = (worker.heartbeat_stats or {}).get("number", 0)
        return self


class Ledger:
    """What the store processes on one database file have promised.

    Args:
        leases_end: whether attempts may have expired meanwhile, so that a repeated claim gets new ones.
        deletes: whether rollouts may have been deleted after their end, and their ids used again.
    """

    def __init__(self, *, leases_end: bool, deletes: bool = False) -> None:
        self.leases_end = leases_end
        self.deletes = deletes
        self._may_have_ended: set[str] = set()
        self.promises = 0
        self.repeated = 0
        """Calls that were in flight at a kill, and answered after."""
        self.memories: dict[int, Memory] = {}
        self.in_flight: dict[int, AnyCall] = {}
        self._rollouts: dict[str, tuple[str | None, int | None] | None] = {}
        self._final: dict[str, str] = {}
        self._attempts: dict[str, tuple[str, int, str | None]] = {}
        self._ended: dict[str, str] = {}
        self._spans: dict[tuple[str, str], int] = {}
        self._issued: set[tuple[str, int]] = set()
        self._resources: dict[tuple[str, int], str] = {}
        self._stats: dict[str, int] = {}
        self._notes: dict[str, int] = {}
        self._unsure = Possible()
        """What was promised before its call was made, and may have been refused then."""
        self._contradictions = Findings()

    def read(self, journal: Path) -> None:
        """Take in what one life wrote."""
        waited = set(self.in_flight)
        *lines, torn = journal.read_bytes().split(b"\n") if journal.exists() else [b""]
        del torn  # what follows the last line end: empty, unless the kill hit in the middle of a line
        for line in msgspec.json.decode(b"[" + b",".join(lines) + b"]", type=list[Line]):
            self.memories[line.writer] = line.memory
            if line.promise is None:
                self.in_flight[line.writer] = line.call
                continue
            if line.writer in waited:
                waited.discard(line.writer)
                self.repeated += 1
            self.in_flight.pop(line.writer, None)
            self._believe(line.promise)
        for call in self.in_flight.values():
            self._may_have_ended.add(getattr(call, "rollout_id", ""))

    def compare(self, found: Contents) -> Findings:
        """What of all that was promised is not so in a store."""
        findings = Findings([*self._contradictions.lost], [*self._contradictions.doubled])
        possible = Possible.of(self.in_flight.values())
        self._compare_rollouts(found, possible, findings)
        self._compare_attempts(found, possible, findings)
        self._compare_spans(found, possible, findings)
        self._compare_resources(found, possible, findings)
        for call in self.in_flight.values():
            if isinstance(call, Finish):
                self._compare_finish(found, call, findings)
        for worker_id, number in self._stats.items():
            if found.stats.get(worker_id) not in (number, *possible.stats.get(worker_id, ())):
                findings.lost.append(f"statistics {number} of {worker_id}: {found.stats.get(worker_id)}")
        return findings

    # --- Promises ----------------------------------------------------------------------------------------

    def _believe(self, promise: Promise) -> None:
        self.promises += 1
        self._may_have_ended.update(promise.may_have_ended)
        for rollout_id, status, *resources in promise.rollouts:
            if status in FINAL:
                self._may_have_ended.add(rollout_id)
            self._agree(self._rollouts, rollout_id, tuple(resources) if status else None)
            if status in FINAL:
                self._agree(self._final, rollout_id, status)
        for rollout_id, attempt_id, sequence_id, status, worker_id in promise.attempts:
            if status:
                self._agree(self._attempts, attempt_id, (rollout_id, sequence_id, worker_id))
            else:
                self._unsure.attempts.add(attempt_id)
            if status in ENDED:
                self._may_have_ended.add(rollout_id)
            if status in ENDED_FOR_GOOD:
                self._agree(self._ended, attempt_id, status)
        for attempt_id, span_id, sequence_id in promise.spans:
            if sequence_id and self._spans.get((attempt_id, span_id)):
                self._contradictions.doubled.append(f"span {span_id} of {attempt_id} was new twice")
            self._spans[attempt_id, span_id] = sequence_id or self._spans.get((attempt_id, span_id), 0)
        for issued in promise.issued:
            if issued in self._issued:
                self._contradictions.doubled.append(f"sequence id {issued[1]} of {issued[0]} was issued twice")
            self._issued.add(issued)
        for resources_id, version, text in promise.resources:
            if text:
                self._agree(self._resources, (resources_id, version), text)
        if promise.claimed_by is not None:
            self._unsure.claimers.add(promise.claimed_by)
        self._stats.update(promise.stats)
        self._notes.update(promise.notes)

    def _agree(self, known: dict[Any, Any], key: Any, value: Any) -> None:
        """Note a promise about what never changes; None: nothing but that it is there."""
        if known.get(key) is None or self._may_be_gone(key):
            known[key] = value
        elif value not in (None, known[key]):
            self._contradictions.lost.append(f"{key} was promised as {known[key]} and as {value}")

    def _may_be_gone(self, rollout_id: Any) -> bool:
        """Whether the rollout may have been deleted, and may be back as another."""
        return self.deletes and (self.leases_end or rollout_id in self._may_have_ended)

    # --- Comparisons -------------------------------------------------------------------------------------

    def _compare_rollouts(self, found: Contents, possible: Possible, findings: Findings) -> None:
        for rollout_id, resources in self._rollouts.items():
            rollout = found.rollouts.get(rollout_id)
            if self._may_be_gone(rollout_id):
                continue
            if rollout is None:
                findings.lost.append(f"rollout {rollout_id}")
                continue
            if rollout.input != input_of(rollout_id):
                findings.lost.append(f"input of rollout {rollout_id}: {rollout.input}")
            if resources not in (None, (rollout.resources_id, rollout.resources_version)):
                findings.lost.append(f"resources {resources} of rollout {rollout_id}")
            if rollout.status != self._final.get(rollout_id, rollout.status):
                findings.lost.append(f"rollout {rollout_id} was {self._final[rollout_id]} and is {rollout.status}")
        for rollout_id, number in self._notes.items():
            if self._may_be_gone(rollout_id):
                continue
            stored = (found.rollouts[rollout_id].metadata or {}).get("number") if rollout_id in found.rollouts else 0
            if stored not in (number, *possible.notes.get(rollout_id, ())):
                findings.lost.append(f"metadata {number} of rollout {rollout_id}: {stored}")
        for rollout_id in found.rollouts.keys() - self._rollouts.keys() - possible.rollouts:
            findings.doubled.append(f"rollout {rollout_id} ({found.rollouts[rollout_id].input})")

    def _compare_attempts(self, found: Contents, possible: Possible, findings: Findings) -> None:
        for attempt_id, promised in self._attempts.items():
            attempt = found.attempts.get(attempt_id)
            if self._may_be_gone(promised[0]):
                continue
            if attempt is None or (attempt.rollout_id, attempt.sequence_id, attempt.worker_id) != promised:
                findings.lost.append(f"attempt {attempt_id} {promised}: {attempt}")
            elif attempt.status != self._ended.get(attempt_id, attempt.status):
                findings.lost.append(f"attempt {attempt_id} was {self._ended[attempt_id]} and is {attempt.status}")
        explained = self._attempts.keys() | possible.attempts | self._unsure.attempts
        for attempt_id in found.attempts.keys() - explained:
            attempt = found.attempts[attempt_id]
            # A claim that is repeated gets the same attempts while they live; one that was cancelled does not.
            given_up = self.leases_end or attempt.reason_code == "cancelled"
            if attempt.worker_id not in possible.claimers | self._unsure.claimers and not given_up:
                findings.doubled.append(
                    f"attempt {attempt_id} of {attempt.worker_id}, {attempt.status} {attempt.reason_code}: "
                    f"{attempt.reason_message}"
                )

    def _compare_spans(self, found: Contents, possible: Possible, findings: Findings) -> None:
        for (attempt_id, span_id), sequence_id in self._spans.items():
            span = found.spans.get((attempt_id, span_id))
            if self._may_be_gone(self._attempts[attempt_id][0]):
                continue
            if span is None:
                findings.lost.append(f"span {span_id} of {attempt_id}")
                continue
            if sequence_id not in (0, span.sequence_id):
                findings.lost.append(f"sequence id {sequence_id} of span {span_id} of {attempt_id}: {span.sequence_id}")
            if span != span_of(span.rollout_id, attempt_id, span_id, span.sequence_id):
                findings.lost.append(f"content of span {span_id} of {attempt_id}")
        findings.doubled += [f"span {span_id}" for span_id in found.repeated_spans]
        findings.doubled += [f"span {key}" for key in found.spans.keys() - self._spans.keys() - possible.spans]

    def _compare_finish(self, found: Contents, call: Finish, findings: Findings) -> None:
        """A finish that was in flight has been done, or not. (Where the attempt was lost, its spans are kept.)"""
        stored = [each for each in call.span_ids if (call.attempt_id, each) in found.spans]
        attempt = found.attempts.get(call.attempt_id)
        if stored and attempt is not None and (len(stored) < len(call.span_ids) or attempt.status not in ENDED):
            findings.broken.append(
                f"finish of {call.attempt_id}: half done, with {stored} while it is {attempt.status}"
            )

    def _compare_resources(self, found: Contents, possible: Possible, findings: Findings) -> None:
        for key, text in self._resources.items():
            if found.resources.get(key) != text:
                findings.lost.append(f"resources {key} ({text}): {found.resources.get(key)}")
        for key in found.resources.keys() - self._resources.keys():
            if key[0] in possible.resources:
                possible.resources.remove(key[0])  # one call makes one version
            else:
                findings.doubled.append(f"resources {key} ({found.resources[key]})")


@dataclass
class Possible:
    """What may be stored although nobody was told, because the call was in flight when the process died."""

    rollouts: set[str] = field(default_factory=set)
    attempts: set[str] = field(default_factory=set)
    claimers: set[str] = field(default_factory=set)
    spans: set[tuple[str, str]] = field(default_factory=set)
    resources: list[str] = field(default_factory=list)
    stats: dict[str, list[int]] = field(default_factory=dict)
    notes: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, calls: Iterable[AnyCall]) -> Possible:
        self = cls()
        for promise in (call.at_most() for call in calls):
            self.rollouts.update(each[0] for each in promise.rollouts)
            self.attempts.update(each[1] for each in promise.attempts)
            self.spans.update(each[:2] for each in promise.spans)
            self.resources += [each[0] for each in promise.resources]
            if promise.claimed_by is not None:
                self.claimers.add(promise.claimed_by)
            for worker_id, number in promise.stats:
                self.stats.setdefault(worker_id, []).append(number)
            for rollout_id, number in promise.notes:
                self.notes.setdefault(rollout_id, []).append(number)
        return self


# --- Lives and deaths --------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a campaign came to."""

    kills: int = 0
    closed: int = 0
    """Processes that were done before the kill came."""
    promises: int = 0
    repeated: int = 0
    checks: int = 0
    findings: Findings = field(default_factory=Findings)


class Campaign:
    """Lives on database files, one after another; each file sees several.

    After each kill a copy of the files, as they were left, is opened and held against the ledger, so the next
    process finds the original unrecovered. At the end of each file its last process closes it.

    Args:
        nursery: begins the lives.
        folder: where the files are; must exist.
        seed: of the moments of the kills, and of what the writers do.
        kills_per_file: when to go on to a new file.
        acknowledge, repeat_with, finish: as in `Life`; all but the defaults are seeded bugs.
    """

    def __init__(
        self,
        nursery: Nursery,
        folder: Path,
        seed: int,
        *,
        kills_per_file: int = 10,
        acknowledge: Literal["after", "before"] = "after",
        repeat_with: Literal["same ids", "no ids", "no claim ids"] = "same ids",
        finish: Literal["in one", "in parts"] = "in one",
    ) -> None:
        self._nursery = nursery
        self._folder = folder
        self._rng = random.Random(seed)
        self._kills_per_file = kills_per_file
        self._acknowledge: Literal["after", "before"] = acknowledge
        self._repeat_with: Literal["same ids", "no ids", "no claim ids"] = repeat_with
        self._finish: Literal["in one", "in parts"] = finish
        self._files = 0
        self.outcome = Outcome()

    def run(self, kills: int) -> Outcome:
        """Kill so many processes, or fewer if something is found to be wrong before."""
        while self.outcome.kills < kills and not self.outcome.findings:
            self._files += 1
            folder = self._folder / f"file-{self._files}"
            folder.mkdir()
            self._use_up(folder, min(self._kills_per_file, kills - self.outcome.kills))
            shutil.rmtree(folder)
        return self.outcome

    def _use_up(self, folder: Path, kills: int) -> None:
        """Play lives on one new file."""
        leases_end = self._rng.random() < 0.25
        deletes = self._rng.random() < 0.25
        ledger = Ledger(leases_end=leases_end, deletes=deletes)
        done = self.outcome.kills + kills
        database = folder / "store.db"
        number = 0
        while self.outcome.kills < done and not self.outcome.findings:
            number += 1
            life = self._life(database, number, ledger)
            self._live_and_die(life, new=number == 1)
            ledger.read(Path(life.journal))
            with_log = shutil.copytree(
                folder, self._folder / "copy", ignore=shutil.ignore_patterns("*-shm", "*-owner", "journal-*")
            )
            self._check(with_log / database.name, ledger)
            shutil.rmtree(with_log)
        last = self._life(database, number + 1, ledger)
        last.close_after_calls = 50
        assert self._nursery.wait(self._nursery.begin(last)) == 0
        ledger.read(Path(last.journal))
        self._check(database, ledger)
        self.outcome.promises += ledger.promises
        self.outcome.repeated += ledger.repeated

    def _life(self, database: Path, number: int, ledger: Ledger) -> Life:
        return Life(
            database=str(database),
            journal=str(database.with_name(f"journal-{number}")),
            seed=self._rng.getrandbits(32),
            memories=ledger.memories,
            in_flight=ledger.in_flight,
            clock_speed=300.0 if ledger.leases_end else 0.001,
            deletes=ledger.deletes,
            checkpoint_pages=self._rng.choice((10, 100, 4000)),
            acknowledge=self._acknowledge,
            repeat_with=self._repeat_with,
            finish=self._finish,
        )

    def _live_and_die(self, life: Life, *, new: bool) -> None:
        """Kill at a random moment: while the store opens (and migrates, or recovers), works, or closes."""
        phase = "opening" if new else self._rng.choice(("opening", "working", "working", "working", "closing"))
        if phase == "closing":
            life.close_after_calls = self._rng.randint(20, 200)
        pid = self._nursery.begin(life)
        match phase:
            case "opening":
                time.sleep(self._rng.uniform(0.0, 0.015))
            case "working":
                time.sleep(self._rng.uniform(0.01, 0.3))
            case _:
                self._nursery.wait_until_closing()
                time.sleep(self._rng.uniform(0.0, 0.004))
        if self._nursery.kill(pid) == 0:
            self.outcome.closed += 1
        else:
            self.outcome.kills += 1

    def _check(self, database: Path, ledger: Ledger) -> None:
        self.outcome.checks += 1
        self.outcome.findings += asyncio.run(_findings(database, ledger))


async def _findings(database: Path, ledger: Ledger) -> Findings:
    async with SqliteLightningStore(database) as store:
        findings = ledger.compare(await Contents.of(store))
        report = await store.verify()
        findings.broken += [f"{each.record}: {each.detail} ({each.rule})" for each in report.violations]
    return findings
