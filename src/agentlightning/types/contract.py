"""Filters, order and pages of queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeAlias, TypeVar, overload

from pydantic import BaseModel, ConfigDict
from typing_extensions import TypedDict  # pydantic refuses typing's own before Python 3.12

if TYPE_CHECKING:
    from pydantic_core import CoreSchema

T_item = TypeVar("T_item")


class FilterField(TypedDict, total=False):
    """Conditions on one field of a record. All that are present must hold."""

    exact: Any
    """The field equals this."""
    within: Sequence[Any]
    """The field equals one of these. None does when it is empty."""
    contains: str
    """The field is a string that has this in it, in the same case."""


FilterOptions: TypeAlias = Mapping[
    str | Literal["_aggregate", "_must"],
    FilterField | Literal["and", "or"] | Mapping[str, FilterField],
]
"""Conditions by the name of the field.

``_aggregate`` says whether all of them must hold (``"and"``, the default) or one suffices
(``"or"``); those under ``_must`` must hold in either case.
"""


class SortOptions(TypedDict):
    """The order of a query: by the field called `name`, in the given direction."""

    name: str
    order: Literal["asc", "desc"]


class PaginatedResult(BaseModel, Sequence[T_item], Generic[T_item]):
    """One page of a query: a sequence of its items that also knows where it was cut.

    Length, truth, iteration, index and slice are those of `items`. Equal to another page
    with the same items and numbers, never to a list: compare ``list(page)``.
    """

    # The items may be spans, and pydantic takes this setting from the outermost model alone.
    model_config = ConfigDict(ser_json_inf_nan="strings")

    items: Sequence[T_item]
    """The records on this page."""
    limit: int
    """How many there could have been at most; -1 means no limit."""
    offset: int
    """How many records of the whole result come before this page."""
    total: int
    """How many records there are on all pages together."""

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> T_item: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[T_item]: ...

    def __getitem__(self, index: int | slice) -> T_item | Sequence[T_item]:
        return self.items[index]

    # pydantic's own yields the fields.
    def __iter__(self) -> Iterator[T_item]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return iter(self.items)

    def __reduce__(self) -> tuple[Any, ...]:
        # pickle finds a class by its name, which `PaginatedResult[Span]` does not have. The plain
        # class with the same content is equal to it.
        plain = self.__pydantic_generic_metadata__["origin"] or type(self)
        return partial(plain.model_construct, **self.__dict__), ()


# --- The mark for an argument that was not given, where `None` is a value of its own ---


class Unset(Enum):
    """The type of `UNSET`, for annotations: ``status: RolloutStatus | Unset = UNSET``.

    It is an enum with one member because that is what type checkers narrow by ``is``
    (PEP 484, "Support for singleton types in unions"), and because enum members stay
    the same object through pickle, copy and threads. The member's value is an opaque
    object: neither a string nor anything else that came in as JSON turns into `UNSET`,
    and no serialiser writes it by mistake.
    """

    UNSET = object()

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "UNSET"

    __str__ = __repr__

    def __reduce_ex__(self, proto: Any) -> tuple[Any, ...]:
        # Enum pickles a member by its value, which would be another object on the other side.
        return getattr, (type(self), self.name)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        from pydantic_core import core_schema

        return core_schema.is_instance_schema(cls)


UNSET: Final = Unset.UNSET
"""Not given. Falsy; test for it with ``value is UNSET``."""


# --- What a consistency check of a store reports ---


class Violation(BaseModel):
    """One record that breaks one rule."""

    rule: str
    """Stable name of the rule, such as ``attempts_numbered``."""
    record: str
    """Which record: its kind and id, such as ``rollout ro-…``."""
    detail: str
    """What was found, and what should have been."""


class VerificationReport(BaseModel):
    """The outcome of a consistency check."""

    checked: dict[str, int]
    """How many records of each kind were looked at."""
    violations: list[Violation]
    complete: bool = True
    """Whether every violation is named; if not, there were more than the report has room for."""

    @property
    def ok(self) -> bool:
        """Whether every rule holds."""
        return not self.violations
