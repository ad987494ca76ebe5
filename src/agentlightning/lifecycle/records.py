"""The rows that the state machine reads and writes: immutable values, one class a table.

A row is what a backend stores. It differs from the public records of ``agentlightning.types``
in two ways: JSON stays encoded (nothing here looks into it), and it carries what only the
store needs: versions for conditional writes, lease clocks, counters.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import msgspec

from agentlightning.lifecycle.states import CLAIMABLE, FINAL, LIVE
from agentlightning.types import AttemptStatus, RolloutMode, RolloutStatus, WorkerDirective, WorkerStatus


class Moment(NamedTuple):
    """One reading of the store's two clocks, taken together."""

    wall: float
    """Unix seconds. What records show to people; may jump."""
    lease: float
    """Seconds that only ever go forward at the speed of real time. What deadlines are compared with."""


class Reason(NamedTuple):
    """Why a rollout or an attempt ended: a stable code and a sentence for people."""

    code: str
    message: str


class RolloutPolicy(msgspec.Struct, frozen=True, gc=False):
    """How a rollout is retried and when its attempts expire: ``RolloutConfig`` as an immutable value."""

    timeout_seconds: float | None = None
    unresponsive_seconds: float | None = None
    max_attempts: int = 1
    retry_condition: tuple[AttemptStatus, ...] = ()


class Claim(NamedTuple):
    """Who wants an attempt, under which id, and how soon they must confirm it."""

    attempt_id: str
    worker_id: str | None = None
    request_id: str | None = None
    """The caller's id of the claim. A repeat with the same id gets the same attempts."""
    confirm_seconds: float | None = None
    """How long the attempt may stay without a sign of life before it is handed out again; None: for ever."""
    digest: bytes = b""
    """Digest of the request, where the caller gave an id for it."""


class RolloutRow(msgspec.Struct, frozen=True, gc=False):
    """One rollout: a unit of work and where it stands."""

    seq: int
    """Insert sequence, issued by the backend: the FIFO order. 0 until inserted."""
    version: int
    """Raised by every write; a write is conditional on it."""
    rollout_id: str
    status: RolloutStatus
    priority: int
    input: bytes
    mode: RolloutMode | None
    resources_id: str | None
    resources_version: int | None
    policy: RolloutPolicy
    metadata: bytes | None
    start_time: float
    end_time: float | None
    reason_code: str | None
    reason_message: str | None
    attempts: int
    """Attempts made so far; the newest has this ``sequence_id``."""
    redeliveries: int
    """How many of them were handed out and never confirmed; these do not use up ``max_attempts``."""
    latest_attempt_id: str | None
    digest: bytes
    """Digest of the request that made it, to tell a repeat from a reused id."""
    releases: int = 0
    """How many of its attempts were given back before their work began; these do not use up ``max_attempts``."""
    suspects: str = ""
    """The workers that were handed it, gave a sign of life after that, and never confirmed it, separated by spaces.
    Each is there once, and once more for each time that it was reported dead."""

    @property
    def counted_attempts(self) -> int:
        """How many attempts count against ``max_attempts``: not those that were never confirmed or were given back."""
        return self.attempts - self.redeliveries - self.releases

    @property
    def claimable(self) -> bool:
        """Whether it waits in the queue."""
        return self.status in CLAIMABLE

    @property
    def final(self) -> bool:
        """Whether it has reached its one terminal state."""
        return self.status in FINAL


class AttemptRow(msgspec.Struct, frozen=True, gc=False):
    """One execution of a rollout."""

    seq: int
    """Insert sequence, issued by the backend. 0 until inserted."""
    version: int
    rollout_id: str
    attempt_id: str
    sequence_id: int
    """1 for the first attempt of its rollout, then one more each: the fencing token."""
    status: AttemptStatus
    start_time: float
    end_time: float | None
    worker_id: str | None
    last_heartbeat_time: float | None
    metadata: bytes | None
    reason_code: str | None
    reason_message: str | None
    request_id: str | None
    confirm_seconds: float | None
    """The confirmation lease, while the claim is unconfirmed; None once there was a sign of life."""
    started_lease: float
    """When it started, on the lease clock."""
    beaten_lease: float
    """Last sign of life (or the start), on the lease clock."""
    deadline: float | None
    """No later than the moment, on the lease clock, at which it expires; None: it never does.

    A heartbeat does not move it (that would write an index each time). When it has passed,
    ``expire`` looks again and either ends the attempt or sets the true one.
    """
    span_sequence: int
    """The highest span ``sequence_id`` issued or seen."""
    digest: bytes = b""
    """Digest of the request that made it, to tell a repeat from a reused id."""

    @property
    def live(self) -> bool:
        """Whether it still holds its rollout."""
        return self.status in LIVE


class Pair(NamedTuple):
    """A rollout and one of its attempts (the latest, where nothing else is said)."""

    rollout: RolloutRow
    attempt: AttemptRow


class Holder(NamedTuple):
    """What is known of the worker of a live attempt."""

    last_heard: float = -math.inf
    """When it, or one of its attempts, gave its last sign of life, on the lease clock."""
    died: bool = False
    """Whether it was reported dead."""
    at_work: Collection[str] | None = None
    """Of one that died: ids of the attempts on which it was at work. None: nobody knows."""


class WorkerRow(msgspec.Struct, frozen=True, gc=False):
    """One runner process as the store sees it."""

    seq: int
    version: int
    worker_id: str
    status: WorkerStatus = "unknown"
    heartbeat_stats: bytes | None = None
    last_heartbeat_time: float | None = None
    last_dequeue_time: float | None = None
    last_busy_time: float | None = None
    last_idle_time: float | None = None
    current_rollout_id: str | None = None
    current_attempt_id: str | None = None
    lease_seconds: float | None = None
    """How long the worker may be silent before its attempts are lost; None: for ever (0.3 workers)."""
    beaten_lease: float = 0.0
    deadline: float | None = None
    """As in ``AttemptRow``: a lower bound of the moment at which it counts as lost."""
    registration: bytes | None = None
    """What it said of itself when it began, as canonical JSON."""
    directive: WorkerDirective | None = None
    """What it has been asked to do; while there is one, it gets no work."""
    heard_lease: float = 0.0
    """When it, or an attempt of it that has ended, was last heard of, on the lease clock. Unlike ``beaten_lease``, a
    rollout that it gets when it has waited does not count: its connection may be gone."""
    reason_code: str | None = None
    """Why it is ``unknown``; None where it is not, or where nobody knows."""
    reason_message: str | None = None


class ResourcesRow(msgspec.Struct, frozen=True, gc=False):
    """One immutable version of named resources."""

    seq: int
    """Insert sequence over all resources: the newest row is ``latest``. 0 until inserted."""
    resources_id: str
    version: int
    """1, 2, 3 … without a gap, within one ``resources_id``."""
    create_time: float
    """When version 1 was made."""
    update_time: float
    """When this version was made."""
    resources: bytes
    request_id: str | None
    digest: bytes


class SpanRow(NamedTuple):
    """One trace event of an attempt."""

    attempt_seq: int
    rollout_id: str
    attempt_id: str
    sequence_id: int
    issued: bool
    """Whether the store issued the ``sequence_id`` (else the caller gave it)."""
    span_id: str
    body: bytes
    """The span as a JSON object, without ``rollout_id``, ``attempt_id`` and ``sequence_id``."""
