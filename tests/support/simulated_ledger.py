"""What was promised to whom in a simulation, and what each process was in for, as the world outside saw it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from agentlightning.http.client.client import LightningStoreClient
from agentlightning.types import AttemptedRollout, AttemptEnd, FinishedAttempt, Rollout
from agentlightning.types.plain_spans import SpanOrPlain

__all__ = ["Hardship", "Ledger", "NotingClient"]


class Hardship(NamedTuple):
    """A time in which somebody could not be heard, or not well."""

    since: float
    until: float
    machine: str
    what: str
    losses: list[float]
    """When its signs of life were lost on a bad network; shared with all that it has."""


class Ledger:
    """Filled in while a simulation runs, and compared with the store at its end."""

    def __init__(self) -> None:
        self.enqueue_calls = 0
        """How many rollouts callers wanted to be enqueued."""
        self.enqueued: set[str] = set()
        """Those that the store said it has."""
        self.claims: dict[str, int] = {}
        """How many rollouts each claim asked for, by its ``request_id``."""
        self.executed = Counter[str]()
        """How often agents began on each attempt, by id."""
        self.began: dict[str, tuple[float, str]] = {}
        """When an agent began on it first, and in which process."""
        self.deaths: dict[str, float] = {}
        """When each process of a runner that has ended did so."""
        self.emitted: dict[str, list[str]] = {}
        """The ids of the spans of each attempt, in the order in which its agent made them."""
        self.accepted: set[tuple[str, str]] = set()
        """(attempt, span) of the spans that the client said are safe."""
        self.finished: dict[str, AttemptEnd] = {}
        """How attempts ended, as far as the store has confirmed that to the runner."""
        self.ends_seen: dict[str, str] = {}
        """The final states of rollouts that somebody was told."""
        self.cancelled: set[str] = set()
        """Rollouts whose cancellation the store has confirmed."""
        self.changed_ends: list[str] = []
        """Final states that changed after somebody was told."""
        self.hardships: list[Hardship] = []
        self.losses: dict[str, list[float]] = {}
        """When signs of life of each machine were lost."""

    def saw_end(self, rollout: Rollout) -> None:
        """Somebody was told of a rollout that has ended."""
        before = self.ends_seen.setdefault(rollout.rollout_id, rollout.status)
        if before != rollout.status:
            self.changed_ends.append(f"{rollout.rollout_id} was {before} and is {rollout.status}")


class NotingClient(LightningStoreClient):
    """A client that notes what it was promised."""

    ledger: Ledger

    async def finish_attempt(
        self, rollout_id: str, attempt_id: str, status: AttemptEnd, spans: Sequence[SpanOrPlain] = (), **more: Any
    ) -> FinishedAttempt:
        """See ``LightningStore``."""
        if more.get("request_id") is not None:
            self.ledger.claims[more["request_id"]] = more["claim_limit"]
        finished = await super().finish_attempt(rollout_id, attempt_id, status, spans, **more)
        self.ledger.finished[attempt_id] = status
        self.ledger.accepted.update((attempt_id, span.span_id) for span in spans)
        return finished

    async def dequeue_many_rollouts(self, **more: Any) -> Sequence[AttemptedRollout]:
        """See ``LightningStore``."""
        self.ledger.claims[more["request_id"]] = more["limit"]
        return await super().dequeue_many_rollouts(**more)

    async def add_many_spans(self, spans: Sequence[Any]) -> Sequence[Any]:
        """See ``LightningStore``."""
        stored = await super().add_many_spans(spans)
        self.ledger.accepted.update((span.attempt_id, span.span_id) for span in spans)
        return stored

    async def wait_for_rollouts(self, *, rollout_ids: Sequence[str], timeout: float | None = None) -> list[Rollout]:
        """See ``LightningStore``."""
        ended = await super().wait_for_rollouts(rollout_ids=rollout_ids, timeout=timeout)
        for rollout in ended:
            self.ledger.saw_end(rollout)
        return ended
