"""Rewards are found in spans of every kind that ever carried one, and nowhere else."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from agentlightning.types import Span
from agentlightning.types.rewards import (
    find_final_reward,
    find_reward_spans,
    get_reward_value,
    get_rewards_from_span,
    is_reward_span,
)


def span(name: str = "agentlightning.annotation", **attributes: Any) -> Span:
    return Span.from_attributes(name=name, attributes=attributes)


def rewards(*values: Any) -> Span:
    told: dict[str, Any] = {}
    for position, value in enumerate(values):
        told[f"agentlightning.reward.{position}.name"] = f"r{position}"
        told[f"agentlightning.reward.{position}.value"] = value
    return span(**told)


def test_dimensions_come_in_their_order_and_the_first_counts() -> None:
    found = get_rewards_from_span(rewards(*range(12)))
    assert [(each.name, each.value) for each in found] == [(f"r{i}", float(i)) for i in range(12)]
    assert get_reward_value(rewards(3, 4)) == 3.0


@pytest.mark.parametrize("value", [1, 1.0, True])
def test_every_kind_of_number_counts(value: Any) -> None:
    assert get_reward_value(rewards(value)) == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf, "NaN", "1.0", 10**400])
def test_what_is_no_finite_number_is_no_reward(value: Any) -> None:
    only = span()
    only.attributes["agentlightning.reward.0.value"] = value
    assert get_reward_value(only) is None
    assert get_rewards_from_span(only) == []
    assert not is_reward_span(only)


def test_a_dimension_without_a_name_is_called_primary() -> None:
    value: dict[str, Any] = {"agentlightning.reward.0.value": 1.5}
    assert get_rewards_from_span(span(**value))[0].name == "primary"


def test_spans_of_older_versions_and_of_agentops() -> None:
    assert get_reward_value(span("agentlightning.reward", reward=0.5)) == 0.5
    assert get_reward_value(span("other", reward=0.5)) is None
    output = json.dumps({"type": "reward", "value": 0.25})
    assert get_reward_value(span("task", **{"agentops.task.output": output})) == 0.25
    assert get_reward_value(span("task", **{"agentops.entity.output": "not json"})) is None
    assert get_reward_value(span("task", **{"agentops.entity.output": '{"type": "other", "value": 1}'})) is None


def test_the_last_reward_is_the_final_one() -> None:
    spans = [rewards(1), span(), rewards(2, 5), span()]
    assert find_reward_spans(spans) == [spans[0], spans[2]]
    assert find_final_reward(spans) == 2.0
    assert find_final_reward([span()]) is None
