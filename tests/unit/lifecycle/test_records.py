"""The rows: values that know which group of states they are in."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from agentlightning.lifecycle.records import RolloutPolicy
from agentlightning.types import AttemptStatus, RolloutStatus
from rows import a_worker, an_attempt, standing_rollout


@pytest.mark.parametrize("status", get_args(RolloutStatus))
def test_a_rollout_waits_or_is_held_or_has_ended(status: RolloutStatus) -> None:
    row = standing_rollout(status)
    assert row.claimable == (status in ("queuing", "requeuing"))
    assert row.final == (status in ("succeeded", "failed", "cancelled"))
    assert row.claimable + row.final + (status in ("preparing", "running")) == 1


@pytest.mark.parametrize("status", get_args(AttemptStatus))
def test_an_attempt_is_live_or_has_ended(status: AttemptStatus) -> None:
    assert an_attempt(status).live == (status in ("preparing", "running"))


@pytest.mark.parametrize("row", [standing_rollout(), an_attempt(), a_worker(), RolloutPolicy()])
def test_rows_never_change(row: Any) -> None:
    for name in row.__struct_fields__:
        with pytest.raises(AttributeError):
            setattr(row, name, None)
