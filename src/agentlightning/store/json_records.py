"""Rows as the JSON of the public records. A server sends these bytes, without building the records first.

The functions and fields are those of ``records``; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from agentlightning.lifecycle.records import (
    AttemptRow,
    Pair,
    ResourcesRow,
    RolloutPolicy,
    RolloutRow,
    SpanRow,
    WorkerRow,
)
from agentlightning.store.records import attempt_fields, rollout_fields, worker_fields
from agentlightning.store.span_json import span_json

_encode = msgspec.json.Encoder().encode
_raw = msgspec.Raw


def rollout_view(rollout: RolloutRow, attempt: AttemptRow | None) -> bytes:
    """A rollout, with its latest attempt, if there is one."""
    fields = rollout_fields(rollout, _raw, _policy)
    if attempt is not None:
        fields["attempt"] = attempt_fields(attempt, _raw)
    return _encode(fields)


def attempted_view(rollout: RolloutRow, attempt: AttemptRow) -> bytes:
    """A rollout with one attempt."""
    return rollout_view(rollout, attempt)


def attempt_view(row: AttemptRow) -> bytes:
    """An attempt."""
    return _encode(attempt_fields(row, _raw))


def finished_view(row: AttemptRow, sequence_ids: Sequence[int], claimed: Iterable[Pair]) -> bytes:
    """An attempt that was finished, the sequence ids of its last spans, and the rollouts that were claimed."""
    rollouts = [_raw(attempted_view(*pair)) for pair in claimed]
    return _encode({"attempt": attempt_fields(row, _raw), "sequence_ids": list(sequence_ids), "claimed": rollouts})


def worker_view(row: WorkerRow, stale_attempt_ids: Iterable[str] | None = None) -> bytes:
    """A worker; ``stale_attempt_ids`` only in the reply to its heartbeat."""
    return _encode(worker_fields(row, stale_attempt_ids, _raw))


def resources_view(row: ResourcesRow) -> bytes:
    """One version of resources."""
    return _encode(
        {
            "resources_id": row.resources_id,
            "create_time": row.create_time,
            "update_time": row.update_time,
            "version": row.version,
            "resources": _raw(row.resources),
        }
    )


def span_view(row: SpanRow) -> bytes:
    """A span."""
    return span_json(row.rollout_id, row.attempt_id, row.sequence_id, row.body)


def _policy(policy: RolloutPolicy) -> RolloutPolicy:
    return policy  # a struct with the fields of RolloutConfig
