"""Stopping processes in four stages: the stop event, SIGINT, SIGTERM, SIGKILL.

The stages are data. Each is applied to every process of the run that is left, and given its time;
the next begins when that is up, or at the last one at once when somebody is in a hurry.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from agentlightning.execution.process_tree import Process, send

_log = logging.getLogger(__name__)
_LOOK_SECONDS = 0.02
_MOST_LOOK_SECONDS = 0.2


class Stage(NamedTuple):
    """One step of an abort."""

    number: int
    name: str
    signals: tuple[signal.Signals, ...]
    """What every process of the run is sent; nothing: the stop event is set instead."""
    seconds: float
    """How long to wait for the processes to end."""


def abort_stages(graceful_timeout: float, terminate_timeout: float) -> tuple[Stage, ...]:
    """The stages of an abort, with their times in seconds.

    A process that was stopped (SIGSTOP) sees neither SIGINT nor SIGTERM until it goes on, so it is told to.
    """
    return (
        Stage(1, "the stop event", (), graceful_timeout),
        Stage(2, "SIGINT", (signal.SIGINT, signal.SIGCONT), terminate_timeout),
        Stage(3, "SIGTERM", (signal.SIGTERM, signal.SIGCONT), terminate_timeout),
        Stage(4, "SIGKILL", (signal.SIGKILL,), terminate_timeout),
    )


class Ending(NamedTuple):
    """How one process ended during an abort."""

    pid: int
    name: str
    stage: Stage | None
    """The stage that ended it; None: it is still there."""
    seconds: float
    """Since the abort began."""


class _Hunt:
    """Who is left, and in which stage those who are not have ended."""

    def __init__(self, living: Callable[[], list[Process]], names: Mapping[int, str], clock: Callable[[], float]):
        self._living = living
        self._names = names
        self._clock = clock
        self._began = clock()
        self._known: dict[tuple[int, float], Process] = {}
        self.stage: Stage | None = None
        """The last stage that was applied."""
        self.endings: list[Ending] = []

    def look(self) -> list[Process]:
        """Those who are left; notes those who are not any more."""
        left = {(each.pid, each.started): each for each in self._living()}
        if self.stage is not None:
            for key in self._known.keys() - left.keys():
                self._note(self._known[key], self.stage)
        self._known = left
        return list(left.values())

    def give_up(self) -> None:
        """Note those who have survived everything."""
        for each in self._known.values():
            self._note(each, None)

    def _note(self, process: Process, stage: Stage | None) -> None:
        name = self._names.get(process.pid) or f"{process.name}, left behind by {self._owner(process)}"
        self.endings.append(Ending(process.pid, name, stage, self._clock() - self._began))

    def _owner(self, process: Process) -> str:
        return self._names.get(process.session) or self._names.get(process.parent) or "a process of this run"


def abort(
    stages: tuple[Stage, ...],
    living: Callable[[], list[Process]],
    names: Mapping[int, str],
    stop: Callable[[], None],
    *,
    hurry: Callable[[], bool] = lambda: False,
    pause: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> list[Ending]:
    """End all processes of a run; blocks until they have ended, or every stage has had its time.

    Args:
        stages: what is done, in this order.
        living: the processes of the run that have not ended.
        names: of the processes that hear the stop event, by number.
        stop: sets the stop event.
        hurry: whether to go on to the last stage at once.
        pause: waits for so many seconds, or less.

    Returns:
        How each process ended, in the order in which they did.
    """
    hunt = _Hunt(living, names, clock)
    for stage in stages:
        if hurry() and stage is not stages[-1]:
            continue
        left = hunt.look()
        if not left:
            break
        hunt.stage = stage
        if not stage.signals:
            stop()
        _apply(stage, left, hunt, names, hurry if stage is not stages[-1] else lambda: False, pause, clock)
    if hunt.look():
        hunt.give_up()
    return hunt.endings


def _apply(
    stage: Stage,
    left: list[Process],
    hunt: _Hunt,
    names: Mapping[int, str],
    hurry: Callable[[], bool],
    pause: Callable[[float], object],
    clock: Callable[[], float],
) -> None:
    until = clock() + stage.seconds
    look_seconds = _LOOK_SECONDS
    told: set[tuple[int, float]] = set()
    while left and clock() < until and not hurry():
        if not stage.signals and not any(each.pid in names for each in left):
            return  # the others do not hear the stop event
        for process in left:  # also those that have appeared since
            if (process.pid, process.started) not in told:
                told.add((process.pid, process.started))
                for number in stage.signals:
                    send(process, number)
        pause(min(look_seconds, max(until - clock(), 0.0)))
        look_seconds = min(look_seconds * 1.5, _MOST_LOOK_SECONDS)
        left = hunt.look()


def tell(endings: list[Ending]) -> None:
    """Log one line for each process: what ended it."""
    for pid, name, stage, seconds in endings:
        if stage is None:
            _log.error("%s (pid %d) is still there after %.1f s, whatever it was sent", name, pid, seconds)
        elif stage.signals:
            _log.warning("%s (pid %d) was ended by %s, stage %d, %.1f s", name, pid, stage.name, stage.number, seconds)
        else:
            _log.info("%s (pid %d) ended after %s, stage 1, %.1f s", name, pid, stage.name, seconds)
