"""How a run is resumed after its process died: what is done to the rollouts that it left in the store.

The parts of the story, in the order in which they matter when a process resumes a run:

1. `prepare_to_resume`, before anybody can reach the store. Nothing of the queue is handed out yet, because the models
   that the rollouts need are not served yet. Attempts of workers that died with the earlier process are ended now, so
   that nobody waits for their leases. Rollouts in progress behind the earlier process's LLM proxy go back into the
   queue before their workers can report that they failed: it was the proxy that failed them.
2. `end_lost_workers` again and again: runners here notice the death of their parent some seconds later.
3. The algorithm loads its checkpoint (`Run.load_checkpoint`) and serves its models. If it publishes resources with a
   new address, `reassign_unfinished` gives them to the unfinished rollouts.
4. The algorithm asks for its rollouts. `Run.rollout_id` follows from name, step and index, so existing ones are found
   instead of made again. Before the first request is passed on, `ProxyMove` tells the rollouts in the queue where the
   LLM proxy is now; the request itself makes the store hand out rollouts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

import psutil

from agentlightning.algorithm.model_proxy import ModelProxy
from agentlightning.algorithm.run import Run
from agentlightning.errors import IllegalMove
from agentlightning.store.base import LightningStore, is_finished
from agentlightning.types import (
    UNSET,
    NamedResources,
    ProxyLLM,
    ResourcesUpdate,
    ResourceUnion,
    Rollout,
    RolloutMode,
    RolloutStatus,
    Worker,
    WorkerStatus,
)

_logger = logging.getLogger(__name__)

_QUEUED: Sequence[RolloutStatus] = ("queuing", "requeuing")
_CLAIMED: Sequence[RolloutStatus] = ("preparing", "running")
_ALIVE: Sequence[WorkerStatus] = ("busy", "idle")
_UPDATES_AT_ONCE = 64
_CHECK_SECONDS = 0.5


async def prepare_to_resume(store: LightningStore, process_space: str | None, *, behind_proxy: bool) -> None:
    """Make the store ready for a run that may be resumed, before anybody else can reach it.

    Args:
        store: where an earlier start of the run may have left rollouts.
        process_space: see ``end_lost_workers``.
        behind_proxy: whether the run has an LLM proxy, which is new in this process.
    """
    # Only a store of this process can hold back claims. One elsewhere may serve other runs, too.
    hold_claims = getattr(store, "hold_claims", None)
    if hold_claims is not None:
        hold_claims()
    await end_lost_workers(store, process_space)
    if behind_proxy:
        resources_of = _resources_reader(store)

        async def requeue(rollout: Rollout) -> None:
            if any(isinstance(each, ProxyLLM) for each in (await resources_of(rollout)).values()):
                await _update(store, rollout)

        await _for_each(await store.query_rollouts(status_in=_CLAIMED), requeue)


async def end_lost_workers(store: LightningStore, process_space: str | None) -> set[str]:
    """End the attempts of workers whose processes are certainly gone, and return the ids of the other workers.

    A process is certainly gone if its worker registered in the same process space (the same boot of this machine, the
    same PID namespace) and nobody has its process id now. All others are left to their leases.

    Args:
        store: where the workers are registered.
        process_space: of this process; None if it is unknown.
    """
    others: set[str] = set()
    for worker in await store.query_workers(status_in=_ALIVE):
        pid = local_pid(worker, process_space)
        if pid is None or psutil.pid_exists(pid):
            others.add(worker.worker_id)
            continue
        attempts = await store.report_worker_lost(
            worker.worker_id, message="its process was gone when the run was resumed"
        )
        _logger.info("worker %s of an earlier start is gone; %d attempts ended", worker.worker_id, len(attempts))
    return others


def local_pid(worker: Worker, process_space: str | None) -> int | None:
    """Return the worker's process id if it is valid in this process space; None if it is not, or is unknown."""
    told = worker.registration or {}
    is_local = process_space is not None and told.get("process_space") == process_space
    return told["pid"] if is_local and type(told.get("pid")) is int else None


async def watch_lost_workers(store: LightningStore, process_space: str | None, timeout_seconds: float = 60.0) -> None:
    """Call ``end_lost_workers`` repeatedly while workers of an earlier start may still be dying.

    Args:
        store, process_space: see ``end_lost_workers``.
        timeout_seconds: workers that live longer than that are left to their leases.
    """
    until = time.monotonic() + timeout_seconds
    earlier = {worker.worker_id for worker in await store.query_workers(status_in=_ALIVE)}
    while earlier and time.monotonic() < until:
        earlier &= await end_lost_workers(store, process_space)
        await asyncio.sleep(_CHECK_SECONDS)


async def reassign_unfinished(
    store: LightningStore, run: Run | None, resources: Callable[[RolloutMode | None], ResourcesUpdate]
) -> None:
    """Give the unfinished rollouts of a run the resources of this start, unless theirs are equal.

    Resources may have addresses of the process that published them, and a rollout with the address of a dead process
    can only fail. One that is in progress with other resources is put back into the queue.

    Args:
        store: where they are.
        run: whose rollouts; None: there is no earlier start.
        resources: returns what rollouts of a mode get.
    """
    if run is None:
        return
    prefix = run.rollout_id(0, 0).removesuffix("0:0")
    resources_of = _resources_reader(store)

    async def reassign(rollout: Rollout) -> None:
        new = resources(rollout.mode)
        if rollout.rollout_id.startswith(prefix) and await resources_of(rollout) != new.resources:
            await _update(store, rollout, resources_id=new.resources_id)

    found = await store.query_rollouts(status_in=[*_QUEUED, *_CLAIMED], rollout_id_contains=prefix)
    await _for_each(found, reassign)


class ProxyMove:
    """Tells the rollouts in the queue where the LLM proxy is now, once, as soon as it runs.

    Args:
        store: where they are.
        proxy: None if the run has none.
    """

    def __init__(self, store: LightningStore, proxy: ModelProxy | None) -> None:
        self._store = store
        self._proxy = proxy
        self._lock = asyncio.Lock()
        self.done = False

    async def ensure(self) -> None:
        """Do it, unless it is done. While the proxy does not run there is nothing to tell: no rollout can need it."""
        if self.done:
            return
        async with self._lock:
            if self.done or (self._proxy is not None and not self._proxy.is_running()):
                return
            if self._proxy is not None:
                await self._readdress(self._proxy)
            self.done = True

    async def _readdress(self, proxy: ModelProxy) -> None:
        """Publish a copy of each version of resources that has an old address, and give it to its rollouts."""
        store, resources_of = self._store, _resources_reader(self._store)
        queued = await store.query_rollouts(status_in=_QUEUED)
        new_ids: dict[tuple[str | None, int | None], str | None] = {}
        latest = await store.get_latest_resources()
        for rollout in queued:
            version = (rollout.resources_id, rollout.resources_version)
            if version not in new_ids:
                before = await resources_of(rollout)
                after = _readdressed(before, proxy)
                new_ids[version] = None if after == before else (await store.add_resources(after)).resources_id
        if latest is not None and any(new_ids.values()):
            # The copies are now the latest resources, and the algorithm may have published newer ones on purpose.
            await store.update_resources(latest.resources_id, _readdressed(latest.resources, proxy))

        async def reassign(rollout: Rollout) -> None:
            resources_id = new_ids[rollout.resources_id, rollout.resources_version]
            if resources_id is not None:
                await _update(store, rollout, resources_id=resources_id)

        await _for_each(queued, reassign)


def _readdressed(resources: NamedResources, proxy: ModelProxy) -> NamedResources:
    """Return the resources with the proxy's present address for the models that it serves."""
    models = {entry["model_name"] for entry in proxy.model_list}

    def readdress(resource: ResourceUnion) -> ResourceUnion:
        if not isinstance(resource, ProxyLLM) or resource.model not in models:
            return resource
        return proxy.as_resource(model=resource.model, sampling_parameters=resource.sampling_parameters)

    return {name: readdress(resource) for name, resource in resources.items()}


def _resources_reader(store: LightningStore) -> Callable[[Rollout], Awaitable[NamedResources]]:
    """Return what reads the resources of a rollout; empty if it has none of its own, or they were deleted."""
    known: dict[tuple[str, int | None], NamedResources] = {}  # a version never changes, so each is read once

    async def read(rollout: Rollout) -> NamedResources:
        if rollout.resources_id is None:
            return {}
        key = (rollout.resources_id, rollout.resources_version)
        if key not in known:
            found = await store.get_resources_by_id(rollout.resources_id, version=rollout.resources_version)
            known[key] = {} if found is None else found.resources
        return known[key]

    return read


async def _for_each(rollouts: Sequence[Rollout], update: Callable[[Rollout], Awaitable[None]]) -> None:
    for begin in range(0, len(rollouts), _UPDATES_AT_ONCE):
        await asyncio.gather(*(update(rollout) for rollout in rollouts[begin : begin + _UPDATES_AT_ONCE]))


async def _update(store: LightningStore, rollout: Rollout, *, resources_id: str | None = None) -> None:
    """Give an unfinished rollout other resources, and put it back into the queue if it is in progress.

    Args:
        store: where it is.
        rollout: as it was read. If it has ended meanwhile, it stays as it is.
        resources_id: None: it keeps its resources.
    """
    in_progress = rollout.status in _CLAIMED
    if in_progress:
        _logger.info(
            "rollout %s depends on the run's earlier process, which is gone; it is retried", rollout.rollout_id
        )
    try:
        await store.update_rollout(
            rollout.rollout_id,
            resources_id=UNSET if resources_id is None else resources_id,
            status="requeuing" if in_progress else UNSET,
            reason_message="what it depended on died with the run's earlier process" if in_progress else None,
        )
    except IllegalMove:
        now = await store.get_rollout_by_id(rollout.rollout_id)
        if now is not None and not is_finished(now) and now.status == rollout.status:
            raise
