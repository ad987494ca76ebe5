"""The resources of rollouts, asked for once: a version never changes."""

from __future__ import annotations

import time
from collections import OrderedDict

from agentlightning.store.base import LightningStore
from agentlightning.types import AttemptedRollout, NamedResources, ResourcesUpdate

__all__ = ["CachedResources"]

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
