"""What a store is doing, gathered in a handful of questions that cost the same however large it is."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from agentlightning.cli.rewards import rewards_of
from agentlightning.cli.target import Target, clock_of
from agentlightning.cli.terminal import ago, count, duration, one_line
from agentlightning.lifecycle.reasons import WORKER_LEFT
from agentlightning.store.base import LightningStore, LightningStoreStatistics
from agentlightning.types import Attempt, AttemptedRollout, Rollout, RolloutStatus, Worker

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


class Failures(NamedTuple):
    """One reason for which rollouts failed, how often, and the newest of them."""

    reason: str
    number: int
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
    rewards: Mapping[str, float] = field(default_factory=dict[str, float])
    """Of those that ended, by id."""
    unowned: bool = False
    """Whether this is a file that no process has open, so that what its workers last said stands still."""

    @cached_property
    def by_status(self) -> Counter[str]:
        """Rollouts by state."""
        return Counter(self.statistics.get("rollouts_by_status", {}))

    @property
    def waiting(self) -> int:
        """Rollouts in the queue."""
        return self.by_status["queuing"] + self.by_status["requeuing"]

    @property
    def running(self) -> int:
        """Rollouts that an attempt holds."""
        return self.by_status["preparing"] + self.by_status["running"]

    @cached_property
    def alive(self) -> Sequence[Worker]:
        """Workers that were heard of lately, and may claim or be at work."""
        return [each for each in self.workers if self.is_alive(each)]

    def is_alive(self, worker: Worker) -> bool:
        """Whether a worker was heard of within its lease, or lately if it has none."""
        if self.unowned or worker.status == "unknown":
            return False
        if worker.lease_seconds is not None:  # the store itself makes it `unknown` when the lease is over
            return True
        heard = last_heard(worker)
        return heard is not None and self.now - heard <= SILENT_SECONDS

    @cached_property
    def silent(self) -> Sequence[Worker]:
        """Workers that are gone without a word. Those that ended in order, or as they were asked to, are not."""
        return [each for each in self.workers if not self.is_alive(each) and not has_left(each)]

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
    def in_order(self) -> list[float]:
        """The rewards, in the order in which their rollouts ended."""
        ended = sorted(self.ended, key=lambda each: each.end_time or 0.0)
        return [self.rewards[each.rollout_id] for each in ended if each.rollout_id in self.rewards]

    @cached_property
    def failures(self) -> list[Failures]:
        """Of the rollouts that ended lately, those that failed, by reason, the most frequent first."""
        failed: dict[str, list[Rollout]] = defaultdict(list)
        for each in self.ended:
            if each.status == "failed":
                failed[reason_of(each)[0]].append(each)
        most = sorted(failed.items(), key=lambda each: -len(each[1]))
        return [Failures(reason, len(rollouts), rollouts[0]) for reason, rollouts in most]


def reason_of(rollout: Rollout) -> tuple[str, str]:
    """Why a rollout, or its latest attempt, ended as it did: (code, text).

    Where a rollout ended with its attempt, the attempt's own words are the ones that say what happened.
    """
    attempt: Attempt | None = getattr(rollout, "attempt", None)
    if attempt is not None and attempt.reason_code is not None and rollout.reason_code in (None, attempt.reason_code):
        return attempt.reason_code, attempt.reason_message or ""
    return rollout.reason_code or "no reason given", rollout.reason_message or ""


def has_left(worker: Worker) -> bool:
    """Whether a worker that is gone has ended in order, or as it was asked to."""
    return worker.reason_code == WORKER_LEFT or worker.directive is not None


def last_heard(worker: Worker) -> float | None:
    """When a worker gave its last sign of life."""
    times = (worker.last_heartbeat_time, worker.last_dequeue_time, worker.last_busy_time, worker.last_idle_time)
    return max((each for each in times if each is not None), default=None)


async def gather(store: LightningStore, target: Target | None = None) -> Overview:
    """Ask a store what it is doing; ``target`` is where it lies, if that is known."""
    asked = time.monotonic()
    statistics = await store.statistics()
    answer_seconds = time.monotonic() - asked
    by_status = statistics.get("rollouts_by_status", {})

    async def some(limit: int, order: Literal["asc", "desc"], *states: RolloutStatus) -> Sequence[Rollout]:
        if not any(by_status.get(state) for state in states):
            return ()
        return list(await store.query_rollouts(status_in=states, sort_order=order, limit=limit))

    live = await some(_OPEN, "asc", "preparing", "running")
    ended = await some(RECENT, "desc", "succeeded", "failed", "cancelled")
    return Overview(
        now=clock_of(statistics),
        answer_seconds=answer_seconds,
        statistics=statistics,
        workers=list(await store.query_workers(limit=_WORKERS)) if statistics.get("total_workers") else (),
        oldest_waiting=next(iter(await some(1, "asc", "queuing", "requeuing")), None),
        live=[each for each in live if isinstance(each, AttemptedRollout)],
        ended=ended,
        rewards=await rewards_of(store, ended),
        unowned=target is not None and target.is_unowned(),
    )


# --- What an overview means: what stands still, why, and what to do about it ---

Level = Literal["problem", "warning", "note"]
"""``problem``: it does not work until somebody does something. ``warning``: it may soon not. ``note``: all is well."""

_PATIENCE_SECONDS = 30.0
"""How long a rollout may wait beside idle workers: twice the longest time that a runner sleeps between claims."""
_LONG_SECONDS = 600.0
"""No agent is taken to block for ever before that, nor before twenty times as long as others took."""
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
    held = () if overview.unowned else (*_held(overview), *_long(overview))
    found = [*_queue(overview), *held, *_failing(overview)]
    return sorted(found, key=lambda each: ("problem", "warning", "note").index(each.level))


def _queue(overview: Overview) -> Iterator[Finding]:
    oldest = overview.oldest_waiting
    if overview.unowned and overview.workers and (overview.waiting or overview.running):
        yield Finding(
            "no_owner",
            "problem",
            f"{count(overview.waiting, 'rollout')} in the queue and {overview.running} begun, and no process has this "
            "file open: it ended, or was killed. What it last knew of its workers does not hold any more.",
            "Serve it (`agl store --db FILE`), or go on with its run (`agl runs resume`); lost attempts end then.",
        )
    elif overview.waiting:
        yield _why_it_waits(overview, f"{count(overview.waiting, 'rollout')} in the queue")
        if isinstance(oldest, AttemptedRollout):
            code, text = reason_of(oldest)
            yield Finding(
                "retrying",
                "note",
                f"The oldest in the queue, {oldest.rollout_id}, waits for attempt {oldest.attempt.sequence_id + 1}; "
                f"the last one ended as {oldest.attempt.status}, {code}: {one_line(text)}".rstrip(": "),
            )
    elif overview.running:
        yield Finding("working", "note", f"The queue is empty; {count(overview.running, 'rollout')} in work.")
    elif overview.statistics.get("total_rollouts"):
        yield Finding("all_ended", "note", "Nothing to do: every rollout has ended.")
    else:
        yield Finding("empty", "note", "Nothing to do: nothing was ever enqueued.")


def _why_it_waits(overview: Overview, waiting: str) -> Finding:
    workers, alive, pace = overview.workers, overview.alive, overview.pace
    if not workers:
        return Finding(
            "no_runner",
            "problem",
            f"{waiting}, and no runner has ever connected.",
            "Start one: `agl runner`, or a Trainer with this store.",
        )
    if not alive:
        silent = overview.silent
        newest = max(silent or workers, key=lambda each: last_heard(each) or 0.0)
        told = f"the last was {newest.worker_id}, {ago(last_heard(newest), overview.now)}"
        if not silent:
            text = f"{waiting}, and every runner has ended in order or as asked; {told}."
            return Finding("no_runner", "problem", text, "Start runners again: `agl runner`.")
        why = f" ({one_line(newest.reason_message)})" if newest.reason_message else ""
        return Finding(
            "no_runner",
            "problem",
            f"{waiting}, and {_all_of(silent)} silent; {told}{why}.",
            "Look whether its machine and process live, and start runners again.",
        )
    undirected = [each for each in alive if each.directive is None]
    if not undirected:
        return Finding(
            "all_directed",
            "problem",
            f"{waiting}, and {_all_of(alive)} under the order to {alive[0].directive}.",
            "Start other runners, or take it back: `agl workers resume --all`.",
        )
    idle = [each for each in undirected if each.status == "idle"]
    waited = _waited(overview)
    if idle and waited > _PATIENCE_SECONDS:
        return Finding(
            "idle_but_waiting",
            "problem",
            f"{waiting}, the oldest for {duration(waited)}, though {idle[0].worker_id} is idle.",
            "Its heartbeats go on but it does not claim: its agent may block it. Look into its log, or restart it.",
        )
    busy = sum(each.status == "busy" for each in alive)
    left = pace and f" At this pace it is empty in {duration(overview.waiting / pace.per_minute * 60.0)}."
    return Finding("queue_moves", "note", f"{waiting}; {busy} of {len(alive)} workers busy.{left or ''}")


def _waited(overview: Overview) -> float:
    oldest = overview.oldest_waiting
    if oldest is None:
        return 0.0
    ended = oldest.attempt.end_time if isinstance(oldest, AttemptedRollout) else None
    return max(0.0, overview.now - (oldest.start_time if ended is None else ended))


def _held(overview: Overview) -> Iterator[Finding]:
    """Rollouts that nobody works on any more, and that nothing will ever end."""
    alive = {each.worker_id for each in overview.alive}
    stuck = [each for each in overview.live if each.attempt.worker_id not in alive and _is_stuck(each, overview.now)]
    if stuck:
        yield Finding(
            "stuck",
            "problem",
            f"{count(len(stuck), 'rollout')} held by a silent attempt that nothing ends: {stuck[0].rollout_id}, last "
            f"heard of {ago(_last_sign(stuck[0].attempt), overview.now)}, has no time limit, and its worker no lease.",
            "Give rollouts a limit (timeout_seconds, unresponsive_seconds); end these with `agl rollouts cancel`.",
        )


def _long(overview: Overview) -> Iterator[Finding]:
    """Rollouts for which nothing says how long an agent may be at them; above all those that take very long."""
    alive = {each.worker_id for each in overview.alive}
    times = sorted(each.end_time - each.start_time for each in overview.ended if each.end_time is not None)
    usual = times[len(times) // 2] if times else 0.0
    limit = max(_LONG_SECONDS, 20 * usual)
    long = [
        each
        for each in overview.live
        if each.config.timeout_seconds is None
        and each.attempt.worker_id in alive
        and overview.now - each.attempt.start_time > limit
    ]
    if long:
        first = long[0]
        yield Finding(
            "long_running",
            "warning",
            f"{count(len(long), 'rollout')} without a time limit at work for more than {duration(limit)}: "
            f"{first.rollout_id} for {duration(overview.now - first.attempt.start_time)}. "
            "Its worker lives; its agent may block for ever.",
            "Give rollouts a limit: Trainer(rollout_config=agl.RolloutConfig(timeout_seconds=…)); end this one with "
            f"`agl rollouts cancel {first.rollout_id}`.",
        )
        return
    endless = sum(each.config.timeout_seconds is None for each in overview.live)
    if endless:
        yield Finding(
            "no_time_limit",
            "note",
            f"{count(endless, 'rollout')} in work without a time limit: an agent that blocks holds its own for ever.",
            "Give rollouts one: Trainer(rollout_config=agl.RolloutConfig(timeout_seconds=…)).",
        )


def _is_stuck(rollout: AttemptedRollout, now: float) -> bool:
    has_limit = rollout.config.timeout_seconds is not None or rollout.config.unresponsive_seconds is not None
    return not has_limit and now - _last_sign(rollout.attempt) > 10 * SILENT_SECONDS


def _last_sign(attempt: Attempt) -> float:
    return max(attempt.start_time, attempt.last_heartbeat_time or 0.0)


def _failing(overview: Overview) -> Iterator[Finding]:
    failures = overview.failures
    newest = sorted((each for each in overview.ended if each.status != "cancelled"), key=_end, reverse=True)
    streak = next((place for place, each in enumerate(newest) if each.status != "failed"), len(newest))
    failed = sum(each.number for each in failures)
    ended = sum(each.status != "cancelled" for each in overview.ended)
    if ended < _FEW or failed * 4 < ended:
        if streak >= _FEW or 0 < streak == len(newest):
            code, text = reason_of(newest[0])
            yield Finding(
                "failing",
                "problem" if streak >= _FEW else "warning",
                f"The last {count(streak, 'rollout')} failed, the newest with {code}: {one_line(text)}".rstrip(": "),
                f"See one whole: `agl rollouts show {newest[0].rollout_id}`.",
            )
        return
    worst = failures[0]
    text = f"{worst.number} of them with {worst.reason}: {one_line(reason_of(worst.newest)[1])}".rstrip(": ")
    yield Finding(
        "failing",
        "problem" if failed * 2 >= ended else "warning",
        f"{failed} of the last {ended} rollouts failed, {text}",
        f"See one whole: `agl rollouts show {worst.newest.rollout_id}`.",
    )


def _end(rollout: Rollout) -> float:
    return rollout.end_time or 0.0


def _all_of(workers: Sequence[Worker]) -> str:
    """The subject of a sentence whose verb follows in the plural ("all 3 workers are"), or singular."""
    return "its one worker is" if len(workers) == 1 else f"all {len(workers)} workers are"
