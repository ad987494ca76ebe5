"""A ``PageQuery`` as SQL."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from agentlightning.store.backend import Filter, PageQuery, Table
from agentlightning.store.sqlite.codec import ATTEMPTS, RESOURCES, ROLLOUTS, WORKERS, Codec

__all__ = ["Statement", "counted_by", "page_statement", "total_statement"]


class Statement(NamedTuple):
    """SQL and its values."""

    sql: str
    values: list[Any]


_ROLLOUTS_WITH_LATEST = "rollouts t LEFT JOIN attempts a ON a.attempt_id = t.latest_attempt_id"
_SPANS_OF_ATTEMPTS = "attempts a CROSS JOIN spans t ON t.attempt_seq = a.seq"
_FROM: dict[Table, str] = {
    "rollouts": _ROLLOUTS_WITH_LATEST,
    "attempts": "attempts t",
    "spans": _SPANS_OF_ATTEMPTS,
    "resources": "resources t",
    "workers": "workers t",
}
_COUNT_FROM: dict[Table, str] = {**_FROM, "rollouts": "rollouts t"}
_SELECT: dict[Table, str] = {
    "rollouts": f"{ROLLOUTS.names('t')}, {ATTEMPTS.names('a')}",
    "attempts": ATTEMPTS.names("t"),
    "spans": "t.attempt_seq, a.rollout_id, a.attempt_id, t.sequence_id, t.issued, t.span_id, t.body",
    "resources": RESOURCES.names("t"),
    "workers": WORKERS.names("t"),
}
_CODECS: dict[Table, Codec[Any]] = {each.table: each for each in (ROLLOUTS, ATTEMPTS, RESOURCES, WORKERS)}
_SPAN_COLUMNS = {
    "rollout_id": "a.rollout_id",
    "attempt_id": "a.attempt_id",
    "sequence_id": "t.sequence_id",
    "span_id": "t.span_id",
}
_NEWEST = "t.version = (SELECT max(n.version) FROM resources n WHERE n.resources_id = t.resources_id)"


def page_statement(query: PageQuery) -> Statement:
    """Selects the rows of the page."""
    where = _where(query)
    sql = f"SELECT {_SELECT[query.table]} FROM {_FROM[query.table]}{where.sql} ORDER BY {_order(query)}"
    if query.limit == -1 and query.offset == 0:
        return Statement(sql, where.values)
    return Statement(f"{sql} LIMIT ? OFFSET ?", [*where.values, query.limit, query.offset])


def total_statement(query: PageQuery) -> Statement:
    """Counts the rows of all pages."""
    where = _where(query)
    return Statement(f"SELECT count(*) FROM {_COUNT_FROM[query.table]}{where.sql}", where.values)


def counted_by(query: PageQuery) -> list[str] | None:
    """The counters whose sum is the total; None if it has to be counted. A name may end in ``*``."""
    if query.scope or (query.table == "resources" and not query.newest_only):
        return None
    if query.table == "rollouts":
        match query.filters:
            case ():
                return ["rollouts.*"]
            case (Filter("status", "within", states),):
                return [f"rollouts.{state}" for state in set(states)]
            case _:
                return None
    return None if query.filters else [query.table]


def _where(query: PageQuery) -> Statement:
    values: list[Any] = []
    conditions = [_condition(query.table, each, values) for each in query.scope]
    if query.newest_only:
        conditions.append(_NEWEST)
    chosen = [_condition(query.table, each, values) for each in query.filters]
    if chosen:
        conditions.append(f"({f' {query.logic.upper()} '.join(chosen)})")
    return Statement(f" WHERE {' AND '.join(conditions)}" if conditions else "", values)


def _condition(table: Table, condition: Filter, values: list[Any]) -> str:
    column = _column(table, condition.field)
    match condition.test:
        case "equals":
            values.append(condition.value)
            return f"{column} = ?"
        case "within":
            values.append(json.dumps(list(condition.value)))
            return f"{column} IN (SELECT value FROM json_each(?))"
        case "below":
            values.append(condition.value)
            return f"{column} < ?"
        case "contains":
            values.append(condition.value)
            return f"instr({column}, ?) > 0"


def _order(query: PageQuery) -> str:
    way = "DESC" if query.descending else "ASC"
    if query.sort_by is None:
        return f"t.seq {way}"
    column = _column(query.table, query.sort_by)
    if query.table == "spans" and query.sort_by == "sequence_id":
        return f"a.sequence_id {way}, {column} {way}, t.seq {way}"
    if query.sort_by.endswith("_time"):
        missing = "FIRST" if query.descending else "LAST"
        return f"{column} {way} NULLS {missing}, t.seq {way}"
    return f"{column} {way}, t.seq {way}"


def _column(table: Table, field: str) -> str:
    if table == "spans":
        return _SPAN_COLUMNS.get(field) or f"json_extract(t.body, '$.{field}')"
    if field not in _CODECS[table].fields:
        raise KeyError(field)
    return f"t.{field}"
