"""The mark for an argument that was not given, where `None` is a value of its own."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pydantic_core import CoreSchema

__all__ = ["UNSET", "Unset"]


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
