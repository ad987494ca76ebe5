"""What a store is doing, gathered in a handful of questions that cost the same however large it is."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

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
