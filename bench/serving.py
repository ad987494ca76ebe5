"""Store servers that are measured, each a process of its own on one core, and the load on the other core.

Used by ``server.py`` and ``against.py``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil

LOAD = Path(__file__).with_name("http_load.py")
SERVER_CORE, LOAD_CORE = 0, max(os.cpu_count() or 1, 1) - 1
START_TIMEOUT_SECONDS = 60.0


class Serving(NamedTuple):
    """A server that is being measured."""

    process: subprocess.Popen[bytes]
    port: int

    def cpu_seconds(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def resident_megabytes(self) -> float:
        return psutil.Process(self.process.pid).memory_info().rss / 1e6


@contextmanager
def ours(folder: Path, agl: Path | None = None) -> Iterator[Serving]:
    """A server of ours on a new database file: of this environment, or the given command of another."""
    port = free_port()
    agl = agl or Path(sys.executable).with_name("agl")
    database = folder / f"{time.monotonic_ns()}.db"
    with started(
        [agl, "store", "--port", port, "--db", database, "--log-level", "warning"], port, "/agl/v1"
    ) as serving:
        yield serving
    for file in folder.iterdir():
        file.unlink()


@contextmanager
def peer(environment: Path) -> Iterator[Serving]:
    """The server of agentlightning 0.3.0, which keeps everything in memory."""
    port = free_port()
    with started([environment / "bin" / "agl", "store", "--port", port], port, "/v1/agl") as serving:
        yield serving


@contextmanager
def started(command: Sequence[object], port: int, prefix: str) -> Iterator[Serving]:
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, {SERVER_CORE}),
        start_new_session=True,
    )
    try:
        until = time.monotonic() + START_TIMEOUT_SECONDS
        while not answers(port, f"{prefix}/health"):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{' '.join(map(str, command))} does not answer (exit code {process.poll()})")
            time.sleep(0.1)
        yield Serving(process, port)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(port: int, path: str) -> bool:
    """Whether ``path`` is answered by 200."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n".encode())
            return connection.recv(64).split()[1:2] == [b"200"]
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def load(scenario: str, port: int, **options: object) -> dict[str, Any]:
    """Run a scenario of ``http_load.py`` on a core of its own, and return what it found."""
    done = subprocess.run(load_command(scenario, port, **options), stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def load_command(scenario: str, port: int, **options: object) -> list[str]:
    chosen = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return ["taskset", "-c", str(LOAD_CORE), sys.executable, str(LOAD), scenario, "--port", str(port), *chosen]
