"""The arguments of reading methods as page queries, validated."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel

from agentlightning.errors import InvalidValue
from agentlightning.lifecycle import attempts
from agentlightning.lifecycle.records import AttemptRow, Holder, Moment, Pair, RolloutRow
from agentlightning.store.backend import Filter, PageQuery, ReadTransaction, Table
from agentlightning.store.validation import MAX_BATCH, check_id, check_one_of, check_paging, shown
from agentlightning.types import Attempt, AttemptedRollout, ResourcesUpdate, Span, Worker

T = TypeVar("T")

_RECORDS: Mapping[Table, tuple[type[BaseModel], Collection[str]]] = {
    "rollouts": (AttemptedRollout, {"input", "config", "metadata", "attempt"}),
    "attempts": (Attempt, {"metadata"}),
    "spans": (Span, {"status", "attributes", "events", "links", "context", "parent", "resource"}),
    "resources": (ResourcesUpdate, {"resources"}),
    "workers": (Worker, {"heartbeat_stats", "registration", "stale_attempt_ids"}),
}
SORTABLE: Mapping[Table, Sequence[str]] = {
    table: [name for name in record.model_fields if name not in structured]
    for table, (record, structured) in _RECORDS.items()
}
"""The fields that a page may be sorted by: those with plain values, which a database can compare."""


_OLD_NAMES = {"status": "status_in", "rollout_ids": "rollout_id_in"}
_LATEST = Filter("attempt_id", "equals", "latest")


def page_query(
    table: Table, given: dict[str, Any], scope: Sequence[str], states: Sequence[str] | None = None
) -> PageQuery:
    """The arguments of a querying method of the contract as a query; uses the dict up.

    The name of an argument says what it does: those in ``scope`` always apply, those that end in ``_in`` or
    ``_contains`` and those that are fields are filters, and the others are about the page.

    Raises:
        InvalidId, InvalidValue: an argument is not valid. ``states``: what ``status_in`` may hold.
    """
    for old, name in _OLD_NAMES.items():
        if old in given:
            given[name] = either(name, given.get(name), old, given.pop(old))
    limit, offset, sort_by = given.pop("limit"), given.pop("offset"), given.pop("sort_by", None)
    check_paging(limit, offset, sort_by, SORTABLE[table])
    order, logic = given.pop("sort_order"), given.pop("filter_logic", "and")
    check_one_of(order, ("asc", "desc"), "sort_order")
    check_one_of(logic, ("and", "or"), "filter_logic")
    always: list[Filter] = []
    filters: list[Filter] = []
    for name, value in given.items():
        if name in scope:
            if value is not None:
                always.append(_LATEST if name == "attempt_id" and value == "latest" else matches(name, value))
        elif value is not None:
            filters.append(_filter(name, value, states if name == "status_in" else None))
    return PageQuery(table, tuple(always), tuple(filters), logic, sort_by, order == "desc", limit, offset)


def _filter(name: str, value: Any, allowed: Sequence[str] | None) -> Filter:
    if name.endswith("_in"):
        return within(name.removesuffix("_in"), value, allowed)
    field = name.removesuffix("_contains")
    return Filter(field, "equals" if field == name else "contains", text_filter(name, value))


def matches(field: str, value: str) -> Filter:
    """The field equals this id."""
    return Filter(field, "equals", check_id(value, field))


async def without_latest(tx: ReadTransaction, query: PageQuery) -> PageQuery:
    """The query with the id of the latest attempt in place of ``latest``."""
    if not query.scope or query.scope[-1] is not _LATEST:
        return query
    rollout = await tx.get(RolloutRow, query.scope[0].value)
    latest = None if rollout is None else rollout.latest_attempt_id
    return query._replace(scope=(query.scope[0], Filter("attempt_id", "equals", latest)))


def either(name: str, value: Sequence[T] | None, old_name: str, old_value: Sequence[T] | None) -> Sequence[T] | None:
    """The value of an argument that callers may also give under its old name.

    Raises:
        InvalidValue: both names are given.
    """
    if value is not None and old_value is not None:
        raise InvalidValue(f"{name} and {old_name} are the same filter; give only {name}")
    return old_value if value is None else value


def within(field: str, values: Sequence[str], allowed: Sequence[str] | None = None) -> Filter:
    """The field equals one of these values. Raises ``InvalidValue`` if they are not a list of ``allowed`` strings."""
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
    return pair if attempt.deadline is None or attempt.deadline > now.lease else attempts.expire(pair, Holder(), now)


def text_filter(what: str, value: Any) -> str:
    """``value``, if records can be compared with it; ``what`` names it in the error."""
    try:
        usable = isinstance(value, str) and b"\0" not in value.encode()
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise InvalidValue(f"{what} {shown(value)} is not valid; give a string without NUL or lone surrogates")
    return value
