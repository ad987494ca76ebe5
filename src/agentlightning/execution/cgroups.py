"""Control groups, version 2: who belongs to a run, and how much memory a runner has, told by the kernel.

A process cannot leave its cgroup by forking, by a session of its own, or by losing its parent, so this is
the surest way to find all of them. It needs a cgroup2 file system in which this user may make directories;
where there is none, the run goes without.
"""

from __future__ import annotations

import errno
import logging
from pathlib import Path

__all__ = ["Cgroup", "make_cgroup"]

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
