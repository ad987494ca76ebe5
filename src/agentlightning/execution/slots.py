"""The slots of a run: places that one process after another fills, and what is known of those that crashed."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Literal

from agentlightning.execution.child import ProcessEvent, ProcessResult, StartProcess
from agentlightning.execution.process_tree import Cgroup
from agentlightning.execution.quotas import exhausted
from agentlightning.execution.restarts import CrashCounter
from agentlightning.runner.vital_signs import VitalSigns

_SHOWN_CHARACTERS = 500
"""Of what a process printed, in the reason of an attempt."""


@dataclass(frozen=True)
class Crash:
    """How a process failed."""

    slot: str
    pid: int
    what: str  # the predicate of a sentence: "was killed by SIGSEGV"
    traceback: str
    output: str  # the last lines that it printed
    exhausted: bool  # whether it had exceeded one of its quotas
    seconds: float  # how long it lived
    attempts: list[str] | None  # on which it was at work; None: that is not known
    ended: int  # how many attempts it had brought to their end

    def __str__(self) -> str:
        return f"{self.slot} (pid {self.pid}) {self.what}"

    def reason(self) -> str:
        """What is said of the attempts that it was working on."""
        more = len(self.attempts or ()) - 1
        others = "" if more < 1 else " and on another one" if more == 1 else f" and on {more} others"
        end = self.output[-_SHOWN_CHARACTERS:]
        printed = f"; the last that it printed: {end}" if end and not self.traceback else ""
        return f"the runner process (pid {self.pid}) {self.what} while it worked on this{others}{printed}"


@dataclass
class Slot:
    """A place that one process after another fills: one that crashes is replaced, until the restarts are used up."""

    start: StartProcess
    restarts: CrashCounter | None  # None: a process that crashes is not replaced
    cgroup: Cgroup | None = None
    signs: VitalSigns | None = None
    state: Literal["starting", "running", "waiting", "ended", "given up"] = "ended"
    """``waiting``: its process crashed, and the next one starts soon. ``ended``: its process has ended without a crash,
    or is not needed any more."""
    pid: int = 0
    began: float = 0.0
    result: ProcessResult | None = None  # of the last process
    crash: Crash | None = None  # the last one
    last_claim: float | None = None  # when, as the store knew it at the last crash
    _memory_kills: int = 0

    @property
    def name(self) -> str:
        """Of a runner's slot: the worker id."""
        return self.start.slot

    @property
    def is_live(self) -> bool:
        """Whether a process is there, or will be."""
        return self.state in ("starting", "running", "waiting")

    @property
    def has_left(self) -> bool:
        """Whether its runner has left before it had done its share, and would go on if it could."""
        return self.state == "ended" and self.result is not None and self.result.status in ("drain", "stop", "gone")

    def next_start(self, now: float) -> StartProcess:
        """Begin the next process; return the command for the launcher."""
        self.state, self.pid, self.began, self.result = "starting", 0, now, None
        if self.signs is not None:
            self.signs.reset()
        if self.cgroup is None:
            return self.start
        most = None if self.start.quotas is None else self.start.quotas.memory_bytes
        limited = most is not None and self.cgroup.limit_memory(most)
        return self.start._replace(cgroup=str(self.cgroup.path), memory_is_limited=limited)

    def end(self, exited: ProcessEvent, allowed_exit_codes: frozenset[int], now: float) -> Crash | None:
        """Note the end of a process; return how it crashed, or None if it did not."""
        self.state, self.result = "ended", exited.result
        result = exited.result or ProcessResult("")
        kills = 0 if self.cgroup is None else self.cgroup.memory_kills()
        new_kills, self._memory_kills = kills - self._memory_kills, kills
        if exited.code in allowed_exit_codes and result.status != "failed":
            return None
        used_up = exhausted(self.start.quotas, exited.code, memory_kills=new_kills) or result.exhausted
        what = _describe(exited, result)
        what = f"{what}, having used up {used_up}" if used_up else what
        # Only where it has shown life it has also noted its attempts.
        signs = None if self.signs is None or self.signs.times() is None else self.signs
        self.crash = Crash(
            slot=self.name,
            pid=exited.pid,
            what=what,
            traceback=result.traceback,
            output=exited.output,
            exhausted=bool(used_up),
            seconds=now - self.began,
            attempts=None if signs is None else signs.at_work(),
            ended=0 if self.signs is None else self.signs.ended(),
        )
        return self.crash


def _describe(exited: ProcessEvent, result: ProcessResult) -> str:
    if exited.code < 0 and exited.pid:
        try:
            name = signal.Signals(-exited.code).name
        except ValueError:  # a real-time signal
            name = f"signal {-exited.code}"
        return f"was killed by {name}"
    return f"failed: {result.error}" if result.status == "failed" else f"ended with exit code {exited.code}"
