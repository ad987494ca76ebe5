"""Log files that are put away when they are large or old: compressed, readable by their owner only, the newest kept."""

from __future__ import annotations

import gzip
import logging
import os
import re
import shutil
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import BaseRotatingHandler
from pathlib import Path
from typing import NamedTuple

from agentlightning.errors import InvalidValue

_CHUNK_BYTES = 256 * 1024
_STAMP = "%Y%m%dT%H%M%S.%fZ"
_PUT_AWAY = re.compile(r"\.\d{8}T\d{6}\.\d{6}Z(\.gz)?")
"""What follows the name of a log file in those of its older parts; they sort by age."""
_PARTIAL = ".partial"


class Rotation(NamedTuple):
    """When a log file is put away, and for how long."""

    max_bytes: int = 64_000_000
    """A file that would grow larger is put away."""
    max_age_seconds: float | None = None
    """A file is put away at multiples of this time since the Unix epoch: 86,400 means at midnight UTC."""
    kept: int = 5
    """How many files are kept besides the one that is written to."""

    def check(self) -> None:
        """Raise ``InvalidValue`` for a limit that is not possible."""
        age = self.max_age_seconds
        if self.max_bytes < 1 or (age is not None and not age > 0) or self.kept < 0:
            raise InvalidValue(
                f"log files of {self.max_bytes} bytes and {age} seconds, of which {self.kept} are kept, are not "
                "possible; give a size of at least 1, an age above 0, and at least 0 files"
            )


class RotatingLog(BaseRotatingHandler):
    """Writes log lines to a file, and puts it away as ``NAME.TIME.gz`` when its time has come.

    Files are compressed in a thread, because that takes seconds and whoever logs shall not wait. New files can be read
    by their owner only; one that exists keeps the mode that it was given. A file that somebody else has moved away
    is begun anew. Whatever cannot be opened, renamed or compressed: no line is lost by it.

    Args:
        path: the file.
        rotation: when it is put away.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | Path, rotation: Rotation) -> None:
        super().__init__(path, "a", encoding="utf-8")
        self._rotation = rotation
        self._compressing: threading.Thread | None = None
        self._has_more = False
        """Whether there is something to compress or delete; guarded, as the thread is, by the handler's own lock."""
        written = os.stat(self.baseFilename)
        self._period = self._period_of(written.st_mtime) if written.st_size else None
        if any(each.suffix != ".gz" for each in older_parts(Path(self.baseFilename))):
            self._tidy_up()  # an earlier process was ended before it had done so

    def _open(self) -> TextIOWrapper:
        os.close(os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600))
        return super()._open()

    def shouldRollover(self, record: logging.LogRecord) -> bool:
        """Whether the file is put away before this line is written."""
        file = self._follow()
        period, self._period = self._period, self._period_of(record.created)
        size = os.fstat(file.fileno()).st_size
        if not size:
            return False
        is_old = period is not None and period != self._period
        return is_old or size + len(self.format(record).encode()) + 1 > self._rotation.max_bytes

    def doRollover(self) -> None:
        """Put the file away and begin a new one."""
        with suppress(OSError):
            os.rename(self.baseFilename, f"{self.baseFilename}.{datetime.now(UTC).strftime(_STAMP)}")
            self._begin_anew()
            self._tidy_up()

    def _period_of(self, moment: float) -> int | None:
        age = self._rotation.max_age_seconds
        return None if age is None else int(moment // age)

    def _follow(self) -> TextIOWrapper:
        """Begin a new file if another process, or an operator, has moved this one; returns the one to write to."""
        if self.stream is None:  # closed, and used again
            self.stream = self._open()
        try:
            if os.path.samestat(os.stat(self.baseFilename), os.fstat(self.stream.fileno())):
                return self.stream
        except OSError:
            pass
        with suppress(OSError):
            self._begin_anew()
        return self.stream

    def _begin_anew(self) -> None:
        new, old = self._open(), self.stream
        self.stream = new
        if old is not None:
            old.close()

    def _tidy_up(self) -> None:
        """Compress and delete in a thread. It is not waited for: what it leaves undone, the next process does."""
        self._has_more = True
        if self._compressing is None or not self._compressing.is_alive():
            self._compressing = threading.Thread(target=self._compress_and_delete, name="agl-log", daemon=True)
            with suppress(RuntimeError):  # the system has no more threads
                self._compressing.start()

    def _compress_and_delete(self) -> None:
        while True:
            self.acquire()
            try:
                if not self._has_more:
                    self._compressing = None
                    return
                self._has_more = False
            finally:
                self.release()
            try:
                files = older_parts(Path(self.baseFilename))
                surplus = files[: max(0, len(files) - self._rotation.kept)]
                for each in surplus:
                    each.unlink(missing_ok=True)
                for each in files[len(surplus) :]:
                    if each.suffix != ".gz":
                        _compress(each)
            except OSError as error:  # not through the log, which may be what fails
                with suppress(OSError, ValueError):
                    sys.stderr.write(f"a part of the log that was put away stays as it is: {error}\n")


def older_parts(path: Path) -> list[Path]:
    """The parts of a log file that were put away, the oldest first."""
    beside = path.parent.glob(f"{path.name}.*")
    return sorted(each for each in beside if _PUT_AWAY.fullmatch(each.name.removeprefix(path.name)))


def _compress(path: Path) -> None:
    """Replace a file by its compressed form, which appears under its name only when it is whole."""
    partial = path.with_name(path.name + _PARTIAL)
    try:
        file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with path.open("rb") as source, os.fdopen(file, "wb") as target:
            with gzip.GzipFile("", "wb", fileobj=target) as compressed:
                shutil.copyfileobj(source, compressed, _CHUNK_BYTES)
            target.flush()
            os.fsync(target.fileno())
        partial.rename(path.with_name(path.name + ".gz"))
        path.unlink()
    finally:
        partial.unlink(missing_ok=True)
