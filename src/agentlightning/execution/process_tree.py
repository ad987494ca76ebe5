"""Which processes belong to a run, however they detach themselves: double forks, own sessions, other parents.

A process belongs to the run if one of these is true:

- it descends from the launcher, which on Linux adopts every descendant whose parent ends;
- it is in the session of a process that the launcher started;
- its environment carries the mark of the run, which every program inherits;
- it is in the run's control group, if there is one.

No single rule is enough: a program may clear its environment or start a session, only Linux can adopt orphans, and
control groups are often not available in containers.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import psutil

_log = logging.getLogger(__name__)

MARK = "AGL_RUN_MARK"
"""Name of the environment variable that marks the processes of a run."""

_DEAD_STATES, _STOPPED_STATES = "ZXx", "Tt"
_PROC = Path("/proc")


class ProcessInfo(NamedTuple):
    """A process that has not ended."""

    pid: int
    parent: int
    session: int
    started: float  # when it began, on any clock. It tells the process from a later one with the same number
    name: str


def snapshot() -> dict[int, ProcessInfo]:
    """All processes that have not ended, by number. A zombie, which has ended and is not collected, does not count."""
    if not _PROC.joinpath("self", "stat").exists():
        return _snapshot_by_psutil()
    # Read here rather than by psutil, which takes ten times as long; an abort does this every few milliseconds.
    found = (_read_stat(int(entry)) for entry in os.listdir(_PROC) if entry.isdigit())
    return {process.pid: process for process in found if process is not None}


def is_running(pid: int) -> bool:
    """Whether a process is there and has neither ended nor been stopped (SIGSTOP, a debugger)."""
    if not _PROC.joinpath("self", "stat").exists():
        try:
            return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED)
        except psutil.Error:
            return False
    fields = _stat_fields(pid)
    return fields is not None and fields[0] not in _DEAD_STATES + _STOPPED_STATES


def descendants(table: dict[int, ProcessInfo], ancestor: int) -> set[int]:
    """Numbers of all processes below ``ancestor``."""
    found = {ancestor}
    while more := {process.pid for process in table.values() if process.parent in found} - found:
        found |= more
    return found - {ancestor}


def send_signal(process: ProcessInfo, number: signal.Signals) -> None:
    """Send a signal, unless the process has ended or belongs to another user.

    The signal never reaches another process that has got the same number since: a pidfd keeps referring to one process,
    and the start time is compared while it is open (pidfd_open(2)).
    """
    with contextlib.suppress(OSError):
        if not hasattr(os, "pidfd_open"):  # not Linux
            os.kill(process.pid, number)
            return
        handle = os.pidfd_open(process.pid)
        try:
            now = _read_stat(process.pid)
            if now is not None and now.started == process.started:
                signal.pidfd_send_signal(handle, number)
        finally:
            os.close(handle)


class ProcessTree:
    """The processes of one run.

    Args:
        mark: value of ``MARK`` in their environment.
        launcher_pid: number of the process that starts them; it is not one of them.
        cgroup: control group of the run.

    Raises:
        ValueError: ``launcher_pid`` is 0 or 1, from which every process descends.
    """

    def __init__(self, mark: str, launcher_pid: int, cgroup: Cgroup | None = None) -> None:
        # Without this check a mistake of ours would send SIGKILL to every process of the machine.
        if launcher_pid <= 1:
            raise ValueError(f"every process descends from {launcher_pid}; that cannot be the launcher of a run")
        self._mark = f"{MARK}={mark}".encode()
        self._launcher_pid = launcher_pid
        self._cgroup = cgroup
        self._sessions: set[int] = set()

    def add_session(self, pid: int) -> None:
        """Note that the launcher has started this process, which leads a session of its own."""
        self._sessions.add(pid)

    def living(self) -> list[ProcessInfo]:
        """The processes that have not ended."""
        table = snapshot()
        found = descendants(table, self._launcher_pid)
        if self._cgroup is not None:
            found.update(self._cgroup.processes())
        for process in table.values():
            if process.session in self._sessions or self._is_marked(process.pid):
                found.add(process.pid)
        found -= {self._launcher_pid, os.getpid()}
        return [table[pid] for pid in sorted(found) if pid in table]

    def _is_marked(self, pid: int) -> bool:
        try:
            environment = _PROC.joinpath(str(pid), "environ").read_bytes()
        except OSError:  # the process has ended or belongs to another user, or there is no /proc
            return False
        return self._mark in environment.split(b"\0")


def _read_stat(pid: int) -> ProcessInfo | None:
    fields = _stat_fields(pid)
    if fields is None or fields[0] in _DEAD_STATES:
        return None
    return ProcessInfo(pid, int(fields[1]), int(fields[3]), float(fields[19]), fields[-1])


def _stat_fields(pid: int) -> list[str] | None:
    """State, parent, process group, session … of a process, and its name at the end; None if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # "pid (name) state ppid pgrp session … starttime(22nd) …" (proc_pid_stat(5)). The name may contain spaces and
    # parentheses, so the fields are counted from the last parenthesis.
    name, _, rest = stat.partition("(")[2].rpartition(")")
    return [*rest.split(), name]


def _snapshot_by_psutil() -> dict[int, ProcessInfo]:
    table: dict[int, ProcessInfo] = {}
    for each in psutil.process_iter(["ppid", "create_time", "name", "status"]):
        read = each.info  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType]
        if read["status"] == psutil.STATUS_ZOMBIE:
            continue
        try:
            session = os.getsid(each.pid)
        except OSError:
            continue
        started, name = read["create_time"] or 0.0, read["name"] or ""
        table[each.pid] = ProcessInfo(each.pid, read["ppid"] or 0, session, started, name)
    return table


# --- Control groups, version 2 (cgroups(7)): who belongs to a run, and how much memory a runner may have -------------


class Cgroup:
    """One control group, by its directory, which exists."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def child(self, name: str) -> Cgroup:
        """A control group below this one; it is made if it does not exist."""
        path = self.path / name
        path.mkdir(exist_ok=True)
        return Cgroup(path)

    def limit_memory(self, number_of_bytes: int) -> bool:
        """Let the kernel kill all its processes when together they use more; return whether the kernel can."""
        try:
            (self.path / "memory.max").write_text(str(number_of_bytes))
            # All together, because an agent that has lost one of its programs to the kernel cannot be trusted to fail.
            (self.path / "memory.oom.group").write_text("1")
        except OSError:  # the memory controller is not available here
            return False
        return True

    def memory_kills(self) -> int:
        """How many of its processes the kernel has killed because of the memory limit."""
        try:
            events = (self.path / "memory.events").read_text()
        except OSError:
            return 0
        return next((int(line.split()[1]) for line in events.splitlines() if line.startswith("oom_kill ")), 0)

    def processes(self) -> set[int]:
        """Numbers of the processes in it and in the groups below it."""
        found: set[int] = set()
        for path in (self.path, *self._children()):
            with contextlib.suppress(OSError):  # it was removed meanwhile
                found.update(map(int, (path / "cgroup.procs").read_text().split()))
        return found

    def remove(self) -> None:
        """Remove it and the groups below it, unless they still have processes; idempotent."""
        for path in (*self._children(), self.path):
            try:
                path.rmdir()
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                _log.warning("control group %s still has processes and is not removed", path)

    def _children(self) -> list[Path]:
        try:
            return [each for each in self.path.iterdir() if each.is_dir()]
        except OSError:
            return []


def make_cgroup(name: str) -> Cgroup | None:
    """A new control group below that of this process; None where the system does not allow it."""
    parent = _own_cgroup()
    if parent is None:
        return None
    path = parent / name
    try:
        path.mkdir()
        (path / "cgroup.procs").read_text()  # fails in a subtree of type "threaded", which cannot hold processes
    except OSError as error:
        _log.debug("no control group for this run: %s", error)
        with contextlib.suppress(OSError):
            path.rmdir()
        return None
    for directory in (parent, path):  # a group has the memory controller only if every group above it passes it on
        with contextlib.suppress(OSError):
            (directory / "cgroup.subtree_control").write_text("+memory")
    return Cgroup(path)


def _own_cgroup() -> Path | None:
    """The directory of this process's control group in the cgroup2 file system."""
    with contextlib.suppress(OSError, StopIteration):
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        own = Path("/proc/self/cgroup").read_text().splitlines()
        mounted = next(line.split()[1] for line in mounts if line.split()[2] == "cgroup2")
        inside = next(line.removeprefix("0::") for line in own if line.startswith("0::"))
        directory = Path(mounted, inside.lstrip("/"))
        return directory if directory.is_dir() else None
    return None


# --- What Linux offers to a process that is responsible for others (prctl(2)). Other systems have no equivalent. ------

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Make this process the parent of every descendant whose own parent ends."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process as soon as ``parent`` ends.

    The kernel watches the *thread* that made this process, not the whole parent. So the parent must have one thread, or
    this process would die when the thread ends. That is why only the launcher starts processes.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the kernel was asked, so no signal will come
        os.kill(os.getpid(), signal.SIGKILL)


def _prctl(option: int, argument: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0)
