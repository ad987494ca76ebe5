"""Rollouts that an earlier start of a run has left unfinished, and the resources that they are to go on with.

Resources may name addresses of the process that published them: of a proxy, of a model's endpoint. When that
process has died, a rollout that still has them can only fail.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from agentlightning.errors import IllegalMove
from agentlightning.store.base import LightningStore, is_finished
from agentlightning.types import UNSET, NamedResources, ResourcesUpdate, Rollout, RolloutMode, RolloutStatus

_logger = logging.getLogger(__name__)

WAITING: Sequence[RolloutStatus] = ("queuing", "requeuing")
"""In the queue."""

LIVE: Sequence[RolloutStatus] = ("preparing", "running")
"""Claimed, perhaps by somebody who is dead by now."""

_AT_ONCE = 64
"""Changes that are on their way at a time."""


class PinnedResources:
    """Looks up what rollouts were enqueued with. A version never changes, so each is read once.

    Args:
        store: where they are.
    """

    def __init__(self, store: LightningStore) -> None:
        self._store = store
        self._known: dict[tuple[str, int | None], NamedResources] = {}

    async def of(self, rollout: Rollout) -> NamedResources:
        """The resources of a rollout; none if it has none of its own, or the store knows them no more."""
        if rollout.resources_id is None:
            return {}
        key = (rollout.resources_id, rollout.resources_version)
        if key not in self._known:
            found = await self._store.get_resources_by_id(rollout.resources_id, version=rollout.resources_version)
            self._known[key] = {} if found is None else found.resources
        return self._known[key]


async def give_to_leftovers(
    store: LightningStore, run_name: str, resources: Callable[[RolloutMode | None], ResourcesUpdate]
) -> None:
    """Give the unfinished rollouts of a run the resources of this start, unless they have the same already.

    One that is being worked on with others is put back into the queue: what it works with is no more.

    Args:
        store: where they are.
        run_name: what their ids begin with.
        resources: what rollouts of a mode get.
    """
    pinned = PinnedResources(store)
    left = await store.query_rollouts(status_in=[*WAITING, *LIVE], rollout_id_contains=f"{run_name}:")

    async def give(rollout: Rollout) -> None:
        due = resources(rollout.mode)
        if rollout.rollout_id.startswith(f"{run_name}:") and await pinned.of(rollout) != due.resources:
            await change(store, rollout, resources_id=due.resources_id)

    await change_each(left, give)


async def change_each(rollouts: Sequence[Rollout], change: Callable[[Rollout], Awaitable[None]]) -> None:
    """Await ``change`` for every rollout, many at a time."""
    for begin in range(0, len(rollouts), _AT_ONCE):
        await asyncio.gather(*(change(rollout) for rollout in rollouts[begin : begin + _AT_ONCE]))


async def change(store: LightningStore, rollout: Rollout, *, resources_id: str | None = None) -> None:
    """Give an unfinished rollout other resources; put it back into the queue, if it is being worked on.

    One that has ended meanwhile stays as it is.

    Args:
        store: where it is.
        rollout: as it was read.
        resources_id: None: it keeps those that it has.
    """
    live = rollout.status in LIVE
    if live:
        _logger.info("rollout %s was being worked on with what is no more; it is tried again", rollout.rollout_id)
    try:
        await store.update_rollout(
            rollout.rollout_id,
            resources_id=UNSET if resources_id is None else resources_id,
            status="requeuing" if live else UNSET,
            reason_message="what it worked with died with the run's earlier process" if live else None,
        )
    except IllegalMove:
        now = await store.get_rollout_by_id(rollout.rollout_id)
        if now is not None and not is_finished(now) and now.status == rollout.status:
            raise
