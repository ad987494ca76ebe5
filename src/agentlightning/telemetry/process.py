"""What a server uses of its machine: processor, memory, disk and network, as the kernel counts them.

The files of /proc are opened once and read again from their beginning, which costs some microseconds, and works when
the process has no free file descriptor any more.
"""

from __future__ import annotations

import os
import resource
import weakref
from collections.abc import Iterator, Sequence

from agentlightning.telemetry.metrics import Measure

_BLOCK_BYTES = 512
"""The unit in which ``getrusage`` counts what went to and from disks."""
_READ_BYTES = 16 * 1024
_INTERFACES = 64
"""So many network interfaces are shown at most."""


class ProcessMeter:
    """Reads what this process uses. Where a file is missing (no Linux), its numbers are left out."""

    def __init__(self) -> None:
        self._memory = _opened("/proc/self/statm")
        self._network = _opened("/proc/self/net/dev")
        files = [each for each in (self._memory, self._network) if each is not None]
        weakref.finalize(self, _close, files).atexit = False

    def measures(self) -> Sequence[Measure]:
        """The numbers of now."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        found = [
            Measure(
                "process_cpu_seconds", "Seconds of processor time of the server.", used.ru_utime + used.ru_stime, True
            ),
            Measure(
                "agl_process_disk_read_bytes",
                "Bytes that the server had read from disks.",
                float(used.ru_inblock * _BLOCK_BYTES),
                True,
            ),
            Measure(
                "agl_process_disk_written_bytes",
                "Bytes that the server had written to disks.",
                float(used.ru_oublock * _BLOCK_BYTES),
                True,
            ),
        ]
        return [*found, *self._memory_in_use(), *self._traffic()]

    def _memory_in_use(self) -> Iterator[Measure]:
        pages = _read(self._memory).split()
        if len(pages) > 1:
            used = float(int(pages[1]) * os.sysconf("SC_PAGE_SIZE"))
            yield Measure("process_resident_memory_bytes", "Memory of the server.", used)

    def _traffic(self) -> Iterator[Measure]:
        received, sent = dict[str, float](), dict[str, float]()
        for line in _read(self._network).splitlines()[2 : 2 + _INTERFACES]:
            name, _, counts = line.partition(":")
            numbers = counts.split()
            if len(numbers) >= 9:
                received[name.strip()], sent[name.strip()] = float(numbers[0]), float(numbers[8])
        text = "Bytes that the network interfaces of the server's machine have"
        yield Measure("agl_network_received_bytes", f"{text} received.", received, True, "interface")
        yield Measure("agl_network_sent_bytes", f"{text} sent.", sent, True, "interface")


def _opened(path: str) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def _read(file: int | None) -> str:
    return "" if file is None else os.pread(file, _READ_BYTES, 0).decode("ascii", "replace")


def _close(files: Sequence[int]) -> None:
    for each in files:
        os.close(each)
