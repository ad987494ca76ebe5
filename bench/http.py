"""How fast the store is over HTTP: a real `agl store` on one core, the load on the other.

    scripts/bench http [--runs 5] [--seconds 5] [--peer VENV] [--only NAME ...] [--json FILE]

SQLite with full durability on the disk of the current folder; 64 virtual runners, spans of 1.5 KB, six for each
rollout; every figure is the median of several runs, each on a new file. With ``--peer``, the server of
agentlightning 0.3.0 in that virtual environment is measured in the same runs, with the same load (``bench/peer.md``
says how to make one). Nothing here can fail by being slow: it reports.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil

LOAD = Path(__file__).with_name("http_load.py")
SERVER_CORE, LOAD_CORE = 0, max(os.cpu_count() or 1, 1) - 1
PATIENCE_SECONDS = 60.0


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
def ours(folder: Path) -> Iterator[Serving]:
    """Our server on a new database file."""
    port = free_port()
    agl = Path(sys.executable).with_name("agl")
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
        until = time.monotonic() + PATIENCE_SECONDS
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
    """Whether ``path`` is answered by 200. By hand: this file hides the standard library's ``http``."""
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
    return ["taskset", "-c", str(LOAD_CORE), sys.executable, "-P", str(LOAD), scenario, "--port", str(port), *chosen]


def throughput(folder: Path, arguments: argparse.Namespace, spans: str) -> dict[str, float]:
    with ours(folder) as serving:
        found = load("rollouts", serving.port, seconds=arguments.seconds, spans=spans)
    figures = {f"{spans}.rollouts_per_s": found["rollouts_per_s"], f"{spans}.requests_per_s": found["requests_per_s"]}
    for kind, value in found["p99_ms"].items():
        figures[f"{spans}.p99_ms.{kind}"] = value
    return figures


def of_peer(arguments: argparse.Namespace, spans: str) -> dict[str, float]:
    with peer(arguments.peer) as serving:
        found = load("rollouts", serving.port, seconds=arguments.seconds, spans=spans, prefix="/v1/agl")
    return {f"peer.{spans}.rollouts_per_s": found["rollouts_per_s"]}


def floor(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    with ours(folder) as serving:
        return {"floor.requests_per_s": load("floor", serving.port, seconds=arguments.seconds)["requests_per_s"]}


def idle(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """CPU of the server, in per cent of a core, while 1,000 runners wait for work, in polls of 20 s."""
    with ours(folder) as serving:
        command = load_command("idle", serving.port, runners=1000, seconds=42)
        with subprocess.Popen(command, stdout=subprocess.PIPE) as waiting:
            assert waiting.stdout is not None
            waiting.stdout.readline()
            before, began = serving.cpu_seconds(), time.perf_counter()
            time.sleep(40)  # two polls of each
            used = (serving.cpu_seconds() - before) / (time.perf_counter() - began)
            found = json.loads(waiting.stdout.read())
        return {"idle.1000_runners.cpu_percent": 100 * used, "idle.1000_runners.answered": found["answered"]}


def memory(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """How much the server grows, after a first part in which it warms up, over many spans."""
    with ours(folder) as serving:
        load("many_spans", serving.port, number=max(arguments.spans // 10, 1_000))
        before = serving.resident_megabytes()
        found = load("many_spans", serving.port, number=arguments.spans)
        return {"memory.growth_mb": serving.resident_megabytes() - before, "memory.spans_per_s": found["spans_per_s"]}


def main() -> None:
    names = ("single", "bulk", "floor", "idle", "memory")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="runs of each scenario; the median counts (default 5)")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of one run")
    parser.add_argument("--spans", type=int, default=500_000, help="spans stored in the memory scenario")
    parser.add_argument("--peer", type=Path, help="virtual environment with agentlightning 0.3.0")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="only these scenarios")
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=Path.cwd()))
    print(f"python {platform.python_version()}, {os.cpu_count()} cores, server on {SERVER_CORE}, load on {LOAD_CORE}")
    values: dict[str, list[float]] = {}
    try:
        for run in range(arguments.runs):
            found: dict[str, float] = {}
            for spans, spans_of_peer in (("single", "single"), ("bulk", "otlp")):
                if spans in arguments.only:
                    found |= throughput(folder, arguments, spans)
                    if arguments.peer:
                        theirs = of_peer(arguments, spans_of_peer)
                        [peer_rate] = theirs.values()
                        found |= {**theirs, f"{spans}.times_peer": found[f"{spans}.rollouts_per_s"] / peer_rate}
            if "floor" in arguments.only:
                found |= floor(folder, arguments)
            if "idle" in arguments.only and run == 0:
                found |= idle(folder, arguments)
            if "memory" in arguments.only and run == 0:
                found |= memory(folder, arguments)
            for name, value in found.items():
                values.setdefault(name, []).append(value)
    finally:
        shutil.rmtree(folder)
    results = {name: {"median": statistics.median(each), "runs": each} for name, each in values.items()}
    for name, each in values.items():
        print(f"{name:34} {statistics.median(each):12,.1f}   ({', '.join(f'{value:,.1f}' for value in each)})")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
