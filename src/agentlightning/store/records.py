"""Rows as the public records that callers see.

Rows were validated when they were written, so records are built without validating them again. This module and
``json_records`` offer the same functions, which ``Shown`` lists: a store returns records in the one form or the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar, cast

import msgspec
from msgspec.structs import replace
from pydantic import BaseModel, TypeAdapter

from agentlightning.lifecycle.records import (
    AttemptRow,
    Pair,
    ResourcesRow,
    RolloutPolicy,
    RolloutRow,
    SpanRow,
    WorkerRow,
)
from agentlightning.store.span_json import read_span, span_json
from agentlightning.types import (
    Attempt,
    AttemptedRollout,
    FinishedAttempt,
    NamedResources,
    ResourcesUpdate,
    Rollout,
    RolloutConfig,
    Span,
    Worker,
)
from agentlightning.types.plain_spans import AnySpan, PlainSpan

M = TypeVar("M", bound=BaseModel)

_set = object.__setattr__
_decode = msgspec.json.Decoder().decode
_resources = TypeAdapter[NamedResources](NamedResources)


class Shown(Protocol):
    """The functions that turn rows into what a store returns."""

    def rollout_view(self, rollout: RolloutRow, attempt: AttemptRow | None) -> Any:
        """A rollout, with its latest attempt if there is one."""
        ...

    def attempted_view(self, rollout: RolloutRow, attempt: AttemptRow) -> Any:
        """A rollout with one attempt."""
        ...

    def attempt_view(self, row: AttemptRow) -> Any:
        """An attempt."""
        ...

    def finished_view(self, row: AttemptRow, sequence_ids: Sequence[int], claimed: Iterable[Pair]) -> Any:
        """The result of ``finish_attempt``."""
        ...

    def worker_view(self, row: WorkerRow, stale_attempt_ids: Iterable[str] | None = None) -> Any:
        """A worker."""
        ...

    def resources_view(self, row: ResourcesRow) -> Any:
        """One version of resources."""
        ...

    def span_view(self, row: SpanRow) -> Any:
        """A span."""
        ...


def rollout_view(rollout: RolloutRow, attempt: AttemptRow | None) -> Rollout:
    """A rollout; with its latest attempt, if there is one, it is an ``AttemptedRollout``."""
    return _build(Rollout, _rollout(rollout)) if attempt is None else attempted_view(rollout, attempt)


def attempted_view(rollout: RolloutRow, attempt: AttemptRow) -> AttemptedRollout:
    """A rollout with one attempt."""
    return _build(AttemptedRollout, {**_rollout(rollout), "attempt": attempt_view(attempt)})


def attempt_view(row: AttemptRow) -> Attempt:
    """An attempt."""
    return _build(Attempt, attempt_fields(row, _decode))


def finished_view(row: AttemptRow, sequence_ids: Sequence[int], claimed: Iterable[Pair]) -> FinishedAttempt:
    """An attempt that was finished, the sequence ids of its last spans, and the rollouts that were claimed."""
    return _build(
        FinishedAttempt,
        {
            "attempt": attempt_view(row),
            "sequence_ids": list(sequence_ids),
            "claimed": [attempted_view(*pair) for pair in claimed],
        },
    )


def worker_view(row: WorkerRow, stale_attempt_ids: Iterable[str] | None = None) -> Worker:
    """A worker; ``stale_attempt_ids`` only in the reply to its heartbeat."""
    return _build(Worker, worker_fields(row, stale_attempt_ids, _decode))


def resources_view(row: ResourcesRow) -> ResourcesUpdate:
    """One version of resources."""
    return _build(
        ResourcesUpdate,
        {
            "resources_id": row.resources_id,
            "create_time": row.create_time,
            "update_time": row.update_time,
            "version": row.version,
            "resources": _resources.validate_json(row.resources),
        },
    )


def span_view(row: SpanRow) -> Span:
    """A span."""
    return read_span(span_json(row.rollout_id, row.attempt_id, row.sequence_id, row.body))


def stored_span(span: AnySpan, sequence_id: int) -> AnySpan:
    """The span that a caller gave, as it was stored."""
    if span.sequence_id == sequence_id:
        return span
    if isinstance(span, PlainSpan):
        return replace(span, sequence_id=sequence_id)
    extra = span.__pydantic_extra__
    stored = Span.__new__(Span)
    _set(stored, "__dict__", {**span.__dict__, "sequence_id": sequence_id})
    _set(stored, "__pydantic_fields_set__", {*span.__pydantic_fields_set__, "sequence_id"})
    _set(stored, "__pydantic_extra__", extra and dict(extra))
    _set(stored, "__pydantic_private__", None)
    return cast("AnySpan", stored)


def _build(record: type[M], fields: dict[str, Any]) -> M:
    """``model_construct`` for a dict that has every field: the same record in a quarter of the time."""
    built = record.__new__(record)
    _set(built, "__dict__", fields)
    _set(built, "__pydantic_fields_set__", set(fields))
    _set(built, "__pydantic_extra__", None)
    _set(built, "__pydantic_private__", None)
    return built


def _rollout(row: RolloutRow) -> dict[str, Any]:
    return rollout_fields(row, _decode, _config)


def _config(policy: RolloutPolicy) -> RolloutConfig:
    return _build(
        RolloutConfig,
        {
            "timeout_seconds": policy.timeout_seconds,
            "unresponsive_seconds": policy.unresponsive_seconds,
            "max_attempts": policy.max_attempts,
            "retry_condition": list(policy.retry_condition),
        },
    )


# --- The fields of records -----------------------------------------------------------------------
# ``value`` converts a field that is stored as JSON.


def rollout_fields(
    row: RolloutRow, value: Callable[[bytes], Any], policy: Callable[[RolloutPolicy], Any]
) -> dict[str, Any]:
    """The fields of a rollout, without an attempt."""
    return {
        "rollout_id": row.rollout_id,
        "input": value(row.input),
        "start_time": row.start_time,
        "end_time": row.end_time,
        "mode": row.mode,
        "resources_id": row.resources_id,
        "resources_version": row.resources_version,
        "status": row.status,
        "priority": row.priority,
        "config": policy(row.policy),
        "metadata": None if row.metadata is None else value(row.metadata),
        "reason_code": row.reason_code,
        "reason_message": row.reason_message,
    }


def attempt_fields(row: AttemptRow, value: Callable[[bytes], Any]) -> dict[str, Any]:
    """The fields of an attempt."""
    return {
        "rollout_id": row.rollout_id,
        "attempt_id": row.attempt_id,
        "sequence_id": row.sequence_id,
        "start_time": row.start_time,
        "end_time": row.end_time,
        "status": row.status,
        "worker_id": row.worker_id,
        "last_heartbeat_time": row.last_heartbeat_time,
        "metadata": None if row.metadata is None else value(row.metadata),
        "reason_code": row.reason_code,
        "reason_message": row.reason_message,
    }


def worker_fields(
    row: WorkerRow, stale_attempt_ids: Iterable[str] | None, value: Callable[[bytes], Any]
) -> dict[str, Any]:
    """The fields of a worker."""
    return {
        "worker_id": row.worker_id,
        "status": row.status,
        "heartbeat_stats": None if row.heartbeat_stats is None else value(row.heartbeat_stats),
        "last_heartbeat_time": row.last_heartbeat_time,
        "last_dequeue_time": row.last_dequeue_time,
        "last_busy_time": row.last_busy_time,
        "last_idle_time": row.last_idle_time,
        "current_rollout_id": row.current_rollout_id,
        "current_attempt_id": row.current_attempt_id,
        "lease_seconds": row.lease_seconds,
        "registration": None if row.registration is None else value(row.registration),
        "directive": row.directive,
        "stale_attempt_ids": None if stale_attempt_ids is None else list(stale_attempt_ids),
    }
