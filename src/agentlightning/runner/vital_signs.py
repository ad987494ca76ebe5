"""What a runner leaves in memory that it shares with its supervisor, so that this can send heartbeats in its place.

An agent may hold Python's interpreter lock for longer than any lease, in native code or a regular expression. Then
nothing in its process can speak, although it works. So the heartbeat's thread notes here that it still gets its turns,
and the attempts are here from the moment at which they begin. Reading that needs nothing of the runner.

Layout of a place: one entry with the times and the number of entries in use, then one for each attempt.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from contextlib import suppress
from contextvars import ContextVar
from typing import NamedTuple

_ENTRY_BYTES = 128
"""As long as an id may be."""
_ENTRIES = 2048
_PLACE_BYTES = _ENTRY_BYTES * _ENTRIES
"""Only pages that are written take memory."""
_TIMES, _USED = struct.Struct("=ddd"), struct.Struct("=q")


class Times(NamedTuple):
    """When the heartbeat's thread had its last turn, on the machine's monotonic clock, and how it beats."""

    alive: float
    interval_seconds: float
    lease_seconds: float


class VitalSigns:
    """The place of one runner in the shared memory.

    Args:
        file: descriptor of the shared memory.
        place: number of the place, from 0.
    """

    def __init__(self, file: int, place: int) -> None:
        self._memory = mmap.mmap(file, _PLACE_BYTES, offset=place * _PLACE_BYTES)
        self._entries: dict[str, int] = {}
        self._free: list[int] = []

    # --- The runner --------------------------------------------------------------------------------------------------

    def show_life(self, times: Times) -> None:
        """Note the times. From now on the supervisor sends heartbeats if there is no newer note."""
        _TIMES.pack_into(self._memory, 0, *times)

    def begin(self, attempt_id: str) -> None:
        """Note that the runner works on an attempt. What does not fit is left out."""
        entry, value = self._free.pop() if self._free else len(self._entries) + 1, attempt_id.encode()
        if entry >= _ENTRIES or len(value) > _ENTRY_BYTES:
            return
        self._entries[attempt_id] = entry
        self._write(entry, value)
        if entry > self._used():
            _USED.pack_into(self._memory, _TIMES.size, entry)

    def end(self, attempt_id: str) -> None:
        """Forget an attempt."""
        entry = self._entries.pop(attempt_id, None)
        if entry is not None:
            self._free.append(entry)
            self._write(entry, b"")

    def _write(self, entry: int, value: bytes) -> None:
        self._memory[entry * _ENTRY_BYTES : (entry + 1) * _ENTRY_BYTES] = value.ljust(_ENTRY_BYTES, b"\0")

    # --- The supervisor, or both -------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget everything: nobody shall speak for this runner."""
        self._entries.clear()
        self._free.clear()
        for entry in range(self._used() + 1):
            self._write(entry, b"")

    def times(self) -> Times | None:
        """The last note; None: there is no heartbeat, or it has been stopped."""
        times = Times(*_TIMES.unpack_from(self._memory))
        return times if times.alive else None

    def attempt_ids(self) -> list[str]:
        """The attempts that the runner works on."""
        entries = range(_ENTRY_BYTES, (self._used() + 1) * _ENTRY_BYTES, _ENTRY_BYTES)
        found = (self._memory[at : at + _ENTRY_BYTES].rstrip(b"\0") for at in entries)
        return [each.decode("ascii", "replace") for each in found if each]

    def _used(self) -> int:
        return _USED.unpack_from(self._memory, _TIMES.size)[0]


def open_shared_memory() -> int:
    """New memory without a name, which lives as long as a process has it; its descriptor."""
    with suppress(AttributeError, OSError):  # another system than Linux
        return os.memfd_create("agl-vital-signs")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def make_places(file: int, number: int) -> list[VitalSigns]:
    """Make room for so many runners."""
    os.ftruncate(file, number * _PLACE_BYTES)
    return [VitalSigns(file, place) for place in range(number)]


VITAL_SIGNS: ContextVar[VitalSigns | None] = ContextVar("agentlightning_vital_signs", default=None)
"""The place of the runner that this process is for, if a supervisor watches it."""
