"""The places of a run that processes fill, one life after another."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from agentlightning.execution.cgroups import Cgroup
from agentlightning.execution.messages import Exited, Outcome, Start
from agentlightning.execution.quotas import Quotas, exhausted
from agentlightning.execution.restarts import RestartPolicy, Restarts

__all__ = ["Crash", "Slot", "SlotState"]

SlotState = Literal["starting", "running", "waiting", "ended", "given up"]
"""``waiting``: it crashed, and is started again soon. ``ended``: it came to its end, or is not needed any more."""


@dataclass(frozen=True)
class Crash:
    """How a process failed."""

    slot: str
    pid: int
    what: str
    """In half a sentence."""
    traceback: str
    exhausted: bool
    """Whether it had used up one of its quotas."""

    def __str__(self) -> str:
        return f"{self.slot} (pid {self.pid}) {self.what}"


@dataclass
class Slot:
    """One place.

    Args:
        name: of the place; for a runner, its worker id.
        job: which job is done here.
        arguments: plain values for the job.
        restart: whether a process that crashes is replaced.
        quotas: what each process may use up.
        environment: added to that of each process.
    """

    name: str
    job: str
    arguments: Mapping[str, Any]
    restart: RestartPolicy | None
    quotas: Quotas | None = None
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    cgroup: Cgroup | None = None
    state: SlotState = "ended"
    life: int = 0
    begun: bool = False
    """Whether the process of this life has begun with its job, whatever became of it since."""
    pid: int = 0
    began: float = 0.0
    outcome: Outcome | None = None
    """Of the last life."""
    crash: Crash | None = None
    """The last one."""
    _restarts: Restarts | None = None
    _memory_kills: int = 0

    @property
    def live(self) -> bool:
        """Whether a process is there, or will be."""
        return self.state in ("starting", "running", "waiting")

    def begin(self, now: float) -> Start:
        """The order for the next life."""
        self.life += 1
        self.state, self.begun, self.pid, self.began, self.outcome = "starting", False, 0, now, None
        limited = False
        if self.cgroup is not None and self.quotas is not None and self.quotas.memory_bytes is not None:
            limited = self.cgroup.limit_memory(self.quotas.memory_bytes)
        return Start(
            slot=self.name,
            life=self.life,
            job=self.job,
            arguments=self.arguments,
            environment=self.environment,
            quotas=self.quotas,
            cgroup=None if self.cgroup is None else str(self.cgroup.path),
            memory_is_limited=limited,
        )

    def ended_as(self, exited: Exited, allowed_exit_codes: frozenset[int]) -> Crash | None:
        """Take note of the end of a life: how it crashed, or None if it came to its end in good order.

        One that ends with an exit code that is allowed, and without a word, has not crashed, but nobody else has
        told the store that it is gone.
        """
        self.state, self.outcome = "ended", exited.outcome
        kills = 0 if self.cgroup is None else self.cgroup.memory_kills()
        new_kills, self._memory_kills = kills - self._memory_kills, kills
        failed = exited.outcome is not None and exited.outcome.word == "failed"
        if exited.code in allowed_exit_codes and not failed:
            return None
        used_up = exhausted(self.quotas, exited.code, memory_kills=new_kills)
        if used_up is None and exited.outcome is not None and exited.outcome.exhausted:
            used_up = exited.outcome.exhausted
        self.crash = Crash(
            slot=self.name,
            pid=exited.pid,
            what=_told(exited, used_up),
            traceback=exited.outcome.traceback if exited.outcome else "",
            exhausted=used_up is not None,
        )
        return self.crash

    def delay(self, now: float) -> float | None:
        """Seconds until the next life after a crash; None: there is none any more."""
        if self.restart is None:
            return None
        self._restarts = self._restarts or Restarts(self.restart)
        return self._restarts.crashed(now - self.began, now)


def _told(exited: Exited, used_up: str | None) -> str:
    if exited.code < 0 and exited.pid:
        how = f"was killed by {_signal_name(-exited.code)}"
    elif exited.outcome is not None and exited.outcome.word == "failed":
        how = f"failed: {exited.outcome.error}"
    else:
        how = f"ended with exit code {exited.code}"
    return how if used_up is None else f"{how}, having used up {used_up}"


def _signal_name(number: int) -> str:

    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
