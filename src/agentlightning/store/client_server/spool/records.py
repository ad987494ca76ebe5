"""The file format of a spool: records one after another, each with its length and a checksum.

``mark (4 bytes) | length (4) | CRC-32 of the content (4) | content``, numbers little-endian. A crash may
tear the last record; a bad sector may damage any. Whatever comes after a damaged record is found again
by its mark, and believed only if its checksum is right.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple
from zlib import crc32

__all__ = ["HEAD_BYTES", "Record", "encode_record", "read_records"]

_MARK = b"\xa9sp\n"
_HEAD = struct.Struct("<4sII")
HEAD_BYTES = _HEAD.size
"""What a record takes beside its content."""


class Record(NamedTuple):
    """A record that was read, and what was passed over to find it."""

    content: bytes
    end: int
    """Where the next one begins."""
    skipped_bytes: int
    """Damaged bytes before it."""


def encode_record(content: bytes) -> bytes:
    """A record with this content."""
    return _HEAD.pack(_MARK, len(content), crc32(content)) + content


def read_records(data: bytes, start: int = 0) -> Iterator[Record]:
    """The whole and undamaged records in ``data``, from ``start`` on."""
    position = searched_from = start
    while (found := data.find(_MARK, searched_from)) >= 0:
        content = _content_at(data, found)
        if content is None:
            searched_from = found + 1
            continue
        end = found + HEAD_BYTES + len(content)
        yield Record(content, end, found - position)
        position = searched_from = end


def _content_at(data: bytes, position: int) -> bytes | None:
    """The content of the record that begins here; None if it is torn or damaged."""
    begin = position + HEAD_BYTES
    if begin > len(data):
        return None
    _, length, checksum = _HEAD.unpack_from(data, position)
    content = data[begin : begin + length]
    return content if len(content) == length and crc32(content) == checksum else None
