"""How a run is stopped: by which signals a user asks for it, and how its processes are ended in four stages.

The stages are data: the stop event, SIGINT, SIGTERM, SIGKILL. Each one is applied to every process of the run that is
left, and has its time; the next begins when that is over. A second signal from the user goes to the last stage at once.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple, Self

from agentlightning.execution.process_tree import ProcessInfo, send_signal

_log = logging.getLogger(__name__)

# --- Signals from the user -------------------------------------------------------------------------------------------


class Interrupted(KeyboardInterrupt, SystemExit):
    """The run was stopped by a signal, and everything it had started has ended.

    Code that catches ``KeyboardInterrupt`` catches it. A program that lets it pass ends without a traceback, with the
    exit code that shells use: 128 plus the number of the signal, so 130 for Ctrl+C.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"the run was stopped by {signal.Signals(number).name}")
        self.code = 128 + number


class SignalHandlers:
    """A context in which the first signal begins an abort, and every further one hurries it.

    It handles SIGINT, SIGTERM and SIGHUP (sent when a terminal is closed). The last two are left alone if the program
    handles or ignores them already. Outside the main thread, where Python allows no handlers, it does nothing.

    Args:
        on_first: called at the first signal, in the main thread, between two steps of whatever runs there.
        on_further: the same for every further signal; what it raises is raised there.
    """

    def __init__(self, on_first: Callable[[], None], on_further: Callable[[], None] = lambda: None) -> None:
        self._on_first = on_first
        self._on_further = on_further
        self._before: dict[int, Any] = {}
        self._count = 0
        self._force = False
        self._main_thread = threading.main_thread().ident
        self.number: int | None = None
        """The first signal."""

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._handle)
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) == signal.SIG_DFL:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
        self._before.clear()

    def is_hurried(self) -> bool:
        """Whether there was a further signal."""
        return self._count > 1

    def conclude(self) -> None:
        """Note that the run has ended: from now on every signal hurries what is left to do.

        If a signal ended the run, that one does not count as a hurry.
        """
        self._count = max(self._count, 1)

    def check(self) -> None:
        """Raise ``Interrupted`` if there was a signal."""
        if self.number is not None:
            raise Interrupted(self.number)

    def interrupt_main_thread(self) -> None:
        """Raise ``KeyboardInterrupt`` in the main thread, whatever it does or waits for. Any thread may call."""
        if self._before and self._main_thread is not None:
            self._force = True
            # A real signal, because only that ends a system call in which the main thread may be blocked.
            signal.pthread_kill(self._main_thread, signal.SIGINT)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._force:
            self._force = False
            raise KeyboardInterrupt
        self._count += 1
        if self._count == 1:
            self.number = number
            self._on_first()
            _log.warning("%s: stopping; send it again to kill what is left", signal.Signals(number).name)
        else:
            self._on_further()


# --- The four stages -------------------------------------------------------------------------------------------------

_FIRST_POLL_SECONDS, _MAX_POLL_SECONDS = 0.02, 0.2


class AbortStage(NamedTuple):
    """One step of an abort."""

    number: int
    name: str
    signals: tuple[signal.Signals, ...]  # sent to every process of the run; empty: the stop event is set instead
    seconds: float  # how long to wait for the processes to end


def abort_stages(graceful_timeout: float, terminate_timeout: float) -> tuple[AbortStage, ...]:
    """The stages of an abort, with their times in seconds.

    SIGCONT follows SIGINT and SIGTERM because a process that was stopped (SIGSTOP) receives them only when it goes on.
    """
    return (
        AbortStage(1, "the stop event", (), graceful_timeout),
        AbortStage(2, "SIGINT", (signal.SIGINT, signal.SIGCONT), terminate_timeout),
        AbortStage(3, "SIGTERM", (signal.SIGTERM, signal.SIGCONT), terminate_timeout),
        AbortStage(4, "SIGKILL", (signal.SIGKILL,), terminate_timeout),
    )


class ProcessEnd(NamedTuple):
    """How one process ended during an abort."""

    pid: int
    name: str
    stage: AbortStage | None  # the stage that ended it; None: it has survived all of them
    seconds: float  # since the abort began


class Abort:
    """Ends all processes of a run.

    Args:
        living: returns those that have not ended.
        names: of those that see the stop event, by number.
        stop: sets the stop event.
        hurry: whether to go to the last stage at once.
    """

    def __init__(
        self,
        living: Callable[[], list[ProcessInfo]],
        names: Mapping[int, str],
        stop: Callable[[], None],
        hurry: Callable[[], bool] = lambda: False,
    ) -> None:
        self._living = living
        self._names = names
        self._stop = stop
        self._hurry = hurry
        self._began = time.monotonic()
        self._known: dict[tuple[int, float], ProcessInfo] = {}
        self._stage: AbortStage | None = None
        """The last stage that was applied."""
        self.ends: list[ProcessEnd] = []
        """How each process ended, in the order in which they ended."""

    def steps(self, stages: tuple[AbortStage, ...]) -> Iterator[float]:
        """Apply the stages, until no process is left or each had its time; yields how long to wait before going on."""
        for stage in stages:
            is_last = stage is stages[-1]
            if self._hurry() and not is_last:
                continue
            if not self._left():
                break
            self._stage = stage
            if not stage.signals:
                self._stop()
            yield from self._apply(stage, is_last)
        for survivor in self._left():
            self._note(survivor, None)

    def _apply(self, stage: AbortStage, is_last: bool) -> Iterator[float]:
        """Send the signals of a stage, and wait until its time is over or nobody is left."""
        until = time.monotonic() + stage.seconds
        poll_seconds = _FIRST_POLL_SECONDS
        signalled: set[tuple[int, float]] = set()
        # Looked up in each round, because a process may have started another one since.
        while (left := self._left()) and time.monotonic() < until and (is_last or not self._hurry()):
            if not stage.signals and not any(each.pid in self._names for each in left):
                return  # the processes that are left do not know of the stop event, so waiting is useless
            for process in left:
                if (process.pid, process.started) not in signalled:
                    signalled.add((process.pid, process.started))
                    for number in stage.signals:
                        send_signal(process, number)
            yield max(min(poll_seconds, until - time.monotonic()), 0.0)
            poll_seconds = min(poll_seconds * 1.5, _MAX_POLL_SECONDS)

    def _left(self) -> list[ProcessInfo]:
        """The processes that are left; the end of the others is noted."""
        left = {(each.pid, each.started): each for each in self._living()}
        if self._stage is not None:
            for key in self._known.keys() - left.keys():
                self._note(self._known[key], self._stage)
        self._known = left
        return list(left.values())

    def _note(self, process: ProcessInfo, stage: AbortStage | None) -> None:
        name = self._names.get(process.pid)
        if name is None:
            owner = self._names.get(process.session) or self._names.get(process.parent) or "a process of this run"
            name = f"{process.name}, left behind by {owner}"
        self.ends.append(ProcessEnd(process.pid, name, stage, time.monotonic() - self._began))

    def log_ends(self) -> None:
        """Log for each process what ended it."""
        for pid, name, stage, seconds in self.ends:
            if stage is None:
                _log.error("%s (pid %d) is still there after %.1f s, in spite of every signal", name, pid, seconds)
                continue
            level = logging.WARNING if stage.signals else logging.INFO
            how = "was ended by" if stage.signals else "ended after"
            _log.log(level, "%s (pid %d) %s %s, stage %d, %.1f s", name, pid, how, stage.name, stage.number, seconds)
