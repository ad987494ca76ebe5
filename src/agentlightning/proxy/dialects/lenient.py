"""JSON as backends and agents really write it, read and written again without a loss.

msgspec refuses what its types cannot hold: half of a surrogate pair (a stream may be cut in the middle of one), NaN and
Infinity (log-probabilities), and numbers beyond its range. OpenAI's clients accept all of these, so a proxy that
refuses them would make a difference. Such a text is read by the standard library instead, numbers that Python cannot
hold stay texts behind a mark, and ``write_json`` puts everything back as it was.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from typing import Any, cast

import msgspec

_MARK = f"agl-number-{secrets.token_hex(12)}:"
"""Before the text of a number that stays a text. Nobody outside of this process knows it, so no text can forge it."""
_MARK_BYTES = _MARK.encode()
_MARKED = re.compile(b'"' + _MARK_BYTES + rb'([^"]*)"')
_encode = msgspec.json.encode
_MAX_DIGITS = 4_000
"""Python refuses to convert much longer integers (sys.int_info)."""


def _read_int(text: str) -> object:
    return int(text) if len(text) <= _MAX_DIGITS else _MARK + text


def _read_float(text: str) -> object:
    number = float(text)
    return number if math.isfinite(number) else _MARK + text


def read_request_json(data: bytes) -> Any:
    """Return what JSON of an agent says, in which halves of surrogate pairs may occur, but no other oddity. Raises
    ``ValueError`` if it is none."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        if b"\\u" not in data or isinstance(error, RecursionError):
            raise ValueError(str(error)) from error
    return json.loads(data, parse_float=_finite, parse_constant=_finite)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no number of JSON, or out of range")
    return number


def read_object(data: bytes) -> dict[str, Any] | None:
    """Return the JSON object that ``data`` is, also with numbers that Python cannot hold; None if it is none."""
    value: Any = None
    try:
        value = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        try:
            value = json.loads(
                data.decode("utf-8", "replace"),
                parse_int=_read_int,
                parse_float=_read_float,
                parse_constant=_MARK.__add__,
                strict=False,
            )
        except (ValueError, RecursionError):
            return None
    except RecursionError:
        return None
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def write_json(value: Any) -> bytes:
    """Return a value as JSON; one that was read here means the same as what was read."""
    try:
        data = _encode(value)
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can say
        data = json.dumps(value, separators=(",", ":"), default=_plain).encode()
    return _MARKED.sub(rb"\1", data) if _MARK_BYTES in data else data


def _plain(value: Any) -> Any:
    """Return what msgspec writes by itself, and the standard library does not."""
    return json.loads(bytes(value)) if isinstance(value, msgspec.Raw) else list(value)


def bytes_of(text: str) -> bytes:
    """Return a text in UTF-8, in which halves of surrogate pairs may occur; see ``text_of``."""
    return text.encode("utf-8", "surrogatepass")


def text_of(data: bytes | bytearray) -> str:
    """Return the text of pieces of ``bytes_of``. Halves that have met become the character that they mean."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        halves = data.decode("utf-8", "surrogatepass").encode("utf-16-le", "surrogatepass")
        return halves.decode("utf-16-le", "surrogatepass")
