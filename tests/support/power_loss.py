"""Power loss, replayed: record what SQLite does to its files, then build what a machine could find after an outage.

A killed process loses nothing that it wrote, because the kernel still has it. A machine without power loses
everything that was not synced, in no particular order. That cannot be had by killing a test, so it is modelled:
`RecordingVFS` passes every call on to the real file system and records, in one global order, each effect on durable
state. `CrashWalker` goes through such a log and, at any position, draws one of the states that the disk may be in.

The model is at least as cruel as real disks and file systems:

- What a sync of the file covers is there. A sync covers the writes that were done when it *began*.
- Each later write is, independently of all others, kept, dropped, or torn: each 512-byte sector old or new. A write
  that made the file grow may also leave zeros or garbage, or only the growth. Bytes outside of a write are never
  harmed by it: SQLite is built on that, too (SQLITE_IOCAP_POWERSAFE_OVERWRITE, https://sqlite.org/psow.html).
- Each later truncate has happened or not.
- Names: creating and deleting are durable after a sync of the directory; creating also after a sync of the file
  itself. Until then a path is at any stage of its history since: a new file may be missing, a deleted one be back.

A crash in the course of recovery is had by recording the recovery: open the files of an image through another
`RecordingVFS`, which takes what it finds as durable.

SQLite's `-shm` file does not pass through a VFS's open, is rebuilt after a crash, and so has no part in this.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import apsw

SECTOR_BYTES = 512
"""What a disk writes as a whole: SQLite assumes no more, and no disk in use does less."""

_BASE_VFS = "unix"
_NAMES = itertools.count()

_DIRECTORY_SYNCING_TYPES = apsw.SQLITE_OPEN_MAIN_JOURNAL | apsw.SQLITE_OPEN_SUPER_JOURNAL | apsw.SQLITE_OPEN_WAL


# The log. `inode` tells apart files that had the same path one after the other.


@dataclass(frozen=True, slots=True)
class Found:
    """A file that was already there when it was first opened, with its content, which counts as durable."""

    path: str
    inode: int
    content: bytes


@dataclass(frozen=True, slots=True)
class Created:
    """A new, empty file."""

    path: str
    inode: int


@dataclass(frozen=True, slots=True)
class Wrote:
    """`data` was written at byte `offset`."""

    path: str
    inode: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Truncated:
    """The file was cut, or extended with zeros, to `size` bytes."""

    path: str
    inode: int
    size: int


@dataclass(frozen=True, slots=True)
class Synced:
    """A sync of the file returned. It covers the entries before log position `covers`, where it began."""

    path: str
    inode: int
    flags: int
    covers: int


@dataclass(frozen=True, slots=True)
class DirectorySynced:
    """A sync of the directory returned: names made or removed before log position `covers` are durable."""

    folder: str
    covers: int


@dataclass(frozen=True, slots=True)
class Deleted:
    """The path was removed. A sync of the directory, if asked for, follows as an entry of its own."""

    path: str
    syncdir: bool


@dataclass(frozen=True, slots=True)
class Marked:
    """A remark of the test, for instance "write X was acknowledged before this point"."""

    obj: object


Entry = Found | Created | Wrote | Truncated | Synced | DirectorySynced | Deleted | Marked
Image = dict[str, bytes]
"""The files of a machine after power loss: original path to content. A path that is absent has no file."""


class RecordingVFS(apsw.VFS):
    """An SQLite VFS over the real file system that records every effect on durable state in `log`.

    Open connections with `apsw.Connection(path, vfs=recording.name)`: as many as you like, in any threads of this
    process, in WAL or any other journal mode. A call that fails is passed on and not recorded; in particular a
    failed sync makes nothing durable.

    The GIL is held while apsw passes a call on, so a real sync stops every thread, however long it takes. So that
    threads meet as they do without the recording, a sync first sleeps for `sync_seconds`, in which others may run
    and write. Record on a RAM disk (see `ram_disk`) and choose by this how slow the disk seems.

    As a context manager it unregisters itself at the end. Close the connections before that.
    """

    def __init__(self, sync_seconds: float = 0.0) -> None:
        """Register under a name of its own, so that recordings can live side by side."""
        self.sync_seconds = sync_seconds
        self.name = f"recording-{next(_NAMES)}"
        self.log: list[Entry] = []
        self.lock = threading.Lock()
        """Held while an effect is made *and* recorded, so that the log's order is the order of the effects."""
        self._inode_of: dict[str, int] = {}
        self._inodes = itertools.count()
        super().__init__(self.name, base=_BASE_VFS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.unregister()

    def mark(self, obj: object) -> None:
        """Record that the test has come to this point, for instance that a write was just acknowledged."""
        with self.lock:
            self.log.append(Marked(obj))

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:
        """Open a file; record it if it is new, or seen for the first time."""
        if name is None or flags[0] & apsw.SQLITE_OPEN_DELETEONCLOSE:
            return apsw.VFSFile(_BASE_VFS, name, flags)  # a temporary file is gone after a crash, whatever was in it
        path = name if isinstance(name, str) else name.filename()
        with self.lock:
            existed = os.path.lexists(path)
            file = _RecordingFile(self, name, path, flags)
            if existed and path in self._inode_of:
                file.inode = self._inode_of[path]
            else:
                file.inode = self._inode_of[path] = next(self._inodes)
                # The content is read through SQLite's own handle: a second descriptor of this file, when closed,
                # would drop all POSIX locks that this process holds on it.
                found = Found(path, file.inode, file.content()) if existed else Created(path, file.inode)
                self.log.append(found)
        return file

    def xDelete(self, filename: str, syncdir: bool) -> None:
        """Delete a file; its name is gone for good only after a sync of the directory."""
        with self.lock:
            if filename not in self._inode_of and os.path.lexists(filename):
                # SQLite removes leftovers of an empty database without a look; they, too, may be back after a crash.
                self._inode_of[filename] = next(self._inodes)
                self.log.append(Found(filename, self._inode_of[filename], Path(filename).read_bytes()))
            super().xDelete(filename, syncdir)
            self._inode_of.pop(filename, None)
            self.log.append(Deleted(filename, bool(syncdir)))
            if syncdir:
                self.log.append(DirectorySynced(os.path.dirname(filename), covers=len(self.log)))


class _RecordingFile(apsw.VFSFile):
    """An open file of a `RecordingVFS`. Reads, locks and shared memory go straight to the real one."""

    inode: int

    def __init__(self, vfs: RecordingVFS, name: str | apsw.URIFilename, path: str, flags: list[int]) -> None:
        self._vfs = vfs
        self._path = path
        # SQLite's unix VFS syncs the directory, too, at the first sync of a journal or WAL that it opened with the
        # right to create it (UNIXFILE_DIRSYNC in os_unix.c). That happens below xSync, so it is mirrored here.
        self._syncs_directory = bool(flags[0] & apsw.SQLITE_OPEN_CREATE and flags[0] & _DIRECTORY_SYNCING_TYPES)
        super().__init__(_BASE_VFS, name, flags)

    def content(self) -> bytes:
        """Return the whole content of the file."""
        size = self.xFileSize()
        return self.xRead(size, 0) if size else b""

    def xWrite(self, data: bytes, offset: int) -> None:
        with self._vfs.lock:
            super().xWrite(data, offset)
            self._vfs.log.append(Wrote(self._path, self.inode, offset, bytes(data)))

    def xTruncate(self, newsize: int) -> None:
        with self._vfs.lock:
            super().xTruncate(newsize)
            self._vfs.log.append(Truncated(self._path, self.inode, newsize))

    def xSync(self, flags: int) -> None:
        with self._vfs.lock:
            covers = len(self._vfs.log)
        # Not under the lock: other connections write while this one waits for the disk, and what they write is not
        # covered. (A checkpoint syncs the WAL while a writer appends to it.)
        time.sleep(self._vfs.sync_seconds)
        super().xSync(flags)
        with self._vfs.lock:
            self._vfs.log.append(Synced(self._path, self.inode, flags, covers))
            if self._syncs_directory:
                self._syncs_directory = False
                self._vfs.log.append(DirectorySynced(os.path.dirname(self._path), covers))


@dataclass(frozen=True, slots=True)
class _Mood:
    """How likely an unsynced write is kept, or torn (else it is dropped), and is grown for by a file that lacks it."""

    kept: float
    torn: float
    grown: float


# Drawn anew for each file of each image: with one even mixture only, a file with many unsynced writes would never be
# seen with all of them there, or none, or all but one.
_MOODS = (
    _Mood(kept=0.0, torn=0.0, grown=0.0),
    _Mood(kept=1.0, torn=0.0, grown=0.0),
    _Mood(kept=0.0, torn=0.0, grown=0.3),
    _Mood(kept=0.95, torn=0.02, grown=0.5),
    _Mood(kept=0.05, torn=0.02, grown=0.1),
    _Mood(kept=0.4, torn=0.3, grown=0.5),
    _Mood(kept=0.0, torn=1.0, grown=0.5),
)
_GARBAGE = 0.5  # how often space that a file has grown by, without its data, holds garbage instead of zeros


@dataclass(slots=True)
class _Inode:
    """A file's content as of its last sync, and what was done to it since."""

    durable: bytearray
    pending: list[tuple[int, Wrote | Truncated]] = field(default_factory=list)
    snapshot: bytes | None = None

    def sync(self, covers: int) -> None:
        """Make durable what was done before log position `covers`."""
        covered = 0
        for position, effect in self.pending:
            if position >= covers:
                break
            covered += 1
            if isinstance(effect, Wrote):
                _put(self.durable, effect.offset, effect.data)
            else:
                _resize(self.durable, effect.size)
        if covered:
            del self.pending[:covered]
            self.snapshot = None

    def after_power_loss(self, rng: random.Random) -> bytes:
        """Draw a content that may be found after power loss."""
        if not self.pending:
            if self.snapshot is None:
                self.snapshot = bytes(self.durable)
            return self.snapshot
        found = bytearray(self.durable)
        mood = rng.choice(_MOODS)
        for _, effect in self.pending:
            draw = rng.random()
            if isinstance(effect, Truncated):
                if draw < mood.kept + mood.torn / 2:
                    _resize(found, effect.size)
            elif draw < mood.kept:
                _put(found, effect.offset, effect.data)
            else:
                if rng.random() < mood.grown:
                    _grow(found, effect.offset + len(effect.data), rng)
                if draw < mood.kept + mood.torn:
                    _tear(found, effect, rng)
        return bytes(found)


@dataclass(slots=True)
class _Name:
    """The inode that a path durably leads to (None: no file), and the changes since, as (position, inode)."""

    durable: int | None = None
    pending: list[tuple[int, int | None]] = field(default_factory=list)

    def settle(self, count: int) -> None:
        """Make the first `count` pending changes durable."""
        if count:
            self.durable = self.pending[count - 1][1]
            del self.pending[:count]

    def after_power_loss(self, rng: random.Random) -> int | None:
        """Draw the inode that the path may lead to after power loss: any stage since the last sync."""
        stage = rng.randint(0, len(self.pending)) if self.pending else 0
        return self.pending[stage - 1][1] if stage else self.durable


class CrashWalker:
    """Walks forward through a log and draws images of the disk after power loss at the point reached.

    It keeps what is durable and what is pending as it goes, so a step costs what its entry costs, and an image
    costs a copy of the files plus their unsynced writes; nothing is replayed from the beginning.
    """

    def __init__(self, log: Sequence[Entry]) -> None:
        """Start before the first entry of `log`, which must not change any more."""
        self._log = log
        self._inodes: dict[int, _Inode] = {}
        self._names: dict[str, _Name] = {}
        self.position = 0
        """The number of entries that have happened."""
        self.marks: list[object] = []
        """The objects marked so far, in order. Grows as the walker goes on."""

    def advance(self, at: int) -> None:
        """Go on until the first `at` entries of the log have happened.

        Raises:
            ValueError: `at` lies behind the position reached, or beyond the end of the log.
        """
        if not self.position <= at <= len(self._log):
            raise ValueError(f"cannot go from log position {self.position} to {at}: the log ends at {len(self._log)}")
        for position in range(self.position, at):
            self._apply(position, self._log[position])
        self.position = at

    def image(self, rng: random.Random) -> Image:
        """Draw the files that a machine may find if power fails now. May be called any number of times."""
        image: Image = {}
        for path, name in self._names.items():
            inode = name.after_power_loss(rng)
            if inode is not None:
                image[path] = self._inodes[inode].after_power_loss(rng)
        return image

    def _apply(self, position: int, entry: Entry) -> None:
        match entry:
            case Wrote() | Truncated():
                self._inodes[entry.inode].pending.append((position, entry))
            case Synced():
                self._inodes[entry.inode].sync(entry.covers)
                self._settle_creation(entry.path, entry.inode)
            case Marked():
                self.marks.append(entry.obj)
            case Found():
                self._inodes[entry.inode] = _Inode(bytearray(entry.content))
                self._names[entry.path] = _Name(durable=entry.inode)
            case Created():
                self._inodes[entry.inode] = _Inode(bytearray())
                self._names.setdefault(entry.path, _Name()).pending.append((position, entry.inode))
            case Deleted():
                self._names.setdefault(entry.path, _Name()).pending.append((position, None))
            case DirectorySynced():
                for path, name in self._names.items():
                    if os.path.dirname(path) == entry.folder:
                        name.settle(sum(position < entry.covers for position, _ in name.pending))

    def _settle_creation(self, path: str, inode: int) -> None:
        """A sync of a new file makes its name durable, too, and with it the earlier history of that path."""
        name = self._names[path]
        for index, (_, linked) in enumerate(name.pending):
            if linked == inode:
                name.settle(index + 1)
                return


def crash_image(log: Sequence[Entry], at: int, rng: random.Random) -> Image:
    """Draw the files that a machine may find after power loss once the first `at` entries of `log` have happened.

    Replays the log from its beginning: for one image. For many, see `crashes` and `CrashWalker`.
    """
    walker = CrashWalker(log)
    walker.advance(at)
    return walker.image(rng)


@dataclass(frozen=True, slots=True)
class Crash:
    """One power loss: the log position, the objects marked before it, and the files found after it."""

    at: int
    marks: tuple[object, ...]
    image: Image


def crashes(log: Sequence[Entry], count: int, rng: random.Random, *, start: int = 0) -> Iterator[Crash]:
    """Yield `count` power losses spread evenly over the positions `start` to the end of `log`, in increasing order.

    With `count` at least as large as the number of positions, none is left out; a position that comes up several
    times gets several, independently drawn images.
    """
    positions = range(start, len(log) + 1)
    rounds, rest = divmod(count, len(positions))
    walker = CrashWalker(log)
    for at in sorted([*positions] * rounds + rng.sample(positions, rest)):
        walker.advance(at)
        yield Crash(at, tuple(walker.marks), walker.image(rng))


def write_image(image: Mapping[str, bytes], folder: Path) -> None:
    """Write the files of `image` into `folder`, each under its own file name.

    `folder` is created when missing. It must be empty: a `-wal` or `-shm` left by another image would be read as
    part of this one.

    Raises:
        ValueError: `folder` is not empty, or two paths of the image have the same file name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: give each image a folder of its own")
    names = {os.path.basename(path) for path in image}
    if len(names) < len(image):
        raise ValueError(f"two files of the image have the same name and would share a place in {folder}: {[*image]}")
    for path, content in image.items():
        (folder / os.path.basename(path)).write_bytes(content)


@contextmanager
def restored(image: Mapping[str, bytes]) -> Iterator[Path]:
    """Yield a folder with the files of `image`, in memory where the system has a RAM disk; remove it afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="power-loss-", dir=ram_disk()))
    try:
        write_image(image, folder)
        yield folder
    finally:
        shutil.rmtree(folder)


def ram_disk() -> str | None:
    """Return a folder on a RAM disk, or None (which `tempfile` takes as its default) if the system has none."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _put(content: bytearray, offset: int, data: bytes) -> None:
    """Write `data` at `offset`; a gap before it reads as zeros, as on a real file system."""
    if len(content) < offset:
        _resize(content, offset)
    content[offset : offset + len(data)] = data


def _resize(content: bytearray, size: int) -> None:
    """Cut `content`, or extend it with zeros, to `size` bytes."""
    if size < len(content):
        del content[size:]
    else:
        content.extend(bytes(size - len(content)))


def _grow(content: bytearray, size: int, rng: random.Random) -> None:
    """Extend `content` to at least `size` bytes with what was never written there: zeros or garbage."""
    missing = size - len(content)
    if missing > 0:
        content.extend(rng.randbytes(missing) if rng.random() < _GARBAGE else bytes(missing))


def _tear(content: bytearray, write: Wrote, rng: random.Random) -> None:
    """Do only some sectors of `write`, as `rng` has it."""
    start, end = write.offset, write.offset + len(write.data)
    first_sector = start // SECTOR_BYTES
    done = rng.getrandbits(-(-end // SECTOR_BYTES) - first_sector)
    for sector in range(first_sector, -(-end // SECTOR_BYTES)):
        if done >> (sector - first_sector) & 1:
            low, high = max(start, sector * SECTOR_BYTES), min(end, (sector + 1) * SECTOR_BYTES)
            _put(content, low, write.data[low - start : high - start])
