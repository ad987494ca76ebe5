"""A config that allows several attempts and names nothing to retry is told of, once it is made by hand."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from agentlightning.types import EnqueueRolloutRequest, Rollout, RolloutConfig


def test_attempts_without_a_condition_are_told_of_with_the_fix() -> None:
    with pytest.warns(UserWarning, match=r"max_attempts=3\) retries nothing.*retry_condition=\[\"failed\"") as told:
        config = RolloutConfig(max_attempts=3)
    assert config.retry_condition == []
    assert told[0].filename == __file__


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_attempts": 1},
        {"max_attempts": 3, "retry_condition": ["failed"]},
        {"max_attempts": 3, "retry_condition": []},
    ],
)
def test_not_of_what_is_complete(fields: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RolloutConfig(**fields).max_attempts == fields.get("max_attempts", 1)


def test_nor_of_what_is_only_read() -> None:
    """From a server, or in one: somebody else has made it."""
    config = {"max_attempts": 3}
    rollout = {"rollout_id": "ro-1", "input": 1, "start_time": 1.0, "status": "queuing", "config": config}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Rollout.model_validate(rollout).config.max_attempts == 3
        assert RolloutConfig.model_validate_json('{"max_attempts":3}').max_attempts == 3
        request = EnqueueRolloutRequest.model_validate({"input": 1, "config": config})
        assert request.config is not None
        assert request.config.max_attempts == 3
        assert RolloutConfig(max_attempts=2, retry_condition=[]).model_copy().max_attempts == 2
