"""A runner stays alive for the store whatever single messages are lost: in virtual time, over a simulated network."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentlightning.runner.heartbeat import Heartbeat
from agentlightning.types import RolloutConfig
from simulated_clients import Ids, SimulatedRunner, Surrounded
from simulated_ledger import Ledger, NotingClient
from simulated_network import Mix, SimulatedNetwork
from simulated_scenario import RunnerPlan, Scenario
from simulated_server import SimulatedServer, empty_database
from simulated_time import ProcessLoop, World

LEASE = 15.0


class Scene:
    """A server, and a runner's process with a heartbeat every 5 s and a lease of 15 s."""

    def __init__(self, folder: Path) -> None:
        self.world = World(1)
        ids = Ids()
        self._connection = empty_database(self.world)
        self.server = SimulatedServer(self.world, self._connection, ids, 0.001)
        self.network = SimulatedNetwork(self.world, self.server, (0.0001, 0.0002))
        self.around = around = Surrounded(
            self.world, self.network, Ledger(), Scenario((), (), (), (0.0, 0.0), 0.0, False), ids, folder
        )
        self.loop: ProcessLoop = self.world.process("runner")
        self.client: NotingClient = around.client(self.loop, "runner")
        self.heartbeat = Heartbeat(
            self.client,
            "worker",
            interval_seconds=5.0,
            jitter_seconds=0.0,
            lease_seconds=LEASE,
            include_gpu=False,
            in_thread=False,
            registration={"pid": 1},
            statistics=lambda _: {},
            monotonic=self.loop.time,
        )

    def lose(self, at: float, seconds: float, **fates: float) -> None:
        """Requests that are sent in this time have these fates."""
        self.world.after(at, self.network.disturb, "runner", seconds, Mix(**fates))

    def run(self, main: Callable[[], Any]) -> Any:
        """Run a coroutine function in the runner's process; returns its result."""
        self.server.start()
        tasks: list[asyncio.Task[Any]] = []
        self.loop.call_soon(lambda: tasks.append(self.loop.create_task(main())))
        assert self.world.run(until=lambda: bool(tasks) and tasks[0].done(), at_most=1000.0), self.world.trace
        return tasks[0].result()

    async def held_for(self, seconds: float, **config: Any) -> None:
        """Work on a rollout for so long."""
        self.heartbeat.start_in_loop()
        await asyncio.wrap_future(self.heartbeat.first_beat)
        await self.client.enqueue_rollout(input="work", config=RolloutConfig(**config))
        [claim] = await self.client.dequeue_many_rollouts(worker_id="worker", request_id="claim", limit=1)
        self.heartbeat.begin(claim)
        await asyncio.sleep(seconds)

    def lost(self) -> list[str]:
        """Why attempts were declared lost, one reason for each time."""
        found = self._connection.execute("SELECT reason FROM history WHERE after = 'unresponsive' ORDER BY seq")
        return [str(reason) for (reason,) in found]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    made.world.end()


@pytest.mark.parametrize("fate", ["request_lost", "reply_lost", "reset_before", "late"])
def test_a_lost_beat_is_repeated_while_there_is_time(scene: Scene, fate: str) -> None:
    scene.lose(4.0, 5.5, **{fate: 1.0})  # of the second beat, and of its first repeat
    scene.run(lambda: scene.held_for(40.0))
    assert scene.lost() == []


def test_the_term_of_an_attempt_counts_as_well(scene: Scene) -> None:
    scene.lose(3.0, 2.0, request_lost=1.0)
    scene.run(lambda: scene.held_for(40.0, unresponsive_seconds=6.0))
    assert scene.lost() == []


def test_a_lost_confirmation_holds_up_no_beat(scene: Scene) -> None:
    scene.lose(0.4, 0.6, request_lost=1.0)  # the confirmation is sent after 0.25 s, or at the next look
    scene.run(lambda: scene.held_for(40.0))
    assert scene.lost() == []
    lost = [line for line in scene.world.trace if "sends" in line and "/attempts/" in line and "request_lost" in line]
    assert lost, "the confirmation was to be lost"


def test_all_beats_lost_are_a_dead_worker(scene: Scene) -> None:
    """The control: the store does notice one that is not heard."""
    scene.lose(4.0, 30.0, request_lost=1.0)
    scene.run(lambda: scene.held_for(40.0))
    assert scene.lost() == ["worker_lost"]


def test_a_runner_claims_nothing_before_the_store_knows_it(scene: Scene) -> None:
    scene.lose(0.0, 8.0, request_lost=0.6, reset_before=0.4)
    scene.server.start()
    runner = SimulatedRunner(scene.around, RunnerPlan(1, 0.0), "runner")
    scene.world.after(0.1, runner.start)
    scene.world.run(until=lambda: False, at_most=30.0)
    answers = [line.partition(": ")[2] for line in scene.world.trace if "runner#1: " in line]
    known = answers.index("hears 200 to /agl/v1/workers/runner")
    assert known > 1, "the first beat was to be lost"
    claims = [number for number, line in enumerate(answers) if "dequeue" in line]
    assert claims
    assert known < claims[0]
