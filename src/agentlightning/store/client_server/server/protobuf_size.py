"""How many objects a protobuf message becomes when it is read, counted on its bytes.

An empty message within another takes two bytes on the wire and a hundred times as many in memory, so that a small
body may stand for gigabytes. Counting costs no memory (protobuf.dev/programming-guides/encoding has the format).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from agentlightning.errors import NotJson, TooLarge

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor

__all__ = ["check_fields"]

_SMALLEST_FIELD_BYTES = 2
_LONGEST_VARINT = 70
_VARINT, _DELIMITED = 0, 2
_OTHER_BYTES = {1: 8, 3: 0, 4: 0, 5: 4}
"""What comes after the tag in fields of the other kinds. What is in a group (3, 4) is looked at like what is not."""

_Shape = dict[int, Any]
"""The fields of a message that are messages themselves, by number."""


def check_fields(content: bytes, message: Descriptor, most: int) -> None:
    """Look at all fields of a message and of those within it, before it is read.

    Args:
        content: the bytes of the message.
        message: its type.
        most: the most fields that it may have.

    Raises:
        TooLarge: it has more.
        NotJson: it is no such message. That there are few fields does not show that it is one.
    """
    if len(content) < most * _SMALLEST_FIELD_BYTES:
        return
    try:
        _count(content, _shape_of(message, {}), most)
    except LookupError as error:
        raise _not_whole(message) from error


def _count(content: bytes, shape: _Shape, most: int) -> None:
    count = 0
    waiting: list[tuple[int, int, Mapping[int, Any]]] = [(0, len(content), shape)]
    while waiting:
        position, end, fields = waiting.pop()
        while position < end:
            count += 1
            if count > most:
                raise TooLarge(f"the body has more than {most:,} fields; send fewer spans at a time")
            tag, position = _varint(content, position)
            kind = tag & 7
            if kind == _DELIMITED:
                length, position = _varint(content, position)
                within = fields.get(tag >> 3)
                if within is not None and length:
                    waiting.append((position, position + length, within))
                position += length
            elif kind == _VARINT:
                _, position = _varint(content, position)
            else:
                position += _OTHER_BYTES[kind]
        if position > end:
            raise IndexError(position)


def _varint(content: bytes, position: int) -> tuple[int, int]:
    """A number, and where it ends. Raises ``LookupError`` if it does not."""
    byte = content[position]
    position += 1
    value, shift = byte & 0x7F, 7
    while byte & 0x80:
        if shift == _LONGEST_VARINT:
            raise IndexError(position)
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
    return value, position


def _shape_of(message: Descriptor, known: dict[str, _Shape]) -> _Shape:
    """Types may hold one another, so the shapes do, too."""
    shape = known.get(message.full_name)
    if shape is None:
        shape = known[message.full_name] = {}
        for field in message.fields:
            if field.message_type is not None:
                shape[field.number] = _shape_of(field.message_type, known)
    return shape


def _not_whole(message: Descriptor) -> NotJson:
    return NotJson(f"the body is no {message.name}: its fields are not whole")
