"""The resources of a rollout: from the store, or while that is out of reach, the declared defaults of the runner."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from agentlightning.errors import InvalidValue, StoreClosed, StoreForked, StoreUnavailable
from agentlightning.store.base import LightningStore
from agentlightning.types import AttemptedRollout, NamedResources, Resource, ResourcesUpdate, ResourceUnion

DEFAULTS_AFTER_SECONDS = 30.0
"""How long resources are asked for until the defaults take their place."""
_CACHED_VERSIONS = 16
"""Resources versions kept in memory. Rollouts that run at the same time mostly share one."""
_LATEST_SECONDS = 1.0
"""How long the latest resources are reused for rollouts that were enqueued without any."""

_logger = logging.getLogger(__name__)


def checked_defaults(given: Mapping[str, ResourceUnion] | None) -> dict[str, ResourceUnion] | None:
    """Return a copy. Raises ``InvalidValue`` unless it has resources by name."""
    if given is None:
        return None
    values: dict[str, Any] = dict(given)
    wrong = {name: value for name, value in values.items() if not isinstance(value, Resource)}
    if wrong:
        raise InvalidValue(f"default_resources has {wrong!r:.200}; give resources by name, such as an agl.LLM(…)")
    return values


class RolloutResources:
    """Looks up the resources of rollouts in a store, and keeps the last versions, which never change.

    Args:
        store: where they are.
        defaults: what takes their place while the store is out of reach; None: nothing does.
    """

    def __init__(self, store: LightningStore, defaults: Mapping[str, ResourceUnion] | None = None) -> None:
        self._store = store
        self._defaults = defaults
        self._latest: NamedResources = {}
        self._latest_until = 0.0
        self._known: OrderedDict[tuple[str, int], asyncio.Task[ResourcesUpdate | None]] = OrderedDict()
        """Look-ups. One serves all rollouts that begin meanwhile, which after a training step want the same version."""

    async def find_or_default(self, rollout: AttemptedRollout) -> tuple[NamedResources | None, str | None]:
        """(what ``find`` returns, None); or (the defaults, why it is those) if the store is out of reach too long.

        Raises:
            AgentLightningError: what the store raises, where no default helps, or there is none.
        """
        if self._defaults is None:
            return await self.find(rollout), None
        try:
            async with asyncio.timeout(DEFAULTS_AFTER_SECONDS):
                return await self.find(rollout), None
        except (StoreClosed, StoreForked):
            raise
        except (StoreUnavailable, TimeoutError) as error:
            which = "the latest resources" if rollout.resources_id is None else f"resources {rollout.resources_id!r}"
            version = "" if rollout.resources_version is None else f" version {rollout.resources_version}"
            told = str(error) or f"no answer within {DEFAULTS_AFTER_SECONDS:g} s"
            ids = rollout.rollout_id, rollout.attempt.attempt_id
            why = f"{which}{version} could not be had: {told}"
            _logger.warning("rollout %s, attempt %s runs with default resources: %s", *ids, why)
            return dict(self._defaults), why

    async def find(self, rollout: AttemptedRollout) -> NamedResources | None:
        """The resources that the rollout was enqueued with; None if they are not in the store.

        A rollout that was enqueued when there were none gets the latest of now (up to a second old), or an empty
        dict. Each call returns a dict of its own.
        """
        resources_id, version = rollout.resources_id, rollout.resources_version
        if resources_id is None:
            clock = asyncio.get_running_loop().time
            if clock() >= self._latest_until:
                latest = await self._store.get_latest_resources()
                self._latest = {} if latest is None else latest.resources
                self._latest_until = clock() + _LATEST_SECONDS
            return dict(self._latest)
        if version is None:  # a store that does not keep versions: take the newest
            found = await self._store.get_resources_by_id(resources_id)
        else:
            found = await self._find_version(resources_id, version)
        return None if found is None else dict(found.resources)

    async def _find_version(self, resources_id: str, version: int) -> ResourcesUpdate | None:
        key, found = (resources_id, version), None
        looking = self._known.get(key)
        if looking is None:
            looking = asyncio.create_task(self._store.get_resources_by_id(resources_id, version=version))
            self._known[key] = looking
            if len(self._known) > _CACHED_VERSIONS:
                self._known.popitem(last=False)
        try:
            found = await asyncio.shield(looking)
        finally:
            if found is None and self._known.get(key) is looking:  # the next rollout asks again
                del self._known[key]
        return found
