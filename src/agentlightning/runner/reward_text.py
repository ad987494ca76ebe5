"""Rewards that programs write as text: a number, or JSON."""

from __future__ import annotations

import json
import sys
from typing import Any, NamedTuple, cast

__all__ = ["WrittenReward", "read_reward"]


class WrittenReward(NamedTuple):
    """A reward as ``emit_reward`` takes it."""

    value: float | dict[str, Any]
    primary_key: str | None = None


def read_reward(text: str) -> WrittenReward | None:
    """The reward that a text says, or None if it says none.

    ``0.5``; or ``{"reward": 0.5}``; or, of several dimensions, ``{"reward": {"accuracy": 1, "speed": 0.2},
    "primary_key": "accuracy"}``.
    """
    try:
        said: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    key: Any = None
    if isinstance(said, dict):
        fields = cast("dict[str, Any]", said)
        said, key = fields.get("reward"), fields.get("primary_key")
    if isinstance(said, float) or (isinstance(said, int) and abs(said) <= sys.float_info.max):
        return WrittenReward(float(said))
    if isinstance(said, dict) and (key is None or isinstance(key, str)):
        return WrittenReward(cast("dict[str, Any]", said), key)
    return None
