"""What the processes of a run print. The launcher passes it on, and keeps the end, which may tell of a crash."""

from __future__ import annotations

import os
import select
import selectors
from contextlib import suppress
from functools import partial

_READ_BYTES = 1 << 16
_WRITE_BYTES = select.PIPE_BUF
"""If a file is ready to be written to, so much can be written without waiting (pipe(7))."""
_KEPT_BYTES = 4096
_KEPT_LINES = 20
_STDOUT, _STDERR = 1, 2


class Printed:
    """What one process prints, and those that it starts. ``file`` is the end of a pipe from which that can be read."""

    def __init__(self, file: int) -> None:
        self.file = file
        self._kept = bytearray()

    def add(self, data: bytes) -> None:
        """Keep the end of it."""
        self._kept += data
        del self._kept[:-_KEPT_BYTES]

    def end(self) -> str:
        """The last lines."""
        return "\n".join(self._kept.decode("utf-8", "replace").strip().splitlines()[-_KEPT_LINES:])


class OutputRelay:
    """Passes on to standard error what processes print.

    Standard output goes the same way if both lead to the same place, so that the order of lines is kept. While nobody
    reads standard error, the processes wait; the launcher never does.

    Args:
        selector: of the launcher; it calls the ``data`` of a file that is ready.
    """

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        self._open: list[Printed] = []
        self._waiting = b""
        """What could not be written yet. Meanwhile nothing is read."""
        self.streams = _streams()
        """Descriptors that processes get from ``begin``."""

    def begin(self) -> tuple[Printed, int]:
        """A new pipe: what comes out of it, and the descriptor to write to, which the caller closes."""
        read, write = os.pipe()
        os.set_blocking(read, False)
        printed = Printed(read)
        self._open.append(printed)
        if not self._waiting:
            self._listen(printed)
        return printed, write

    def give(self, write: int) -> None:
        """Let this process, which was just forked, print to there, and close what belongs to the launcher."""
        for stream in self.streams:
            os.dup2(write, stream)
        os.close(write)
        for each in self._open:
            os.close(each.file)

    def drain(self, printed: Printed) -> None:
        """Pass on what a process that has ended had printed. Others may still hold its pipe, and are heard later."""
        while printed in self._open and not self._waiting and self._pass_on(printed):
            pass

    def _listen(self, printed: Printed) -> None:
        self._selector.register(printed.file, selectors.EVENT_READ, partial(self._pass_on, printed))

    def _pass_on(self, printed: Printed) -> bool:
        """Read once and write that; return whether there may be more."""
        try:
            data = os.read(printed.file, _READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._selector.unregister(printed.file)
            os.close(printed.file)
            self._open.remove(printed)
            return False
        printed.add(data)
        self._waiting = _write(data)
        if self._waiting:
            for each in self._open:
                self._selector.unregister(each.file)
            self._selector.register(_STDERR, selectors.EVENT_WRITE, self._go_on)
        return True

    def _go_on(self) -> None:
        self._waiting = _write(self._waiting)
        if not self._waiting:
            self._selector.unregister(_STDERR)
            for each in self._open:
                self._listen(each)


def _streams() -> tuple[int, ...]:
    try:
        error = os.fstat(_STDERR)
    except OSError:  # closed: there is nothing to pass on to
        return ()
    with suppress(OSError):
        if os.path.samestat(os.fstat(_STDOUT), error):
            return _STDOUT, _STDERR
    return (_STDERR,)


def _write(data: bytes) -> bytes:
    """Write to standard error as much as is taken at once; return what is left."""
    ready = select.poll()
    ready.register(_STDERR, select.POLLOUT)
    while data and ready.poll(0):
        try:
            data = data[os.write(_STDERR, data[:_WRITE_BYTES]) :]
        except BlockingIOError:  # somebody has made it so, who shares the file
            break
        except OSError:  # nobody will read it any more
            return b""
    return data
