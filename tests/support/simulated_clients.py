"""The clients of a simulation: runners with the real worker loop, heartbeat, sender and client, and an algorithm.

Replaced are what the client takes from its process (``Surroundings``) and the threads: heartbeat, sender of spans and
delivery of spooled spans are tasks of the process's event loop. The spool is real, in a folder of the machine.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, cast

from agentlightning.errors import AgentLightningError, StoreUnavailable
from agentlightning.execution import supervisor
from agentlightning.execution.membership import deregister_worker, report_lost
from agentlightning.http.client.client import Surroundings
from agentlightning.http.client.span_delivery import SpanDelivery
from agentlightning.litagent.litagent import AttemptFailed, LitAgent
from agentlightning.runner.attempt import AttemptParts, RolloutResources
from agentlightning.runner.calling import AgentThreads
from agentlightning.runner.failures import FailureLog
from agentlightning.runner.heartbeat import Heartbeat
from agentlightning.runner.worker_loop import WorkerLoop, WorkerSettings
from agentlightning.store.base import LightningStore
from agentlightning.store.sources import IdSource
from agentlightning.tracer.base import DummyTracer
from agentlightning.tracer.recording import Recording
from agentlightning.tracer.sender import DeferredTrace, SpanSender
from agentlightning.types import AttemptedRollout, EnqueueRolloutRequest, PromptTemplate
from agentlightning.types.plain_spans import PlainResource, PlainSpan, PlainStatus
from simulated_ledger import Hardship, Ledger, NotingClient
from simulated_network import Link, SimulatedNetwork
from simulated_scenario import Behaviour, RolloutPlan, RunnerPlan, Scenario
from simulated_time import ProcessLoop, World

__all__ = ["LEASE_SECONDS", "Algorithm", "SimulatedRunner", "Surrounded"]

ADDRESS = "http://server:4747"
LEASE_SECONDS = 15.0
BEAT_SECONDS = 5.0
_RESTART_SECONDS = 1.0
_DEREGISTER_SECONDS = 2.0
_REPORT_SECONDS = supervisor._REPORT_SECONDS  # pyright: ignore[reportPrivateUsage] - how long it really tries

_open: ContextVar[Recording] = ContextVar("simulated_recording")


class Ids:
    """Ids that follow from how many were made before. One for a whole simulation."""

    def __init__(self) -> None:
        self._count = 0

    def mint(self, prefix: str) -> str:
        """The next id."""
        self._count += 1
        return f"{prefix}{self._count:04d}"


class _NoThread:
    """In place of the thread that delivers spans."""

    def join(self, timeout: float | None = None) -> None:
        """The task ends by itself."""


class SimulatedDelivery(SpanDelivery):
    """Delivers spans in a task of the process's event loop.

    Args:
        loop: the process.
        arguments: of a delivery.
    """

    def __init__(self, loop: ProcessLoop, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._process = loop

    def _start(self) -> None:
        if self._thread is None:
            self._thread = thread = cast("Any", _NoThread())
            self._process.call_soon(lambda: self._process.create_task(self._run_in_loop(thread)))

    async def _run_in_loop(self, thread: Any) -> None:
        try:
            await self._deliver_all()
        finally:
            with self._lock:
                self._running = None
                if self._thread is thread:
                    self._thread = None


class Surrounded:
    """What all clients of a simulation share.

    Args:
        world, network, ledger, scenario: of the simulation.
        folder: for the spools of all machines.
    """

    def __init__(
        self, world: World, network: SimulatedNetwork, ledger: Ledger, scenario: Scenario, ids: IdSource, folder: Path
    ) -> None:
        self.world = world
        self.network = network
        self.ledger = ledger
        self.scenario = scenario
        self.ids = ids
        self.folder = folder

    def client(self, loop: ProcessLoop, machine: str) -> NotingClient:
        """A client in this process."""
        world = self.world
        surroundings = Surroundings(
            connections=Link(self.network, loop, machine),
            ids=self.ids,
            monotonic=loop.time,
            chance=world.chance.random,
            delivery=partial(SimulatedDelivery, loop),
            token=lambda: self.ids.mint(""),
        )
        made = NotingClient(ADDRESS, spool_dir=self.folder / machine, surroundings=surroundings)
        made.ledger = self.ledger
        return made


def _span(rollout: AttemptedRollout, number: int) -> PlainSpan:
    attempt_id = rollout.attempt.attempt_id
    return PlainSpan(
        rollout_id=rollout.rollout_id,
        attempt_id=attempt_id,
        sequence_id=0,
        trace_id="0" * 31 + "1",
        span_id=f"{attempt_id}-{number}",
        parent_id=None,
        name="step",
        status=PlainStatus("OK"),
        attributes={"number": number},
        events=[],
        links=[],
        start_time=1.0,
        end_time=2.0,
        context=None,
        parent=None,
        resource=PlainResource({}, ""),
    )


class SimulatedTracer(DummyTracer):
    """Hands what agents record to the real sender.

    Args:
        sender: sends it.
        now: Unix seconds.
    """

    def __init__(self, sender: SpanSender, now: Callable[[], float]) -> None:
        super().__init__()
        self._sender = sender
        self._now = now

    def trace_context(
        self,
        name: str | None = None,
        *,
        store: LightningStore | None = None,
        rollout_id: str | None = None,
        attempt_id: str | None = None,
    ) -> Any:
        """See ``Tracer``."""
        return DeferredTrace(self._scope(store, str(rollout_id), str(attempt_id)), None, self._sender)

    @contextmanager
    def _scope(self, store: LightningStore | None, rollout_id: str, attempt_id: str) -> Generator[Recording]:
        recording = Recording(lambda span, *_: span, store, rollout_id, attempt_id)
        self._sender.open(recording)
        token = _open.set(recording)
        try:
            yield recording
        finally:
            _open.reset(token)
            recording.closed_at = self._now()


class SimulatedAgent(LitAgent[Any]):
    """Does what the scenario says.

    Args:
        around: the simulation.
        store: where it adds spans to.
        name: of its process, for the trace.
    """

    def __init__(self, around: Surrounded, store: LightningStore, name: str) -> None:
        super().__init__()
        self._around = around
        self._store = store
        self._name = name

    async def rollout_async(self, task: Any, resources: Any, rollout: Any) -> Any:
        """See ``LitAgent``."""
        around = self._around
        attempt_id, ledger = rollout.attempt.attempt_id, around.ledger
        ledger.executed[attempt_id] += 1
        ledger.began.setdefault(attempt_id, (around.world.now, self._name))
        around.world.note(self._name, f"begins on {rollout.rollout_id} {attempt_id}")
        tries = around.scenario.rollouts[task["number"]].tries
        await self._behave(tries[min(rollout.attempt.sequence_id, len(tries)) - 1], rollout)

    async def _behave(self, behaviour: Behaviour, rollout: AttemptedRollout) -> None:
        made = self._around.ledger.emitted.setdefault(rollout.attempt.attempt_id, [])
        for step in behaviour.steps:
            if step.do == "work":
                await asyncio.sleep(step.amount)
                continue
            spans = [_span(rollout, len(made) + number) for number in range(int(step.amount))]
            made += [span.span_id for span in spans]
            if step.do == "add":
                await self._store.add_many_spans(spans)
            else:
                for span in spans:
                    _open.get().add(span)
        if behaviour.ends == "raises":
            raise RuntimeError("the agent fails")
        if behaviour.ends == "fails_for_good":
            raise AttemptFailed("no_use", "the agent fails for good", retry=False)


class SimulatedRunner:
    """A runner that its supervisor starts again whenever it has ended.

    Args:
        around: the simulation.
        plan: how it works.
        machine: where it is.
    """

    def __init__(self, around: Surrounded, plan: RunnerPlan, machine: str) -> None:
        self._around = around
        self._plan = plan
        self.machine = machine
        self.name = machine
        """Of the worker; another one after each start of the machine."""
        self.loop: ProcessLoop | None = None
        self._client: NotingClient | None = None
        self._starts = 0
        self._losses = around.ledger.losses.setdefault(machine, [])
        self.supervisor = around.world.process(f"supervisor on {machine}")
        self._told_by = around.client(self.supervisor, machine)

    def start(self) -> None:
        """Start a process, unless there is one."""
        if self.loop is not None or self.supervisor.is_killed:
            return
        world = self._around.world
        self._starts += 1
        self.loop = loop = world.process(f"{self.name}#{self._starts}")
        self._client = self._around.client(loop, self.machine)
        world.note(loop.name, "starts")
        loop.call_soon(lambda: loop.create_task(self._work(loop, self._parts_of(loop))))

    def _parts_of(self, loop: ProcessLoop) -> tuple[AttemptParts, Heartbeat, SpanSender]:
        client, world = self._client, self._around.world
        assert client is not None
        sender = SpanSender(monotonic=loop.time, chance=world.chance.random)
        tracer = SimulatedTracer(sender, lambda: world.now)
        agent = SimulatedAgent(self._around, client, loop.name)
        threads = AgentThreads(self.name)
        parts = AttemptParts(agent, None, client, tracer, (), threads, RolloutResources(client), FailureLog())
        heartbeat = Heartbeat(
            client,
            self.name,
            interval_seconds=BEAT_SECONDS,
            jitter_seconds=0.5,
            lease_seconds=LEASE_SECONDS,
            include_gpu=False,
            in_thread=False,
            registration={"process_space": self.machine, "start_time": world.now},
            statistics=lambda _: {},
            monotonic=loop.time,
            chance=world.chance.random,
        )
        return parts, heartbeat, sender

    async def _work(self, loop: ProcessLoop, made: tuple[AttemptParts, Heartbeat, SpanSender]) -> None:
        parts, heartbeat, sender = made
        sending = asyncio.create_task(sender.work())
        heartbeat.start_in_loop()
        settings = WorkerSettings(self._plan.concurrency, None, 5.0, 600.0)
        try:
            await WorkerLoop(parts, heartbeat, settings, asyncio.Event()).work()
        except StoreUnavailable as error:
            self._around.world.note(self.name, f"fails: {error}")
        heartbeat.stop()
        sending.cancel()
        self.suffers(_DEREGISTER_SECONDS, "ends")
        await deregister_worker(parts.store, self.name)
        await cast("NotingClient", parts.store).close()
        self._around.world.note(self.name, "ends")
        self._around.world.after(0.0, self._exit, loop)

    def _exit(self, loop: ProcessLoop) -> None:
        if self.loop is loop:
            self._bury()
            self._around.world.after(_RESTART_SECONDS, self.start)

    def kill(self, away_seconds: float) -> None:
        """End the process at once, if there is one; its supervisor reports that, and starts it again after a time."""
        if self.loop is None:
            return
        self._around.world.note(self.name, "is killed")
        self.suffers(away_seconds, "killed")
        self._bury()
        self.supervisor.call_soon(lambda: self.supervisor.create_task(self._recover(away_seconds)))

    def lose_machine(self, away_seconds: float) -> None:
        """The machine loses power, and with it the runner and its supervisor, and nobody is told."""
        network, world = self._around.network, self._around.world
        if self.supervisor.is_killed:
            return
        network.cut(self.machine, away_seconds)
        world.kill(self.supervisor)
        if self.loop is not None:
            self.suffers(math.inf, "lost")
            self._bury()
        world.note(self.machine, f"loses power for {away_seconds:.3f} s")
        world.after(away_seconds, self._power_up)

    def _power_up(self) -> None:
        self.name = f"{self.machine}.{self._starts}"
        self.supervisor = self._around.world.process(f"supervisor on {self.machine}")
        self._told_by = self._around.client(self.supervisor, self.machine)
        self.start()

    async def _recover(self, away_seconds: float) -> None:
        """As ``Supervisor`` does: the store is told first, because the next process has the same worker id."""
        error = await report_lost(self._told_by, self.name, "its process has ended", None, _REPORT_SECONDS)
        self._around.world.note(self.supervisor.name, f"has reported {self.name}: {error}")
        await asyncio.sleep(away_seconds)
        self.start()

    def _bury(self) -> None:
        loop, self.loop = self.loop, None
        assert loop is not None
        assert self._client is not None
        self._around.world.kill(loop)
        self._around.ledger.deaths[loop.name] = self._around.world.now
        self._client._spans.abandon()  # pyright: ignore[reportPrivateUsage] - its descriptors go with a process
        self._around.network.client_ended(loop)

    def suffers(self, seconds: float, what: str) -> None:
        """Note that it cannot be heard for some time."""
        now = self._around.world.now
        self._around.ledger.hardships.append(Hardship(now, now + seconds, self.machine, what, self._losses))


class Algorithm:
    """Enqueues the rollouts and waits for their ends.

    Args:
        around: the simulation.
    """

    name = "algorithm"

    def __init__(self, around: Surrounded) -> None:
        self._around = around
        self.loop = around.world.process(self.name)
        self.client = around.client(self.loop, self.name)
        self.rollout_ids: list[str | None] = [None] * len(around.scenario.rollouts)
        """The ids of the rollouts, by their place in the scenario, as far as they are enqueued."""
        self.is_done = False
        self.loop.call_soon(lambda: self.loop.create_task(self._run()))

    async def _run(self) -> None:
        scenario = self._around.scenario
        if scenario.with_resources:
            await self._insist(
                lambda: self.client.add_resources({"prompt": PromptTemplate(template="x", engine="f-string")})
            )
        for number, plan in enumerate(scenario.rollouts):
            await asyncio.sleep(plan.enqueued_after)
            self.rollout_ids[number] = await self._enqueue(number, plan)
        ids = [each for each in self.rollout_ids if each is not None]
        await self._insist(lambda: self.client.wait_for_rollouts(rollout_ids=ids))
        self.is_done = True

    async def _enqueue(self, number: int, plan: RolloutPlan) -> str:
        ledger = self._around.ledger
        request = EnqueueRolloutRequest(input={"number": number}, config=plan.config)

        async def call() -> str:
            ledger.enqueue_calls += 1
            [rollout] = await self.client.enqueue_many_rollouts([request])
            ledger.enqueued.add(rollout.rollout_id)
            return rollout.rollout_id

        return await self._insist(call)

    async def _insist(self, call: Callable[[], Any]) -> Any:
        """Make a call again until the store can be reached."""
        while True:
            try:
                return await call()
            except StoreUnavailable as error:
                self._around.world.note(self.name, f"tries again: {error}")
                await asyncio.sleep(1.0)

    def cancel(self, number: int) -> None:
        """Cancel a rollout."""
        rollout_id = self.rollout_ids[number]
        if rollout_id is not None:
            self.loop.call_soon(lambda: self.loop.create_task(self._cancel(rollout_id)))

    async def _cancel(self, rollout_id: str) -> None:
        try:
            self._around.ledger.saw_end(await self.client.cancel_rollout(rollout_id))
            self._around.ledger.cancelled.add(rollout_id)
        except AgentLightningError as error:  # it has ended otherwise, or the store cannot be reached
            self._around.world.note(self.name, f"could not cancel {rollout_id}: {error.code}")

    def drain(self, worker_id: str) -> None:
        """Ask a worker to end."""
        self.loop.call_soon(lambda: self.loop.create_task(self._direct(worker_id)))

    async def _direct(self, worker_id: str) -> None:
        try:
            await self.client.direct_workers("drain", worker_ids=[worker_id])
        except AgentLightningError as error:
            self._around.world.note(self.name, f"could not drain {worker_id}: {error.code}")
