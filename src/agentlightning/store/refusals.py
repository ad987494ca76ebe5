"""The one rule for spans that a store refuses: they are found by bisection, and do not hold up the others."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import TypeVar

from agentlightning.errors import AgentLightningError, Conflict, IdReused, InvalidValue, NotFound

SpanT = TypeVar("SpanT")


def is_refusal(error: AgentLightningError) -> bool:
    """Whether the error is about the spans or their attempt, so that the same spans would be refused again."""
    return isinstance(error, (InvalidValue, NotFound, Conflict))


async def send_apart(
    spans: Sequence[SpanT],
    send: Callable[[Sequence[SpanT]], Awaitable[object]],
    refused: Callable[[Sequence[SpanT], AgentLightningError], Awaitable[None]],
    *,
    attempt_of: Callable[[SpanT], Hashable] | None = None,
    is_refusal: Callable[[AgentLightningError], bool] = is_refusal,
) -> None:
    """Send spans, in halves where some are refused, until each is sent or known as refused.

    Args:
        spans: in their order, which is kept.
        send: stores spans, all or none.
        refused: gets what is refused, in its place in the order: one span; or all spans of an attempt, if the error is
            about that.
        attempt_of: which attempt a span belongs to; None: not known.
        is_refusal: whether an error means that the same spans would be refused again.

    Raises:
        AgentLightningError: the store takes no spans now. A repeat is safe.
    """
    try:
        await send(spans)
    except AgentLightningError as error:
        if not is_refusal(error):
            raise
        of_one_attempt = attempt_of is not None and len(set(map(attempt_of, spans))) == 1
        about_attempt = isinstance(error, (NotFound, Conflict)) and not isinstance(error, IdReused)
        if len(spans) == 1 or (of_one_attempt and about_attempt):
            await refused(spans, error)
            return
        for half in (spans[: len(spans) // 2], spans[len(spans) // 2 :]):
            await send_apart(half, send, refused, attempt_of=attempt_of, is_refusal=is_refusal)
