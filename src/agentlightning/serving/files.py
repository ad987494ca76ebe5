"""How many files a process may have open."""

from __future__ import annotations

import resource
from contextlib import suppress

__all__ = ["allow_many_files"]


def allow_many_files() -> None:
    """Let this process have as many connections as the system allows; what is usual, 1,024, is soon used up."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # then as many as it has now
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
