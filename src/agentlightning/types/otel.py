"""Values of OpenTelemetry turned into values of ours.

Nothing is imported from OpenTelemetry here: its objects are only read.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

# Seconds up to here are dates before the year 5139; nanoseconds from here on are dates after 100 s past the epoch.
_SECONDS_END = 1e11

_NUMBERS: frozenset[type[Any]] = frozenset({int, float})
_SCALARS: frozenset[type[Any]] = frozenset({str, bool, int, float})


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
        return _base64_text(value)
    if isinstance(value, Sequence):
        return _convert_sequence(list(cast("Sequence[Any]", value)))
    if isinstance(value, Mapping):
        return _json_text(cast("Mapping[Any, Any]", value))
    return str(value)


def _convert_sequence(items: list[Any]) -> list[Any] | str:
    kinds: set[type[Any]] = {type(item) for item in items}
    if kinds <= _SCALARS and len(kinds) <= 1:
        return items
    if kinds <= _NUMBERS:
        with suppress(OverflowError):  # an integer too large for a float
            return [float(item) for item in items]
    return _json_text(items)


def _base64_text(value: bytes | bytearray) -> str:
    return base64.b64encode(value).decode("ascii")


def _json_text(value: Any) -> str:
    return json.dumps(_json_value(value), ensure_ascii=False, separators=(",", ":"))


def _json_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _json_value(item) for name, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, bytes | bytearray):
        return _base64_text(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Sequence):
        return [_json_value(item) for item in cast("Sequence[Any]", value)]
    return str(value)


def _fits_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
