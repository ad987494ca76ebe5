"""Rows as what a store returns: the public records, or their JSON.

Rows were validated when they were written, so records are built without validating them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar, cast, overload

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
_encode = msgspec.json.Encoder().encode


class Views(Sequence[Any]):
    """Rows as what a store returns, each made when it is asked for, so that a long list is never there in the whole.

    Args:
        rows: rows, or tuples of the arguments of ``view``.
        view: a method of ``Shown``.
    """

    def __init__(self, rows: Sequence[Any], view: Callable[..., Any]) -> None:
        self._rows = rows
        self._view = view

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return Views(self._rows[index], self._view)
        row = self._rows[index]
        return self._view(*row) if isinstance(row, tuple) else self._view(row)


class Shown(NamedTuple):
    """A form in which a store returns rows: ``RECORDS`` or ``JSON``."""

    whole: Callable[[type[BaseModel], dict[str, Any]], Any]
    """Makes what is returned from the fields of a record."""
    part: Callable[[type[BaseModel], dict[str, Any]], Any]
    """Makes a record that is a field of another one."""
    value: Callable[[bytes], Any]
    """Converts a field that is stored as JSON; so do the next three, for fields with a type of their own."""
    config: Callable[[RolloutPolicy], Any] | None
    resources: Callable[[bytes], Any]
    span: Callable[[bytes], Any]

    def rollout_view(self, rollout: RolloutRow, attempt: AttemptRow | None) -> Any:
        """A rollout; with an attempt, if there is one, it is an ``AttemptedRollout``."""
        return _rollout(self, self.whole, rollout, attempt)

    def views(self, rows: Sequence[Any], view: Callable[..., Any]) -> Sequence[Any]:
        """Many of them at once, in one of these forms; as JSON each is made only when it is asked for."""
        found = Views(rows, view)
        return found if self.whole is _as_json else list(found)

    def attempt_view(self, row: AttemptRow) -> Any:
        """An attempt."""
        return self.whole(Attempt, _attempt_fields(row, self.value))

    def finished_view(self, row: AttemptRow, sequence_ids: Sequence[int], claimed: Iterable[Pair]) -> Any:
        """An attempt that was finished, the sequence ids of its last spans, and the rollouts that were claimed."""
        fields = {
            "attempt": self.part(Attempt, _attempt_fields(row, self.value)),
            "sequence_ids": list(sequence_ids),
            "claimed": [_rollout(self, self.part, *pair) for pair in claimed],
        }
        return self.whole(FinishedAttempt, fields)

    def worker_view(self, row: WorkerRow, stale_attempt_ids: Iterable[str] | None = None) -> Any:
        """A worker; ``stale_attempt_ids`` only in the reply to its heartbeat."""
        fields = {
            "worker_id": row.worker_id,
            "status": row.status,
            "heartbeat_stats": None if row.heartbeat_stats is None else self.value(row.heartbeat_stats),
            "last_heartbeat_time": row.last_heartbeat_time,
            "last_dequeue_time": row.last_dequeue_time,
            "last_busy_time": row.last_busy_time,
            "last_idle_time": row.last_idle_time,
            "current_rollout_id": row.current_rollout_id,
            "current_attempt_id": row.current_attempt_id,
            "lease_seconds": row.lease_seconds,
            "registration": None if row.registration is None else self.value(row.registration),
            "directive": row.directive,
            "reason_code": row.reason_code,
            "reason_message": row.reason_message,
            "stale_attempt_ids": None if stale_attempt_ids is None else list(stale_attempt_ids),
        }
        return self.whole(Worker, fields)

    def resources_view(self, row: ResourcesRow) -> Any:
        """One version of resources."""
        fields = {
            "resources_id": row.resources_id,
            "create_time": row.create_time,
            "update_time": row.update_time,
            "version": row.version,
            "resources": self.resources(row.resources),
        }
        return self.whole(ResourcesUpdate, fields)

    def span_view(self, row: SpanRow) -> Any:
        """A span."""
        return self.span(span_json(row.rollout_id, row.attempt_id, row.sequence_id, row.body))


def _rollout(
    form: Shown, make: Callable[[type[BaseModel], Any], Any], row: RolloutRow, latest: AttemptRow | None
) -> Any:
    fields = {
        "rollout_id": row.rollout_id,
        "input": form.value(row.input),
        "start_time": row.start_time,
        "end_time": row.end_time,
        "mode": row.mode,
        "resources_id": row.resources_id,
        "resources_version": row.resources_version,
        "status": row.status,
        "priority": row.priority,
        "config": row.policy if form.config is None else form.config(row.policy),
        "metadata": None if row.metadata is None else form.value(row.metadata),
        "reason_code": row.reason_code,
        "reason_message": row.reason_message,
    }
    if latest is None:
        return make(Rollout, fields)
    fields["attempt"] = form.part(Attempt, _attempt_fields(latest, form.value))
    return make(AttemptedRollout, fields)


def _attempt_fields(row: AttemptRow, value: Callable[[bytes], Any]) -> dict[str, Any]:
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


def _build(
    record: type[M], fields: dict[str, Any], given: set[str] | None = None, extra: dict[str, Any] | None = None
) -> M:
    """``model_construct`` for a dict that has every field: the same record in a quarter of the time."""
    built = record.__new__(record)
    _set(built, "__dict__", fields)
    _set(built, "__pydantic_fields_set__", given or set(fields))
    _set(built, "__pydantic_extra__", extra)
    _set(built, "__pydantic_private__", None)
    return built


def _config(policy: RolloutPolicy) -> RolloutConfig:
    fields = msgspec.structs.asdict(policy)
    fields["retry_condition"] = list(policy.retry_condition)
    return _build(RolloutConfig, fields)


def _as_json(_record: type[BaseModel], fields: dict[str, Any]) -> bytes:
    return _encode(fields)


def _as_fields(_record: type[BaseModel], fields: dict[str, Any]) -> dict[str, Any]:
    return fields


def _as_it_is(value: Any) -> Any:
    return value


RECORDS = Shown(
    _build,
    _build,
    value=msgspec.json.Decoder().decode,
    config=_config,
    resources=TypeAdapter[NamedResources](NamedResources).validate_json,
    span=read_span,
)
"""What callers in this process get."""
JSON = Shown(
    _as_json,
    _as_fields,
    value=msgspec.Raw,
    config=None,  # a struct with the fields of RolloutConfig
    resources=msgspec.Raw,
    span=_as_it_is,
)
"""What a server sends, in bytes: it would only encode the records again."""


def stored_span(span: AnySpan, sequence_id: int) -> AnySpan:
    """The span that a caller gave, as it was stored."""
    if span.sequence_id == sequence_id:
        return span
    if isinstance(span, PlainSpan):
        return replace(span, sequence_id=sequence_id)
    given, extra = {*span.__pydantic_fields_set__, "sequence_id"}, span.__pydantic_extra__
    return cast("AnySpan", _build(Span, {**span.__dict__, "sequence_id": sequence_id}, given, extra and dict(extra)))
