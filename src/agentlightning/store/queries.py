"""The arguments of reading methods as page queries, validated."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from agentlightning.errors import InvalidValue
from agentlightning.lifecycle import attempts
from agentlightning.lifecycle.records import AttemptRow, Moment, Pair, RolloutRow
from agentlightning.store.backend import Filter, PageQuery, Table
from agentlightning.store.validation import MAX_BATCH, check_one_of, check_paging, shown
from agentlightning.types import Attempt, AttemptedRollout, ResourcesUpdate, Span, Worker

T = TypeVar("T")

SORTABLE: dict[Table, tuple[str, ...]] = {
    "rollouts": tuple(
        name for name in AttemptedRollout.model_fields if name not in ("input", "config", "metadata", "attempt")
    ),
    "attempts": tuple(name for name in Attempt.model_fields if name != "metadata"),
    "spans": tuple(
        name
        for name in Span.model_fields
        if name not in ("status", "attributes", "events", "links", "context", "parent", "resource")
    ),
    "resources": tuple(name for name in ResourcesUpdate.model_fields if name != "resources"),
    "workers": tuple(
        name for name in Worker.model_fields if name not in ("heartbeat_stats", "registration", "stale_attempt_ids")
    ),
}
"""The fields that a page may be sorted by: those with plain values, which a database can compare."""


class Paging(NamedTuple):
    """Order, size and place of a page."""

    sort_by: str | None
    sort_order: Literal["asc", "desc"]
    limit: int
    offset: int


def paged(
    table: Table,
    paging: Paging,
    *,
    scope: Sequence[Filter] = (),
    filters: Sequence[Filter | None] = (),
    logic: Literal["and", "or"] = "and",
    newest_only: bool = False,
) -> PageQuery:
    """The query for a page; a filter that is None was not given.

    Raises:
        InvalidValue: limit, offset, sort field, order or logic are not valid.
    """
    check_paging(paging.limit, paging.offset, paging.sort_by, SORTABLE[table])
    check_one_of(paging.sort_order, ("asc", "desc"), "sort_order")
    check_one_of(logic, ("and", "or"), "filter_logic")
    return PageQuery(
        table,
        scope=tuple(scope),
        filters=tuple(each for each in filters if each is not None),
        logic=logic,
        sort_by=paging.sort_by,
        descending=paging.sort_order == "desc",
        limit=paging.limit,
        offset=paging.offset,
        newest_only=newest_only,
    )


def either(name: str, value: Sequence[T] | None, old_name: str, old_value: Sequence[T] | None) -> Sequence[T] | None:
    """The value of an argument that callers may also give under its old name.

    Raises:
        InvalidValue: both names are given.
    """
    if value is not None and old_value is not None:
        raise InvalidValue(f"{name} and {old_name} are the same filter; give only {name}")
    return old_value if value is None else value


def equals(field: str, value: str | None) -> Filter | None:
    """The field equals this value."""
    return None if value is None else Filter(field, "equals", text_filter(field, value))


def contains(field: str, value: str | None) -> Filter | None:
    """The field contains this text; case matters."""
    return None if value is None else Filter(field, "contains", text_filter(f"{field}_contains", value))


def within(field: str, values: Sequence[str] | None, allowed: Sequence[str] | None = None) -> Filter | None:
    """The field equals one of these values."""
    if values is None:
        return None
    unusable = isinstance(values, str) or not isinstance(values, Collection)  # pyright: ignore[reportUnnecessaryIsInstance]
    if unusable or len(values) > MAX_BATCH:
        raise InvalidValue(f"{field}_in {shown(values)} is not valid; give a list of up to {MAX_BATCH} strings")
    for value in values:
        if allowed is not None:
            check_one_of(value, allowed, field)
        text_filter(f"{field}_in", value)
    return Filter(field, "within", tuple(values))


def as_of(rollout: RolloutRow, attempt: AttemptRow, now: Moment) -> Pair:
    """Both as they are at this moment. A read uses it, because a store that cannot write cannot store an expiry."""
    pair = Pair(rollout, attempt)
    return pair if attempt.deadline is None or attempt.deadline > now.lease else attempts.expire(pair, now)


def text_filter(what: str, value: Any) -> str:
    """``value``, if records can be compared with it; ``what`` names it in the error."""
    if not isinstance(value, str) or "\0" in value or not _encodable(value):
        raise InvalidValue(f"{what} {shown(value)} is not valid; give a string without NUL or lone surrogates")
    return value


def _encodable(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
