"""All that callers can see of a store, to compare before and after."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from pydantic import BaseModel

from agentlightning.store.base import LightningStore
from agentlightning.types import AttemptedRollout

__all__ = ["assert_sound", "dump", "unchanged"]


async def dump(store: LightningStore) -> dict[str, Any]:
    """Every record, as plain values."""
    rollouts = await store.query_rollouts()
    resources = await store.query_resources()
    statistics = dict(await store.statistics())
    del statistics["uptime"], statistics["host"]
    state: dict[str, Any] = {
        "statistics": statistics,
        "rollouts": _plain(rollouts),
        "resources": _plain(resources),
        "latest_resources": _plain([latest] if (latest := await store.get_latest_resources()) else []),
        "workers": _plain(await store.query_workers()),
    }
    for each in resources:
        state[f"versions of {each.resources_id}"] = _plain(await store.query_resource_versions(each.resources_id))
    for each in rollouts:
        if isinstance(each, AttemptedRollout):
            state[f"attempts of {each.rollout_id}"] = _plain(await store.query_attempts(each.rollout_id))
            state[f"spans of {each.rollout_id}"] = _plain(await store.query_spans(each.rollout_id))
    return state


@asynccontextmanager
async def unchanged(store: LightningStore) -> AsyncIterator[None]:
    """The block leaves everything in the store as it was."""
    before = await dump(store)
    yield
    assert await dump(store) == before


async def assert_sound(store: LightningStore) -> None:
    """The store's own consistency check finds nothing."""
    assert (await store.verify()).violations == []


def _plain(records: Any) -> list[dict[str, Any]]:
    return [record.model_dump() for record in records if isinstance(record, BaseModel)]
