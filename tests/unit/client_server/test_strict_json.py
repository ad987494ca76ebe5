"""The strict JSON door: accepted is what every reader understands alike, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, strategies as st

from agentlightning.errors import NotJson, TooLarge
from agentlightning.http.codec import MAX_BODY_DEPTH, MAX_NODES, check_node_count, decode_strict
from agentlightning.store.validation import holds_nul

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


@given(text=st.text(st.sampled_from('\\\0u0"n'), max_size=12))
def test_a_nul_is_found_behind_any_backslashes(text: str) -> None:
    assert holds_nul(json.dumps(text).encode()) == ("\0" in text)


@pytest.mark.parametrize(
    ("item", "nodes"),
    [
        (b'"' + b"[,:{" * 9 + b'"', 1),
        (b'"' + b'\\"[' * 9 + b'"', 1),
        (b'"' + b"\\\\" * 9 + b'",[', 3),
        (b'"\\\\\\"[,",{', 3),
        (b'""', 1),
        (b"[]", 2),
    ],
)
def test_nodes_are_counted_outside_of_strings(item: bytes, nodes: int) -> None:
    """Each item adds its comma and what it has itself; one more than there may be is one too many."""
    most = MAX_NODES // nodes
    check_node_count(item + (b"," + item) * (most - 2) + b" " * MAX_NODES, "it")
    with pytest.raises(TooLarge):
        check_node_count(item + (b"," + item) * (most + 1), "it")


_IN_LITTLE_MEMORY = r"""
import re, resource
from agentlightning.http.codec import decode_strict
pairs = 4 << 20
bodies = [b'{"a":"' + each * pairs + b'"}' for each in (rb"\\", rb"\"", rb",[", rb"\\u0000")]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 8 * len(bodies[-1]),) * 2)
for body in bodies:
    decode_strict(body)
try:
    re.search(rb"(?<!\\)(?:\\\\)*\\u0000", bodies[0])
except MemoryError:
    print("too much for an expression that remembers each pair")
"""


def test_the_checks_of_a_hostile_body_take_a_few_times_its_bytes() -> None:
    done = subprocess.run([sys.executable, "-c", _IN_LITTLE_MEMORY], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "too much for an expression that remembers each pair\n"  # so the limit is one
