"""Spans that end in forked children of a runner, such as those of a ``ProcessPoolExecutor``.

A forked child has a copy of the open traces, but not the thread that sends their spans. It appends its spans to a file
of its own, and the runner reads the files: before each span that it emits, so that the order is kept, and at the end
of each trace. Processes that are spawned have no trace; emitting in them raises.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable

import msgspec
import psutil

from agentlightning.tracer.recording import Recording
from agentlightning.types.plain_spans import PlainSpan

_CLOSED_LIMIT = 100
"""How many closed traces that were open at a fork are remembered, for children that live on."""
_LENGTH_BYTES = 4
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(PlainSpan).decode
_logger = logging.getLogger(__name__)


class ForkedSpans:
    """The way of spans from forked children to this process.

    Args:
        open_traces: returns the traces that are open in this process.
    """

    def __init__(self, open_traces: Callable[[], Iterable[Recording]]) -> None:
        self.lost = 0
        """How many spans could not be assigned, since they began after the trace of the fork had ended."""
        self._open_traces = open_traces
        self._pid = os.getpid()
        self.folder: str | None = None
        """Where the files are; None until a process was forked while a trace was open."""
        self._known: dict[int, Recording] = {}
        self._read: dict[str, int] = {}
        """How many bytes of each file were read."""
        self._lock = threading.Lock()
        _all.add(self)

    def before_fork(self) -> None:
        """Make the folder for the files, if a trace is open."""
        traces = [each for each in self._open_traces() if each.is_here]
        if not traces:
            return
        if self._pid != os.getpid():  # a fork that has traces of its own; what it inherited is its parent's
            self._pid, self.folder, self._known, self._read = os.getpid(), None, {}, {}
            self._lock = threading.Lock()
        if self.folder is None:
            self.folder = tempfile.mkdtemp(prefix="agentlightning-forked-")
            atexit.register(self._remove)
        self._known |= {each.number: each for each in traces}
        closed = [number for number, each in self._known.items() if each.closed]
        for number in closed[:-_CLOSED_LIMIT]:
            del self._known[number]

    def keep(self, recording: Recording, span: PlainSpan) -> None:
        """In a child: append a span to the file of this process.

        Raises:
            RuntimeError: the process was forked by other means than Python's, so that there is no folder.
            OSError: the file cannot be written.
        """
        if self.folder is None:
            raise RuntimeError(
                f"process {os.getpid()} was forked from the runner without os.fork or multiprocessing, and its spans "
                "have no way to the runner; return the values, and emit them in the runner's process"
            )
        content = _encode(span)
        # Unbuffered, so that one write appends the whole span, also beside other threads.
        with open(f"{self.folder}/{recording.number}-{os.getpid()}", "ab", buffering=0) as file:
            file.write(len(content).to_bytes(_LENGTH_BYTES, "big") + content)

    def collect(self) -> None:
        """In the runner: add the spans that children have written since to their traces."""
        if self.folder is None or self._pid != os.getpid():
            return
        with self._lock:
            found = [
                (span, self._known.get(number))
                for entry in list(os.scandir(self.folder))
                for number, child in [map(int, entry.name.split("-"))]
                for span in self._new_spans(entry.path, child)
            ]
            found.sort(key=lambda each: each[0].end_time or 0.0)  # one host, one clock
            for span, recording in found:
                if recording is not None and (recording.closed_at or float("inf")) >= (span.start_time or 0.0):
                    recording.add(span)
                else:
                    self._lose(span)

    def _new_spans(self, path: str, child: int) -> Iterable[PlainSpan]:
        """The spans that a child has written since; its file is removed once it has ended."""
        has_ended = not psutil.pid_exists(child)  # asked first: what it wrote before is read now
        start = self._read.get(path, 0)
        if not has_ended and os.path.getsize(path) == start:
            return
        with open(path, "rb") as file:
            file.seek(start)
            content = file.read()
        position = 0
        while position + _LENGTH_BYTES <= len(content):
            begin = position + _LENGTH_BYTES
            end = begin + int.from_bytes(content[position:begin], "big")
            if end > len(content):  # the child is writing it
                break
            yield _decode(content[begin:end])
            position = end
        self._read[path] = start + position
        if has_ended:
            del self._read[path]
            os.unlink(path)

    def _lose(self, span: PlainSpan) -> None:
        self.lost += 1
        if self.lost == 1:
            _logger.error(
                "the span %r of a forked child is lost: it began when the rollout that forked the child had ended, so "
                "nobody knows whose it is; create pools of processes within the rollout that uses them",
                span.name,
            )

    def _remove(self) -> None:
        if self.folder is not None and self._pid == os.getpid():
            shutil.rmtree(self.folder, ignore_errors=True)


_all: weakref.WeakSet[ForkedSpans] = weakref.WeakSet()


def _before_fork() -> None:
    for each in list(_all):
        each.before_fork()


os.register_at_fork(before=_before_fork)
