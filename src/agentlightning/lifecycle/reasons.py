"""The reason codes that the store itself gives. A worker may report its own codes beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

COMPLETED: Final = "completed"
"""Reported as succeeded."""
REPORTED: Final = "reported"
"""Reported as ended otherwise, without a code of the reporter's own."""
TIMEOUT: Final = "timeout"
"""Ran longer than ``timeout_seconds``."""
UNRESPONSIVE: Final = "unresponsive"
"""Silent for longer than ``unresponsive_seconds``."""
UNCONFIRMED: Final = "unconfirmed"
"""Claimed, but its worker never gave a sign of life."""
RELEASED: Final = "released"
"""Given back by its worker before the work began; it does not count as an attempt."""
WORKER_LOST: Final = "worker_lost"
"""Its worker died, or its worker's lease ran out."""
WORKER_LEFT: Final = "worker_left"
"""Of a worker, never of an attempt: its runner has ended in order."""
RESOURCE_EXHAUSTED: Final = "resource_exhausted"
"""Its memory, or another quota of its worker, was used up: the worker was killed, or the agent got no more."""
SUPERSEDED: Final = "superseded"
"""Replaced by a newer attempt that was asked for explicitly."""
REQUEUED: Final = "requeued"
"""Its rollout was put back into the queue on request."""
CANCELLED: Final = "cancelled"
"""Its rollout was cancelled."""
POISON: Final = "poison"
"""The rollout was handed out too often without ever being confirmed: it may kill its workers."""

STORE_ONLY: Final = frozenset({UNCONFIRMED, RELEASED})
"""Codes that no caller may give, because they decide whether an attempt counts and whether it can be revived."""

BY_STATUS: Final[Mapping[str, str]] = {"succeeded": COMPLETED, "cancelled": CANCELLED, "requeuing": REQUEUED}
"""The code for a status that a caller sets without a code of its own; ``REPORTED`` for all others."""
