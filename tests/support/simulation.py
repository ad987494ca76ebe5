"""One simulation: server, runners, algorithm and network in virtual time, from a seed to a verdict.

The code under test is the real one: store engine, group commit, SQL, routes, codec, ASGI application, HTTP client
with its retries, circuit breaker and spool, worker loop, heartbeat and sender of spans. ``simulated_time`` has the
scheduler, ``simulated_network`` what happens to messages, ``simulated_server`` and ``simulated_clients`` say what is
replaced, ``simulated_scenario`` draws what happens, and ``simulated_checks`` has the rules.

Run one seed again, and see what happened: ``python tests/support/simulation.py 1234``
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from agentlightning.http.client.transport import WireRequest
from simulated_bugs import BUGS, planted
from simulated_checks import read_remains, violations
from simulated_clients import Algorithm, Ids, SimulatedRunner, Surrounded
from simulated_ledger import Ledger
from simulated_network import SimulatedNetwork
from simulated_scenario import Scenario, Trouble, draw
from simulated_server import SimulatedServer, empty_database
from simulated_time import World, seeded_jitter

__all__ = ["Outcome", "command", "simulate"]

_LIMIT_SECONDS = 900.0
"""Everything has ended after so much virtual time, and it has been calm for most of it."""
_LOOK_SECONDS = 1.0


class Outcome(NamedTuple):
    """What came of a simulation."""

    seed: int
    violations: list[str]
    trace: list[str]
    seconds: float
    """Virtual time that has passed."""

    @property
    def digest(self) -> str:
        """Of the trace: the same for the same course of events."""
        return hashlib.blake2b("\n".join(self.trace).encode(), digest_size=8).hexdigest()


class Simulation:
    """One world with all that is in it.

    Args:
        seed: of everything.
        folder: for spools; empty.
    """

    def __init__(self, seed: int, folder: Path) -> None:
        self.scenario: Scenario = draw(seed)
        self.world = World(seed)
        self.ledger = Ledger()
        self._connection = empty_database(self.world)
        ids = Ids()
        self._server = SimulatedServer(self.world, self._connection, ids, self.scenario.commit_seconds)
        network = self._network = SimulatedNetwork(self.world, self._server, self.scenario.latency)
        self._around = Surrounded(self.world, network, self.ledger, self.scenario, ids, folder)
        self._runners = [
            SimulatedRunner(self._around, plan, f"runner-{number}") for number, plan in enumerate(self.scenario.runners)
        ]
        self._folder = folder
        network.on_loss = self._note_loss

    def run(self) -> list[str]:
        """Let everything happen; returns what was wrong."""
        world = self.world
        self._server.start()
        self._algorithm = Algorithm(self._around)
        for runner, plan in zip(self._runners, self.scenario.runners, strict=True):
            world.after(plan.starts_at, runner.start)
        for trouble in self.scenario.troubles:
            world.after(trouble.at, self._begin, trouble)
        found: list[str] = []
        if not world.run(until=self._ended, at_most=_LIMIT_SECONDS):
            found.append(f"not everything has ended within {_LIMIT_SECONDS:g} s")
        if found or not world.run(until=self._delivered, at_most=world.now + _LIMIT_SECONDS):
            found.append("spans are still on a disk")
        found += violations(read_remains(self._connection), self.ledger)
        found += world.unhandled
        return found

    def _ended(self) -> bool:
        return self._algorithm.is_done

    def _delivered(self) -> bool:
        return not any(self._folder.glob("*/*/*.spool/*.seg"))

    def _note_loss(self, machine: str, request: WireRequest) -> None:
        if machine in self.ledger.losses and request.priority == "heartbeat":
            self.ledger.losses[machine].append(self.world.now)

    # --- Trouble ---------------------------------------------------------------------------------

    def _begin(self, trouble: Trouble) -> None:
        getattr(self, f"_{trouble.kind}")(trouble)

    def _kill_runner(self, trouble: Trouble) -> None:
        self._runners[trouble.target].kill(trouble.seconds)

    def _lose_machine(self, trouble: Trouble) -> None:
        self._runners[trouble.target].lose_machine(trouble.seconds)

    def _stop_runner(self, trouble: Trouble) -> None:
        runner = self._runners[trouble.target]
        if runner.loop is not None:
            runner.suffers(trouble.seconds, "stopped")
            self.world.note(runner.name, f"stands still for {trouble.seconds:.3f} s")
            self.world.stop(runner.loop, trouble.seconds)

    def _drain_runner(self, trouble: Trouble) -> None:
        self._algorithm.drain(self._runners[trouble.target].name)

    def _kill_server(self, trouble: Trouble) -> None:
        if self._server.kill():
            self._network.server_ended()
            self.world.after(trouble.seconds, self._server.start)

    def _stop_server(self, trouble: Trouble) -> None:
        if self._server.loop is not None:
            self.world.note("server", f"stands still for {trouble.seconds:.3f} s")
            self.world.stop(self._server.loop, trouble.seconds)

    def _drain_server(self, trouble: Trouble) -> None:
        self._server.drain()
        self.world.after(0.5, self._kill_server, trouble)

    def _cut(self, trouble: Trouble) -> None:
        name = self._machine(trouble)
        self.world.note(name, f"is cut off for {trouble.seconds:.3f} s")
        self._network.cut(name, trouble.seconds)
        self._suffers(trouble, "cut off")

    def _disturb(self, trouble: Trouble) -> None:
        name = self._machine(trouble)
        self.world.note(name, f"has a bad network for {trouble.seconds:.3f} s")
        self._network.disturb(name, trouble.seconds, trouble.detail)
        self._suffers(trouble, "bad network")

    def _jump(self, trouble: Trouble) -> None:
        self.world.note("server", f"its clock is set by {trouble.detail:g} s")
        self._server.clock.jumped += trouble.detail

    def _cancel(self, trouble: Trouble) -> None:
        self._algorithm.cancel(trouble.target)

    def _slow_disk(self, trouble: Trouble) -> None:
        self._server.commit_seconds = trouble.detail
        self.world.after(trouble.seconds, self._mend_disk)

    def _mend_disk(self) -> None:
        self._server.commit_seconds = self.scenario.commit_seconds

    def _machine(self, trouble: Trouble) -> str:
        return self._runners[trouble.target].machine if trouble.target < len(self._runners) else Algorithm.name

    def _suffers(self, trouble: Trouble, what: str) -> None:
        if trouble.target < len(self._runners):
            self._runners[trouble.target].suffers(trouble.seconds, what)


@contextmanager
def _quiet() -> Iterator[None]:
    """Nobody reads the log of a simulation, and writing it takes longer than all the rest."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def simulate(seed: int, bug: str | None = None) -> Outcome:
    """Run the simulation of a seed; with a fault of ``simulated_bugs`` in the product, if one is named."""
    memory = Path("/dev/shm")  # a disk that needs no time
    spools = tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)
    with spools as folder, _quiet(), seeded_jitter(seed), planted(bug):
        simulation = Simulation(seed, Path(folder))
        try:
            found = simulation.run()
        finally:
            simulation.world.end()
    return Outcome(seed, found, simulation.world.trace, simulation.world.now)


def command(seed: int, bug: str | None = None) -> str:
    """The command that runs the simulation of a seed again."""
    return f"python tests/support/simulation.py {seed}{f' --bug {bug}' if bug else ''}"


def main() -> int:
    """Run seeds; tell of those that fail. With one seed, tell what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=int, help="the first seed")
    parser.add_argument("count", type=int, nargs="?", default=1, help="how many seeds")
    parser.add_argument("--bug", choices=sorted(BUGS), help="a fault to put into the product")
    parser.add_argument("--until-found", action="store_true", help="end with the first seed that fails")
    given = parser.parse_args()
    longest = 0.0
    began, failed = time.process_time(), 0
    for seed in range(given.first, given.first + given.count):
        outcome = simulate(seed, given.bug)
        if given.count == 1:
            print("\n".join(outcome.trace))
            print(f"{outcome.digest}: the trace; {outcome.seconds:.1f} s of virtual time")
        longest = max(longest, outcome.seconds)
        for each in outcome.violations:
            print(f"seed {seed}: {each}")
        if outcome.violations:
            failed += 1
            print(f"again: {command(seed, given.bug)}", flush=True)
            if given.until_found:
                break
    if given.count > 1:
        seconds = time.process_time() - began
        each = f"{seconds / given.count * 1000:.2f} ms each, the longest {longest:.0f} s of virtual time"
        print(f"{given.count} seeds, {failed} failed, {seconds:.1f} s of CPU, {each}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
