"""Rewards, read from spans.

A reward has one dimension or several. It stands in the attributes ``agentlightning.reward.<i>.name`` and
``.value``, the primary dimension first. Two older ways are read, too: 0.2's span ``agentlightning.reward`` with
the attribute ``reward``, and the outputs that AgentOps records of a function, ``{"type": "reward", "value": x}``.

A value that is not a finite number is no reward. No reward is ``None``, which is not a reward of 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Real
from typing import Any, TypeVar, cast

from agentlightning.semconv import AGL_REWARD, LightningSpanAttributes, RewardAttributes, RewardPydanticModel
from agentlightning.types.attempt_spans import by_attempt, only_newest
from agentlightning.types.spans import SpanLike

_S = TypeVar("_S", bound=SpanLike)

PRIMARY_NAME = "primary"
"""The name of a reward's dimension that was given none."""

_PREFIX = LightningSpanAttributes.REWARD.value + "."
_NAME = "." + RewardAttributes.REWARD_NAME.value
_VALUE = "." + RewardAttributes.REWARD_VALUE.value
_FIRST_VALUE = _PREFIX + "0" + _VALUE
_OLD_VALUE = "reward"
_AGENTOPS_OUTPUTS = ("agentops.task.output", "agentops.entity.output")


def number_of(value: Any) -> Any:
    """The value as a number, if it is one, or one in an array of no dimensions (numpy, torch, jax); else None."""
    if not isinstance(value, Real) and getattr(value, "shape", None) == ():  # numpy's bool is no Real, either
        with suppress(Exception):  # of a class that is not known here
            value = value.item()
    return value if isinstance(value, Real) else None


def get_reward_value(span: SpanLike) -> float | None:
    """The primary dimension of the reward that a span carries; None if it carries none."""
    attributes = span.attributes or {}
    if _FIRST_VALUE in attributes:
        return _number(attributes[_FIRST_VALUE])
    rewards = get_rewards_from_span(span)
    return rewards[0].value if rewards else None


def get_rewards_from_span(span: SpanLike) -> list[RewardPydanticModel]:
    """All dimensions of the reward that a span carries, the primary one first. Those without a number are left out."""
    attributes = cast("Mapping[str, Any]", span.attributes or {})
    found: list[tuple[int, RewardPydanticModel]] = []
    for key, raw in attributes.items():
        if key.startswith(_PREFIX) and key.endswith(_VALUE):
            index = key[len(_PREFIX) : -len(_VALUE)]
            value = _number(raw)
            if index.isdecimal() and value is not None:
                name = attributes.get(_PREFIX + index + _NAME, PRIMARY_NAME)
                found.append((int(index), RewardPydanticModel(name=str(name), value=value)))
    if found:
        return [reward for _, reward in sorted(found, key=lambda each: each[0])]
    old = _old_value(span.name, attributes)
    return [] if old is None else [RewardPydanticModel(name=PRIMARY_NAME, value=old)]


def is_reward_span(span: SpanLike) -> bool:
    """Whether a span carries a reward."""
    return get_reward_value(span) is not None


def find_reward_spans(spans: Sequence[_S]) -> list[_S]:
    """Those of the spans that carry a reward, in their order."""
    return [span for span in spans if is_reward_span(span)]


def find_final_reward(spans: Sequence[SpanLike]) -> float | None:
    """The primary dimension of the last reward of the newest attempt among the spans; None if there is none.

    The last one is that with the highest sequence id; if a span has none, that which comes last.
    """
    rewards = find_reward_spans(only_newest(by_attempt(spans)))
    if len({getattr(span, "rollout_id", "") for span in rewards}) == 1 and all(
        getattr(span, "sequence_id", 0) > 0 for span in rewards
    ):
        rewards.sort(key=lambda span: getattr(span, "sequence_id", 0))
    return get_reward_value(rewards[-1]) if rewards else None


def _old_value(name: str, attributes: Mapping[str, Any]) -> float | None:
    if name == AGL_REWARD and _OLD_VALUE in attributes:
        return _number(attributes[_OLD_VALUE])
    output: Any = next((attributes[key] for key in _AGENTOPS_OUTPUTS if key in attributes), None)
    with suppress(TypeError, ValueError):  # what a function returns need not be JSON
        told: Any = json.loads(output)
        if isinstance(told, dict) and cast("dict[str, Any]", told).get("type") == "reward":
            return _number(cast("dict[str, Any]", told).get("value"))
    return None


def _number(value: Any) -> float | None:
    with suppress(OverflowError):
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    return None
