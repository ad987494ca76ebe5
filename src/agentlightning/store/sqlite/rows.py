"""Rows as SQL values and back, and the statements that carry them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import compress
from operator import is_not, itemgetter
from types import MappingProxyType
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import msgspec
from msgspec.structs import astuple

from agentlightning.lifecycle.records import AttemptRow, ResourcesRow, RolloutPolicy, RolloutRow, WorkerRow
from agentlightning.lifecycle.states import CLAIMABLE, LIVE
from agentlightning.store.backend import Filter, PageQuery, Table

R = TypeVar("R", bound=msgspec.Struct)


class Codec(Generic[R]):
    """One table and the row class that it stores: columns are the fields of the class, in order.

    Args:
        table: the table.
        row: the row class.
        encoded: fields that are not stored as they are: to the stored value, and back (None: as it is).
        flag: a column behind the fields that says whether the row's status is one of these, for partial indexes.
        source: what is selected from under the name ``t``, if it is not the table itself.
        computed: fields that ``source`` computes, so that they are not stored.
    """

    def __init__(
        self,
        table: Literal["rollouts", "attempts", "resources", "workers"],
        row: type[R],
        *,
        encoded: Mapping[str, tuple[Callable[[Any], Any], Callable[[Any], Any] | None]] = MappingProxyType({}),
        flag: tuple[str, frozenset[Any]] | None = None,
        source: str | None = None,
        computed: Sequence[str] = (),
    ) -> None:
        self.table: Literal["rollouts", "attempts", "resources", "workers"] = table
        self.fields = row.__struct_fields__
        self.flag, self._flagged = flag or (None, frozenset[Any]())
        flags = [] if self.flag is None else [self.flag]
        self.source = f"{source or table} t"
        self.select = f"SELECT {self.names('t')} FROM {self.source}"
        self.select_all = f"SELECT {', '.join([self.names('t'), *flags])} FROM {self.source}"
        self._row = row
        self._computed = frozenset(self.fields.index(name) for name in computed)
        self._indexes = range(len(self.fields))
        stored = [name for name in self.fields[1:] if name not in computed]
        columns = [*stored, *flags]
        self.insert = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
        self._encode = {self.fields.index(name): encode for name, (encode, _) in encoded.items()}
        self._decode = {self.fields.index(name): decode for name, (_, decode) in encoded.items() if decode}
        self._status = self.fields.index("status") if flags else -1
        self._updates: dict[tuple[int, ...], tuple[str, itemgetter[Any]]] = {}

    def flag_of(self, row: Any) -> int:
        """The value of the column ``flag``."""
        return int(row.status in self._flagged)

    def encode(self, row: R) -> list[Any]:
        """The values for ``insert``."""
        values: list[Any] = [*astuple(row)]
        flags = [] if self.flag is None else [int(values[self._status] in self._flagged)]
        for index, encode in self._encode.items():
            values[index] = encode(values[index])
        if self._computed:
            values = [value for index, value in enumerate(values) if index not in self._computed]
        return [*values[1:], *flags]

    def decode(self, values: Sequence[Any]) -> R:
        """The row with these values of its fields."""
        if self._decode:
            values = list(values)
            for index, decode in self._decode.items():
                values[index] = decode(values[index])
        return self._row(*values)

    def names(self, alias: str) -> str:
        """The fields as columns of a table that a query calls ``alias``."""
        return ", ".join(f"{alias}.{field}" for field in self.fields)

    def update(self, old: R, new: R) -> tuple[str, list[Any]]:
        """The statement that turns the stored ``old`` into ``new``, and its values.

        Only columns that differ are written, so an index is touched only when it must be. The
        row is found by ``seq``, on condition that its ``version`` is the one that was read.
        """
        before, after = astuple(old), astuple(new)
        changed = tuple(compress(self._indexes, map(is_not, before, after)))
        if self._computed:
            changed = tuple([i for i in changed if i not in self._computed])
        flagged = self._status in changed
        known = self._updates.get(changed)
        if known is None:
            columns = [*([self.flag] if flagged else ()), *[self.fields[i] for i in changed]]
            assignments = ", ".join(f"{column} = ?" for column in columns)
            statement = f"UPDATE {self.table} SET {assignments} WHERE seq = ? AND version = ?"
            known = self._updates[changed] = statement, itemgetter(*changed, 0)
        statement, pick = known
        values: list[Any] = [*pick(after), before[1]]
        for index, encode in self._encode.items():
            if index in changed:
                values[changed.index(index)] = encode(after[index])
        if flagged:
            values.insert(0, int(after[self._status] in self._flagged))
        return statement, values


@lru_cache(maxsize=1024)
def _encode_policy(policy: RolloutPolicy) -> bytes:
    return msgspec.json.encode(policy)


@lru_cache(maxsize=1024)
def _decode_policy(encoded: bytes) -> RolloutPolicy:
    return msgspec.json.decode(encoded, type=RolloutPolicy)


ROLLOUTS: Codec[RolloutRow] = Codec(
    "rollouts",
    RolloutRow,
    encoded={"policy": (_encode_policy, _decode_policy)},
    flag=("claimable", CLAIMABLE),
)
ATTEMPTS: Codec[AttemptRow] = Codec("attempts", AttemptRow, flag=("live", LIVE))
RESOURCES: Codec[ResourcesRow] = Codec("resources", ResourcesRow)
_OF_HELD_ATTEMPT = {
    "current_rollout_id": "h.rollout_id",
    "current_attempt_id": "h.attempt_id",
    "status": "iif(h.seq IS NOT NULL AND w.status IN ('idle', 'unknown'), 'busy', w.status)",
}
"""What is computed about a worker: it is busy with the newest live attempt that names it. That saves writing the row
of the worker each time when it claims or ends an attempt."""
_WORKER_COLUMNS = ", ".join(
    f"{_OF_HELD_ATTEMPT.get(name, f'w.{name}')} AS {name}" for name in WorkerRow.__struct_fields__
)
_WORKERS_NOW = (
    f"(SELECT {_WORKER_COLUMNS} FROM workers w LEFT JOIN attempts h "
    "ON h.seq = (SELECT max(seq) FROM attempts WHERE worker_id = w.worker_id AND live))"
)
WORKERS: Codec[WorkerRow] = Codec(
    "workers",
    WorkerRow,
    source=_WORKERS_NOW,
    computed=("current_rollout_id", "current_attempt_id"),
    encoded={"status": (lambda status: "idle" if status == "busy" else status, None)},
)

CODECS: dict[type[Any], Codec[Any]] = {
    RolloutRow: ROLLOUTS,
    AttemptRow: ATTEMPTS,
    ResourcesRow: RESOURCES,
    WorkerRow: WORKERS,
}
"""By the class of the rows that it stores."""


# --- A ``PageQuery`` as SQL ---


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
    "workers": WORKERS.source,
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
