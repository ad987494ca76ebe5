"""What a runner process may use up, and how one that has used it up is recognised."""

from __future__ import annotations

import os
import resource
import signal
from dataclasses import dataclass

__all__ = ["Quotas", "exhausted"]


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
