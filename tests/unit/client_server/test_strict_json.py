"""The strict JSON door: accepted is what every reader understands alike, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, strategies as st

from agentlightning.errors import NotJson, TooLarge
from agentlightning.http.codec import MAX_BODY_DEPTH, MAX_NODES, decode_strict

REFUSED: Mapping[str, tuple[type[Exception], bytes]] = {
    "NaN": (NotJson, b'{"a": NaN}'),
    "Infinity": (NotJson, b"[Infinity]"),
    "-Infinity": (NotJson, b"-Infinity"),
    "overflow": (NotJson, b"1e999"),
    "negative overflow": (NotJson, b"[-1e999]"),
    "lone surrogate": (NotJson, b'"\\ud800"'),
    "lone low surrogate": (NotJson, b'{"a":"x\\udfff"}'),
    "half a pair in a key": (NotJson, b'{"\\ud800":1}'),
    "surrogate in UTF-8": (NotJson, b'"\xed\xa0\x80"'),
    "overlong UTF-8": (NotJson, b'"\xc0\x80"'),
    "not UTF-8": (NotJson, b'"\xff"'),
    "NUL": (NotJson, b'{"a":"\\u0000"}'),
    "NUL after an escaped backslash": (NotJson, b'{"a":"\\\\\\u0000"}'),
    "NUL in a key": (NotJson, b'{"\\u0000":1}'),
    "raw NUL": (NotJson, b'"\x00"'),
    "raw control character": (NotJson, b'"\n"'),
    "UTF-16": (NotJson, '{"a": 1}'.encode("utf-16")),
    "UTF-16 without a mark": (NotJson, '{"a": 1}'.encode("utf-16-le")),
    "byte order mark": (NotJson, b"\xef\xbb\xbf{}"),
    "depth 100,000": (TooLarge, b"[" * 100_000 + b"]" * 100_000),
    "objects 100,000 deep": (TooLarge, b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "a level too deep": (TooLarge, b"[" * (MAX_BODY_DEPTH + 1) + b"]" * (MAX_BODY_DEPTH + 1)),
    "10^6 keys": (TooLarge, b"{" + b",".join(b'"%d":1' % n for n in range(10**6)) + b"}"),
    "10^6 items": (TooLarge, b"[" + b"1," * MAX_NODES + b"1]"),
    "duplicate keys": (NotJson, b'{"a":1,"a":2}'),
    "duplicate keys inside": (NotJson, b'{"x":[{"a":1,"b":2,"a":1}]}'),
    "duplicate after a spaced colon": (NotJson, b'{"a" :1,"a":2}'),
    "duplicate beside a text with a colon": (NotJson, b'{"a":":","a":1}'),
    "duplicate beside an escaped quote": (NotJson, b'{"a":"\\":","a":1}'),
    "duplicate key that ends in a backslash": (NotJson, b'{"a\\\\":1,"a\\\\":2}'),
    "duplicate written differently": (NotJson, b'{"a":1,"\\u0061":2}'),
    "5,000 digits": (NotJson, b"9" * 5_000),
    "2^63": (NotJson, b'{"a":9223372036854775808}'),
    "2^63 alone": (NotJson, b"9223372036854775808"),
    "-2^63 - 1": (NotJson, b"[-9223372036854775809]"),
    "empty": (NotJson, b""),
    "blank": (NotJson, b" \n"),
    "trailing garbage": (NotJson, b"{} x"),
    "two values": (NotJson, b"{}{}"),
    "trailing comma": (NotJson, b"[1,]"),
    "leading zero": (NotJson, b"[01]"),
    "plus sign": (NotJson, b"+1"),
    "single quotes": (NotJson, b"{'a':1}"),
    "comment": (NotJson, b"{} // x"),
    "truncated": (NotJson, b'{"a":'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    error, raw = REFUSED[name]
    with pytest.raises(error) as caught:
        decode_strict(raw)
    assert type(caught.value) is error
    assert 10 < len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "raw",
    [
        b"{}",
        b" [1, 2.5, -3e-7, true, false, null] \n",
        b'{"a":1,"b":{"a":1}}',
        b'[{"a":1},{"a":1}]',
        b'{"a" : 1, "b"\t:\n2}',
        b'{"a":":x","b":"\\":","c":"\\\\","\\"":"{\\"a\\":1,\\"a\\":2}"}',
        b'"\\ud83d\\ude00"',
        b'"\\\\u0000"',
        b"[9223372036854775807,-9223372036854775808]",
        b"[" * MAX_BODY_DEPTH + b"]" * MAX_BODY_DEPTH,
        b'{"' + b"[{," * 500_000 + b'":1}',
    ],
)
def test_accepted(raw: bytes) -> None:
    assert decode_strict(raw) == json.loads(raw)


_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.sampled_from('a":\\ {}')), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(value=_values, spaced=st.booleans(), escaped=st.booleans())
def test_what_any_writer_makes_of_a_value_is_accepted(value: Any, spaced: bool, escaped: bool) -> None:
    separators = (" , ", " : ") if spaced else (",", ":")
    assert decode_strict(json.dumps(value, separators=separators, ensure_ascii=escaped).encode()) == value


@given(
    pairs=st.lists(st.tuples(st.text(st.sampled_from('a":\\ '), max_size=3), _values), min_size=1, max_size=5),
    spaced=st.sampled_from([":", " :", ": "]),
)
def test_a_key_given_twice_is_always_found(pairs: list[tuple[str, Any]], spaced: str) -> None:
    """Each object is written with its first key once more at the end; without that it is accepted."""

    def written(items: list[tuple[str, Any]]) -> bytes:
        return ("{" + ",".join(json.dumps(key) + spaced + json.dumps(value) for key, value in items) + "}").encode()

    once = list(dict(pairs).items())
    assert decode_strict(written(once)) == dict(once)
    with pytest.raises(NotJson, match="twice"):
        decode_strict(written([*once, once[0]]))
