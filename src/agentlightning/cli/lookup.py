"""From what a user types to the record that is meant."""

from __future__ import annotations

from agentlightning.errors import InvalidValue, NotFound
from agentlightning.store.base import LightningStore
from agentlightning.types import Attempt, AttemptedRollout, Rollout

LATEST = "latest"
"""Stands for the newest; no id may be this."""
_CANDIDATES = 5


async def find_rollout(store: LightningStore, name: str) -> Rollout:
    """A rollout by its id, by a part of it that no other has, or ``latest``: the one enqueued last.

    Raises:
        NotFound: there is none.
        InvalidValue: there are several.
    """
    if name == LATEST:
        page = await store.query_rollouts(sort_order="desc", limit=1)
        if not page.items:
            raise NotFound("the store has no rollouts yet")
        return page.items[0]
    found = await store.get_rollout_by_id(name)
    if found is not None:
        return found
    page = await store.query_rollouts(rollout_id_contains=name, limit=_CANDIDATES)
    if not page.items:
        raise NotFound(f"there is no rollout {name!r}; `agl rollouts ls` lists them")
    if page.total > 1:
        some = ", ".join(each.rollout_id for each in page.items)
        raise InvalidValue(f"{name!r} is part of {page.total} ids: {some}{', …' if page.total > len(page) else ''}")
    return page.items[0]


async def find_begun_rollout(store: LightningStore, name: str) -> Rollout:
    """``find_rollout``, but ``latest`` is the one enqueued last of those that somebody has begun to work on."""
    if name != LATEST:
        return await find_rollout(store, name)
    page = await store.query_rollouts(
        status_in=["preparing", "running", "succeeded", "failed", "requeuing"], sort_order="desc", limit=1
    )
    if not page.items:
        raise NotFound("nobody has begun to work on any rollout yet; `agl status` says why")
    return page.items[0]


async def find_attempt(store: LightningStore, rollout: Rollout, name: str) -> Attempt:
    """An attempt by its id, its number, or ``latest``.

    Raises:
        NotFound: there is none.
    """
    if name == LATEST:
        if not isinstance(rollout, AttemptedRollout):
            raise NotFound(f"rollout {rollout.rollout_id} has no attempts yet; it is {rollout.status}")
        return rollout.attempt
    attempts = await store.query_attempts(rollout.rollout_id)
    for each in attempts:
        if name in (each.attempt_id, str(each.sequence_id)):
            return each
    raise NotFound(
        f"rollout {rollout.rollout_id} has {len(attempts)} attempts, and none is {name!r}; "
        "give its number or id, or `latest`"
    )
