"""What the demo shows while it runs: a table with the reward curve, and what happens to the runners."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.text import Text

from agentlightning.trainer.progress import Snapshot
from agentlightning.trainer.views import TableView, duration, render, workers_line


class Notices:
    """Things that happened, in their order, for whoever shows them."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        """Append one."""
        self.lines.append(line)


class DemoTable(TableView):
    """The trainer's table, with the notices below."""

    interval_seconds = 0.25

    def __init__(self, console: Console, notices: Notices) -> None:
        super().__init__(console)
        self._notices = notices

    def draw(self, snapshot: Snapshot) -> RenderableType:
        """The table and the notices."""
        return Group(render(snapshot), *(Text(f"  ! {line}", style="yellow") for line in self._notices.lines))


class DemoLines:
    """One line every few seconds, where there is no terminal."""

    interval_seconds = 3.0

    def __init__(self, console: Console, notices: Notices) -> None:
        self._console = console
        self._notices = notices
        self._told = 0

    def open(self) -> None:
        pass

    def show(self, snapshot: Snapshot) -> None:
        for line in self._notices.lines[self._told :]:
            self._console.print(f"! {line}", highlight=False)
        self._told = len(self._notices.lines)
        reward = "none yet" if snapshot.reward is None else f"{snapshot.reward:.2f}"
        self._console.print(
            f"{duration(snapshot.elapsed_seconds):>5}  {snapshot.finished} rollouts, {snapshot.rate:.0f}/s, "
            f"reward {reward}, workers: {workers_line(snapshot.workers)}",
            highlight=False,
        )

    def close(self) -> None:
        pass
