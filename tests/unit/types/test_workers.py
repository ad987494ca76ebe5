from __future__ import annotations

import pytest
from pydantic import ValidationError

from agentlightning.types.rollouts import Worker


def test_defaults() -> None:
    assert Worker(worker_id="w").model_dump() == {
        "worker_id": "w",
        "status": "unknown",
        "heartbeat_stats": None,
        "last_heartbeat_time": None,
        "last_dequeue_time": None,
        "last_busy_time": None,
        "last_idle_time": None,
        "current_rollout_id": None,
        "current_attempt_id": None,
        "stale_attempt_ids": None,
        "lease_seconds": None,
        "registration": None,
        "directive": None,
        "reason_code": None,
        "reason_message": None,
    }


def test_no_stale_attempts_is_not_the_same_as_not_said() -> None:
    assert Worker(worker_id="w", stale_attempt_ids=[]).stale_attempt_ids == []


def test_other_statuses_are_refused() -> None:
    with pytest.raises(ValidationError):
        Worker.model_validate({"worker_id": "w", "status": "dead"})


def test_other_directives_are_refused() -> None:
    assert Worker(worker_id="w", directive="drain").directive == "drain"
    with pytest.raises(ValidationError):
        Worker.model_validate({"worker_id": "w", "directive": "pause"})
