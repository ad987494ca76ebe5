"""Spans of one process that wait on the disk for the server.

A folder of numbered segment files, which are only appended to, and a small file that says how far the server has
them. Whoever holds the lock on the folder owns it; the lock goes with its process, however that ends, and then the
spool can be adopted. What is read twice does no harm: the server knows a span by its id.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import starmap
from pathlib import Path
from typing import NamedTuple, Self
from zlib import crc32

from agentlightning.errors import AgentLightningError, SpoolFull

_MARK = b"\xa9sp\n"
_HEAD = struct.Struct("<4sII")
"""Of a record: the mark, the number of bytes of the span that follows, and their checksum (CRC-32)."""


class Record(NamedTuple):
    """A record that was read, and what was passed over to find it."""

    content: bytes
    end: int
    """Where the next one begins."""
    skipped_bytes: int
    """Damaged bytes before it."""


def encode_record(content: bytes) -> bytes:
    """A record with this content."""
    return _HEAD.pack(_MARK, len(content), crc32(content)) + content


def read_records(data: bytes, start: int = 0) -> Iterator[Record]:
    """The whole and undamaged records in ``data``, from ``start`` on."""
    position = searched_from = start
    while 0 <= (found := data.find(_MARK, searched_from)) <= len(data) - _HEAD.size:
        _, length, checksum = _HEAD.unpack_from(data, found)
        end = found + _HEAD.size + length
        content = data[found + _HEAD.size : end]
        if len(content) == length and crc32(content) == checksum:
            yield Record(content, end, found - position)
            position = searched_from = end
        else:
            searched_from = found + 1


_logger = logging.getLogger(__name__)

_SEGMENT_BYTES = 8 * 1024 * 1024
"""A segment is deleted as a whole, when the server has all of it."""
_CURSOR = "cursor"
_LOCK = "lock"


class _Place(NamedTuple):
    """Where a record begins."""

    segment: int
    offset: int


class Batch(NamedTuple):
    """Spans to be sent next, in the order in which they came."""

    spans: list[bytes]
    after: _Place
    """Where reading goes on when the server has them."""
    damaged_bytes: int
    """Bytes passed over because they are no whole records."""


class Spool:
    """The spool in a folder that this process has locked. Safe from any thread.

    Args:
        folder: where the files are.
        lock: file descriptor that holds the lock; closed with the spool.
    """

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder = folder
        self._lock_fd: int | None = lock
        self._lock = threading.RLock()
        self._writing: int | None = None
        self._size = 0
        self._segments = sorted(int(each.stem) for each in folder.glob("*.seg") if each.stem.isdigit())
        self._read = _read_cursor(folder, self._segments)
        """How far the server has them."""
        last = [_Place(each, _size_of(self._path(each))) for each in self._segments[-1:]]
        self._end = max([self._read, *last])

    @classmethod
    def take(cls, folder: Path) -> Self | None:
        """The spool in ``folder``, if it is there and no living process holds it."""
        try:
            handle = _private(folder / _LOCK, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it before may have deleted it meanwhile; then this is the lock of nothing.
            there = os.stat(folder / _LOCK).st_ino == os.fstat(handle).st_ino
        except (BlockingIOError, FileNotFoundError):
            there = False
        if not there:
            os.close(handle)
            return None
        return cls(folder, handle)

    @property
    def empty(self) -> bool:
        """Whether the server has everything."""
        with self._lock:
            return self._read >= self._end

    @property
    def waiting_bytes(self) -> int:
        """Bytes on the disk, those included that the server has but that could not be deleted yet."""
        with self._lock:
            return sum(_size_of(self._path(each)) for each in self._segments)

    def append(self, spans: Sequence[bytes]) -> None:
        """Write spans behind all others; on the disk when this returns.

        Args:
            spans: each as JSON.

        Raises:
            SpoolFull: the disk does not take them. Then none of them is in the spool.
        """
        data = b"".join([encode_record(each) for each in spans])
        with self._lock:
            try:
                _write_all(self._segment_to_write(), data, self._size)
            except OSError as error:
                self._stop_writing()
                raise SpoolFull(
                    f"{len(spans)} spans could not be written to {self.folder}: {error}. They are still yours to keep; "
                    "make room on the disk, or set AGL_SPOOL_DIR to a folder on another one"
                ) from error
            self._size += len(data)
            self._end = _Place(self._segments[-1], self._size)

    def next_batch(self, max_spans: int, max_bytes: int) -> Batch | None:
        """The spans to be sent next; None if there is none. The same again until ``acknowledge``."""
        with self._lock:
            while self._read < self._end:
                batch = self._read_from(self._read, max_spans, max_bytes)
                if batch.spans:
                    return batch
                self._move_to(batch.after)  # a damaged or torn rest
            return None

    def acknowledge(self, batch: Batch) -> None:
        """The server has these spans, or they are in quarantine."""
        if batch.damaged_bytes:
            _logger.error("%d bytes in %s were damaged; spans may be lost in them", batch.damaged_bytes, self.folder)
        with self._lock:
            if self._lock_fd is not None:
                self._move_to(batch.after)

    def close(self) -> None:
        """Let go of the files; delete them if the server has everything. Idempotent."""
        with self._lock:
            if self._lock_fd is None:
                return
            if self.empty:
                self._stop_writing()
                for name in [*(self._path(each) for each in self._segments), self.folder / _CURSOR]:
                    name.unlink(missing_ok=True)
                (self.folder / _LOCK).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # something foreign is in it
                    self.folder.rmdir()
            self.abandon()

    def abandon(self) -> None:
        """Close the descriptors and leave the files, as for another process. Idempotent."""
        self._stop_writing()
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def _path(self, segment: int) -> Path:
        return self.folder / f"{segment:08d}.seg"

    def _segment_to_write(self) -> int:
        if self._lock_fd is None:
            raise OSError("the spool is closed")
        if self._writing is not None and self._size < _SEGMENT_BYTES:
            return self._writing
        self._stop_writing()
        number = self._segments[-1] + 1 if self._segments else self._read.segment + 1
        self._writing = _private(self._path(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)
        self._segments.append(number)
        self._size = 0
        entry = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(entry)  # else a power loss could take the name of the new file
        finally:
            os.close(entry)
        return self._writing

    def _stop_writing(self) -> None:
        if self._writing is not None:
            os.close(self._writing)
            self._writing = None

    def _read_from(self, start: _Place, max_spans: int, max_bytes: int) -> Batch:
        """Spans of one segment; none if there is no whole record left in it."""
        path = self._path(start.segment)
        last = start.segment == self._end.segment
        size = (self._end.offset if last else _size_of(path)) - start.offset
        batch, data = Batch([], start, 0), b""
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(start.offset)
            for wanted in (min(max_bytes, size), size):  # all, if one record is larger than a batch
                data += file.read(wanted - len(data))
                batch = _records_of(data, start, max_spans)
                if batch.spans:
                    return batch
        if data:
            _logger.warning(
                "%d bytes at the end of %s are no whole record: torn by a crash, or damaged", len(data), path
            )
        following = next((each for each in self._segments if each > start.segment), self._end.segment)
        return Batch([], self._end if last else _Place(following, 0), len(data))

    def _move_to(self, place: _Place) -> None:
        """Reading goes on here; segments before it are deleted, and so is the last one when it is done with."""
        self._read = place
        if place >= self._end:
            self._stop_writing()
        done = [
            each for each in self._segments if each < place.segment or (place >= self._end and each <= place.segment)
        ]
        try:
            # First the cursor: it may point to what is gone, but never before what is still there and was read.
            # In one write of fixed length, so that a kill leaves the old text or the new one.
            cursor = _private(self.folder / _CURSOR, os.O_WRONLY | os.O_CREAT)
            try:
                os.pwrite(cursor, f"{place.segment:010d} {place.offset:012d}\n".encode(), 0)
            finally:
                os.close(cursor)
            for each in done:
                self._path(each).unlink(missing_ok=True)
                self._segments.remove(each)
        except OSError as error:  # they are read again by whoever comes next, and the server drops the repeats
            _logger.warning("the spool in %s could not be cleared of what the server has: %s", self.folder, error)


def _records_of(data: bytes, start: _Place, max_spans: int) -> Batch:
    spans: list[bytes] = []
    end, damaged = start.offset, 0
    for record in read_records(data):
        spans.append(record.content)
        end, damaged = start.offset + record.end, damaged + record.skipped_bytes
        if len(spans) == max_spans:
            break
    return Batch(spans, _Place(start.segment, end), damaged)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _private(path: str | Path, flags: int) -> int:
    """Open a file that only its owner can read, and that children do not inherit."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _write_all(handle: int, data: bytes | bytearray, size: int) -> None:
    """Write to the end of a file of this size, and to the disk. Raises ``OSError``; then nothing was added."""
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(handle, rest) :]
        os.fsync(handle)
    except OSError:
        with contextlib.suppress(OSError):  # else what was written in part is torn, and passed over
            os.ftruncate(handle, size)
        raise


def _read_cursor(folder: Path, segments: Sequence[int]) -> _Place:
    """How far the server has them; the beginning, if that is not known or cannot be."""
    beginning = _Place(segments[0], 0) if segments else _Place(0, 0)
    try:
        segment, offset = map(int, (folder / _CURSOR).read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return beginning
    possible = segment not in segments or offset <= _size_of(folder / f"{segment:08d}.seg")
    return max(beginning, _Place(segment, offset)) if possible else beginning


_COUNT_AGAIN_SECONDS = 1.0
_QUARANTINE_SHARE = 4


class SpoolFolder:
    """The spools for one server.

    Args:
        root: where they are; made when the first is. Readable by its owner only.
        max_bytes: the most that all spools together may take.
        monotonic: seconds since some moment.
        token: a text that no two spools of a process share, for the name of one.
    """

    def __init__(
        self,
        root: Path,
        max_bytes: int,
        monotonic: Callable[[], float] = time.monotonic,
        token: Callable[[], str] = lambda: secrets.token_hex(4),
    ) -> None:
        self.root = root
        self._max_bytes = max_bytes
        self._monotonic = monotonic
        self._token = token
        self._lock = threading.Lock()
        self._others_bytes = 0
        self._counted_at = float("-inf")

    @property
    def quarantine_file(self) -> Path:
        """Spans that the server refused for good: a JSON object a line, with the error and the span."""
        return self.root / "quarantine.jsonl"

    def create(self) -> Spool:
        """A new, empty spool that this process owns.

        Raises:
            SpoolFull: the folder cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            while True:
                folder = self.root / f"{os.getpid()}-{self._token()}.spool"
                folder.mkdir(mode=0o700)
                spool = Spool.take(folder)
                if spool is not None:  # else somebody took it for a dead one's, and has removed it
                    return spool
        except OSError as error:
            raise SpoolFull(
                f"no spool can be made in {self.root}: {error}. Set AGL_SPOOL_DIR to a folder that can be written"
            ) from error

    def adopt(self) -> list[Spool]:
        """The spools of dead processes, which are this process's from now on; empty ones are removed."""
        found: list[Spool] = []
        for folder in sorted(self.root.glob("*.spool")):
            spool = Spool.take(folder)
            if spool is None:
                continue
            if spool.empty:
                spool.close()
            else:
                found.append(spool)
        return found

    def check_room(self, own: Spool, more_bytes: int) -> None:
        """Raise ``SpoolFull`` unless so many more bytes may be written to this process's spool."""
        with self._lock:
            now = self._monotonic()
            if now - self._counted_at >= _COUNT_AGAIN_SECONDS:
                self._counted_at = now
                others = (each for each in self.root.glob("*.spool/*.seg") if each.parent != own.folder)
                self._others_bytes = sum(map(_size_of, others))
            used = own.waiting_bytes + self._others_bytes + _size_of(self.quarantine_file)
        if used + more_bytes > self._max_bytes:
            raise SpoolFull(
                f"{used:,} bytes of spans wait in {self.root} for the server, and {self._max_bytes:,} are allowed; "
                f"{more_bytes:,} more were not taken. Bring the server back, or allow more (spool_max_bytes)"
            )

    def quarantine(self, refused: Sequence[tuple[bytes, AgentLightningError]]) -> int:
        """Put away spans that the server refuses for good, each with the reason, as whole lines.

        Returns:
            How many there was room for: the file takes a quarter of what all spools may take, and no more than these
            leave. The others are gone.

        Raises:
            OSError: the disk does not take them. Then none of them is in the file.
        """
        spools = sum(map(_size_of, self.root.glob("*.spool/*.seg")))
        handle = _private(self.quarantine_file, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # other processes write there, too
            size = os.fstat(handle).st_size
            room = min(self._max_bytes // _QUARANTINE_SHARE, self._max_bytes - spools) - size
            # A process that was killed may have left half a line.
            data = bytearray(b"\n" if size and os.pread(handle, 1, size - 1) != b"\n" else b"")
            kept = 0
            for line in starmap(_quarantine_line, refused):
                if len(data) + len(line) <= room:
                    data += line
                    kept += 1
            if kept:
                _write_all(handle, data, size)
        finally:
            os.close(handle)
        return kept


def _quarantine_line(span: bytes, error: AgentLightningError) -> bytes:
    line = {"time": time.time(), "code": error.code, "message": error.message, "span": json.loads(span)}
    return json.dumps(line).encode() + b"\n"
