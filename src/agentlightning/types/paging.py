"""Filters, order and pages of queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, TypeAlias, TypeVar, overload

from pydantic import BaseModel, ConfigDict
from typing_extensions import TypedDict  # pydantic refuses typing's own before Python 3.12

__all__ = ["FilterField", "FilterOptions", "PaginatedResult", "SortOptions"]

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
        return _restore, (plain, dict(self.__dict__))


def _restore(page: type[PaginatedResult[Any]], fields: dict[str, Any]) -> PaginatedResult[Any]:
    return page.model_construct(**fields)
