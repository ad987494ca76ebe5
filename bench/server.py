"""How fast the store is over HTTP: a real `agl store` on one core, the load on the other.

    scripts/bench server [--runs 5] [--seconds 5] [--peer VENV] [--only NAME ...] [--json FILE]

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
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from serving import LOAD_CORE, SERVER_CORE, load, load_command, ours, peer


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
