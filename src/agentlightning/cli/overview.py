"""What a store is doing, gathered in a handful of questions that cost the same however large it is."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from agentlightning.cli.output import ago, duration, one_line
from agentlightning.store.base import LightningStore, LightningStoreStatistics
from agentlightning.types import Attempt, AttemptedRollout, Rollout, Worker

RECENT = 200
"""How many of the rollouts that ended last are looked at."""
_OPEN = 200
_WORKERS = 500
_PACE_SECONDS = 60.0
SILENT_SECONDS = 60.0
"""Without a lease of its own, a worker that was silent for longer than this counts as silent."""


class Pace(NamedTuple):
    """How fast rollouts end."""

    per_minute: float
    seconds: float
    """The length of the time that was looked at, up to now."""


@dataclass(frozen=True, slots=True)
class Failures:
    """One reason for which rollouts failed, how often, and the newest of them."""

    reason: str
    count: int
    newest: Rollout


@dataclass(frozen=True)
class Overview:
    """A store at one moment."""

    now: float
    """The store's wall clock."""
    answer_seconds: float
    """How long the store took for the simplest question."""
    statistics: LightningStoreStatistics
    workers: Sequence[Worker]
    oldest_waiting: Rollout | None
    live: Sequence[AttemptedRollout]
    """The oldest rollouts that an attempt holds."""
    ended: Sequence[Rollout]
    """Rollouts that ended, of those inserted last, the newest first."""

    def count(self, *states: str) -> int:
        """Rollouts in any of these states."""
        by_status = self.statistics.get("rollouts_by_status", {})
        return sum(by_status.get(state, 0) for state in states)

    @property
    def waiting(self) -> int:
        """Rollouts in the queue."""
        return self.count("queuing", "requeuing")

    @property
    def running(self) -> int:
        """Rollouts that an attempt holds."""
        return self.count("preparing", "running")

    @cached_property
    def alive(self) -> Sequence[Worker]:
        """Workers that were heard of lately, and may claim or be at work."""
        return [each for each in self.workers if self.is_alive(each)]

    def is_alive(self, worker: Worker) -> bool:
        """Whether a worker was heard of within its lease, or lately if it has none."""
        if worker.status == "unknown":
            return False
        if worker.lease_seconds is not None:  # the store itself makes it `unknown` when the lease is over
            return True
        heard = last_heard(worker)
        return heard is not None and self.now - heard <= SILENT_SECONDS

    @cached_property
    def pace(self) -> Pace | None:
        """How fast rollouts end, within the last minute or as far back as was looked. None: none did."""
        ends = (each.end_time for each in self.ended if each.end_time is not None)
        recent = [end for end in ends if self.now - end <= _PACE_SECONDS]
        if not recent:
            return None
        seconds = _PACE_SECONDS if len(recent) < RECENT else max(self.now - min(recent), 0.001)
        return Pace(len(recent) / seconds * 60.0, seconds)

    @cached_property
    def failures(self) -> list[Failures]:
        """Of the rollouts that ended lately, those that failed, by reason, the most frequent first."""
        failed = [each for each in self.ended if each.status == "failed"]
        counts = Counter(reason_of(each)[0] for each in failed)
        newest: dict[str, Rollout] = {}
        for each in failed:
            newest.setdefault(reason_of(each)[0], each)
        return [Failures(reason, number, newest[reason]) for reason, number in counts.most_common()]


def reason_of(rollout: Rollout) -> tuple[str, str]:
    """Why a rollout, or its latest attempt, ended as it did: (code, text).

    Where a rollout ended with its attempt, the attempt's own words are the ones that say what happened.
    """
    attempt: Attempt | None = getattr(rollout, "attempt", None)
    if attempt is not None and attempt.reason_code is not None and rollout.reason_code in (None, attempt.reason_code):
        return attempt.reason_code, attempt.reason_message or ""
    return rollout.reason_code or "no reason given", rollout.reason_message or ""


def last_heard(worker: Worker) -> float | None:
    """When a worker gave its last sign of life."""
    times = (worker.last_heartbeat_time, worker.last_dequeue_time, worker.last_busy_time, worker.last_idle_time)
    return max((each for each in times if each is not None), default=None)


def clock_of(statistics: LightningStoreStatistics) -> float:
    """The store's wall clock, which ages of its records are counted by; this machine's if it does not tell."""
    return statistics.get("host", {}).get("time", time.time())


async def gather(store: LightningStore) -> Overview:
    """Ask a store what it is doing."""
    asked = time.monotonic()
    statistics = await store.statistics()
    answer_seconds = time.monotonic() - asked
    by_status = statistics.get("rollouts_by_status", {})

    def any_in(*states: str) -> bool:
        return any(by_status.get(state, 0) for state in states)

    workers = await store.query_workers(limit=_WORKERS) if statistics.get("total_workers") else ()
    waiting = (
        await store.query_rollouts(status_in=["queuing", "requeuing"], limit=1)
        if any_in("queuing", "requeuing")
        else ()
    )
    live = (
        await store.query_rollouts(status_in=["preparing", "running"], limit=_OPEN)
        if any_in("preparing", "running")
        else ()
    )
    ended = (
        await store.query_rollouts(status_in=["succeeded", "failed", "cancelled"], sort_order="desc", limit=RECENT)
        if any_in("succeeded", "failed", "cancelled")
        else ()
    )
    return Overview(
        now=clock_of(statistics),
        answer_seconds=answer_seconds,
        statistics=statistics,
        workers=list(workers),
        oldest_waiting=next(iter(waiting), None),
        live=[each for each in live if isinstance(each, AttemptedRollout)],
        ended=list(ended),
    )


# --- What an overview means: what stands still, why, and what to do about it ---

Level = Literal["problem", "warning", "note"]
"""``problem``: it does not work until somebody does something. ``warning``: it may soon not. ``note``: all is well."""

_PATIENCE_SECONDS = 30.0
"""How long a rollout may wait beside idle workers: twice the longest time that a runner sleeps between claims."""
_FEW = 5
"""With fewer rollouts than this, a share of failures says nothing."""


class Finding(NamedTuple):
    """One thing that was found."""

    code: str
    """Stable, for programs."""
    level: Level
    text: str
    fix: str = ""
    """What to do; empty if nothing needs doing."""


def explain(overview: Overview) -> list[Finding]:
    """What goes on in a store, the worst first."""
    found = [*_queue(overview), *_held(overview), *_failing(overview)]
    order: dict[Level, int] = {"problem": 0, "warning": 1, "note": 2}
    return sorted(found, key=lambda each: order[each.level])


# --- The queue ---------------------------------------------------------------------------------------


def _queue(overview: Overview) -> Iterator[Finding]:
    if overview.waiting:
        yield _why_it_waits(overview)
        yield from _retried(overview)
    elif overview.running:
        yield Finding("working", "note", f"The queue is empty; {_count(overview.running, 'rollout')} in work.")
    elif overview.statistics.get("total_rollouts"):
        yield Finding("all_ended", "note", "Nothing to do: every rollout has ended.")
    else:
        yield Finding("empty", "note", "Nothing to do: nothing was ever enqueued.")


def _why_it_waits(overview: Overview) -> Finding:
    waiting = f"{_count(overview.waiting, 'rollout')} in the queue"
    workers, alive = overview.workers, overview.alive
    if not workers:
        return Finding(
            "no_runner",
            "problem",
            f"{waiting}, and no runner has ever connected.",
            "Start one: `agl runner`, or a Trainer with this store.",
        )
    if not alive:
        newest = max(workers, key=lambda each: last_heard(each) or 0.0)
        return Finding(
            "no_runner",
            "problem",
            f"{waiting}, and {_all_of(workers)} silent; the last was {newest.worker_id}, "
            f"{ago(last_heard(newest), overview.now)}.",
            "Look whether its machine and process live, and start runners again.",
        )
    directed = [each for each in alive if each.directive is not None]
    if len(directed) == len(alive):
        return Finding(
            "all_directed",
            "problem",
            f"{waiting}, and {_all_of(alive)} under the order to {directed[0].directive}.",
            "Start other runners, or take it back: `agl workers resume --all`.",
        )
    idle = [each for each in alive if each.status == "idle" and each.directive is None]
    waited = _waited(overview)
    if idle and waited > _PATIENCE_SECONDS:
        return Finding(
            "idle_but_waiting",
            "problem",
            f"{waiting}, the oldest for {duration(waited)}, though {idle[0].worker_id} is idle.",
            "Its heartbeats go on but it does not claim: its agent may block it. Look into its log, or restart it.",
        )
    busy = len([each for each in alive if each.status == "busy"])
    return Finding(
        "queue_moves", "note", f"{waiting}; {busy} of {len(alive)} workers busy. {_forecast(overview)}".rstrip()
    )


def _retried(overview: Overview) -> Iterator[Finding]:
    oldest = overview.oldest_waiting
    if isinstance(oldest, AttemptedRollout):
        code, text = reason_of(oldest)
        yield Finding(
            "retrying",
            "note",
            f"The oldest in the queue, {oldest.rollout_id}, waits for attempt {oldest.attempt.sequence_id + 1}; "
            f"the last one ended as {oldest.attempt.status}, {code}: {one_line(text)}".rstrip(": "),
        )


def _waited(overview: Overview) -> float:
    oldest = overview.oldest_waiting
    if oldest is None:
        return 0.0
    since = oldest.start_time
    if isinstance(oldest, AttemptedRollout) and oldest.attempt.end_time is not None:
        since = oldest.attempt.end_time
    return max(0.0, overview.now - since)


def _forecast(overview: Overview) -> str:
    pace = overview.pace
    return "" if pace is None else f"At this pace it is empty in {duration(overview.waiting / pace.per_minute * 60.0)}."


# --- What is held ------------------------------------------------------------------------------------


def _held(overview: Overview) -> Iterator[Finding]:
    """Rollouts that nobody works on any more, and that nothing will ever end."""
    workers = {each.worker_id: each for each in overview.workers}
    stuck = [each for each in overview.live if _is_stuck(each, workers.get(each.attempt.worker_id or ""), overview)]
    if stuck:
        first = stuck[0]
        heard = first.attempt.last_heartbeat_time or first.attempt.start_time
        yield Finding(
            "stuck",
            "problem",
            f"{_count(len(stuck), 'rollout')} held by a silent attempt that nothing ends: {first.rollout_id}, last "
            f"heard of {ago(heard, overview.now)}, has no time limit, and its worker no lease.",
            "Give rollouts a limit (timeout_seconds, unresponsive_seconds); end these with `agl rollouts cancel`.",
        )


def _is_stuck(rollout: AttemptedRollout, worker: Worker | None, overview: Overview) -> bool:
    config = rollout.config
    if config.timeout_seconds is not None or config.unresponsive_seconds is not None:
        return False
    if worker is not None and overview.is_alive(worker):
        return False
    heard = max(rollout.attempt.start_time, rollout.attempt.last_heartbeat_time or 0.0)
    return overview.now - heard > 10 * SILENT_SECONDS


# --- What fails --------------------------------------------------------------------------------------


def _failing(overview: Overview) -> Iterator[Finding]:
    failures = overview.failures
    failed = sum(each.count for each in failures)
    ended = len([each for each in overview.ended if each.status != "cancelled"])
    if ended < _FEW or failed * 4 < ended:
        return
    worst = failures[0]
    text = one_line(reason_of(worst.newest)[1])
    yield Finding(
        "failing",
        "problem" if failed * 2 >= ended else "warning",
        f"{failed} of the last {ended} rollouts failed, {worst.count} of them with {worst.reason}: {text}".rstrip(": "),
        f"See one whole: `agl rollouts show {worst.newest.rollout_id}`.",
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _all_of(workers: Sequence[Worker]) -> str:
    """The subject of a sentence whose verb follows in the plural ("all 3 workers are"), or singular."""
    return "its one worker is" if len(workers) == 1 else f"all {len(workers)} workers are"
