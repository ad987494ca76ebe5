"""What a test lets a decoder do with a body. The decoder's process imports it from here."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["fail", "length", "process", "wait_for"]


def length(raw: bytes) -> Iterator[int]:
    """The number of bytes."""
    yield len(raw)


def process(_: bytes) -> Iterator[int]:
    """Which process reads it."""
    yield os.getpid()


def fail(_: bytes) -> Iterator[int]:
    """A bug."""
    raise ZeroDivisionError("secret detail")


def wait_for(file: Path, begun: Path, raw: bytes) -> Iterator[int]:
    """Say that it has begun, and go on when the file is there."""
    begun.touch()
    while not file.exists():
        time.sleep(0.01)
    yield len(raw)
