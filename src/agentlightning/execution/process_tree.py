"""Which processes belong to a run, however far they have gone: double forks, own sessions, other parents.

A process belongs to the run if one of these says so:

- it descends from the nursery, which on Linux adopts every descendant whose parent ends;
- it is in the session of a process that the nursery started;
- its environment carries the mark of the run, which every program that is started inherits;
- it is in the run's cgroup, where there is one.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import signal
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import psutil

MARK = "AGL_KIN"
"""Name of the environment variable that marks the processes of a run."""

_DEAD = "ZXx"
_PROC = Path("/proc")


class Process(NamedTuple):
    """A process that has not ended."""

    pid: int
    parent: int
    session: int
    started: float
    """When it began, on any clock: tells it from another one that has the same number later."""
    name: str


def snapshot() -> dict[int, Process]:
    """All processes that have not ended, by number. One that has ended and was not collected does not count."""
    return _of_proc() if _PROC.joinpath("self", "stat").exists() else _of_psutil()


def descendants(table: dict[int, Process], ancestor: int) -> set[int]:
    """Numbers of all processes below ``ancestor``."""
    children: dict[int, list[int]] = {}
    for process in table.values():
        children.setdefault(process.parent, []).append(process.pid)
    found: set[int] = set()
    pending = [ancestor]
    while pending:
        for child in children.get(pending.pop(), ()):
            if child not in found:
                found.add(child)
                pending.append(child)
    return found


def send(process: Process, number: signal.Signals) -> None:
    """Send a signal, unless the process has ended, or is not ours to signal.

    Never to another process that has got its number since: the number is held by a pidfd while it is compared.
    """
    try:
        handle = os.pidfd_open(process.pid)
    except AttributeError:  # not Linux
        _kill(process.pid, number)
        return
    except OSError:
        return
    try:
        now = _read(process.pid)
        if now is not None and now.started == process.started:
            signal.pidfd_send_signal(handle, number)
    except (ProcessLookupError, PermissionError):
        return
    finally:
        os.close(handle)


class Kin:
    """The processes of one run.

    Args:
        mark: value of ``MARK`` in their environment.
        nursery: number of the process that starts them; it is not one of them.
        enrolled: numbers of the processes in the run's cgroup.

    Raises:
        ValueError: ``nursery`` is one from which every process descends.
    """

    def __init__(self, mark: str, nursery: int, enrolled: Callable[[], Collection[int]] = frozenset[int]) -> None:
        if nursery <= 1:
            raise ValueError(f"every process descends from {nursery}; that cannot be the nursery of a run")
        self._mark = f"{MARK}={mark}".encode()
        self._nursery = nursery
        self._enrolled = enrolled
        self._sessions: set[int] = set()

    def note(self, pid: int) -> None:
        """The nursery has started this process, in a session of its own."""
        self._sessions.add(pid)

    def living(self) -> list[Process]:
        """Those that have not ended."""
        table = snapshot()
        found = descendants(table, self._nursery)
        found.update(self._enrolled())
        for process in table.values():
            if process.session in self._sessions or self._marked(process.pid):
                found.add(process.pid)
        found -= {self._nursery, os.getpid()}
        return [table[pid] for pid in sorted(found) if pid in table]

    def _marked(self, pid: int) -> bool:
        try:
            environment = _PROC.joinpath(str(pid), "environ").read_bytes()
        except OSError:  # it has ended, is not ours to look into, or there is no /proc
            return False
        return self._mark in environment.split(b"\0")


def _of_proc() -> dict[int, Process]:
    table: dict[int, Process] = {}
    for entry in os.listdir(_PROC):
        process = _read(int(entry)) if entry.isdigit() else None
        if process is not None:
            table[process.pid] = process
    return table


def _read(pid: int) -> Process | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:  # it has ended
        return None
    # "pid (name) state ppid pgrp session … starttime(22nd) …"; the name may hold anything (proc_pid_stat(5)).
    name, _, rest = stat.partition("(")[2].rpartition(")")
    fields = rest.split()
    return None if fields[0] in _DEAD else Process(pid, int(fields[1]), int(fields[3]), float(fields[19]), name)


def _kill(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return


def _of_psutil() -> dict[int, Process]:
    table: dict[int, Process] = {}
    for each in psutil.process_iter(["ppid", "create_time", "name", "status"]):
        told = each.info  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType]
        if told["status"] == psutil.STATUS_ZOMBIE:
            continue
        try:
            session = os.getsid(each.pid)
        except OSError:
            continue
        table[each.pid] = Process(each.pid, told["ppid"] or 0, session, told["create_time"] or 0.0, told["name"] or "")
    return table


# --- Control groups, version 2: who belongs to a run, and how much memory a runner has, told by ---

_log = logging.getLogger(__name__)


class Cgroup:
    """One control group.

    Args:
        path: its directory, which exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def child(self, name: str) -> Cgroup:
        """A control group below this one; made if it is not there."""
        path = self.path / name
        path.mkdir(exist_ok=True)
        return Cgroup(path)

    def limit_memory(self, number_of_bytes: int) -> bool:
        """Let the kernel kill its processes when all of them hold more; whether it can."""
        try:
            (self.path / "memory.max").write_text(str(number_of_bytes))
            (self.path / "memory.oom.group").write_text("1")
        except OSError:  # the memory controller is not available here
            return False
        return True

    def memory_kills(self) -> int:
        """How many of its processes the kernel has killed for want of memory."""
        try:
            events = (self.path / "memory.events").read_text()
        except OSError:
            return 0
        return next((int(line.split()[1]) for line in events.splitlines() if line.startswith("oom_kill ")), 0)

    def processes(self) -> set[int]:
        """Numbers of the processes in it, and in those below it."""
        found: set[int] = set()
        for path in (self.path, *_subdirectories(self.path)):
            try:
                found.update(int(line) for line in (path / "cgroup.procs").read_text().split())
            except OSError:  # it was removed meanwhile
                continue
        return found

    def remove(self) -> None:
        """Remove it and those below it, if no process is left in them; idempotent."""
        for path in (*_subdirectories(self.path), self.path):
            try:
                path.rmdir()
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                _log.warning("control group %s still has processes and stays", path)


def make_cgroup(name: str) -> Cgroup | None:
    """A new control group below that of this process; None where that is not possible."""
    parent = _own_directory()
    if parent is None:
        return None
    path = parent / name
    try:
        path.mkdir()
        (path / "cgroup.procs").read_text()  # refused in a subtree of another type
    except OSError as error:
        _log.debug("no control group for this run: %s", error)
        if path.is_dir():
            path.rmdir()
        return None
    for directory in (parent, path):  # each must hand the memory controller on to those below it
        try:
            (directory / "cgroup.subtree_control").write_text("+memory")
        except OSError as error:
            _log.debug("no memory controller below %s: %s", directory, error)
    return Cgroup(path)


def _own_directory() -> Path | None:
    """Where the cgroup2 file system shows the control group of this process (cgroups(7))."""
    try:
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        own = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    mounted = next((line.split()[1] for line in mounts if line.split()[2] == "cgroup2"), None)
    inside = next((line[len("0::") :] for line in own if line.startswith("0::")), None)
    if mounted is None or inside is None:
        return None
    directory = Path(mounted) / inside.lstrip("/")
    return directory if directory.is_dir() else None


def _subdirectories(path: Path) -> list[Path]:
    try:
        return [each for each in path.iterdir() if each.is_dir()]
    except OSError:
        return []


# --- What Linux offers to whoever is responsible for other processes. Elsewhere each says that  ---

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LINUX = sys.platform == "linux"


def adopt_orphans() -> bool:
    """Make this process the parent of every descendant whose own parent ends; whether the system can (prctl(2))."""
    return _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> bool:
    """Let the kernel kill this process as soon as ``parent`` ends; whether the system can (prctl(2)).

    The kernel looks at the *thread* that made this process, so the parent must have only one.
    """
    armed = _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)
    return armed


def _prctl(option: int, argument: int) -> bool:
    if not _LINUX:
        return False
    return ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0) == 0
