"""Progress of a run: measured from the store, and shown as a live table on a terminal or as log lines elsewhere."""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from agentlightning.errors import AgentLightningError, InvalidValue
from agentlightning.store.base import LightningStore
from agentlightning.types import Worker

if TYPE_CHECKING:
    from rich.console import Console, Group, RenderableType
    from rich.live import Live

_logger = logging.getLogger("agentlightning.trainer")

_RATE_WINDOW_SECONDS = 10.0
_REMEMBERED_ROLLOUTS = 10_000
_SHOWN_WORKERS = 50
_FINAL = ("succeeded", "failed", "cancelled")
_STATUS_ORDER = (*_FINAL, "running", "preparing", "queuing", "requeuing")
_WORKER_WORDS = {"busy": "busy", "idle": "idle", "unknown": "silent"}
_CURVE_POINTS = 64
_CURVE_WIDTH = 48
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment."""

    elapsed_seconds: float
    by_status: Mapping[str, int]
    """Rollouts in the store by status, those of earlier starts of the run included."""
    rate: float
    """Rollouts that ended per second, over the last ten seconds."""
    reward: float | None
    """Mean of the newest rewards; None before the first."""
    curve: Sequence[float]
    """The mean reward over the run, oldest first."""
    workers: Sequence[Worker]
    step: int | None
    numbers: Mapping[str, float] = field(default_factory=dict[str, float])
    """The algorithm's latest report."""
    eta_seconds: float | None = None
    url: str | None = None
    """Where the store is served, for ``agl status``."""

    @property
    def total(self) -> int:
        """Number of rollouts so far."""
        return sum(self.by_status.values())

    @property
    def finished(self) -> int:
        """Number of rollouts that have ended, in any status."""
        return sum(self.by_status.get(status, 0) for status in _FINAL)


class ProgressView(Protocol):
    """Shows snapshots. The methods are called from the event loop of the algorithm, so they must not block.

    A subclass defines those that it needs; the others do nothing.
    """

    interval_seconds: float = 3600.0
    """Time between snapshots."""

    def open(self) -> None:
        """Begin to show."""

    def show(self, snapshot: Snapshot) -> None:
        """Show the newest snapshot."""

    def close(self) -> None:
        """End; idempotent."""


class Curve:
    """Means of consecutive values: at most ``points`` of them, each over equally many values.

    When there is one too many, neighbours are merged, and from then on each point stands for twice as many values. So
    a curve of any length takes bounded memory.

    Args:
        points: the most points to keep; even.
        recent: number of the newest values in ``recent_mean``.
    """

    def __init__(self, points: int = _CURVE_POINTS, recent: int = 100) -> None:
        self._limit = points
        self._means: list[float] = []
        self._width = 1
        self._open: list[float] = []
        self._recent = deque[float](maxlen=recent)
        self.count = 0

    def add(self, value: float) -> None:
        """Append one value."""
        self.count += 1
        self._recent.append(value)
        self._open.append(value)
        if len(self._open) == self._width:
            self._means.append(_mean(self._open))
            self._open.clear()
        if len(self._means) > self._limit:
            last = self._means.pop()
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means = [(first + second) / 2 for first, second in pairs]
            self._open = [last] * self._width
            self._width *= 2

    @property
    def means(self) -> list[float]:
        """The points of the curve, oldest first; the last one may still be incomplete."""
        return [*self._means, _mean(self._open)] if self._open else list(self._means)

    @property
    def recent_mean(self) -> float | None:
        """Mean of the newest values; None if there is none yet."""
        return _mean(self._recent) if self._recent else None


def _mean(values: Sequence[float]) -> float:
    """As ``statistics.fmean``, which raises where the sum is not finite: a chart must not end a run."""
    return sum(values) / len(values)


class Progress:
    """Measures a run and feeds a view while it is entered (``async with``).

    If the store does not answer, a snapshot is skipped; the run goes on.

    Args:
        store: is asked for counts and workers.
        view: shows them. The first snapshot comes after its interval, when there is something to see.
        clock: monotonic seconds.
    """

    def __init__(self, store: LightningStore, view: ProgressView, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._view = view
        self._clock = clock
        self._started = 0.0
        self._marks = deque[tuple[float, int]]()
        self._observed, self._reported = Curve(), Curve()
        self._seen = OrderedDict[str, None]()
        self._step: int | None = None
        self._first_step: tuple[float, int] | None = None
        self._numbers: dict[str, float] = {}
        self._task: asyncio.Task[None] | None = None

    def observe(self, rollout_id: str, reward: float) -> None:
        """Add the final reward of a rollout to the curve, once."""
        if rollout_id in self._seen:
            return
        self._seen[rollout_id] = None
        if len(self._seen) > _REMEMBERED_ROLLOUTS:
            self._seen.popitem(last=False)
        self._observed.add(reward)

    def report(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the algorithm's report of a step.

        Args:
            step: counted from 0.
            numbers: if ``reward_mean`` is among them, it makes the curve from then on, instead of the observed
                rewards. ``total_steps`` is the number of steps of the run, for the estimate of the time left.
        """
        if self._first_step is None:
            self._first_step = (self._clock(), step)
        self._step = step
        self._numbers.update(numbers)
        if "reward_mean" in numbers:
            self._reported.add(numbers["reward_mean"])

    async def __aenter__(self) -> Progress:
        self._started = self._clock()
        self._view.open()
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        try:
            await self._show()
        finally:
            self._view.close()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._view.interval_seconds)
            await self._show()

    async def _show(self) -> None:
        try:
            snapshot = await self.snapshot()
        except AgentLightningError as error:
            _logger.debug("the progress is unknown at the moment: %s", error)
            return
        self._view.show(snapshot)

    async def snapshot(self) -> Snapshot:
        """Ask the store for the present state.

        Raises:
            AgentLightningError: the store does not answer.
        """
        statistics = await self._store.statistics()
        workers = await self._store.query_workers(limit=_SHOWN_WORKERS)
        by_status = dict(statistics.get("rollouts_by_status", {}))
        now = self._clock()
        finished = sum(by_status.get(status, 0) for status in _FINAL)
        rate = self._rate(now, finished)
        curve = self._reported if self._reported.count else self._observed
        return Snapshot(
            elapsed_seconds=now - self._started,
            by_status=by_status,
            rate=rate,
            reward=curve.recent_mean if curve is self._observed else curve.means[-1],
            curve=curve.means,
            workers=list(workers),
            step=self._step,
            numbers=dict(self._numbers),
            eta_seconds=self._eta(now, rate, sum(by_status.values()) - finished),
            url=getattr(self._store, "endpoint", None),
        )

    def _rate(self, now: float, finished: int) -> float:
        self._marks.append((now, finished))
        while len(self._marks) > 2 and now - self._marks[1][0] >= _RATE_WINDOW_SECONDS:
            self._marks.popleft()
        since, before = self._marks[0]
        return (finished - before) / (now - since) if now > since else 0.0

    def _eta(self, now: float, rate: float, unfinished: int) -> float | None:
        """Seconds until the last step, at the pace so far. If steps are unknown: until the queue is empty."""
        total = self._numbers.get("total_steps")
        if total is not None and self._step is not None and self._first_step is not None:
            since, first = self._first_step
            if self._step > first:
                return max(0.0, total - self._step - 1) * (now - since) / (self._step - first)
            return None
        return unfinished / rate if rate > 0 else None


# --- Views -----------------------------------------------------------------------------------------

ProgressSpec: TypeAlias = Literal["auto", "table", "log", "off"] | ProgressView
"""How to show progress; ``auto`` is a table if stderr is a terminal, else log lines."""


def make_view(spec: ProgressSpec) -> ProgressView:
    """Return the view of a spec."""
    if not isinstance(spec, str):
        return spec
    if spec == "auto":
        spec = "table" if sys.stderr.isatty() else "log"
    views: dict[str, type[ProgressView]] = {"table": TableView, "log": LogView, "off": SilentView}
    if spec not in views:
        raise InvalidValue(f"progress={spec!r}; give 'auto', 'table', 'log', 'off', or a ProgressView")
    return views[spec]()


class SilentView(ProgressView):
    """Shows nothing."""


class LogView(ProgressView):
    """One line of the logger ``agentlightning.trainer`` (level INFO) every ten seconds, and one at the end.

    If the program has not configured any logging, the lines go to stderr, because nobody would see them otherwise.
    """

    interval_seconds = 10.0
    _told_url: str | None = None

    def show(self, snapshot: Snapshot) -> None:
        """Write one line."""
        if not snapshot.total and snapshot.elapsed_seconds < self.interval_seconds:
            return  # a run that failed before its first rollout; the error says more
        reward = "none yet" if snapshot.reward is None else f"{snapshot.reward:.3f}"
        line = (
            f"{snapshot.finished} rollouts ended of {snapshot.total} ({states_line(snapshot)}), {snapshot.rate:.1f}/s, "
            f"reward {reward}, {workers_line(snapshot.workers)}, ETA {duration(snapshot.eta_seconds)}"
        )
        if snapshot.url not in (None, self._told_url) and snapshot.elapsed_seconds >= self.interval_seconds:
            self._told_url = snapshot.url
            line += f"; look on with `agl status --url {snapshot.url}`"
        if _logger.hasHandlers():
            _logger.info("%s", line)
        else:
            sys.stderr.write(f"{line}\n")


class TableView(ProgressView):
    """A table that is redrawn in place, on stderr."""

    interval_seconds = 0.5

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._live: Live | None = None

    def open(self) -> None:
        """Begin to draw."""
        # rich takes a tenth of a second to import, and runs without a terminal do not need it.
        from rich.console import Console
        from rich.live import Live

        self._live = Live(console=self._console or Console(stderr=True), auto_refresh=False)
        self._live.start()

    def show(self, snapshot: Snapshot) -> None:
        """Draw the newest snapshot."""
        if self._live is not None:
            self._live.update(self.draw(snapshot), refresh=True)

    def draw(self, snapshot: Snapshot) -> RenderableType:
        """Return what is on the screen; subclasses add to it."""
        return render(snapshot)

    def close(self) -> None:
        """Leave the last table on the screen."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()


def render(snapshot: Snapshot) -> Group:
    """Return a snapshot as a table."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    step = "" if snapshot.step is None else f"step {_step_of(snapshot)} done   "
    table.add_row("run", f"{step}{duration(snapshot.elapsed_seconds)} gone, ETA {duration(snapshot.eta_seconds)}")
    table.add_row("rollouts", f"{snapshot.finished} ended of {snapshot.total}, {snapshot.rate:.1f}/s")
    table.add_row("states", states_line(snapshot))
    table.add_row("workers", workers_line(snapshot.workers))
    reward = Text("none yet" if snapshot.reward is None else f"{snapshot.reward:.3f}  ")
    reward.append(sparkline(snapshot.curve, _CURVE_WIDTH), style="green")
    table.add_row("reward", reward)
    if snapshot.url is not None:
        table.add_row("look on", f"agl status --url {snapshot.url}")
    shown = {name: value for name, value in snapshot.numbers.items() if name not in ("reward_mean", "total_steps")}
    if shown:
        table.add_row("algorithm", "  ".join(f"{name} {value:.4g}" for name, value in shown.items()))
    return Group(table)


def _step_of(snapshot: Snapshot) -> str:
    done = (snapshot.step or 0) + 1  # steps are counted from 0
    total = snapshot.numbers.get("total_steps")
    return f"{done}" if total is None else f"{done} of {total:.0f}"


def states_line(snapshot: Snapshot) -> str:
    """Return how many rollouts are in which state, such as ``9 succeeded, 2 running``."""
    counts = [f"{snapshot.by_status[status]} {status}" for status in _STATUS_ORDER if snapshot.by_status.get(status)]
    return ", ".join(counts) or "no rollouts yet"


def workers_line(workers: Sequence[Worker]) -> str:
    """Return how many workers are in which state, such as ``1 busy, 1 silent``."""
    counts = Counter(worker.status for worker in workers)
    known = [f"{counts[status]} {word}" for status, word in _WORKER_WORDS.items() if counts[status]]
    return ", ".join(known) or "no worker yet"


def duration(seconds: float | None) -> str:
    """Return seconds in a readable form: ``4 s``, ``3:20``, ``1:02:05``; ``?`` if unknown."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def sparkline(values: Sequence[float], width: int) -> str:
    """Return the values as ``width`` bars at most, scaled between the lowest and the highest value."""
    values = [value for value in values if math.isfinite(value)]
    if not values or width < 1:
        return ""
    if len(values) > width:
        edges = [index * len(values) // width for index in range(width + 1)]
        values = [_mean(values[start:end]) for start, end in pairwise(edges)]
    low, high = min(values), max(values)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in values)
