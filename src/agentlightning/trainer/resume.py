"""A run is taken up again: what its earlier start left in the store is handed out only when it can be worked on.

Its LLM proxy died with it, and this start's may be elsewhere. So rollouts that were being worked on behind the old
one go back into the queue, before their workers can report that they failed of it; nothing is handed out until the
algorithm asks for rollouts, because before that its models may not be there; and by then what waits is told where
the proxy is now.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import psutil

from agentlightning.algorithm.resume import LIVE, WAITING, PinnedResources, change, change_each
from agentlightning.runner.identity import process_space
from agentlightning.store.base import LightningStore
from agentlightning.store.engine import EngineStore
from agentlightning.trainer.wrappers import Forwarding
from agentlightning.types import (
    EnqueueRolloutRequest,
    NamedResources,
    ProxyLLM,
    ResourceUnion,
    Rollout,
    Worker,
    WorkerStatus,
)

if TYPE_CHECKING:
    from agentlightning.proxy.llm_proxy import LLMProxy

_READS = ("get_rollout_by_id", "query_rollouts", "get_latest_attempt", "query_attempts", "query_spans", "statistics")
"""By which an algorithm sees how far its rollouts are, if it does not wait for them."""


def hold_until_asked(store: LightningStore) -> None:
    """Hand out nothing before the algorithm asks, if the store is ours: one elsewhere may serve others, too."""
    if isinstance(store, EngineStore):
        store.hold_claims()


async def requeue_cut_off(store: LightningStore) -> None:
    """Put those that are being worked on behind a proxy back into the queue: the proxy is no more.

    Their workers hear of it with their next heartbeat, and what they report is too late.
    """
    pinned = PinnedResources(store)

    async def requeue(rollout: Rollout) -> None:
        resources = await pinned.of(rollout)
        if any(isinstance(resource, ProxyLLM) for resource in resources.values()):
            await change(store, rollout)

    await change_each(await store.query_rollouts(status_in=LIVE), requeue)


def with_taking_up(store: LightningStore, proxy: LLMProxy | None) -> LightningStore:
    """The same store; before it is first asked for rollouts, those that wait are told where the proxy is now."""
    return cast("LightningStore", _TakingUp(store, proxy))


class _TakingUp(Forwarding):
    def __init__(self, store: LightningStore, proxy: LLMProxy | None) -> None:
        super().__init__(store)
        self._proxy = proxy
        self._taken_up = False
        self._taking_up = asyncio.Lock()
        self._seen: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return self._watched(name, found) if name in _READS and not self._taken_up else found

    async def enqueue_rollout(self, *args: Any, **more: Any) -> Rollout:
        await self._take_up()
        return await self._store.enqueue_rollout(*args, **more)

    async def enqueue_many_rollouts(self, rollouts: Sequence[EnqueueRolloutRequest]) -> Sequence[Rollout]:
        await self._take_up()
        return await self._store.enqueue_many_rollouts(rollouts)

    async def wait_for_rollouts(self, *, rollout_ids: Sequence[str], timeout: float | None = None) -> list[Rollout]:
        await self._take_up()
        return await self._store.wait_for_rollouts(rollout_ids=rollout_ids, timeout=timeout)

    def _watched(self, name: str, read: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """The same read. Who asks the same question again is waiting for something to happen."""

        async def ask(*args: Any, **more: Any) -> Any:
            question = repr((name, args, more))
            if question in self._seen:
                await self.wait_for_rollouts(rollout_ids=[], timeout=0)
            self._seen.add(question)
            return await read(*args, **more)

        return ask

    async def _take_up(self) -> None:
        if self._taken_up:
            return
        async with self._taking_up:
            proxy = self._proxy
            if proxy is not None and not self._taken_up:
                if not proxy.is_running():  # then nothing can be behind it yet
                    return
                await _readdress(self._store, proxy)
            self._taken_up = True


async def _readdress(store: LightningStore, proxy: LLMProxy) -> None:
    """Tell rollouts that wait where the proxy is: new resources, like theirs but for that."""
    pinned = PinnedResources(store)
    waiting = await store.query_rollouts(status_in=WAITING)
    moved: dict[tuple[str | None, int | None], str] = {}
    latest = await store.get_latest_resources()
    for rollout in waiting:
        key = (rollout.resources_id, rollout.resources_version)
        if key not in moved:
            before = await pinned.of(rollout)
            after = _moved(before, proxy)
            moved[key] = "" if after == before else (await store.add_resources(after)).resources_id
    if latest is not None and any(moved.values()):  # what is the latest stays so, for who asks for that
        await store.update_resources(latest.resources_id, _moved(latest.resources, proxy))

    async def give(rollout: Rollout) -> None:
        resources_id = moved[rollout.resources_id, rollout.resources_version]
        if resources_id:
            await change(store, rollout, resources_id=resources_id)

    await change_each(waiting, give)


def _moved(resources: NamedResources, proxy: LLMProxy) -> NamedResources:
    """The resources, with the proxy's address of now for the models that it serves."""
    return {name: _here(resource, proxy) for name, resource in resources.items()}


def _here(resource: ResourceUnion, proxy: LLMProxy) -> ResourceUnion:
    if not isinstance(resource, ProxyLLM) or resource.model not in proxy.models:
        return resource
    return proxy.as_resource(model=resource.model, sampling_parameters=resource.sampling_parameters)


# --- What an earlier start of a run has left behind: workers whose processes are gone, and whic ---

_logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
_ALIVE: Sequence[WorkerStatus] = ("busy", "idle")


async def watch_leftovers(store: LightningStore, *, patience_seconds: float = 60.0) -> None:
    """Call ``end_leftovers`` as long as something may be left of an earlier start.

    Runners whose parent was killed notice that within seconds, so they may outlive it, and see this start.

    Args:
        store: where the workers are.
        patience_seconds: when to leave those that still live to their leases.
    """
    until = time.monotonic() + patience_seconds
    left = {worker.worker_id for worker in await store.query_workers(status_in=_ALIVE)}
    while left and time.monotonic() < until:
        left &= await end_leftovers(store)
        await asyncio.sleep(_LOOK_SECONDS)


async def end_leftovers(store: LightningStore) -> set[str]:
    """End the attempts of workers that certainly are dead, so that a resumed run need not wait for their leases.

    Those are workers that registered in the same process space as ours (the same boot of this machine, the same PID
    namespace) and whose process id is nobody's now. All others are left to their leases.

    Returns:
        The ids of the workers that are not dead, as far as is known.
    """
    alive: set[str] = set()
    for worker in await store.query_workers(status_in=_ALIVE):
        if not _is_gone(worker):
            alive.add(worker.worker_id)
            continue
        attempts = await store.report_worker_lost(
            worker.worker_id, message="its process was gone when the run was taken up again"
        )
        _logger.info("worker %s of an earlier start is gone; %d attempts ended", worker.worker_id, len(attempts))
    return alive


def _is_gone(worker: Worker) -> bool:
    told = worker.registration or {}
    here, pid = process_space(), told.get("pid")
    return here is not None and told.get("process_space") == here and type(pid) is int and not psutil.pid_exists(pid)
