"""What a runner leaves in memory that it shares with its supervisor, so that this can send heartbeats in its place.

An agent may hold Python's interpreter lock for longer than any lease, in native code or a regular expression. Then
nothing in its process can speak, although it works. So the heartbeat's thread notes here that it still gets its turns,
and the attempts are here from the moment at which they begin. Reading that needs nothing of the runner, so it also
tells what a process that has crashed was working on.

Layout of a place: one entry with the times and two numbers, then one for each attempt: a letter and the id.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from contextlib import suppress
from contextvars import ContextVar
from typing import NamedTuple

_ENTRY_BYTES, _ID_BYTES = 256, 128
"""An id may be so long. A place has to be a multiple of the size of a page, of any system."""
_ENTRIES = 2048
_AT_WORK, _REPORTING = b"w", b"r"
_PLACE_BYTES = _ENTRY_BYTES * _ENTRIES
"""Only pages that are written take memory."""
_TIMES, _NUMBER = struct.Struct("=ddd"), struct.Struct("=q")
_USED, _ENDED = _TIMES.size, _TIMES.size + _NUMBER.size
"""Where the number of entries in use is, and that of the attempts that have ended."""


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
        if entry >= _ENTRIES or len(value) > _ID_BYTES:
            return
        self._entries[attempt_id] = entry
        self._write(entry, _AT_WORK + value)
        if entry > self._number(_USED):
            _NUMBER.pack_into(self._memory, _USED, entry)

    def reporting(self, attempt_id: str) -> None:
        """Note that the agent has finished an attempt. If the process crashes now, that one is not the reason."""
        if attempt_id in self._entries:
            self._write(self._entries[attempt_id], _REPORTING + attempt_id.encode())

    def end(self, attempt_id: str) -> None:
        """Forget an attempt, but for that there was one more."""
        _NUMBER.pack_into(self._memory, _ENDED, self.ended() + 1)
        entry = self._entries.pop(attempt_id, None)
        if entry is not None:
            self._free.append(entry)
            self._write(entry, b"")

    def _write(self, entry: int, value: bytes) -> None:
        self._memory[entry * _ENTRY_BYTES : (entry + 1) * _ENTRY_BYTES] = value.ljust(_ENTRY_BYTES, b"\0")

    # --- The supervisor, or both -------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget everything but how many attempts have ended: nobody shall speak for this runner."""
        self._entries.clear()
        self._free.clear()
        ended = self.ended()
        for entry in range(self._number(_USED) + 1):
            self._write(entry, b"")
        _NUMBER.pack_into(self._memory, _ENDED, ended)

    def reset(self) -> None:
        """Forget everything: a new process begins."""
        self.clear()
        _NUMBER.pack_into(self._memory, _ENDED, 0)

    def times(self) -> Times | None:
        """The last note; None: there is no heartbeat, or it has been stopped."""
        times = Times(*_TIMES.unpack_from(self._memory))
        return times if times.alive else None

    def attempt_ids(self) -> list[str]:
        """The attempts that the runner works on, or reports."""
        return self._listed(_AT_WORK, _REPORTING)

    def at_work(self) -> list[str]:
        """The attempts whose agents are at work."""
        return self._listed(_AT_WORK)

    def _listed(self, *letters: bytes) -> list[str]:
        entries = range(_ENTRY_BYTES, (self._number(_USED) + 1) * _ENTRY_BYTES, _ENTRY_BYTES)
        found = (self._memory[at : at + _ENTRY_BYTES].rstrip(b"\0") for at in entries)
        return [each[1:].decode("ascii", "replace") for each in found if each.startswith(letters)]

    def ended(self) -> int:
        """How many attempts have ended, in whatever way, while the process went on."""
        return self._number(_ENDED)

    def _number(self, offset: int) -> int:
        return _NUMBER.unpack_from(self._memory, offset)[0]


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
