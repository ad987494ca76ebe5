"""Which of several spans of the same model call is kept.

A client's instrumentation and a proxy each make a span of a call. One may lie inside of the other, or they
stand side by side with the same response id. The one with token ids is worth more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from agentlightning.adapter.model_calls import has_token_ids, response_id_of
from agentlightning.types import Span

__all__ = ["FoundCall", "one_for_each_reply", "one_of_each_nest"]

N = TypeVar("N")


@dataclass(frozen=True)
class FoundCall(Generic[N]):
    """A span of a model call, found in a tree."""

    node: N
    """Where in the tree it is."""

    span: Span
    agent: str
    outer: FoundCall[N] | None
    """The call that it lies in."""


def one_of_each_nest(calls: Sequence[FoundCall[N]]) -> list[FoundCall[N]]:
    """Of calls inside of each other the outermost, or those with token ids if it has none."""
    nests: dict[str, list[FoundCall[N]]] = {}
    for call in calls:
        outermost = call
        while outermost.outer is not None:
            outermost = outermost.outer
        nests.setdefault(outermost.span.span_id, []).append(call)
    return [call for nest in nests.values() for call in _kept_of(nest)]


def one_for_each_reply(calls: Sequence[FoundCall[N]], seen: set[str]) -> list[FoundCall[N]]:
    """Of calls with the same response id one, rather one with token ids; none of those in ``seen``, which grows."""
    kept: list[FoundCall[N]] = []
    for call in sorted(calls, key=lambda call: not has_token_ids(call.span)):
        reply = response_id_of(call.span)
        if reply is None or reply not in seen:
            kept.append(call)
        if reply is not None:
            seen.add(reply)
    return kept


def _kept_of(nest: Sequence[FoundCall[N]]) -> Iterator[FoundCall[N]]:
    recorded = [call for call in nest if has_token_ids(call.span)]
    if recorded and all(call.outer is not None for call in recorded):
        yield from recorded
    else:
        yield next(call for call in nest if call.outer is None)
