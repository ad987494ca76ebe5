"""Nested values are written flat and read back, and every value becomes one that an attribute can be."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies as st

from agentlightning.types.attributes import (
    check_attributes_sanity,
    filter_and_unflatten_attributes,
    filter_attributes,
    flatten_attributes,
    format_exception_attributes,
    full_qualified_name,
    sanitize_attribute_value,
    sanitize_attributes,
    unflatten_attributes,
)

keys = st.text("abc", min_size=1, max_size=3)
leaves = st.one_of(st.integers(), st.text(max_size=3), st.booleans())
nested = st.recursive(
    leaves, lambda inner: st.one_of(st.dictionaries(keys, inner, min_size=1, max_size=3)), max_leaves=8
)


@given(st.dictionaries(keys, nested, max_size=4))
def test_nested_objects_come_back(value: dict[str, Any]) -> None:
    assert unflatten_attributes(flatten_attributes(value)) == value


@pytest.mark.parametrize(
    ("value", "flat"),
    [
        ({"a": {"b": 1}}, {"a.b": 1}),
        ({"a": [{"x": 1}, {"y": 2}]}, {"a.0.x": 1, "a.1.y": 2}),
        ({"a": [1, 2]}, {"a": [1, 2]}),
        ({"a": [[1], [2]]}, {"a.0": [1], "a.1": [2]}),
    ],
)
def test_flat_and_back(value: dict[str, Any], flat: dict[str, Any]) -> None:
    assert flatten_attributes(value) == flat
    assert unflatten_attributes(flat) == value


def test_lists() -> None:
    assert flatten_attributes({"a": [1, 2]}, expand_leaf_lists=True) == {"a.0": 1, "a.1": 2}
    assert flatten_attributes([{"a": 1}, "b"]) == {"0.a": 1, "1": "b"}
    assert unflatten_attributes({"0.a": 1, "1": "b"}) == [{"a": 1}, "b"]
    assert unflatten_attributes({"x.1": "b", "x.0": "a"}) == {"x": ["a", "b"]}
    assert unflatten_attributes({"x.0": "a", "x.2": "b"}) == {"x": {"0": "a", "2": "b"}}


def test_a_key_below_one_that_has_a_value_stays_joined() -> None:
    for flat in ({"a": 1, "a.b": 2}, {"a.b": 2, "a": 1}, {"x.a": 1, "x.a.b.c": 2}):
        back = unflatten_attributes(flat)
        assert flatten_attributes(back) == flat


def test_keys_must_be_strings() -> None:
    with pytest.raises(TypeError, match="key 1"):
        flatten_attributes({"a": {1: 2}})
    with pytest.raises(TypeError, match="key 1"):
        sanitize_attributes({1: 2})  # pyright: ignore[reportArgumentType]


def test_filters() -> None:
    attributes = {"a": 0, "a.b": 1, "ab": 2, "a.c.0": 3}
    assert filter_attributes(attributes, "a") == {"a": 0, "a.b": 1, "a.c.0": 3}
    assert filter_and_unflatten_attributes(attributes, "a") == {"b": 1, "c": [3]}


@pytest.mark.parametrize(
    ("value", "sane"),
    [
        (1, 1),
        (True, True),
        ("x", "x"),
        ([1, 2], [1, 2]),
        ((1, 2), [1, 2]),
        ([1, 2.5], [1.0, 2.5]),
        ([], []),
        ([1, "a"], '[1, "a"]'),
        ({"a": 1}, '{"a": 1}'),
        (None, "null"),
        (2**70, str(2**70)),
        (
            {
                1,
            },
            '"{1}"',
        ),
    ],
)
def test_any_value_becomes_an_attribute(value: Any, sane: Any) -> None:
    result = sanitize_attribute_value(value)
    assert result == sane
    assert type(result) is type(sane)


@pytest.mark.parametrize("value", [None, {"a": 1}, [1, "a"], [[1]], 2**70])
def test_without_force_what_does_not_fit_is_refused_by_name(value: Any) -> None:
    with pytest.raises(TypeError, match="'x'"):
        check_attributes_sanity({"ok": 1, "x": value})


def test_exceptions() -> None:
    try:
        raise KeyError("gone")
    except KeyError as error:
        told = format_exception_attributes(error)
    assert told["exception.type"] == "KeyError"
    assert told["exception.message"] == "'gone'"
    assert "test_exceptions" in str(told["exception.stacktrace"])
    assert full_qualified_name(pytest.Item) == "_pytest.nodes.Item"


def test_of_a_long_traceback_the_end_is_kept() -> None:
    told = format_exception_attributes(ValueError("x" * 200_000 + "END"))
    assert len(str(told["exception.stacktrace"])) < 70_000
    assert str(told["exception.stacktrace"]).rstrip().endswith("END")
