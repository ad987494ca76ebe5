"""A process that may have no more of something."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

__all__ = ["limited", "without_descriptors"]


@contextmanager
def limited(which: int, most: int) -> Iterator[None]:
    """Until the block ends, this process may have at most so much of a resource (``resource.RLIMIT_…``)."""
    before = resource.getrlimit(which)
    resource.setrlimit(which, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)


def without_descriptors() -> AbstractContextManager[None]:
    """Until the block ends, this process can open no file or socket."""
    return limited(resource.RLIMIT_NOFILE, 3)
