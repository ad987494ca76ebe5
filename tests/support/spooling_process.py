"""A runner that cannot reach its server: it accepts spans until it is killed, and says how many."""

from __future__ import annotations

import asyncio
import sys

from agentlightning.http.client.client import LightningStoreClient
from agentlightning.http.client.retry import Resilience
from agentlightning.types import Span
from fresh_process import say

__all__ = ["numbered", "spool_without_end"]


def numbered(rollout_id: str, attempt_id: str, number: int) -> Span:
    """A span that tells its place."""
    return Span.from_attributes(
        attributes={"n": number}, rollout_id=rollout_id, attempt_id=attempt_id, span_id=f"{number:016x}"
    )


def spool_without_end(url: str, spool_dir: str, rollout_id: str, attempt_id: str) -> None:
    async def run() -> None:
        impatient = Resilience(spool_after_seconds=0.05)
        client = LightningStoreClient(url, spool_dir=spool_dir, resilience=impatient)
        number = 0
        while True:
            await client.add_span(numbered(rollout_id, attempt_id, number))
            number += 1
            say(number)

    asyncio.run(run())
    sys.exit("unreachable")
