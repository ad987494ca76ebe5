"""Rows as SQL values and back, and the statements that carry them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import eq
from typing import Any, Generic, Literal, TypeVar

import msgspec
from msgspec.structs import astuple

from agentlightning.lifecycle.records import AttemptRow, Policy, ResourcesRow, RolloutRow, WorkerRow

__all__ = ["ATTEMPTS", "RESOURCES", "ROLLOUTS", "WORKERS", "Codec", "codec_of"]

R = TypeVar("R", bound=msgspec.Struct)
Values = tuple[Any, ...]


class Codec(Generic[R]):
    """One table and the row class that it stores: columns are the fields of the class, in order.

    Args:
        table: the table.
        row: the row class.
        encode: a row as the values of all columns.
        decode: a row from the values of its fields.
        derived: columns behind the fields, computed from the row.
    """

    def __init__(
        self,
        table: Literal["rollouts", "attempts", "resources", "workers"],
        row: type[R],
        encode: Callable[[R], Values],
        decode: Callable[[Values], R],
        derived: Sequence[str] = (),
    ) -> None:
        self.table: Literal["rollouts", "attempts", "resources", "workers"] = table
        self.encode = encode
        self.decode = decode
        self.fields = row.__struct_fields__
        self.columns = (*self.fields, *derived)
        self.select = f"SELECT {', '.join(self.fields)} FROM {table}"
        stored = self.columns[1:]
        self.insert = f"INSERT INTO {table} ({', '.join(stored)}) VALUES ({', '.join('?' * len(stored))})"
        self._updates: dict[tuple[int, ...], str] = {}

    def names(self, alias: str) -> str:
        """The fields as columns of a table that a query calls ``alias``."""
        return ", ".join(f"{alias}.{field}" for field in self.fields)

    def update(self, old: R, new: R) -> tuple[str, list[Any]]:
        """The statement that turns the stored ``old`` into ``new``, and its values.

        Only columns that differ are written, so an index is touched only when it must be. The
        row is found by ``seq``, on condition that its ``version`` is the one that was read.
        """
        before, after = self.encode(old), self.encode(new)
        changed = tuple([i for i, same in enumerate(map(eq, before, after)) if not same])
        statement = self._updates.get(changed)
        if statement is None:
            assignments = "".join(f", {self.columns[i]} = ?" for i in changed)
            statement = f"UPDATE {self.table} SET version = version + 1{assignments} WHERE seq = ? AND version = ?"
            self._updates[changed] = statement
        return statement, [*[after[i] for i in changed], before[0], before[1]]


_POLICY = RolloutRow.__struct_fields__.index("policy")


@lru_cache(maxsize=1024)
def _encode_policy(policy: Policy) -> bytes:
    return msgspec.json.encode(policy)


@lru_cache(maxsize=1024)
def _decode_policy(encoded: bytes) -> Policy:
    return msgspec.json.decode(encoded, type=Policy)


def _encode_rollout(row: RolloutRow) -> Values:
    values = astuple(row)
    return (*values[:_POLICY], _encode_policy(row.policy), *values[_POLICY + 1 :], int(row.claimable))


def _decode_rollout(values: Values) -> RolloutRow:
    fields = list(values)
    fields[_POLICY] = _decode_policy(fields[_POLICY])
    return RolloutRow(*fields)


ROLLOUTS: Codec[RolloutRow] = Codec("rollouts", RolloutRow, _encode_rollout, _decode_rollout, ("claimable",))
ATTEMPTS: Codec[AttemptRow] = Codec(
    "attempts", AttemptRow, lambda row: (*astuple(row), int(row.live)), lambda values: AttemptRow(*values), ("live",)
)
RESOURCES: Codec[ResourcesRow] = Codec("resources", ResourcesRow, astuple, lambda values: ResourcesRow(*values))
WORKERS: Codec[WorkerRow] = Codec("workers", WorkerRow, astuple, lambda values: WorkerRow(*values))

_BY_ROW: dict[type[msgspec.Struct], Codec[Any]] = {
    RolloutRow: ROLLOUTS,
    AttemptRow: ATTEMPTS,
    ResourcesRow: RESOURCES,
    WorkerRow: WORKERS,
}


def codec_of(row: msgspec.Struct) -> Codec[Any]:
    """The codec of a row's class."""
    return _BY_ROW[type(row)]
