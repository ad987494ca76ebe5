"""What a run looks like at one moment: how far, how fast, how good, and who works on it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from agentlightning.errors import AgentLightningError
from agentlightning.store.base import LightningStore
from agentlightning.types import Worker

# --- A curve of any length in bounded memory, and as one line of text ---

_BARS = "▁▂▃▄▅▆▇█"


class Curve:
    """Means of consecutive values: at most ``points`` of them, each over equally many values.

    When there is one too many, neighbours are merged and each point stands for twice as many values.

    Args:
        points: the most points to keep; even.
        recent: over how many of the newest values ``recent_mean`` goes.
    """

    def __init__(self, points: int = 64, recent: int = 100) -> None:
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
            self._merge()

    def _merge(self) -> None:
        last = self._means.pop()
        self._means = [(first + second) / 2 for first, second in zip(self._means[::2], self._means[1::2], strict=True)]
        self._open = [last] * self._width
        self._width *= 2

    @property
    def means(self) -> list[float]:
        """The points of the curve, oldest first; the last one may still be filling."""
        return [*self._means, _mean(self._open)] if self._open else list(self._means)

    @property
    def recent_mean(self) -> float | None:
        """Mean of the newest values; None if there is none yet."""
        return _mean(self._recent) if self._recent else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as ``width`` bars at most, from the lowest to the highest value."""
    if not values or width < 1:
        return ""
    if len(values) > width:
        edges = [index * len(values) // width for index in range(width + 1)]
        values = [_mean(values[start:end]) for start, end in pairwise(edges)]
    low, high = min(values), max(values)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in values)


# ---

_logger = logging.getLogger(__name__)

_RATE_WINDOW_SECONDS = 10.0
_REMEMBERED_ROLLOUTS = 10_000
_SHOWN_WORKERS = 50
_FINAL = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Snapshot:
    """One moment of a run."""

    elapsed_seconds: float
    by_status: Mapping[str, int]
    """Rollouts in the store, those of earlier starts of the run included."""
    rate: float
    """Rollouts that ended per second, over the last ten seconds."""
    reward: float | None
    """Mean of the newest rewards; None before the first."""
    curve: Sequence[float]
    """The mean reward over the run, oldest first."""
    workers: Sequence[Worker]
    step: int | None
    numbers: Mapping[str, float] = field(default_factory=dict[str, float])
    """What the algorithm reported last."""
    eta_seconds: float | None = None

    @property
    def total(self) -> int:
        """All rollouts there are so far."""
        return sum(self.by_status.values())

    @property
    def finished(self) -> int:
        """Those that have ended, in whatever way."""
        return sum(self.by_status.get(status, 0) for status in _FINAL)


class ProgressView(Protocol):
    """Shows snapshots. All three are called from the event loop of the algorithm and must not block."""

    interval_seconds: float
    """How often it wants one."""

    def open(self) -> None:
        """Begin to show."""
        ...

    def show(self, snapshot: Snapshot) -> None:
        """Show the newest snapshot."""
        ...

    def close(self) -> None:
        """End; idempotent."""
        ...


class Progress:
    """Measures a run and feeds a view while it is entered (``async with``).

    A store that cannot be asked for the moment costs a frame, never the run.

    Args:
        store: what is asked for counts and workers.
        view: who shows them.
        clock: seconds that only grow.
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
        """Take the final reward of a rollout into the curve, once."""
        if rollout_id in self._seen:
            return
        self._seen[rollout_id] = None
        if len(self._seen) > _REMEMBERED_ROLLOUTS:
            self._seen.popitem(last=False)
        self._observed.add(reward)

    def report(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take what the algorithm says of a step. A number called ``reward_mean`` makes the curve from then on.

        ``total_steps`` says how many steps there will be, for the estimate of the time left.
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
            await self._frame()
        finally:
            self._view.close()

    async def _watch(self) -> None:
        while True:
            await self._frame()
            await asyncio.sleep(self._view.interval_seconds)

    async def _frame(self) -> None:
        try:
            snapshot = await self.snapshot()
        except AgentLightningError as error:
            _logger.debug("progress is not known for the moment: %s", error)
            return
        self._view.show(snapshot)

    async def snapshot(self) -> Snapshot:
        """Ask the store where everything stands.

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
        )

    def _rate(self, now: float, finished: int) -> float:
        self._marks.append((now, finished))
        while len(self._marks) > 2 and now - self._marks[1][0] >= _RATE_WINDOW_SECONDS:
            self._marks.popleft()
        since, before = self._marks[0]
        return (finished - before) / (now - since) if now > since else 0.0

    def _eta(self, now: float, rate: float, unfinished: int) -> float | None:
        """Seconds until the last step, by the pace so far; without steps, until the queue is empty."""
        total = self._numbers.get("total_steps")
        if total is not None and self._step is not None and self._first_step is not None:
            since, first = self._first_step
            if self._step > first:
                return max(0.0, total - self._step - 1) * (now - since) / (self._step - first)
            return None
        return unfinished / rate if rate > 0 else None
