"""Spans of several attempts, told apart: what was made of one attempt's spans never has a part of another's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias, TypeVar

from agentlightning.semconv import LightningSpanAttributes
from agentlightning.types.spans import SpanLike

_S = TypeVar("_S", bound=SpanLike)

AttemptKey: TypeAlias = tuple[str, str]
"""The ids of a rollout and of its attempt; both empty for spans that say neither."""

_DEFAULT_RESOURCES = LightningSpanAttributes.DEFAULT_RESOURCES.value
_TIME_ORDERED = re.compile(r"at-([0-9a-f]{12})7[0-9a-f]{3}[89ab][0-9a-f]{15}")
"""The ids that our stores mint: UUIDv7, which begin with a time in milliseconds."""


def by_attempt(spans: Iterable[_S]) -> dict[AttemptKey, list[_S]]:
    """The spans of each attempt, in their order. Attempts come in the order of their first spans."""
    groups: dict[AttemptKey, list[_S]] = {}
    for span in spans:
        key = (str(getattr(span, "rollout_id", "")), str(getattr(span, "attempt_id", "")))
        groups.setdefault(key, []).append(span)
    return groups


def newest_attempts(keys: Sequence[AttemptKey]) -> dict[str, AttemptKey]:
    """The newest attempt of each rollout.

    Attempts whose ids a store of ours minted are compared by the times in these ids. Where an id was minted
    elsewhere, or the times are the same, the attempt that comes last is the newest: ``query_spans`` sorts by attempt.

    Args:
        keys: the attempts, in the order of their first spans.
    """
    rollouts: dict[str, list[AttemptKey]] = {}
    for key in keys:
        rollouts.setdefault(key[0], []).append(key)
    return {rollout: _newest(attempts) for rollout, attempts in rollouts.items()}


def _newest(attempts: Sequence[AttemptKey]) -> AttemptKey:
    minted = [_TIME_ORDERED.fullmatch(attempt_id) for _, attempt_id in attempts]
    times = [match[1] for match in minted if match is not None]
    if len(times) < len(attempts):
        return attempts[-1]
    return attempts[max(range(len(attempts)), key=lambda place: (times[place], place))]


def order_of(spans: Iterable[SpanLike]) -> Callable[[SpanLike], tuple[float, float]]:
    """Return what spans of one attempt are to be sorted by.

    This is the store's sequence id, because the clocks of the hosts that wrote the spans need not agree. Times count
    among spans with the same id, and, where a span has none (0), for all of them.
    """
    if all(_sequence_id(span) > 0 for span in spans):
        return lambda span: (_sequence_id(span), span.start_time or 0)
    return lambda span: (span.start_time or 0, _sequence_id(span))


def used_default_resources(spans: Iterable[SpanLike]) -> str | None:
    """Why an attempt ran with the default resources of its runner, although its rollout has others; None: it did not.

    Its reward and its calls say nothing about the resources that the rollout was enqueued with.

    Args:
        spans: of one attempt.
    """
    reasons = (each.attributes.get(_DEFAULT_RESOURCES) for each in spans if each.attributes)
    return next((str(each) for each in reasons if each is not None), None)


def _sequence_id(span: SpanLike) -> int:
    return int(getattr(span, "sequence_id", 0))


def only_newest(groups: Mapping[AttemptKey, list[_S]]) -> list[_S]:
    """The spans of the newest attempts only, in their order within each."""
    return [span for key in newest_attempts(list(groups)).values() for span in groups[key]]
