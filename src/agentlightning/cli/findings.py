"""What an overview means: what stands still, why, and what to do about it.

Pure: an ``Overview`` goes in, sentences come out. ``agl status`` shows them, ``agl doctor`` counts the problems.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from agentlightning.cli.output import ago, duration, one_line
from agentlightning.cli.overview import SILENT_SECONDS, Overview, last_heard, reason_of
from agentlightning.types import AttemptedRollout, Worker

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
