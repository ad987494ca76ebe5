"""A disk that fails when a test says so: an apsw VFS over the real file system."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Literal, Self

import apsw

__all__ = ["FaultyDisk", "Operation"]

Operation = Literal["read", "write", "sync", "truncate"]
_NAMES = itertools.count()


class FaultyDisk(apsw.VFS):
    """Passes everything on, until it is told to fail.

    Open stores with ``vfs=disk.name``. As a context manager it unregisters itself at the end.
    """

    def __init__(self) -> None:
        self.name = f"faulty-{next(_NAMES)}"
        self.operations = 0
        """Writes, syncs and truncates so far."""
        self.failures = 0
        self._lock = threading.Lock()
        self._fault: Callable[[Operation, str], type[apsw.Error] | None] = _none
        super().__init__(self.name, base="unix")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.unregister()

    def break_down(
        self, operation: Operation, ending: str, error: type[apsw.Error] = apsw.IOError, *, passing: int = 0
    ) -> None:
        """From now on, after ``passing`` more, fail each such operation on files whose name has this ending."""
        left = itertools.count(-passing)
        self._fault = lambda seen, path: (
            error if seen == operation and path.endswith(ending) and next(left) >= 0 else None
        )

    def break_down_at(self, number: int, error: type[apsw.Error] = apsw.IOError) -> None:
        """Fail operation ``number`` (as `operations` counts them) and all that change a file from then on."""
        self._fault = lambda seen, _: error if seen != "read" and self.operations >= number else None

    def mend(self) -> None:
        """Work again."""
        self._fault = _none

    def pass_or_fail(self, operation: Operation, path: str) -> None:
        """Raise if this operation is to fail."""
        with self._lock:
            self.operations += operation != "read"
            error = self._fault(operation, path)
            self.failures += error is not None
        if error is not None:
            raise error(f"{operation} of {path} failed, as the test wanted")

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:
        return _FaultyFile(self, name, flags)


class _FaultyFile(apsw.VFSFile):
    def __init__(self, disk: FaultyDisk, name: str | apsw.URIFilename | None, flags: list[int]) -> None:
        self._disk = disk
        self._path = name if isinstance(name, str) else "" if name is None else name.filename()
        super().__init__("unix", name, flags)

    def xRead(self, amount: int, offset: int) -> bytes:
        self._disk.pass_or_fail("read", self._path)
        return super().xRead(amount, offset)

    def xWrite(self, data: bytes, offset: int) -> None:
        self._disk.pass_or_fail("write", self._path)
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:
        self._disk.pass_or_fail("sync", self._path)
        super().xSync(flags)

    def xTruncate(self, newsize: int) -> None:
        self._disk.pass_or_fail("truncate", self._path)
        super().xTruncate(newsize)


def _none(_operation: Operation, _path: str) -> None:
    return None
