"""Which processes belong to a run, however far they have gone: double forks, own sessions, other parents.

A process belongs to the run if one of these says so:

- it descends from the nursery, which on Linux adopts every descendant whose parent ends;
- it is in the session of a process that the nursery started;
- its environment carries the mark of the run, which every program that is started inherits;
- it is in the run's cgroup, where there is one.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import psutil

__all__ = ["MARK", "Kin", "Process", "descendants", "send", "snapshot"]

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
