"""Emit rewards. They are read by `agentlightning.types.rewards`."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, TypedDict, TypeVar, cast

from agentlightning.emitter.emit import as_attributes, emit
from agentlightning.errors import InvalidValue
from agentlightning.semconv import AGL_ANNOTATION, LightningSpanAttributes
from agentlightning.types import SpanCoreFields
from agentlightning.types.rewards import (
    PRIMARY_NAME,
    find_final_reward as find_final_reward,
    find_reward_spans as find_reward_spans,
    get_reward_value as get_reward_value,
    get_rewards_from_span as get_rewards_from_span,
    is_reward_span as is_reward_span,
)

_F = TypeVar("_F", bound=Callable[..., Any])


class RewardDimension(TypedDict):
    """One dimension of a reward."""

    name: str
    value: float


def emit_reward(
    reward: float | Mapping[str, Any],
    *,
    primary_key: str | None = None,
    attributes: dict[str, Any] | None = None,
    propagate: bool = True,
) -> SpanCoreFields:
    """Record how well the agent did. The last reward of an attempt is its final one.

    Args:
        reward: a finite number, or a mapping from dimensions to finite numbers.
        primary_key: the dimension that counts where one number is needed; required if there are several.
        attributes: further attributes; nested values are flattened.
        propagate: whether the trace gets the span; otherwise it is only returned.

    Raises:
        TypeError: ``reward`` is neither a number nor a mapping to numbers.
        InvalidValue: a number is not finite, the mapping is empty, or ``primary_key`` is missing or not in it.
        RuntimeError: no tracer is active.
    """
    recorded = as_attributes(attributes)
    for position, dimension in enumerate(_dimensions(reward, primary_key)):
        prefix = f"{LightningSpanAttributes.REWARD.value}.{position}"
        recorded[f"{prefix}.name"] = dimension["name"]
        recorded[f"{prefix}.value"] = dimension["value"]
    return emit(AGL_ANNOTATION, recorded, propagate)


def reward(fn: _F) -> _F:
    """Decorate a function or coroutine function whose result is the reward: each call emits it.

    A call that returns None emits nothing. Raises as ``emit_reward``.
    """
    if inspect.iscoroutinefunction(fn):

        @functools.wraps(fn)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            return _emitted(await fn(*args, **kwargs))

        return cast(_F, awaited)

    @functools.wraps(fn)
    def called(*args: Any, **kwargs: Any) -> Any:
        return _emitted(fn(*args, **kwargs))

    return cast(_F, called)


def _emitted(result: Any) -> Any:
    if result is not None:
        emit_reward(result)
    return result


def _dimensions(reward: float | Mapping[str, Any], primary_key: str | None) -> list[RewardDimension]:
    """All dimensions, the primary one first."""
    if not isinstance(reward, Mapping):
        return [RewardDimension(name=primary_key or PRIMARY_NAME, value=_number(reward, "the reward"))]
    if not reward:
        raise InvalidValue("the reward has no dimension; give at least one name with a number")
    if primary_key is None and len(reward) == 1:
        primary_key = next(iter(reward))
    if primary_key is None or primary_key not in reward:
        names = ", ".join(map(repr, reward))
        raise InvalidValue(f"primary_key is {primary_key!r}; name the dimension that counts: {names}")
    names = [primary_key, *(name for name in reward if name != primary_key)]
    return [RewardDimension(name=name, value=_number(reward[name], f"the reward {name!r}")) for name in names]


def _number(value: Any, what: str) -> float:
    if not isinstance(value, Real):  # also numpy's numbers
        raise TypeError(f"{what} is {value!r}, a {type(value).__name__}; give a number")
    try:
        number = float(value)
    except OverflowError as error:
        raise InvalidValue(f"{what} is a whole number too large for a float; give one up to 1e308") from error
    if not math.isfinite(number):
        raise InvalidValue(f"{what} is {value!r}; it must be finite (emit none at all if there is no reward)")
    return number
