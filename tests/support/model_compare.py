"""Replies and records of a store, beside what the reference says they should hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from agentlightning.types import Attempt, FinishedAttempt, ResourcesUpdate, Rollout, Span, Worker

__all__ = ["Divergence", "agree", "in_order", "plain", "tell"]

SPAN_FIELDS = ("rollout_id", "attempt_id", "sequence_id", "span_id", "name")


class Divergence(AssertionError):
    """The store and the reference do not agree."""


def agree(what: str, got: Iterable[Any], expected: Iterable[Any]) -> None:
    """Raise ``Divergence`` unless the store's records show what the reference says."""
    left, right = [plain(each) for each in got], list(expected)
    if left != right:
        raise Divergence(tell(what, left, right))


def plain(reply: Any) -> Any:
    """A reply as plain values. Of a span only what tells it from others; of the text of a reason, nothing."""
    match reply:
        case Span():
            return {name: getattr(reply, name) for name in SPAN_FIELDS}
        case Rollout() | Attempt():
            return _without_text(reply.model_dump())
        case Worker(stale_attempt_ids=None):
            return _without_text(reply.model_dump(exclude={"stale_attempt_ids"}))
        case Worker():
            return _without_text(reply.model_dump())
        case ResourcesUpdate():
            return reply.model_dump()
        case FinishedAttempt():
            return {name: plain(getattr(reply, name)) for name in FinishedAttempt.model_fields}
        case list() | tuple():
            return [plain(each) for each in reply]
        case _:
            return reply


def _without_text(facts: dict[str, Any]) -> dict[str, Any]:
    text = facts.pop("reason_message")
    if bool(text) != (facts["reason_code"] is not None):
        raise Divergence(f"reason {facts['reason_code']!r} comes with the text {text!r}: {facts}")
    if "attempt" in facts:
        facts["attempt"] = _without_text(facts["attempt"])
    return facts


def in_order(rows: list[dict[str, Any]], sort_by: str | None, *, descending: bool) -> list[dict[str, Any]]:
    """Rows, which come in the order of insertion, as a page shows them.

    A missing time is later than all, any other missing value less than all.
    """

    def key(row: dict[str, Any]) -> tuple[bool, Any]:
        value = row[sort_by or ""]
        missing_last = str(sort_by).endswith("_time")
        return (value is None) == missing_last, 0 if value is None else value

    rows = rows if sort_by is None else sorted(rows, key=key)
    return rows[::-1] if descending else rows


def tell(what: str, got: Any, expected: Any) -> str:
    """What differs, and nothing of what does not."""
    if isinstance(got, dict) and isinstance(expected, dict):
        names = [name for name in got | expected if got.get(name, "-") != expected.get(name, "-")]
        return "; ".join(tell(f"{what}.{name}", got.get(name, "-"), expected.get(name, "-")) for name in names)
    if isinstance(got, list) and isinstance(expected, list) and len(got) == len(expected):
        pairs = enumerate(zip(got, expected, strict=True))
        return "; ".join(tell(f"{what}[{at}]", *pair) for at, pair in pairs if pair[0] != pair[1])
    return f"{what}: the store says {got!r}, the reference {expected!r}"
