"""What a runner process may use, and how one that used too much is recognised."""

from __future__ import annotations

import os
import resource
import signal
from dataclasses import dataclass


@dataclass(frozen=True)
class Quotas:
    """Limits of each runner process. None: whatever the system allows.

    Args:
        memory_bytes: private memory, of the process and all its descendants together where the memory controller of
            cgroup v2 is available, elsewhere of each process alone (``RLIMIT_DATA``).
        cpu_seconds: CPU time, in whole seconds (``RLIMIT_CPU``).
        open_files: open file descriptors.
        processes: how many processes and threads the user may have in all when the runner makes another one
            (``RLIMIT_NPROC``; the system does not apply it to root).
        nice: added to the scheduling priority, 0 to 19; higher values give way to other processes.
        cpus: numbers of the processors that it may run on.
    """

    memory_bytes: int | None = None
    cpu_seconds: int | None = None
    open_files: int | None = None
    processes: int | None = None
    nice: int | None = None
    cpus: frozenset[int] | None = None

    def apply(self, *, memory_is_limited: bool = False) -> None:
        """Limit this process and what it will start; a control group may apply ``memory_bytes`` already.

        Raises:
            OSError, ValueError: the system refuses a limit, for example one above what the user may have.
        """
        if self.memory_bytes is not None and not memory_is_limited:
            _limit(resource.RLIMIT_DATA, self.memory_bytes)
        if self.cpu_seconds is not None:
            # At the soft limit the kernel sends SIGXCPU, by which `exhausted` recognises the reason; at the hard limit
            # SIGKILL, in case the process ignores the first.
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
    """Set a limit. It is never above the present hard limit, which only root may raise (setrlimit(2))."""
    hard = soft if hard is None else hard
    _, most = resource.getrlimit(what)
    if most != resource.RLIM_INFINITY:
        hard = min(hard, most)
    resource.setrlimit(what, (min(soft, hard), hard))


def exhausted(quotas: Quotas | None, exit_code: int | None, *, memory_kills: int = 0) -> str | None:
    """Which quota a process has exceeded; None: none.

    It is judged by the exit code (negative for a signal) and by how many of its processes the kernel has killed because
    of the memory limit.
    """
    if memory_kills > 0:
        allowed = None if quotas is None else quotas.memory_bytes
        return "its memory" if allowed is None else f"{allowed:,} bytes of memory"
    if quotas is not None and quotas.cpu_seconds is not None and exit_code == -signal.SIGXCPU:
        return f"{quotas.cpu_seconds} s of CPU time"
    return None
