"""``LitAgentRunner``: runs an agent on the rollouts of a store, many at once."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

from agentlightning.errors import InvalidValue
from agentlightning.litagent.litagent import Hook, LitAgent
from agentlightning.runner.attempt import AttemptParts, AttemptRun
from agentlightning.runner.base import Runner, StopEvent, stop_watch
from agentlightning.runner.calling import AgentThreads
from agentlightning.runner.failures import FailureLog
from agentlightning.runner.heartbeat import Heartbeat, registration, system_statistics, worker_name
from agentlightning.runner.main_thread import MAIN_THREAD
from agentlightning.runner.resources import RolloutResources, checked_defaults
from agentlightning.runner.vital_signs import VITAL_SIGNS
from agentlightning.runner.worker_loop import WorkerLoop, WorkerSettings
from agentlightning.store.base import LightningStore
from agentlightning.tracer.base import Tracer
from agentlightning.types import ResourceUnion, Rollout, RolloutMode

T = TypeVar("T")


class LitAgentRunner(Runner[T]):
    """Claims rollouts, runs the agent on up to ``concurrency`` of them at once, and reports how each ended.

    Agents that are coroutines share the runner's event loop. A plain function runs in the main thread of its process
    if ``concurrency`` is 1 and a strategy or ``agl runner`` has made the process, else in a thread. An exception of an
    agent fails its attempt and is kept in the trace; whether there is another attempt is decided by the store.

    While agents take at most 0.1 s each, the runner claims one rollout ahead, so that it need not wait for the next.

    Args:
        tracer: records what agents do.
        max_rollouts: end after so many; None: never by itself.
        poll_interval: seconds between two claims when the store is unreachable, or does not wait by itself.
        heartbeat_interval: seconds between two heartbeats.
        interval_jitter: by how many seconds the interval varies, so that many workers do not beat in step.
        heartbeat_launch_mode: ``thread`` keeps beating while an agent blocks the loop; ``asyncio`` needs no thread.
        heartbeat_include_gpu: report GPUs with each beat, by ``nvidia-smi``.
        concurrency: how many rollouts to work on at once.
        lease_seconds: after how many seconds without a heartbeat the store counts this worker as lost; default:
            three intervals, at least 15.
        unreachable_seconds: fail when the store was unreachable for so long; None: never.
        labels: shown to operators with this worker.
        default_resources: used for a rollout whose resources cannot be had within 30 s, because the server is out of
            reach. The attempt is marked (``used_default_resources``). None: it fails, ``missing_resources``.

    Raises:
        InvalidValue: an argument is out of range; the message names it.
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
        default_resources: Mapping[str, ResourceUnion] | None = None,
    ) -> None:
        super().__init__()
        if concurrency < 1 or (max_rollouts is not None and max_rollouts < 0):
            raise InvalidValue(
                f"concurrency is {concurrency} and max_rollouts {max_rollouts}; give at least 1, and 0 or more"
            )
        if heartbeat_interval <= 0 or poll_interval < 0 or interval_jitter < 0:
            raise InvalidValue(
                "poll_interval, heartbeat_interval and interval_jitter are seconds; give positive numbers"
            )
        if heartbeat_launch_mode not in ("asyncio", "thread"):
            raise InvalidValue(f"heartbeat_launch_mode {heartbeat_launch_mode!r} is neither 'thread' nor 'asyncio'")
        self._tracer = tracer
        self._worker_settings = WorkerSettings(concurrency, max_rollouts, poll_interval, unreachable_seconds)
        self._make_heartbeat = partial(
            Heartbeat,
            interval_seconds=heartbeat_interval,
            jitter_seconds=interval_jitter,
            lease_seconds=max(15.0, 3 * heartbeat_interval) if lease_seconds is None else lease_seconds,
            include_gpu=heartbeat_include_gpu,
            in_thread=heartbeat_launch_mode == "thread",
            statistics=system_statistics,
        )
        self._labels = dict(labels or {})
        self.default_resources = checked_defaults(default_resources)
        """Used where those of a rollout cannot be had; None: there are none."""
        self._agent: LitAgent[T] | None = None
        self._hooks: Sequence[Hook] = ()
        self._parts: AttemptParts | None = None
        self._heartbeat: Heartbeat | None = None

    # --- Setup and teardown ----------------------------------------------------------------------

    def init(self, agent: LitAgent[T], *, hooks: Sequence[Hook] | None = None, **kwargs: Any) -> None:
        """Take the agent and the hooks, and set up tracer and hooks."""
        super().init(agent, **kwargs)
        self._agent = agent
        self._hooks = tuple(hooks or ())
        agent.set_runner(self)
        self._tracer.init()
        for hook in self._hooks:
            hook.init()

    def wants_main_thread(self, agent: LitAgent[T]) -> bool:
        """Whether ``agent`` is a plain function, and called on one rollout at a time."""
        return self._worker_settings.concurrency == 1 and not agent.is_async()

    def init_worker(self, worker_id: int, store: LightningStore, **kwargs: Any) -> None:
        """Get ready in a worker, and start its heartbeat, which registers it with the store.

        Raises:
            RuntimeError: ``init`` was not called.
        """
        super().init_worker(worker_id, store, **kwargs)
        agent = self.get_agent()
        self._tracer.init_worker(worker_id, store)
        for hook in self._hooks:
            hook.init_worker(worker_id)
        main, signs = MAIN_THREAD.get(), VITAL_SIGNS.get()
        for each in (MAIN_THREAD, VITAL_SIGNS):  # they are of this runner, and not of one that its agent may make
            each.set(None)
        threads = AgentThreads(f"agent-{worker_id}", main if self.wants_main_thread(agent) else None)
        resources = RolloutResources(store, self.default_resources)
        self._parts = AttemptParts(agent, self, store, self._tracer, self._hooks, threads, resources, FailureLog())
        self._heartbeat = self._make_heartbeat(
            store, worker_name(worker_id), registration=registration(self._labels), signs=signs
        )
        self._heartbeat.start()

    def teardown_worker(self, worker_id: int, *args: Any, **kwargs: Any) -> None:
        """Stop the heartbeat, send the remaining spans, and release everything of this worker."""
        heartbeat, self._heartbeat = self._heartbeat, None
        parts, self._parts = self._parts, None
        if heartbeat is not None:
            heartbeat.stop()
        if parts is not None:
            parts.threads.close()
            for hook in self._hooks:
                hook.teardown_worker(worker_id)
            self._tracer.teardown_worker(worker_id)
        super().teardown_worker(worker_id)

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Tear down hooks and tracer, and drop the agent."""
        if self._agent is not None:
            for hook in self._hooks:
                hook.teardown()
            self._tracer.teardown()
        self._agent, self._hooks = None, ()
        super().teardown()

    @property
    def tracer(self) -> Tracer:
        """The tracer that records what agents do."""
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
        """The store that rollouts come from.

        Raises:
            RuntimeError: ``init_worker`` was not called.
        """
        return self._in_worker()[0].store

    def get_worker_id(self) -> str:
        """The name of this worker in the store, unique across machines.

        Raises:
            RuntimeError: ``init_worker`` was not called.
        """
        return self._in_worker()[1].worker_id

    # --- Work ------------------------------------------------------------------------------------

    async def iter(self, *, event: StopEvent | None = None) -> None:
        """Work on the rollouts of the queue.

        It ends when ``event`` is set, when the store asks this worker to drain, or after ``max_rollouts``; agents at
        work finish first. When the store asks the worker to stop, or this call is cancelled, agents at work are
        cancelled, and their attempts are reported as failed, ``aborted``. Rollouts that were claimed and not begun
        are given back at once in each case.

        Raises:
            StoreUnreachable: the store was unreachable for ``unreachable_seconds``.
            AgentLightningError: the store refuses claims, for instance because of a wrong key.
            RuntimeError: ``init_worker`` was not called.
        """
        parts, heartbeat = self._in_worker()
        heartbeat.start_in_loop()
        with stop_watch(event) as stopped:
            await WorkerLoop(parts, heartbeat, self._worker_settings, stopped).work()

    async def step(
        self,
        input: T,
        *,
        resources: Mapping[str, ResourceUnion] | None = None,
        mode: RolloutMode | None = None,
        event: StopEvent | None = None,
    ) -> Rollout:
        """Run the agent once, on this input, past the queue; for debugging.

        Raises:
            Exception: what the agent raised, after its attempt was reported as failed.
            RuntimeError: ``init_worker`` was not called.
        """
        parts, heartbeat = self._in_worker()
        heartbeat.start_in_loop()
        store = parts.store
        resources_id = None if resources is None else (await store.add_resources(resources)).resources_id
        rollout = await store.start_rollout(input, mode, resources_id, worker_id=self.get_worker_id())
        heartbeat.begin(rollout)
        run = AttemptRun(parts, rollout)
        with stop_watch(event) as stopped:
            giving_up = asyncio.create_task(stopped.wait())
            message = "the event given to step was set"
            giving_up.add_done_callback(lambda task: task.cancelled() or run.give_up(message))
            try:
                outcome = await run.work()
                await run.report(outcome)
            finally:
                heartbeat.end(run.attempt_id)
                giving_up.cancel()
        if outcome.error is not None:
            raise outcome.error
        return await store.get_rollout_by_id(rollout.rollout_id) or rollout

    def _in_worker(self) -> tuple[AttemptParts, Heartbeat]:
        if self._parts is None or self._heartbeat is None:
            raise RuntimeError("this runner is in no worker; call init_worker(index, store) first, or use run_context")
        return self._parts, self._heartbeat
