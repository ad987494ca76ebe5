"""Values of OpenTelemetry, and nested values, as span attributes, and back.

An attribute is a scalar or a list of scalars of one type, so what is nested is written flat, its path joined by
dots, items of lists by position: ``{"reward": [{"name": "a"}]}`` becomes ``{"reward.0.name": "a"}``.
Nothing is imported from OpenTelemetry here: its objects are only read.
"""

from __future__ import annotations

import base64
import json
import math
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias, cast

AttributeValue: TypeAlias = str | bool | int | float | Sequence[str] | Sequence[bool] | Sequence[int] | Sequence[float]
"""What an attribute can be: a scalar, or a sequence of scalars of one type."""

Attributes: TypeAlias = dict[str, AttributeValue]
"""Attributes by name."""

_SECONDS_END = 1e11
"""Seconds up to here are dates before the year 5139; nanoseconds from here on are dates after 100 s past the epoch."""
_NUMBERS: frozenset[type[Any]] = frozenset({int, float})
_SCALARS: frozenset[type[Any]] = frozenset({str, bool, int, float})
_INT64_END = 2**63
_TRACEBACK_CHARACTERS = 64 * 1024
"""How much of a traceback is kept, from its end: the innermost frames and the message say most."""


def full_qualified_name(obj: type) -> str:
    """The name of a class with its module, except for builtins: ``ValueError``, ``decimal.Decimal``."""
    return obj.__qualname__ if obj.__module__ == "builtins" else f"{obj.__module__}.{obj.__qualname__}"


# --- Flat and nested -------------------------------------------------------------------------------


def flatten_attributes(
    nested_data: Mapping[str, Any] | Sequence[Any], *, expand_leaf_lists: bool = False
) -> dict[str, Any]:
    """Write nested objects and lists flat. Leaves are not looked at; empty objects and lists vanish.

    Args:
        nested_data: an object, or a list, which gets keys by position.
        expand_leaf_lists: also take lists of plain scalars apart, which otherwise stay whole.

    Raises:
        TypeError: a key is not a string.
    """
    flat: dict[str, Any] = {}
    pending: list[tuple[str, Any]] = [("", nested_data)]
    while pending:
        path, value = pending.pop()
        items = _items(value, expand_leaf_lists or not path)
        if items is None:
            flat[path] = value
        else:
            pending.extend((f"{path}.{key}" if path else key, item) for key, item in reversed(items))
    return flat


def _items(value: Any, expand_leaf_lists: bool) -> list[tuple[str, Any]] | None:
    """The parts of a value by their keys; None for a leaf."""
    if isinstance(value, Mapping):
        parts = list(cast("Mapping[Any, Any]", value).items())
        for key, _ in parts:
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is a {type(key).__name__}; attributes have strings as keys")
        return parts
    if isinstance(value, list | tuple):
        items = cast("Sequence[Any]", value)
        if expand_leaf_lists or any(isinstance(item, Mapping | list | tuple) for item in items):
            return [(str(position), item) for position, item in enumerate(items)]
    return None


def unflatten_attributes(flat_data: Mapping[str, Any]) -> dict[str, Any] | list[Any]:
    """Undo ``flatten_attributes``: keys are taken apart at their dots.

    Keys 0, 1, 2 … without a gap become a list. A key below one that has a value of its own cannot be taken
    apart there, and stays joined: ``{"a": 1, "a.b": 2}`` comes back as it is.
    """
    root: dict[str, Any] = {}
    for key, value in flat_data.items():
        _insert(root, key, value, flat_data)
    return _with_lists(root)


class _Branch(dict[str, Any]):
    """An object made here, as opposed to one that was the value of an attribute."""


def _insert(root: dict[str, Any], key: str, value: Any, flat_data: Mapping[str, Any]) -> None:
    node, path, parts = root, "", key.split(".")
    for position, part in enumerate(parts[:-1]):
        path = f"{path}.{part}" if position else part
        if path in flat_data:
            node[".".join(parts[position:])] = value
            return
        node = cast("dict[str, Any]", node.setdefault(part, _Branch()))
    node[parts[-1]] = value


def _with_lists(node: dict[str, Any]) -> dict[str, Any] | list[Any]:
    whole = {key: _with_lists(value) if isinstance(value, _Branch) else value for key, value in node.items()}
    if whole and all(str(position) in whole for position in range(len(whole))):
        return [whole[str(position)] for position in range(len(whole))]
    return whole


def filter_attributes(attributes: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The attributes called ``prefix`` or below it, under their full names."""
    below = prefix + "."
    return {key: value for key, value in attributes.items() if key == prefix or key.startswith(below)}


def filter_and_unflatten_attributes(attributes: Mapping[str, Any], prefix: str) -> dict[str, Any] | list[Any]:
    """What stands below ``prefix``, nested again, without the prefix."""
    below = prefix + "."
    return unflatten_attributes(
        {key.removeprefix(below): value for key, value in attributes.items() if key.startswith(below)}
    )


# --- Any value as an attribute ---------------------------------------------------------------------


def sanitize_attribute_value(object: Any, force: bool = True) -> AttributeValue:
    """``object`` as the value of an attribute.

    Scalars, and lists of scalars of one type, are what they are. Everything else becomes its JSON, where parts
    that JSON does not know are written as their ``str``; so are integers outside ±2^63.

    Args:
        object: any value.
        force: whether to write as JSON what does not fit.

    Raises:
        TypeError: it does not fit, and ``force`` is off.
    """
    if type(object) in _SCALARS and not _is_big(object):
        return object
    if issubclass(type(object), list | tuple):
        try:
            return sanitize_list_attribute_sanity(list(object))
        except TypeError:
            if not force:
                raise
    if not force:
        kind = type(object).__name__
        raise TypeError(f"{object!r} is a {kind}, which no attribute can be; give a scalar or a list of them")
    if isinstance(object, str):
        return str.__str__(object)
    return json.dumps(object, ensure_ascii=False, default=str)


def sanitize_attributes(attributes: Mapping[str, Any], force: bool = True) -> Attributes:
    """Each value by ``sanitize_attribute_value``. Raises ``TypeError`` if a key is not a string, or a value does not
    fit and ``force`` is off."""
    sane: Attributes = {}
    for key, value in attributes.items():
        if not isinstance(key, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"the key {key!r} is a {type(key).__name__}; attributes have strings as keys")
        try:
            sane[key] = sanitize_attribute_value(value, force)
        except TypeError as error:
            raise TypeError(f"attribute {key!r}: {error}") from error
    return sane


def sanitize_list_attribute_sanity(maybe_list: list[Any]) -> AttributeValue:
    """A list of scalars as the value of an attribute; integers among floats become floats. Raises ``TypeError`` if the
    items are not scalars, or of several types."""
    kinds: set[type[Any]] = {type(item) for item in maybe_list}
    if kinds == {int, float} and all(math.isfinite(item) for item in maybe_list if type(item) is float):
        return [float(item) for item in maybe_list]
    if len(kinds) <= 1 and kinds <= _SCALARS and not any(_is_big(item) for item in maybe_list):
        return maybe_list
    names = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise TypeError(f"a list of {names} cannot be an attribute; its items must be scalars of one type")


def check_attributes_sanity(attributes: Mapping[Any, Any]) -> None:
    """Raise ``TypeError``, naming the key, unless all of these can be attributes as they are."""
    sanitize_attributes(attributes, force=False)


def format_exception_attributes(exception: BaseException) -> Attributes:
    """An exception as attributes, by OpenTelemetry's conventions for exceptions.

    These are ``exception.type``, ``exception.message``, ``exception.stacktrace`` and ``exception.escaped``. Of a
    very long stack trace the end is kept.
    """
    trace = "".join(traceback.format_exception(exception))
    if len(trace) > _TRACEBACK_CHARACTERS:
        trace = "…" + trace[-_TRACEBACK_CHARACTERS:]
    return {
        "exception.type": full_qualified_name(type(exception)),
        "exception.message": str(exception),
        "exception.stacktrace": trace,
        "exception.escaped": True,
    }


def _is_big(value: Any) -> bool:
    return type(value) is int and not -_INT64_END <= value < _INT64_END


# --- Values of OpenTelemetry -------------------------------------------------------------------------


def convert_timestamp(timestamp: float | None) -> float | None:
    """Turn OpenTelemetry's nanoseconds since the Unix epoch into seconds.

    A value that is in seconds already is returned as it is, as a float; no value stays no value.
    """
    if timestamp is None:
        return None
    return timestamp / 1e9 if timestamp >= _SECONDS_END else float(timestamp)


def format_trace_id(trace_id: int) -> str:
    """Write a trace id as 32 hexadecimal digits (W3C Trace Context)."""
    return f"{trace_id:032x}"


def format_span_id(span_id: int) -> str:
    """Write a span id as 16 hexadecimal digits (W3C Trace Context)."""
    return f"{span_id:016x}"


def extract_extra_fields(src: Any, excluded_fields: list[str]) -> dict[str, Any]:
    """Return what an object carries beyond the fields we know, as far as JSON can.

    These are its public instance attributes except the excluded ones. Attributes that begin
    with an underscore, and values that JSON cannot hold, are left out.
    """
    attributes: dict[str, Any] = getattr(src, "__dict__", {})
    return {
        name: value
        for name, value in attributes.items()
        if not name.startswith("_") and name not in excluded_fields and _fits_json(value)
    }


def convert_attributes(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Turn OpenTelemetry attributes into ours: scalars, and lists of scalars of one type.

    Tuples become lists. What ours cannot hold becomes text by the rules of OpenTelemetry's
    common specification, section "AnyValue representation for non-OTLP protocols": bytes are
    Base64, no value is the empty text, and maps and mixed or nested lists are JSON.
    """
    if not attributes:
        return {}
    return {name: value if type(value) in _SCALARS else _convert(value) for name, value in attributes.items()}


def _convert(value: Any) -> Any:
    """Turn a value that is not plainly one of the four scalars into what an attribute can hold."""
    if value is None:
        return ""
    if isinstance(value, str):  # of a subclass, such as an enum; so are the next two
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, bytes | bytearray):
        return base64.b64encode(value).decode("ascii")
    if not isinstance(value, Sequence):
        return _json_text(cast("Any", value)) if isinstance(value, Mapping) else str(value)
    items = list(cast("Sequence[Any]", value))
    kinds: set[type[Any]] = {type(item) for item in items}
    if kinds <= _SCALARS and len(kinds) <= 1:
        return items
    if kinds <= _NUMBERS:
        with suppress(OverflowError):  # an integer too large for a float
            return [float(item) for item in items]
    return _json_text(items)


def _json_text(value: Any) -> str:
    return json.dumps(_json_value(value), ensure_ascii=False, separators=(",", ":"))


def _json_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _json_value(item) for name, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, bytes | bytearray):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Sequence):
        return [_json_value(item) for item in cast("Sequence[Any]", value)]
    return str(value)


def _fits_json(value: Any) -> bool:
    with suppress(TypeError, ValueError, RecursionError):
        json.dumps(value)
        return True
    return False


def dropped_parts(attributes: int, events: int) -> list[str]:
    """Return what ``LightningSpanAttributes.CUT`` says of a span of which a limit of OpenTelemetry dropped some: by
    default the oldest of more than 128.

    Args:
        attributes, events: how many were dropped.
    """
    return [name for name, count in (("attributes", attributes), ("events", events)) if count]
