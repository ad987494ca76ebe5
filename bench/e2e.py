"""How fast a whole run is: Trainer, runner processes, store; and what a span costs the process it is made in.

    scripts/bench e2e [--rounds 5] [--rollouts 2000] [--runners 2] [--peer VENV] [--only NAME ...] [--json FILE]

The workload is that of 0.3.0's own benchmark, with its sleeps taken out: agents open nested spans with random
attributes and emit a reward (six spans a rollout), submitted all at once (``batch``), as fast as they are done
(``queue``), or one by one (``single``). Our store is SQLite with full durability on the disk of the current folder.
With ``--peer``, agentlightning 0.3.0 in that virtual environment does the same, in memory, in the same rounds
(``bench/peer.md`` says how to make one). Runs take turns, so that whatever else the machine does falls on both; the
ratio of each round is taken, and the median reported. Nothing here can fail by being slow: it reports.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

LOAD = Path(__file__).with_name("e2e_load.py")
PATTERNS = ("batch", "queue", "single")
IN_FLIGHT = 64
CONCURRENCY = 32
"""Rollouts that each runner of ours works on at once: two runners have room for all that are in flight."""
RUN_SECONDS = 600.0
PEER_SHARE = 10
"""The peer does one in so many of the rollouts, since it is that much slower; rates are compared."""


class Result(NamedTuple):
    """One run."""

    rollouts: int
    seconds: float
    cpu_seconds: float

    @property
    def rate(self) -> float:
        return self.rollouts / self.seconds

    @property
    def cpu_milliseconds(self) -> float:
        return self.cpu_seconds / self.rollouts * 1e3


# --- Whole runs ------------------------------------------------------------------------------------------


def run(python: Path, asked: dict[str, Any], folder: Path) -> Result:
    """One run in a process tree of its own."""
    done = subprocess.run(
        [python, LOAD, json.dumps(asked)],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if not name.startswith(("AGL_", "OTEL_"))},
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{python} failed at {asked}:\n{done.stderr[-4000:]}")
    return Result(**json.loads(done.stdout.strip().splitlines()[-1]))


def ours(pattern: str, concurrency: int, options: argparse.Namespace, folder: Path) -> Result:
    asked = asked_for(pattern, options.rollouts, options)
    asked |= {"concurrency": concurrency, "database": str(folder / f"{time.monotonic_ns()}.db")}
    return run(Path(sys.executable), asked, folder)


def peers(pattern: str, options: argparse.Namespace, folder: Path) -> Result:
    asked = asked_for(pattern, max(20, options.rollouts // PEER_SHARE), options)
    return run(options.peer / "bin" / "python", asked, folder)


def asked_for(pattern: str, rollouts: int, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "pattern": pattern,
        "rollouts": rollouts,
        "runners": options.runners,
        "in_flight": IN_FLIGHT,
        "concurrency": None,
        "database": None,
    }


def measure_pattern(pattern: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rounds of one pattern, the sides taking turns."""
    sides: dict[str, Callable[[], Result]] = {
        f"ours, concurrency {CONCURRENCY}": lambda: ours(pattern, CONCURRENCY, options, folder),
        "ours, concurrency 1": lambda: ours(pattern, 1, options, folder),
    }
    if options.peer is not None:
        sides["0.3.0"] = lambda: peers(pattern, options, folder)
    rounds: dict[str, list[Result]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, measure in sides.items():
            rounds[name].append(measure())
    print(f"\n{pattern}: {options.runners} runner processes, medians of {options.rounds} rounds")
    report: dict[str, Any] = {}
    for name, results in rounds.items():
        rate = statistics.median(each.rate for each in results)
        cpu = statistics.median(each.cpu_milliseconds for each in results)
        report[name] = {"rollouts_per_second": rate, "cpu_ms_per_rollout": cpu}
        print(f"  {name:<22} {rate:8.1f} rollouts/s   {cpu:7.2f} ms of CPU a rollout, all processes")
    for name in [name for name in rounds if "0.3.0" in rounds and name != "0.3.0"]:
        pairs = list(zip(rounds[name], rounds["0.3.0"], strict=True))
        speed = [mine.rate / theirs.rate for mine, theirs in pairs]
        cpu = [theirs.cpu_milliseconds / mine.cpu_milliseconds for mine, theirs in pairs]
        report[name] |= {"times_as_fast": speed, "times_less_cpu": cpu}
        spread = f"({min(speed):.1f} to {max(speed):.1f})"
        print(
            f"  {name:<22} {statistics.median(speed):5.1f} times as fast as 0.3.0 {spread}, "
            f"{statistics.median(cpu):.1f} times less CPU"
        )
    return report


# --- One span --------------------------------------------------------------------------------------------


def measure_span(options: argparse.Namespace) -> dict[str, float]:
    """CPU of this process for each span, in microseconds: what the SDK takes, what we add, what sending takes."""
    from agentlightning.tracer.conversion import SpanConverter

    texts = {f"text.{index}": "x" * 64 for index in range(5)}
    attributes: dict[str, Any] = texts | {"number": random.random(), "count": 7, "flag": True}
    rounds = range(options.rounds)
    bare = statistics.median(sdk_alone(attributes) for _ in rounds)
    traced, spans, ended = [], [], []
    for _ in rounds:
        seconds, spans, ended = with_tracer(attributes)
        traced.append(seconds)
    convert = SpanConverter().convert
    converted = statistics.median(
        cpu_of(lambda: [convert(each, "r", "a") for each in ended], len(ended)) for _ in rounds
    )
    with served() as url:
        sent = {size: statistics.median(sending(url, spans, size) for _ in rounds) for size in (6, 500)}
    found = {
        "OpenTelemetry SDK": bare,
        "tracer, in the agent's thread": statistics.median(traced) - bare,
        "tracer, conversion": converted,
        "client, 6 spans a call": sent[6],
        "client, 500 spans a call": sent[500],
    }
    print("\none span of 8 attributes, CPU of the process that makes it")
    for name, microseconds in found.items():
        print(f"  {name:<30} {microseconds:7.1f} µs")
    return found


COUNT = 3000


def cpu_of(work: Callable[[], object], number: int) -> float:
    """Microseconds of CPU for each of a number of things."""
    began = time.process_time()
    work()
    return (time.process_time() - began) / number * 1e6


def make(tracer: Any, attributes: dict[str, Any]) -> None:
    for _ in range(COUNT // 2):
        with (
            tracer.start_as_current_span("outer", attributes=attributes),
            tracer.start_as_current_span("inner", attributes=attributes),
        ):
            pass


def sdk_alone(attributes: dict[str, Any]) -> float:
    from opentelemetry.sdk.trace import TracerProvider

    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("bench")
    return cpu_of(lambda: make(tracer, attributes), COUNT)


def with_tracer(attributes: dict[str, Any]) -> tuple[float, list[Any], list[Any]]:
    """(microseconds for each span, the spans, what the SDK made)."""
    from opentelemetry import trace

    from agentlightning import OtelTracer
    from agentlightning.tracer.recording import current

    tracer = OtelTracer()
    taken: list[Any] = []

    def work() -> float:
        seconds = cpu_of(lambda: make(trace.get_tracer("bench"), attributes), COUNT)
        recording = current.get()
        assert recording is not None
        taken.extend(recording.taken)  # before they are converted
        return seconds

    return tracer.trace_run(work), tracer.get_last_trace(), taken


@contextmanager
def served() -> Any:
    """The URL of a store in another process."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        agl = Path(sys.executable).with_name("agl")
        command = [agl, "store", "--port", "0", "--db", f"{folder}/store.db", "--log-level", "warning"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1]
            process.terminate()


def sending(url: str, spans: list[Any], size: int) -> float:
    """Microseconds of this process for each span that the client sends."""
    from agentlightning import LightningStoreClient

    async def work() -> float:
        async with LightningStoreClient(url, spool_dir=None) as store:
            rollout = await store.start_rollout("bench")
            own = {"rollout_id": rollout.rollout_id, "attempt_id": rollout.attempt.attempt_id}
            mine = [span.model_copy(update=own) for span in spans]
            began = time.process_time()
            for start in range(0, len(mine), size):
                await store.add_many_spans(mine[start : start + size])
            return (time.process_time() - began) / len(mine) * 1e6

    return asyncio.run(work())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rollouts", type=int, default=2000)
    parser.add_argument("--runners", type=int, default=2)
    parser.add_argument("--peer", type=Path, help="virtual environment with agentlightning 0.3.0")
    parser.add_argument("--only", nargs="+", choices=[*PATTERNS, "span"], default=[*PATTERNS, "span"])
    parser.add_argument("--json", type=Path, help="write the figures into this file, too")
    options = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=".", prefix="bench-e2e-") as folder:
        for name in options.only:
            if name != "span":
                report[name] = measure_pattern(name, options, Path(folder).resolve())
    if "span" in options.only:
        report["span"] = measure_span(options)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
