"""The strict door of the store: what comes in is checked here, once, before anything is written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from agentlightning.errors import InvalidId, InvalidValue, NotJson, TooLarge
from agentlightning.lifecycle.records import Policy, Reason
from agentlightning.types import NamedResources, Resource, RolloutConfig

__all__ = [
    "INT64",
    "MAX_BATCH",
    "MAX_JSON_BYTES",
    "check_finite",
    "check_id",
    "check_json_size",
    "check_json_value",
    "check_one_of",
    "check_paging",
    "check_text",
    "check_version",
    "encode_json",
    "encode_object",
    "encode_policy",
    "encode_required",
    "encode_resources",
    "reason_of",
]

MAX_JSON_BYTES = 4 * 1024 * 1024
"""The largest input, metadata, resources or span that the store takes, as encoded JSON."""
MAX_DEPTH = 64
"""The deepest nesting of arrays and objects."""
MAX_BATCH = 10_000
"""The most rollouts, spans or ids in one call."""
_ID = re.compile(r"[A-Za-z0-9._~:@\-]{1,128}")
_RESERVED_IDS = frozenset({"latest", "search", "bulk", ".", ".."})
_REASON_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}")
_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
INT64 = range(-(2**63), 2**63)
"""The integers that every database and most JSON readers keep exact."""
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def check_id(value: object, what: str) -> str:
    """``value``, if it is a well-formed id; ``what`` names it in the error.

    Raises:
        InvalidId: it is not.
    """
    if isinstance(value, str) and _ID.fullmatch(value) and value not in _RESERVED_IDS:
        return value
    shown = repr(value) if len(repr(value)) <= 150 else repr(value)[:150] + "…"
    raise InvalidId(
        f"{what} {shown} is not a valid id; use 1 to 128 characters of A-Z a-z 0-9 . _ ~ : @ - "
        "(latest, search and bulk are reserved)"
    )


def check_one_of(value: object, allowed: Sequence[str], what: str) -> None:
    """Raise ``InvalidValue`` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise InvalidValue(f"{what} {value!r} is not one of {', '.join(allowed)}")


def check_text(value: object, what: str) -> str:
    """``value``, if it is a string that every database and every JSON can carry."""
    if not isinstance(value, str):
        raise InvalidValue(f"{what} {value!r} is a {type(value).__name__}; give a string")
    encode_json(value, what)
    return value


def check_version(value: object) -> int:
    """``value``, if it can be the version of resources."""
    if type(value) is not int or not 1 <= value < INT64.stop:
        raise InvalidValue(f"version {value!r} is not valid; versions are 1, 2, 3 …")
    return value


def check_finite(value: object, what: str, *, above: float | None = None) -> float:
    """``value`` as a float, if it is a finite number (greater than ``above``, where given)."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or (above is not None and not cast(float, value) > above):
        wanted = "a finite number" if above is None else f"a finite number above {above:g}"
        raise InvalidValue(f"{what} {value!r} is not {wanted}")
    return float(cast(float, value))


def check_paging(limit: object, offset: object, sort_by: str | None, sortable: Sequence[str]) -> None:
    """Check how a page is asked for.

    Raises:
        InvalidValue: ``limit`` is neither -1 nor at least 1, ``offset`` is negative, or ``sort_by`` unknown.
    """
    if type(limit) is not int or (limit < 1 and limit != -1) or limit not in INT64:
        raise InvalidValue(f"limit {limit!r} is not valid; give at least 1, or -1 for all")
    if type(offset) is not int or offset < 0 or offset not in INT64:
        raise InvalidValue(f"offset {offset!r} is not valid; give 0 or more")
    if sort_by is not None and sort_by not in sortable:
        raise InvalidValue(f"cannot sort by {sort_by!r}; allowed are {', '.join(sortable)}")


def encode_json(value: object, what: str) -> bytes:
    """``value`` as compact JSON; ``what`` names it in errors.

    Raises:
        NotJson: it holds anything that strict JSON does not (tuples count as arrays).
        TooLarge: it is larger than ``MAX_JSON_BYTES`` or deeper than ``MAX_DEPTH``.
    """
    check_json_value(value, what)
    try:
        encoded = _encode(value).encode()
    except UnicodeEncodeError as error:
        raise NotJson(f"{what} holds a lone surrogate, which UTF-8 cannot carry: {error}") from error
    check_json_size(encoded, what)
    return encoded


def encode_object(value: Mapping[str, Any] | None, what: str) -> bytes | None:
    """A JSON object, or None where there is none. Raises as ``encode_json``."""
    if value is None:
        return None
    if not isinstance(value, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise NotJson(f"{what} is a {type(value).__name__}; give a dict with string keys")
    return encode_json(dict(value), what)


def encode_required(value: Mapping[str, Any], what: str) -> bytes:
    """A JSON object that must be there. Raises as ``encode_json``."""
    encoded = encode_object(value, what)
    if encoded is None:
        raise InvalidValue(f"{what} cannot be None; give a dict, or leave it out")
    return encoded


def encode_policy(config: RolloutConfig | None) -> Policy:
    """A rollout's config as an immutable value; None means the default."""
    if config is None:
        return Policy()
    return Policy(
        timeout_seconds=config.timeout_seconds,
        unresponsive_seconds=config.unresponsive_seconds,
        max_attempts=config.max_attempts,
        retry_condition=tuple(config.retry_condition),
    )


def encode_resources(resources: NamedResources) -> bytes:
    """Named resources as JSON. Raises as ``encode_json``, and ``InvalidValue`` for what is no resource."""
    if not isinstance(resources, dict):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidValue(f"resources is a {type(resources).__name__}; give a dict of names to resources")
    for name, resource in resources.items():
        if not name or not isinstance(name, str) or not isinstance(resource, Resource):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidValue(
                f"resources[{name!r}] is a {type(resource).__name__}; give non-empty names and LLM, ProxyLLM or "
                "PromptTemplate resources"
            )
    return encode_json({name: each.model_dump(mode="json") for name, each in resources.items()}, "resources")


def reason_of(code: str | None, message: str | None, default_code: str) -> Reason | None:
    """A reason that a caller gives; None if it gives none.

    Raises:
        InvalidValue: the code is not in lower_snake_case, or a text holds what JSON cannot.
    """
    if code is None and message is None:
        return None
    code = default_code if code is None else code
    if not isinstance(code, str) or not _REASON_CODE.fullmatch(code):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidValue(f"reason_code {code!r} is not valid; use up to 64 characters of a-z 0-9 _")
    message = code if message is None else message
    encode_json(message, "reason_message")
    return Reason(code, message)


def check_json_size(encoded: bytes, what: str, name: str = "") -> None:
    """Raise if encoded JSON is too large, or holds a NUL; ``what`` and ``name`` say what it is.

    Raises:
        TooLarge: it has more than ``MAX_JSON_BYTES``.
        NotJson: there is a NUL in one of its strings.
    """
    if len(encoded) > MAX_JSON_BYTES:
        raise TooLarge(
            f"{what} {name} has {len(encoded):,} bytes as JSON; the store takes {MAX_JSON_BYTES:,}. "
            "Store large data elsewhere and put a reference here"
        )
    if b"\\u0000" in encoded and _NUL.search(encoded):
        raise NotJson(f"{what} {name} holds a NUL character, which not every database can store; remove it")


def check_json_value(value: object, what: str, depth: int = 0) -> None:
    """Raise unless ``value`` is made of what strict JSON has; ``what`` names it.

    Raises:
        NotJson: it holds something else.
        TooLarge: it is nested deeper than ``MAX_DEPTH``, or contains itself.
    """
    kind = type(value)
    if kind is str or value is None or kind is bool:
        return
    if depth > MAX_DEPTH:
        raise TooLarge(f"{what} is nested deeper than {MAX_DEPTH} levels (or contains itself)")
    if isinstance(value, dict):
        for key, item in cast(dict[object, object], value).items():
            if not isinstance(key, str):
                raise NotJson(f"{what} has the key {key!r}, a {type(key).__name__}; JSON keys are strings")
            check_json_value(item, what, depth + 1)
    elif isinstance(value, (list, tuple)):
        for item in cast(Sequence[object], value):
            check_json_value(item, what, depth + 1)
    elif isinstance(value, int):
        if value not in INT64:
            raise NotJson(f"{what} holds an integer outside ±2^63; send it as a string")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise NotJson(f"{what} holds {value!r}, which JSON does not have; use None or a string")
    elif not isinstance(value, str):
        raise NotJson(
            f"{what} holds a {kind.__module__}.{kind.__qualname__}, which is not JSON; "
            "convert it to dicts, lists, strings and numbers first (pydantic: model_dump(mode='json'))"
        )
