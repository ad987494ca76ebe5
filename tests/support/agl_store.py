"""A real `agl store` process, started by a test."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["AglStore"]

_PATIENCE_SECONDS = 60.0


class AglStore:
    """`agl store`, from its first word that it serves to its end. A context manager.

    Args:
        options: further words of the command line.
        database: what it serves.
        environment: variables besides those of this process.
    """

    def __init__(self, *options: object, database: Path | str, environment: dict[str, str] | None = None) -> None:
        agl = Path(sys.executable).with_name("agl")
        self._command = [agl, "store", "--port", "0", "--log-format", "json", "--db", database, *options]
        self._environment = {**os.environ, **(environment or {})}
        self._errors: list[str] = []
        self.endpoint = ""

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            list(map(str, self._command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self._environment,
        )
        self._reader = threading.Thread(target=self._read_errors)
        self._reader.start()
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        assert self.process.stdout is not None
        output = self.process.stdout
        listener = threading.Thread(target=lambda: lines.put(output.readline()))
        listener.start()
        try:
            said = lines.get(timeout=_PATIENCE_SECONDS)
        except queue.Empty:
            self.process.kill()
            raise
        finally:
            listener.join()
        if " at " not in said:
            self.process.wait(_PATIENCE_SECONDS)
            self._reader.join()
            self._close()
            raise RuntimeError(f"agl store ended with {self.process.returncode}: {''.join(self._errors)}")
        self.endpoint = said.rsplit(" at ", 1)[1].strip()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        self._close()

    @property
    def port(self) -> int:
        return int(self.endpoint.rsplit(":", 1)[1])

    def terminate(self, timeout: float = 30.0) -> int:
        """Send SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def log(self) -> str:
        """What it has logged so far; all of it after its end."""
        if self.process.poll() is not None:
            self._reader.join()
        return "".join(self._errors)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._errors.append(line)

    def _close(self) -> None:
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
