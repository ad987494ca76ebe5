"""Arguments of the contract's methods as the wire carries them, checked as the store itself does.

A client refuses what no store would take, with the same errors and before anything is sent; the server
checks again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from agentlightning.lifecycle.records import RolloutRow
from agentlightning.store.door import check_finite, check_id, encode_required
from agentlightning.store.ids import IdSource
from agentlightning.store.requests import check_batch, draft_of, edit_of, report_of
from agentlightning.types import UNSET, EnqueueRolloutRequest

__all__ = [
    "given",
    "new_rollout",
    "new_rollouts",
    "optional_id",
    "report",
    "rollout_changes",
    "worker_beat",
]

_ROLLOUT_FIELDS = ("mode", "resources_id")


def given(**arguments: Any) -> dict[str, Any]:
    """The arguments that are not None, where None means that nothing was given."""
    return {name: value for name, value in arguments.items() if value is not None}


def optional_id(value: str | None, what: str) -> str | None:
    """An id, or None. Raises ``InvalidId``."""
    return None if value is None else check_id(value, what)


def new_rollouts(rollouts: Sequence[EnqueueRolloutRequest], ids: IdSource) -> list[dict[str, Any]]:
    """The items of an enqueue, each with a ``rollout_id``. Raises as ``enqueue_many_rollouts``."""
    check_batch(rollouts, "rollouts")
    return [new_rollout(request, ids) for request in rollouts]


def new_rollout(request: EnqueueRolloutRequest, ids: IdSource) -> dict[str, Any]:
    """One new rollout, with a ``rollout_id``. Raises as ``enqueue_many_rollouts``."""
    row: RolloutRow = draft_of(request, ids).row
    item: dict[str, Any] = {"input": msgspec.Raw(row.input), "rollout_id": row.rollout_id}
    for name in _ROLLOUT_FIELDS:
        value = getattr(row, name)
        if value is not None:
            item[name] = value
    if request.config is not None:
        item["config"] = row.policy
    if row.metadata is not None:
        item["metadata"] = msgspec.Raw(row.metadata)
    if row.priority:
        item["priority"] = row.priority
    return item


def rollout_changes(
    fields: Mapping[str, Any], status: Any, reason_code: str | None, reason_message: str | None
) -> dict[str, Any]:
    """The arguments of ``update_rollout`` that are given. Raises as it does."""
    edit = edit_of(fields, status, reason_code, reason_message)
    changes: dict[str, Any] = {}
    for name, value in edit.fields.items():
        changes[name] = msgspec.Raw(value) if name in ("input", "metadata") and value is not None else value
    if edit.status is not None:
        changes["status"] = edit.status
    return {**changes, **given(reason_code=reason_code, reason_message=reason_message)}


def report(
    status: Any,
    worker_id: Any,
    last_heartbeat_time: Any,
    metadata: Any,
    reason_code: str | None,
    reason_message: str | None,
) -> dict[str, Any]:
    """The arguments of ``update_attempt`` that are given. Raises as it does."""
    said = report_of(status, worker_id, last_heartbeat_time, metadata, reason_code, reason_message)
    arguments = given(
        status=said.status,
        worker_id=said.worker_id,
        last_heartbeat_time=said.last_heartbeat_time,
        reason_code=reason_code,
        reason_message=reason_message,
    )
    if said.metadata is not None:
        [encoded] = said.metadata
        arguments["metadata"] = None if encoded is None else msgspec.Raw(encoded)
    return arguments


def worker_beat(stats: Any, attempt_ids: Any, lease_seconds: Any, registration: Any) -> dict[str, Any]:
    """The arguments of ``update_worker`` that are given. Raises as it does."""
    beat: dict[str, Any] = {}
    if stats is not UNSET:
        beat["heartbeat_stats"] = msgspec.Raw(encode_required(stats, "heartbeat_stats"))
    if registration is not UNSET:
        beat["registration"] = msgspec.Raw(encode_required(registration, "registration"))
    if attempt_ids is not UNSET:
        check_batch(attempt_ids, "attempt_ids")
        beat["attempt_ids"] = [check_id(each, "attempt_id") for each in attempt_ids]
    if lease_seconds is not UNSET:
        beat["lease_seconds"] = check_finite(lease_seconds, "lease_seconds", above=0)
    return beat
