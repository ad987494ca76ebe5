from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from agentlightning.errors import InvalidValue
from agentlightning.types.rollouts import Attempt, AttemptedRollout, EnqueueRolloutRequest, Rollout, RolloutConfig


def make_attempt(**changes: Any) -> Attempt:
    return Attempt.model_validate(
        {"rollout_id": "ro-1", "attempt_id": "at-1", "sequence_id": 1, "start_time": 5.0} | changes
    )


class TestRolloutConfig:
    def test_defaults(self) -> None:
        assert RolloutConfig().model_dump() == {
            "timeout_seconds": None,
            "unresponsive_seconds": None,
            "max_attempts": 1,
            "retry_condition": [],
        }

    @pytest.mark.parametrize("field", ["timeout_seconds", "unresponsive_seconds"])
    @pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, -math.inf])
    def test_a_limit_is_finite_and_above_zero(self, field: str, seconds: float) -> None:
        with pytest.raises(ValidationError, match=field):
            RolloutConfig.model_validate({field: seconds})

    @pytest.mark.parametrize("field", ["timeout_seconds", "unresponsive_seconds"])
    @pytest.mark.parametrize("seconds", [None, 0.001, 1, 1e9])
    def test_a_limit_in_range_is_kept(self, field: str, seconds: float | None) -> None:
        assert getattr(RolloutConfig.model_validate({field: seconds}), field) == seconds

    @pytest.mark.parametrize("attempts", [1, 2, 1000])
    def test_max_attempts_in_range(self, attempts: int) -> None:
        assert RolloutConfig(max_attempts=attempts, retry_condition=[]).max_attempts == attempts

    @pytest.mark.parametrize("attempts", [0, -1, 1001, 1.5, "many"])
    def test_max_attempts_out_of_range(self, attempts: Any) -> None:
        with pytest.raises(ValidationError, match="max_attempts"):
            RolloutConfig(max_attempts=attempts)

    def test_every_attempt_status_is_taken_as_a_retry_condition(self) -> None:
        every = ["preparing", "running", "failed", "succeeded", "unresponsive", "timeout"]
        assert RolloutConfig.model_validate({"retry_condition": every}).retry_condition == every

    def test_other_retry_conditions_are_refused(self) -> None:
        with pytest.raises(ValidationError, match="retry_condition"):
            RolloutConfig.model_validate({"retry_condition": ["cancelled"]})

    def test_null_means_the_default(self) -> None:
        body = '{"max_attempts": null, "retry_condition": null, "timeout_seconds": null}'
        config = RolloutConfig.model_validate_json(body)
        assert config == RolloutConfig()
        assert config.model_fields_set == {"timeout_seconds"}

    def test_the_body_is_left_as_it_was(self) -> None:
        body = {"max_attempts": None, "timeout_seconds": 3.0}
        RolloutConfig.model_validate(body)
        assert body == {"max_attempts": None, "timeout_seconds": 3.0}

    def test_null_means_the_default_inside_a_request_too(self) -> None:
        request = EnqueueRolloutRequest.model_validate_json('{"input": 1, "config": {"max_attempts": null}}')
        assert request.config == RolloutConfig()

    def test_two_configs_share_no_list(self) -> None:
        first = RolloutConfig()
        first.retry_condition.append("timeout")
        assert RolloutConfig().retry_condition == []

    def test_what_is_not_an_object_is_refused(self) -> None:
        with pytest.raises(ValidationError):
            RolloutConfig.model_validate([1])


class TestRollout:
    def test_defaults(self) -> None:
        assert Rollout(rollout_id="ro-1", input={"q": 1}, start_time=1.0).model_dump() == {
            "rollout_id": "ro-1",
            "input": {"q": 1},
            "start_time": 1.0,
            "end_time": None,
            "mode": None,
            "resources_id": None,
            "resources_version": None,
            "priority": 0,
            "status": "queuing",
            "config": RolloutConfig().model_dump(),
            "metadata": None,
            "reason_code": None,
            "reason_message": None,
        }

    def test_input_may_be_null_but_not_absent(self) -> None:
        assert Rollout.model_validate({"rollout_id": "r", "input": None, "start_time": 0}).input is None
        with pytest.raises(ValidationError, match="input"):
            Rollout.model_validate({"rollout_id": "r", "start_time": 0})

    @pytest.mark.parametrize("change", [{"status": "done"}, {"mode": "dev"}, {"config": {"max_attempts": 0}}])
    def test_values_that_do_not_exist_are_refused(self, change: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            Rollout.model_validate({"rollout_id": "r", "input": 1, "start_time": 0} | change)

    def test_fields_of_a_newer_store_are_passed_over(self) -> None:
        rollout = Rollout.model_validate({"rollout_id": "r", "input": 1, "start_time": 0, "brand_new": 1})
        assert "brand_new" not in rollout.model_dump()


class TestAttempt:
    def test_defaults(self) -> None:
        assert make_attempt().model_dump() == {
            "rollout_id": "ro-1",
            "attempt_id": "at-1",
            "sequence_id": 1,
            "start_time": 5.0,
            "end_time": None,
            "status": "preparing",
            "worker_id": None,
            "last_heartbeat_time": None,
            "metadata": None,
            "reason_code": None,
            "reason_message": None,
        }

    def test_a_rollout_status_is_not_an_attempt_status(self) -> None:
        with pytest.raises(ValidationError):
            make_attempt(status="cancelled")


class TestAttemptedRollout:
    def test_is_a_rollout_with_its_attempt(self) -> None:
        claimed = AttemptedRollout(rollout_id="ro-1", input=1, start_time=1.0, attempt=make_attempt())
        assert isinstance(claimed, Rollout)
        assert claimed.check_consistency() is claimed
        assert AttemptedRollout.model_validate_json(claimed.model_dump_json()) == claimed
        assert pickle.loads(pickle.dumps(claimed)) == claimed

    def test_an_attempt_of_another_rollout_is_refused(self) -> None:
        with pytest.raises(ValidationError, match=r"'at-1' belongs to rollout 'ro-2'.* not to 'ro-1'"):
            AttemptedRollout(rollout_id="ro-1", input=1, start_time=1.0, attempt=make_attempt(rollout_id="ro-2"))

    def test_the_check_can_be_made_again(self) -> None:
        claimed = AttemptedRollout(rollout_id="ro-1", input=1, start_time=1.0, attempt=make_attempt())
        claimed.attempt = make_attempt(rollout_id="ro-2")
        with pytest.raises(InvalidValue):
            claimed.check_consistency()


class TestEnqueueRolloutRequest:
    def test_defaults(self) -> None:
        assert EnqueueRolloutRequest(input=[1]).model_dump() == {
            "input": [1],
            "mode": None,
            "resources_id": None,
            "config": None,
            "metadata": None,
            "priority": 0,
            "rollout_id": None,
        }

    def test_null_means_the_default(self) -> None:
        body = (
            '{"input": null, "mode": null, "resources_id": null, "config": null, '
            '"metadata": null, "priority": null, "rollout_id": null}'
        )
        assert EnqueueRolloutRequest.model_validate_json(body) == EnqueueRolloutRequest(input=None)

    @pytest.mark.parametrize("priority", [-(2**31), -1, 0, 2**31 - 1])
    def test_priority_in_range(self, priority: int) -> None:
        assert EnqueueRolloutRequest(input=1, priority=priority).priority == priority

    @pytest.mark.parametrize("priority", [-(2**31) - 1, 2**31, 0.5, "high"])
    def test_priority_out_of_range(self, priority: Any) -> None:
        with pytest.raises(ValidationError, match="priority"):
            EnqueueRolloutRequest(input=1, priority=priority)

    def test_input_is_required(self) -> None:
        with pytest.raises(ValidationError, match="input"):
            EnqueueRolloutRequest.model_validate({})
