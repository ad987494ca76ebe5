"""Rows as SQL values and back, and the statements that carry them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from operator import is_
from types import MappingProxyType
from typing import Any, Generic, Literal, TypeVar

import msgspec
from msgspec.structs import astuple

from agentlightning.lifecycle.records import AttemptRow, Policy, ResourcesRow, RolloutRow, WorkerRow

__all__ = ["ATTEMPTS", "RESOURCES", "ROLLOUTS", "WORKERS", "Codec", "codec_of"]

R = TypeVar("R", bound=msgspec.Struct)


class Codec(Generic[R]):
    """One table and the row class that it stores: columns are the fields of the class, in order.

    Args:
        table: the table.
        row: the row class.
        encoded: fields that are not stored as they are: to the stored value, and back.
        derived: columns behind the fields, computed from the row's status.
    """

    def __init__(
        self,
        table: Literal["rollouts", "attempts", "resources", "workers"],
        row: type[R],
        *,
        encoded: Mapping[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = MappingProxyType({}),
        derived: Mapping[str, Callable[[R], Any]] = MappingProxyType({}),
    ) -> None:
        self.table: Literal["rollouts", "attempts", "resources", "workers"] = table
        self.fields = row.__struct_fields__
        self.columns = (*self.fields, *derived)
        self.select = f"SELECT {', '.join(self.fields)} FROM {table}"
        stored = self.columns[1:]
        self.insert = f"INSERT INTO {table} ({', '.join(stored)}) VALUES ({', '.join('?' * len(stored))})"
        self._row = row
        self._encoded = {self.fields.index(name): way for name, way in encoded.items()}
        self._derived = tuple(derived.values())
        self._decisive = self.fields.index("status") if derived else -1
        self._updates: dict[tuple[int, ...], str] = {}

    def encode(self, row: R) -> list[Any]:
        """The values of all columns."""
        values = [*astuple(row), *[derive(row) for derive in self._derived]]
        for index, (encode, _) in self._encoded.items():
            values[index] = encode(values[index])
        return values

    def decode(self, values: Sequence[Any]) -> R:
        """The row with these values of its fields."""
        if self._encoded:
            values = list(values)
            for index, (_, decode) in self._encoded.items():
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
        changed = tuple([i for i, same in enumerate(map(is_, before, after)) if not same])
        derived = [derive(new) for derive in self._derived] if self._decisive in changed else []
        statement = self._updates.get(changed)
        if statement is None:
            statement = self._updates[changed] = self._update_statement(changed, bool(derived))
        values = [after[i] for i in changed]
        for index, (encode, _) in self._encoded.items():
            if index in changed:
                values[changed.index(index)] = encode(after[index])
        return statement, [*values, *derived, before[0], before[1]]

    def _update_statement(self, changed: tuple[int, ...], derived: bool) -> str:
        columns = [self.fields[i] for i in changed]
        if derived:
            columns += self.columns[len(self.fields) :]
        assignments = "".join(f", {column} = ?" for column in columns)
        return f"UPDATE {self.table} SET version = version + 1{assignments} WHERE seq = ? AND version = ?"


@lru_cache(maxsize=1024)
def _encode_policy(policy: Policy) -> bytes:
    return msgspec.json.encode(policy)


@lru_cache(maxsize=1024)
def _decode_policy(encoded: bytes) -> Policy:
    return msgspec.json.decode(encoded, type=Policy)


ROLLOUTS: Codec[RolloutRow] = Codec(
    "rollouts",
    RolloutRow,
    encoded={"policy": (_encode_policy, _decode_policy)},
    derived={"claimable": lambda row: int(row.claimable)},
)
ATTEMPTS: Codec[AttemptRow] = Codec("attempts", AttemptRow, derived={"live": lambda row: int(row.live)})
RESOURCES: Codec[ResourcesRow] = Codec("resources", ResourcesRow)
WORKERS: Codec[WorkerRow] = Codec("workers", WorkerRow)

_BY_ROW: dict[type[msgspec.Struct], Codec[Any]] = {
    RolloutRow: ROLLOUTS,
    AttemptRow: ATTEMPTS,
    ResourcesRow: RESOURCES,
    WorkerRow: WORKERS,
}


def codec_of(row: msgspec.Struct) -> Codec[Any]:
    """The codec of a row's class."""
    return _BY_ROW[type(row)]
