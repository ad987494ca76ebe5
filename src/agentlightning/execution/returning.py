"""Workers that have left, on a machine that stays: which of them may come back to the run that they were in."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from agentlightning.errors import AgentLightningError
from agentlightning.execution.slots import Slot
from agentlightning.store.base import LightningStore

__all__ = ["away", "welcome"]

_log = logging.getLogger(__name__)
_ASK_SECONDS = 2.0

_LEAVES = frozenset({"drain", "stop", "gone"})
"""The outcomes of a runner that did not leave because it had done its share."""


def away(slots: Sequence[Slot]) -> list[Slot]:
    """Those whose runner has left, and would work on if it could."""
    return [slot for slot in slots if slot.state == "ended" and slot.outcome and slot.outcome.word in _LEAVES]


async def welcome(store: LightningStore, slots: Sequence[Slot]) -> list[str]:
    """Names of those that are not, or not any more, asked to leave; none, if the store cannot be asked.

    A run that comes to its end never takes back what it has asked; an operator may.
    """
    try:
        async with asyncio.timeout(_ASK_SECONDS):
            workers = await asyncio.gather(*(store.get_worker_by_id(slot.name) for slot in slots))
    except (TimeoutError, AgentLightningError, NotImplementedError) as error:
        _log.debug("cannot tell who is asked to leave: %s", error)
        return []
    return [
        slot.name for slot, worker in zip(slots, workers, strict=True) if worker is None or worker.directive is None
    ]
