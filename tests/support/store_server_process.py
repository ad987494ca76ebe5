"""``agl store`` in a process of its own, to be killed and started again at the same address."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from command_line import clean_environment

__all__ = ["StoreServerProcess", "free_port"]


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


class StoreServerProcess:
    """A server that is started at the beginning of a block, and gone at its end.

    Args:
        database: its file.
        host, port: where it listens.
        api_key: what it asks for; a host other than this one needs it.
        inside: words before the command, such as ``ip netns exec NAME``.
    """

    def __init__(
        self,
        database: Path,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        api_key: str | None = None,
        inside: Sequence[str] = (),
    ) -> None:
        self.port = free_port() if port is None else port
        self.url = f"http://{host}:{self.port}"
        self._log = database.with_suffix(".log")
        self._environment = clean_environment(**({} if api_key is None else {"AGL_API_KEY": api_key}))
        self._command = [
            *inside,
            *(sys.executable, "-m", "agentlightning", "store", "--db", str(database)),
            *("--host", host, "--port", str(self.port), "--log-level", "warning"),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self.kill()

    def start(self) -> None:
        """Start it; it answers when this returns."""
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=log, env=self._environment, start_new_session=True
            )
        assert process.stdout is not None
        with process.stdout as said:
            first = said.readline()
        self._process = process
        assert first.startswith(b"serving"), self._log.read_text()

    def kill(self) -> None:
        """SIGKILL, to it and to nothing else."""
        self.signal(signal.SIGKILL)
        process, self._process = self._process, None
        assert process is not None
        process.wait()

    def signal(self, number: signal.Signals) -> None:
        """Send it this signal, to it and to nothing else."""
        assert self._process is not None
        os.kill(self._process.pid, number)

    def stop(self) -> None:
        """SIGTERM; it has ended in order when this returns."""
        process, self._process = self._process, None
        assert process is not None
        process.terminate()
        assert process.wait(30) == 0, self._log.read_text()
