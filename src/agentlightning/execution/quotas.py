"""What a runner process may use up, and how one that has used it up is recognised."""

from __future__ import annotations

import os
import resource
import signal
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Quotas:
    """Limits of each runner process. None: whatever the system allows.

    Args:
        memory_bytes: what it may hold of memory of its own, with all its descendants where the memory controller
            of cgroup v2 can be used; elsewhere each process for itself (``RLIMIT_DATA``).
        cpu_seconds: CPU time it may use, in whole seconds (``RLIMIT_CPU``).
        open_files: file descriptors it may have open.
        processes: how many processes and threads the user may have in all, for it to make another one
            (``RLIMIT_NPROC``; the system does not apply it to root).
        nice: by how much it gives way to others, 0 to 19.
        cpus: the processors it may run on, by number.
    """

    memory_bytes: int | None = None
    cpu_seconds: int | None = None
    open_files: int | None = None
    processes: int | None = None
    nice: int | None = None
    cpus: frozenset[int] | None = None

    def apply(self, *, memory_is_limited: bool = False) -> None:
        """Limit this process and what it will start.

        Args:
            memory_is_limited: whether somebody else, the cgroup, sees to ``memory_bytes``.

        Raises:
            OSError, ValueError: the system refuses a limit, for example one above what the user may have.
        """
        if self.memory_bytes is not None and not memory_is_limited:
            _limit(resource.RLIMIT_DATA, self.memory_bytes)
        if self.cpu_seconds is not None:
            # SIGXCPU at the limit; SIGKILL a little later, if that was ignored.
            _limit(resource.RLIMIT_CPU, self.cpu_seconds, self.cpu_seconds + 5)
        if self.open_files is not None:
            _limit(resource.RLIMIT_NOFILE, self.open_files)
        if self.processes is not None:
            _limit(resource.RLIMIT_NPROC, self.processes)
        if self.nice is not None:
            os.nice(self.nice)
        if self.cpus is not None:
            if not hasattr(os, "sched_setaffinity"):
                raise OSError("this system cannot bind a process to processors; leave cpus out of the quotas")
            os.sched_setaffinity(0, self.cpus)


def _limit(what: int, soft: int, hard: int | None = None) -> None:
    hard = soft if hard is None else hard
    _, most = resource.getrlimit(what)
    if most != resource.RLIM_INFINITY:
        hard = min(hard, most)
    resource.setrlimit(what, (min(soft, hard), hard))


def exhausted(quotas: Quotas | None, exit_code: int | None, *, memory_kills: int = 0) -> str | None:
    """Which quota a process has used up, told by how it ended; None: none.

    Args:
        quotas: what it was allowed.
        exit_code: as of ``subprocess``: negative for a signal.
        memory_kills: how many of its processes the kernel has killed for want of memory.
    """
    if memory_kills > 0:
        allowed = None if quotas is None else quotas.memory_bytes
        return "its memory" if allowed is None else f"{allowed:,} bytes of memory"
    if quotas is not None and quotas.cpu_seconds is not None and exit_code == -signal.SIGXCPU:
        return f"{quotas.cpu_seconds} s of CPU time"
    return None


# --- When a runner that crashed is started again, and when it is given up. Pure: time comes in  ---

_MINUTE = 60.0


@dataclass(frozen=True)
class RestartPolicy:
    """How crashes are answered.

    Args:
        most_per_minute: how many crashes of one runner within a minute are answered with a restart;
            0: it is never started again.
        first_delay: seconds before it is started again.
        factor: what the delay grows by with each life in a row that was too short.
        longest_delay: seconds at most.
        short_life: a life shorter than so many seconds was too short: the runner may crash at once again.
    """

    most_per_minute: int = 10
    first_delay: float = 0.1
    factor: float = 2.0
    longest_delay: float = 10.0
    short_life: float = 1.0


@dataclass
class Restarts:
    """The crashes of one runner.

    Args:
        policy: how they are answered.
    """

    policy: RestartPolicy
    _crashes: list[float] = field(default_factory=list[float])
    _short_lives: int = 0

    def crashed(self, lived_seconds: float, now: float) -> float | None:
        """Note a crash: seconds until the next start, or None: it is given up."""
        self._crashes = [each for each in self._crashes if each > now - _MINUTE]
        self._crashes.append(now)
        if len(self._crashes) > self.policy.most_per_minute:
            return None
        self._short_lives = self._short_lives + 1 if lived_seconds < self.policy.short_life else 0
        return min(self.policy.first_delay * self.policy.factor**self._short_lives, self.policy.longest_delay)
