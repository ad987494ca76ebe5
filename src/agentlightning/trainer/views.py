"""How progress is shown: a live table on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Literal, TypeAlias

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from agentlightning.errors import InvalidValue
from agentlightning.trainer.progress import ProgressView, Snapshot, sparkline
from agentlightning.types import Worker

_logger = logging.getLogger("agentlightning.trainer")

ProgressSpec: TypeAlias = Literal["auto", "table", "log", "off"] | ProgressView
"""How to show progress; ``auto`` is a table if stderr is a terminal, else log lines."""

_CURVE_WIDTH = 48
_WORKER_WORDS = {"busy": "busy", "idle": "idle", "unknown": "silent"}
_STATUS_ORDER = ("succeeded", "failed", "cancelled", "running", "preparing", "queuing", "requeuing")


def make_view(spec: ProgressSpec) -> ProgressView:
    """The view that a spec means.

    Raises:
        InvalidValue: an unknown word.
    """
    if not isinstance(spec, str):
        return spec
    if spec == "auto":
        spec = "table" if sys.stderr.isatty() else "log"
    views: dict[str, type[TableView | LogView | SilentView]] = {"table": TableView, "log": LogView, "off": SilentView}
    if spec not in views:
        raise InvalidValue(f"progress={spec!r}; give 'auto', 'table', 'log', 'off', or a ProgressView")
    return views[spec]()


class TableView:
    """A table that is drawn anew in its place, on stderr."""

    interval_seconds = 0.5

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._live: Live | None = None

    def open(self) -> None:
        self._live = Live(console=self._console, auto_refresh=False)
        self._live.start()

    def show(self, snapshot: Snapshot) -> None:
        if self._live is not None:
            self._live.update(self.draw(snapshot), refresh=True)

    def draw(self, snapshot: Snapshot) -> RenderableType:
        """What is on the screen; subclasses add to it."""
        return render(snapshot)

    def close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()


class LogView:
    """One line of the logger ``agentlightning.trainer`` (level INFO) every ten seconds, and one at the end.

    Where a program has set up no logging at all, the lines go to stderr, since nobody would see them otherwise.
    """

    interval_seconds = 10.0

    def open(self) -> None:
        pass

    def show(self, snapshot: Snapshot) -> None:
        if not snapshot.total and snapshot.elapsed_seconds < self.interval_seconds:
            return  # it has only begun
        reward = "none yet" if snapshot.reward is None else f"{snapshot.reward:.3f}"
        line = (
            f"{snapshot.finished} rollouts ended of {snapshot.total} ({states_line(snapshot)}), {snapshot.rate:.1f}/s, "
            f"reward {reward}, {workers_line(snapshot.workers)}, ETA {duration(snapshot.eta_seconds)}"
        )
        if _logger.hasHandlers():
            _logger.info("%s", line)
        else:
            sys.stderr.write(f"{line}\n")

    def close(self) -> None:
        pass


class SilentView:
    """Shows nothing."""

    interval_seconds = 3600.0

    def open(self) -> None:
        pass

    def show(self, snapshot: Snapshot) -> None:
        pass

    def close(self) -> None:
        pass


def render(snapshot: Snapshot) -> Group:
    """A snapshot as a table."""
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
    shown = {name: value for name, value in snapshot.numbers.items() if name not in ("reward_mean", "total_steps")}
    if shown:
        table.add_row("algorithm", "  ".join(f"{name} {value:.4g}" for name, value in shown.items()))
    return Group(table)


def _step_of(snapshot: Snapshot) -> str:
    done = (snapshot.step or 0) + 1  # steps count from 0, people from 1
    total = snapshot.numbers.get("total_steps")
    return f"{done}" if total is None else f"{done} of {total:.0f}"


def states_line(snapshot: Snapshot) -> str:
    """How many rollouts are in which state, those that there are."""
    counts = [f"{snapshot.by_status[status]} {status}" for status in _STATUS_ORDER if snapshot.by_status.get(status)]
    return ", ".join(counts) or "no rollouts yet"


def workers_line(workers: Sequence[Worker]) -> str:
    """How many workers are in which state."""
    counts = Counter(worker.status for worker in workers)
    known = [f"{counts[status]} {word}" for status, word in _WORKER_WORDS.items() if counts[status]]
    return ", ".join(known) or "no worker yet"


def duration(seconds: float | None) -> str:
    """Seconds as people say them: ``4 s``, ``3:20``, ``1:02:05``; ``?`` if unknown."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
