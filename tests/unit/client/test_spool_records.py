"""Records of a spool: torn and damaged ones are passed over, and nothing else is."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, strategies as st

from agentlightning.http.client.spool import encode_record, read_records

CONTENTS = [b"", b"a", b'{"span":1}', b"x" * 70_000, "é©\u00a9".encode(), b"\xa9sp" * 5]


def _file(contents: list[bytes]) -> bytes:
    return b"".join(encode_record(each) for each in contents)


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_what_was_written_is_read(contents: list[bytes]) -> None:
    data = _file(contents)
    records = list(read_records(data))
    assert [each.content for each in records] == contents
    assert [each.skipped_bytes for each in records] == [0] * len(contents)
    assert (records[-1].end if records else 0) == len(data)


def test_reading_goes_on_anywhere_between_records() -> None:
    data = _file(CONTENTS)
    ends = [0, *(each.end for each in read_records(data))]
    for number, start in enumerate(ends):
        assert [each.content for each in read_records(data, start)] == CONTENTS[number:]


def test_a_torn_end_is_left_out() -> None:
    data = _file(CONTENTS[:3])
    whole = data.rindex(encode_record(CONTENTS[2]))
    for length in range(whole, len(data)):
        assert [each.content for each in read_records(data[:length])] == CONTENTS[:2]


@pytest.mark.parametrize("seed", range(30))
def test_one_damaged_byte_costs_one_record(seed: int) -> None:
    chance = random.Random(seed)
    contents = [chance.randbytes(chance.randrange(1, 300)) for _ in range(10)]
    data = bytearray(_file(contents))
    where = chance.randrange(len(data))
    data[where] ^= 1 << chance.randrange(8)
    hit = next(number for number in range(10) if where < len(_file(contents[: number + 1])))
    records = list(read_records(bytes(data)))
    assert [each.content for each in records] == contents[:hit] + contents[hit + 1 :]
    lost = len(encode_record(contents[hit]))
    assert sum(each.skipped_bytes for each in records) == (lost if hit < 9 else 0)


def test_without_its_checksum_a_damaged_record_would_be_believed() -> None:
    """The control of the test above: the damage is such that only the checksum finds it."""
    data = bytearray(_file([b"good", b"text"]))
    data[-1] ^= 1
    assert data[-4:] == b"texu"
    assert [each.content for each in read_records(bytes(data))] == [b"good"]


def test_a_record_of_an_earlier_version_is_read() -> None:
    """A spool outlives an upgrade: these bytes were written by the first version that had one."""
    assert [each.content for each in read_records(b'\xa9sp\n\n\x00\x00\x00w\xe2\x17\xa1{"span":1}')] == [b'{"span":1}']
