"""Heartbeats for runners that live but cannot speak, because an agent holds the interpreter of their process.

The supervisor sends them from its own process, so an agent cannot delay them. What it says for a runner is only what
the kernel knows (the process is there, and is not stopped) and what the runner had left in shared memory. Whether the
agent gets anywhere is not said: the limit for that is ``timeout_seconds``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection

from agentlightning.errors import AgentLightningError
from agentlightning.execution.process_tree import is_running
from agentlightning.execution.slots import Slot
from agentlightning.runner.vital_signs import Times
from agentlightning.store.base import LightningStore

_log = logging.getLogger(__name__)

_LONGEST_LOOK_SECONDS = 0.25
_SILENT_SECONDS = 1.0
"""The heartbeat of a runner shows itself four times in this time."""
_BEAT_SECONDS = 5.0
"""How long a beat may take; one that has not arrived by then is given up."""


class StandIn:
    """Watches the runners in these slots, in the loop in which it was started, and beats for those that are silent."""

    def __init__(self, slots: Collection[Slot], store: LightningStore) -> None:
        self._slots = slots
        self._store = store
        self._spoken: dict[str, float] = {}
        """When the last beat for a runner began; empty again when it speaks for itself."""
        self._beats: dict[str, asyncio.Task[None]] = {}
        """Those that are under way."""

    def start(self) -> None:
        """Begin to watch, until the loop ends."""
        self._watching = asyncio.get_running_loop().create_task(self._watch(), name="agl-stand-in")

    def speaks_for(self, name: str) -> bool:
        """Whether a beat for this runner is under way."""
        return name in self._beats

    async def fall_silent(self, name: str) -> None:
        """Wait until no beat for this runner is under way: one that came later would bring a lost worker back."""
        if name in self._beats:
            await asyncio.wait([self._beats[name]])

    async def _watch(self) -> None:
        while True:
            looks = [self._look(slot) for slot in self._slots]
            await asyncio.sleep(min([_LONGEST_LOOK_SECONDS, *looks]))

    def _look(self, slot: Slot) -> float:
        """Beat for a runner if that is due; return within how many seconds to look again."""
        times = None if slot.signs is None else slot.signs.times()
        if times is None or slot.state != "running":
            return _LONGEST_LOOK_SECONDS
        now = time.monotonic()
        if now - times.alive < min(_SILENT_SECONDS, times.interval_seconds):
            self._spoken.pop(slot.name, None)
        elif not self.speaks_for(slot.name) and is_running(slot.pid):
            spoken = self._spoken.get(slot.name)
            if spoken is None:
                _log.info("%s (pid %d) is silent, but its process lives; beating for it", slot.name, slot.pid)
            if spoken is None or now - spoken >= times.interval_seconds:
                self._spoken[slot.name] = now
                self._beats[slot.name] = task = asyncio.create_task(self._beat(slot, times))
                task.add_done_callback(lambda _: self._beats.pop(slot.name))
        return times.interval_seconds / 2

    async def _beat(self, slot: Slot, times: Times) -> None:
        assert slot.signs is not None
        try:
            async with asyncio.timeout(_BEAT_SECONDS):
                attempt_ids = slot.signs.attempt_ids()
                await self._store.update_worker(slot.name, attempt_ids=attempt_ids, lease_seconds=times.lease_seconds)
        except (AgentLightningError, OSError, TimeoutError) as error:
            _log.warning("the store does not know that %s lives: %s: %s", slot.name, type(error).__name__, error)
