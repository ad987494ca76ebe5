"""The one rule for spans that a store refuses: they do not hold up the others.

A store that can say which spans of a call it refuses names them in its error, and one more call stores the rest. With
stores that cannot, refused spans are found by bisection.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from agentlightning.errors import AgentLightningError, Conflict, IdReused, InvalidValue, NotFound, RefusedSpan

SpanT = TypeVar("SpanT")

MOST_NAMED = 256
"""The most spans that one error names. The next call, without these, is told of the next ones."""
_ID_CHARACTERS = 128


def is_refusal(error: AgentLightningError) -> bool:
    """Whether the error is about the spans or their attempt, so that the same spans would be refused again."""
    return isinstance(error, (InvalidValue, NotFound, Conflict))


def find_refused(
    spans: Sequence[SpanT], check: Callable[[SpanT], object], id_of: Callable[[SpanT], object]
) -> list[RefusedSpan]:
    """Look at each span by itself, and return the first ones for which ``check`` raises ``InvalidValue``."""
    refused: list[RefusedSpan] = []
    for place, span in enumerate(spans):
        try:
            check(span)
        except InvalidValue as error:
            span_id = id_of(span)
            refused.append(RefusedSpan(place, span_id[:_ID_CHARACTERS] if isinstance(span_id, str) else "", error))
            if len(refused) == MOST_NAMED:
                break
    return refused


def refusal_of(refused: Iterable[RefusedSpan]) -> AgentLightningError:
    """The error of a call of which these spans, one at least, are refused: the first one's, and it names them all."""
    named = sorted(refused, key=lambda each: each.place)
    first = named[0].error
    error = type(first)(first.message)
    error.refused_spans = named
    return error


async def send_apart(
    spans: Sequence[SpanT],
    send: Callable[[Sequence[SpanT]], Awaitable[object]],
    replace: Callable[[Sequence[SpanT], AgentLightningError], Awaitable[Sequence[SpanT]]],
    *,
    attempt_of: Callable[[SpanT], Hashable],
    is_refusal: Callable[[AgentLightningError], bool] = is_refusal,
    error: AgentLightningError | None = None,
) -> None:
    """Send spans, and again without those that are refused, until each is sent or known as refused.

    Args:
        spans: in their order, which is kept.
        send: stores spans, all or none.
        replace: gets what is refused, one span, or spans of one attempt if the error is about that; returns what is to
            be sent in its place, if anything. It must not replace what it has returned.
        attempt_of: which attempt a span belongs to.
        is_refusal: whether an error means that the same spans would be refused again.
        error: what sending all of them has raised already; None: they have not been sent yet.

    Raises:
        AgentLightningError: the store takes no spans now. A repeat is safe.
    """
    while spans:
        if error is None:
            try:
                await send(spans)
                return
            except AgentLightningError as raised:
                error = raised
        if not is_refusal(error):
            raise error
        named = _named(spans, error, attempt_of)
        if not named:
            for half in (spans[: len(spans) // 2], spans[len(spans) // 2 :]):
                await send_apart(half, send, replace, attempt_of=attempt_of, is_refusal=is_refusal)
            return
        rest: list[SpanT] = []
        sent = 0
        for start, end, why in named:
            rest += spans[sent:start]
            rest += await replace(spans[start:end], why)
            sent = end
        spans, error = [*rest, *spans[sent:]], None


def _named(
    spans: Sequence[SpanT], error: AgentLightningError, attempt_of: Callable[[SpanT], Hashable]
) -> list[tuple[int, int, AgentLightningError]]:
    """Which spans are refused, as far as the error tells: (start, end, why), in their order; empty if it does not."""
    if len(spans) == 1 or (_is_about_attempt(error) and len(set(map(attempt_of, spans))) == 1):
        return [(0, len(spans), error)]
    named: list[tuple[int, int, AgentLightningError]] = []
    for place, _, why in error.refused_spans:
        start, end, before = named[-1] if named else (0, 0, error)
        if not end <= place < len(spans):
            return []  # not the places of these spans
        together = place == end > start and _is_about_attempt(why) and type(why) is type(before)
        if together and attempt_of(spans[place]) == attempt_of(spans[start]):
            named[-1] = (start, place + 1, before)
        else:
            named.append((place, place + 1, why))
    return named


def _is_about_attempt(error: AgentLightningError) -> bool:
    return isinstance(error, (NotFound, Conflict)) and not isinstance(error, IdReused)
