"""What Linux offers to whoever is responsible for other processes. Elsewhere each says that it is not there."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

__all__ = ["adopt_orphans", "die_with_parent"]

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
