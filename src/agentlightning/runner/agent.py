"""``LitAgentRunner``: works on the rollouts of a store, many at once."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, TypeVar

from agentlightning.errors import InvalidValue
from agentlightning.litagent.litagent import Hook, LitAgent
from agentlightning.runner.attempt import ABORTED, AttemptRun, Outcome, Stage
from agentlightning.runner.base import Runner, StopEvent, StopWatch
from agentlightning.runner.calling import AgentThreads
from agentlightning.runner.heartbeat import Heart, HeartSettings
from agentlightning.runner.identity import registration, worker_name
from agentlightning.runner.worker_loop import Shift, ShiftSettings
from agentlightning.store.base import LightningStore
from agentlightning.tracer.base import Tracer
from agentlightning.types import AttemptedRollout, NamedResources, ResourcesUpdate, Rollout, RolloutMode

# --- The resources of rollouts, asked for once: a version never changes ---

_KEPT = 16
"""Versions in memory. Rollouts that run at the same time were mostly enqueued with the same one."""

_LATEST_SECONDS = 1.0
"""How long the latest resources count as such, for rollouts that were enqueued without any."""


class CachedResources:
    """Looks resources up in a store, and remembers the last versions.

    Args:
        store: where they are.
    """

    def __init__(self, store: LightningStore) -> None:
        self._store = store
        self._latest: NamedResources = {}
        self._latest_until = 0.0
        self._known: OrderedDict[tuple[str, int], NamedResources] = OrderedDict()

    async def of(self, rollout: AttemptedRollout) -> NamedResources | None:
        """The resources that the rollout was enqueued with; None if they are not in the store.

        A rollout that was enqueued when there were none gets the latest there are now (or were a second ago), or an
        empty dict.
        """
        resources_id, version = rollout.resources_id, rollout.resources_version
        if resources_id is None:
            return await self._of_now()
        if version is None:  # a store that does not say which one: then what it has now
            return _content(await self._store.get_resources_by_id(resources_id))
        key = (resources_id, version)
        if key in self._known:
            self._known.move_to_end(key)
            return dict(self._known[key])
        found = _content(await self._store.get_resources_by_id(resources_id, version=version))
        if found is not None:
            self._known[key] = found
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
            return dict(found)
        return None

    async def _of_now(self) -> NamedResources:
        if time.monotonic() >= self._latest_until:
            self._latest = _content(await self._store.get_latest_resources()) or {}
            self._latest_until = time.monotonic() + _LATEST_SECONDS
        return dict(self._latest)


def _content(update: ResourcesUpdate | None) -> NamedResources | None:
    return None if update is None else update.resources


# ---

T = TypeVar("T")


class LitAgentRunner(Runner[T]):
    """Claims rollouts, runs the agent on up to ``concurrency`` of them at once, and reports how each ended.

    Agents that are coroutines share the runner's event loop; plain ones run in threads. What an agent raises fails
    its attempt, with the exception kept; whether there is another attempt the store decides.

    Args:
        tracer: records what agents do.
        max_rollouts: end after so many; None: never by itself.
        poll_interval: seconds between two claims when the store could not be asked, or does not wait by itself.
        heartbeat_interval: seconds between two signs of life.
        interval_jitter: by how many seconds the interval varies, so that many workers do not beat in step.
        heartbeat_launch_mode: ``thread`` goes on while an agent keeps the loop busy; ``asyncio`` needs no thread.
        heartbeat_include_gpu: report GPUs with each beat, by ``nvidia-smi``.
        concurrency: how many rollouts to work on at once.
        lease_seconds: after how many seconds without a sign of life the store counts this worker as lost; default:
            three intervals, at least 15.
        unreachable_seconds: give up when the store could not be asked for so long; None: never.
        labels: what operators shall see of this worker.
    """

    def __init__(
        self,
        tracer: Tracer,
        max_rollouts: int | None = None,
        poll_interval: float = 5.0,
        heartbeat_interval: float = 10.0,
        interval_jitter: float = 0.5,
        heartbeat_launch_mode: Literal["asyncio", "thread"] = "thread",
        heartbeat_include_gpu: bool = False,
        *,
        concurrency: int = 1,
        lease_seconds: float | None = None,
        unreachable_seconds: float | None = 600.0,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        if concurrency < 1 or (max_rollouts is not None and max_rollouts < 0):
            raise InvalidValue(
                f"concurrency is {concurrency} and max_rollouts {max_rollouts}; give at least 1, and 0 or more"
            )
        if heartbeat_interval <= 0 or poll_interval < 0 or interval_jitter < 0:
            raise InvalidValue("poll_interval, heartbeat_interval and interval_jitter are times; they must be positive")
        if heartbeat_launch_mode not in ("asyncio", "thread"):
            raise InvalidValue(f"heartbeat_launch_mode {heartbeat_launch_mode!r} is neither 'thread' nor 'asyncio'")
        self._tracer = tracer
        self._shift_settings = ShiftSettings(concurrency, max_rollouts, poll_interval, unreachable_seconds)
        self._beat_every, self._jitter = heartbeat_interval, interval_jitter
        self._lease_seconds = max(15.0, 3 * heartbeat_interval) if lease_seconds is None else lease_seconds
        self._in_thread, self._include_gpu = heartbeat_launch_mode == "thread", heartbeat_include_gpu
        self._labels = dict(labels or {})
        self._agent: LitAgent[T] | None = None
        self._hooks: Sequence[Hook] = ()
        self._worker_name: str | None = None
        self._stage: Stage | None = None
        self._heart: Heart | None = None

    # --- Life ------------------------------------------------------------------------------------

    def init(self, agent: LitAgent[T], *, hooks: Sequence[Hook] | None = None, **kwargs: Any) -> None:
        """Take the agent and the hooks, and set up tracer and hooks."""
        super().init(agent, **kwargs)
        self._agent = agent
        self._hooks = tuple(hooks or ())
        agent.set_runner(self)
        self._tracer.init()
        for hook in self._hooks:
            hook.init()

    def init_worker(self, worker_id: int, store: LightningStore, **kwargs: Any) -> None:
        """Get ready in a worker: from now on its heart beats, and the store knows it.

        Raises:
            RuntimeError: ``init`` was not called.
        """
        super().init_worker(worker_id, store, **kwargs)
        agent = self.get_agent()
        self._worker_name = worker_name(worker_id)
        self._tracer.init_worker(worker_id, store)
        for hook in self._hooks:
            hook.init_worker(worker_id)
        threads = AgentThreads(f"agent-{worker_id}")
        self._stage = Stage(agent, self, store, self._tracer, self._hooks, threads, CachedResources(store))
        settings = HeartSettings(
            interval_seconds=self._beat_every,
            jitter_seconds=self._jitter,
            lease_seconds=self._lease_seconds,
            include_gpu=self._include_gpu,
            in_thread=self._in_thread,
            registration=registration(self._labels),
        )
        self._heart = Heart(store, self._worker_name, settings)
        self._heart.start()

    def teardown_worker(self, worker_id: int, *args: Any, **kwargs: Any) -> None:
        """Stop the heart, send the spans that are left, and release everything of this worker."""
        heart, self._heart = self._heart, None
        stage, self._stage = self._stage, None
        if heart is not None:
            heart.stop()
        if stage is not None:
            stage.threads.close()
            for hook in self._hooks:
                hook.teardown_worker(worker_id)
            self._tracer.teardown_worker(worker_id)
        self._worker_name = None
        super().teardown_worker(worker_id)

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Let go of agent and hooks."""
        if self._agent is not None:
            for hook in self._hooks:
                hook.teardown()
            self._tracer.teardown()
        self._agent, self._hooks = None, ()
        super().teardown()

    # --- What there is ---------------------------------------------------------------------------

    @property
    def tracer(self) -> Tracer:
        """What records what agents do."""
        return self._tracer

    def get_agent(self) -> LitAgent[T]:
        """The agent.

        Raises:
            RuntimeError: ``init`` was not called.
        """
        if self._agent is None:
            raise RuntimeError("this runner has no agent; call init(agent) first, or use run_context")
        return self._agent

    def get_store(self) -> LightningStore:
        """Where rollouts come from.

        Raises:
            RuntimeError: ``init_worker`` was not called.
        """
        return self._ready()[0].store

    def get_worker_id(self) -> str:
        """The name of this worker in the store, unique across machines.

        Raises:
            RuntimeError: ``init_worker`` was not called.
        """
        self._ready()
        return self._worker_name or ""

    # --- Work ------------------------------------------------------------------------------------

    async def iter(self, *, event: StopEvent | None = None) -> None:
        """Work on the rollouts of the queue.

        It ends when ``event`` is set, when the store asks this worker to drain, or after ``max_rollouts``: then
        what is being worked on is finished first. When the store asks it to stop, or the call is cancelled, that is
        given up: those attempts are reported as failed, ``aborted``.

        Raises:
            StoreUnreachable: the store could not be asked for ``unreachable_seconds``.
            AgentLightningError: the store refuses to be asked, for instance because of a wrong key.
            RuntimeError: ``init_worker`` was not called.
        """
        stage, heart = self._ready()
        heart.start_in_loop()
        with StopWatch(event) as watch:
            await Shift(stage, heart, self.get_worker_id(), self._shift_settings, watch.stopped).work()

    async def step(
        self,
        input: T,
        *,
        resources: NamedResources | None = None,
        mode: RolloutMode | None = None,
        event: StopEvent | None = None,
    ) -> Rollout:
        """Run the agent once, on this input, past the queue; for debugging.

        Raises:
            Exception: what the agent raised, after its attempt was reported as failed.
            RuntimeError: ``init_worker`` was not called.
        """
        stage, heart = self._ready()
        heart.start_in_loop()
        store = stage.store
        resources_id = None if resources is None else (await store.add_resources(resources)).resources_id
        rollout = await store.start_rollout(input, mode, resources_id, worker_id=self.get_worker_id())
        heart.hold(rollout)
        run = AttemptRun(stage, rollout)
        with StopWatch(event) as watch:
            watching = asyncio.create_task(_give_up_on(watch.stopped, run))
            try:
                outcome = await run.run()
            finally:
                heart.release(run.attempt_id)
                watching.cancel()
                with suppress(asyncio.CancelledError):
                    await watching
        if outcome.error is not None:
            raise outcome.error
        return await store.get_rollout_by_id(rollout.rollout_id) or rollout

    def _ready(self) -> tuple[Stage, Heart]:
        if self._stage is None or self._heart is None:
            raise RuntimeError("this runner is in no worker; call init_worker(index, store) first, or use run_context")
        return self._stage, self._heart


async def _give_up_on(stopped: asyncio.Event, run: AttemptRun) -> None:
    await stopped.wait()
    run.give_up(Outcome("failed", ABORTED, "the event given to step was set"))
