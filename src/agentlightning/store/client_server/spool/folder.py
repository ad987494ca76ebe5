"""All spools on this machine for one server: the own one, those of others, and what the server refused.

Under the folder of the server there is one folder for each process that has, or had, spans waiting.
Processes share the room; a process that starts takes over the spools of those that have died.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path

from agentlightning.errors import AgentLightningError, SpoolFull
from agentlightning.store.client_server.spool.spool import Spool

__all__ = ["SpoolFolder"]

_COUNT_AGAIN_SECONDS = 1.0


class SpoolFolder:
    """The spools for one server.

    Args:
        root: where they are; made when the first is. Readable by its owner only.
        max_bytes: the most that all spools together may take.
        wall: Unix seconds.
        monotonic: seconds since some moment.
    """

    def __init__(
        self,
        root: Path,
        max_bytes: int,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.root = root
        self._max_bytes = max_bytes
        self._wall = wall
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._others_bytes = 0
        self._counted_at: float | None = None

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
                folder = self.root / f"{os.getpid()}-{secrets.token_hex(4)}.spool"
                folder.mkdir(mode=0o700)
                spool = Spool.take(folder)
                if spool is not None:  # else somebody took it for a dead one's, and has removed it
                    return spool
        except OSError as error:
            raise SpoolFull(
                f"no spool can be made in {self.root}: {error}. Set AGL_SPOOL_DIR to a folder that can be written"
            ) from error

    def orphans_exist(self) -> bool:
        """Whether there may be spools of dead processes."""
        return any(self.root.glob("*.spool"))

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
        used = own.waiting_bytes + self._bytes_of_others(own)
        if used + more_bytes > self._max_bytes:
            raise SpoolFull(
                f"{used:,} bytes of spans wait in {self.root} for the server, and {self._max_bytes:,} are allowed; "
                f"{more_bytes:,} more were not taken. Bring the server back, or allow more (spool_max_bytes)"
            )

    def quarantine(self, span: bytes, error: AgentLightningError) -> None:
        """Put away a span that the server refuses for good, with the reason."""
        line = {"time": self._wall(), "code": error.code, "message": error.message, "span": json.loads(span)}
        handle = os.open(self.quarantine_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(handle, json.dumps(line).encode() + b"\n")
            os.fsync(handle)
        finally:
            os.close(handle)

    def _bytes_of_others(self, own: Spool) -> int:
        """What the other spools take, counted about once a second."""
        with self._lock:
            now = self._monotonic()
            if self._counted_at is None or now - self._counted_at >= _COUNT_AGAIN_SECONDS:
                self._counted_at = now
                self._others_bytes = sum(
                    _size(each) for each in self.root.glob("*.spool/*.seg") if each.parent != own.folder
                )
            return self._others_bytes


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
