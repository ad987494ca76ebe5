"""This checkout against another one, in turns in one run: how many times as fast is it?

    scripts/bench against OTHER_CHECKOUT [--rounds 5] [--seconds 5] [--only NAME ...] [--json FILE]

``OTHER_CHECKOUT`` is a working tree of this repository, of another commit, in which ``scripts/install`` has run
(``git worktree add ../old COMMIT && ../old/scripts/install``). In each round every scenario runs once with each
side, the order changing from round to round, so that whatever else the machine does falls on both. The figure is
the median of the rounds' ratios. Scenarios:

``store``        CPU for each rollout of the store alone (less is better)
``store.fused``  the same with spans, end and next claim in one call, against the other's four calls
``http.single``  rollouts/s over the wire of 0.3, one request for each of six spans
``http.bulk``    rollouts/s, six spans in one request
``http.fused``   rollouts/s with spans, end and next claim in one request, against the other's ``http.bulk``
``e2e.single``, ``e2e.queue``, ``e2e.batch``   whole runs with Trainer and two runners, ``concurrency=1``

"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from serving import load, ours

BENCH = Path(__file__).parent

RUN_SECONDS = 600.0


class Side(NamedTuple):
    """A checkout with its environment."""

    name: str
    python: Path

    @property
    def agl(self) -> Path:
        return self.python.with_name("agl")


class Options(NamedTuple):
    """What one measurement needs to know."""

    folder: Path
    seconds: float
    rollouts: int


Measure = Callable[[Side, Options], float]


def last_line(side: Side, program: str, *arguments: str, folder: Path) -> dict[str, float]:
    """Run a program of this folder in the side's environment; its last line is the result."""
    done = subprocess.run(
        [side.python, BENCH / program, *arguments],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if not name.startswith(("AGL_", "OTEL_"))},
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{side.name}: {program} {' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def store(pattern: str) -> Measure:
    def measure(side: Side, options: Options) -> float:
        found = last_line(side, "store_load.py", str(options.folder), pattern, folder=options.folder)
        return found["cpu_us_per_rollout"]

    return measure


def http(spans: str, prefix: str) -> Measure:
    def measure(side: Side, options: Options) -> float:
        with ours(options.folder, side.agl) as serving:
            found = load("rollouts", serving.port, seconds=options.seconds, spans=spans, prefix=prefix)
        return found["rollouts_per_s"]

    return measure


def e2e(pattern: str) -> Measure:
    def measure(side: Side, options: Options) -> float:
        asked = {
            "pattern": pattern,
            "rollouts": options.rollouts,
            "runners": 2,
            "in_flight": 64,
            "concurrency": 1,
            "database": str(options.folder / f"{time.monotonic_ns()}.db"),
        }
        found = last_line(side, "e2e_load.py", json.dumps(asked), folder=options.folder)
        return found["rollouts"] / found["seconds"]

    return measure


class Scenario(NamedTuple):
    """What both sides do, and how they compare."""

    mine: Measure
    other: Measure
    unit: str


SCENARIOS = {
    "store": Scenario(store("calls"), store("calls"), "µs of CPU"),
    "store.fused": Scenario(store("fused"), store("calls"), "µs of CPU"),
    "http.single": Scenario(http("single", "/v1/agl"), http("single", "/v1/agl"), "rollouts/s"),
    "http.bulk": Scenario(http("bulk", "/agl/v1"), http("bulk", "/agl/v1"), "rollouts/s"),
    "http.fused": Scenario(http("fused", "/agl/v1"), http("bulk", "/agl/v1"), "rollouts/s"),
    "e2e.single": Scenario(e2e("single"), e2e("single"), "rollouts/s"),
    "e2e.queue": Scenario(e2e("queue"), e2e("queue"), "rollouts/s"),
    "e2e.batch": Scenario(e2e("batch"), e2e("batch"), "rollouts/s"),
}


def in_turns(scenario: Scenario, mine: Side, other: Side, rounds: int, options: Options) -> list[tuple[float, float]]:
    """(this checkout's figure, the other's) of each round."""
    pairs: list[tuple[float, float]] = []
    for number in range(rounds):
        if number % 2:
            theirs = scenario.other(other, options)
            pairs.append((scenario.mine(mine, options), theirs))
        else:
            ours_now = scenario.mine(mine, options)
            pairs.append((ours_now, scenario.other(other, options)))
        for file in options.folder.iterdir():
            file.unlink()
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of one HTTP run")
    parser.add_argument("--rollouts", type=int, default=2000, help="of one whole run; `single` does a tenth")
    parser.add_argument("--only", nargs="+", choices=[*SCENARIOS], default=[*SCENARIOS])
    parser.add_argument("--json", type=Path, help="write the figures into this file, too")
    options = parser.parse_args()
    mine = Side("this checkout", Path(sys.executable))
    other = Side("the other", options.other.resolve() / ".venv" / "bin" / "python")
    if not other.agl.exists():
        parser.error(f"{options.other} has no .venv/bin/agl; run its scripts/install first")
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=Path.cwd()))
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    report: dict[str, dict[str, object]] = {}
    try:
        for name in options.only:
            chosen = Options(folder, options.seconds, options.rollouts)
            pairs = in_turns(SCENARIOS[name], mine, other, options.rounds, chosen)
            ratios = [here / there for here, there in pairs]
            here, there = (statistics.median(each) for each in zip(*pairs, strict=True))
            report[name] = {"here": here, "there": there, "ratios": ratios, "median": statistics.median(ratios)}
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(
                f"{name:12} {statistics.median(ratios):5.2f} times ({spread})   "
                f"{here:,.0f} against {there:,.0f} {SCENARIOS[name].unit}",
                flush=True,
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
