"""Validation of what callers give to a store. It happens once, before a transaction begins."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgspec
from pydantic import TypeAdapter, ValidationError

from agentlightning.errors import InvalidId, InvalidValue, NotJson, TooLarge
from agentlightning.lifecycle import reasons
from agentlightning.lifecycle.records import Reason, RolloutPolicy
from agentlightning.store.contract import EncodedJson
from agentlightning.types import NamedResources, Resource, ResourceUnion, RolloutConfig

MAX_JSON_BYTES = 4 * 1024 * 1024
"""The largest input, metadata, resources or span that the store takes, as encoded JSON."""
MAX_DEPTH = 64
"""The deepest nesting of arrays and objects."""
MAX_BATCH = 10_000
"""The most rollouts, spans or ids in one call."""
_ID = re.compile(r"[A-Za-z0-9._~:@\-]{1,128}")
_RESERVED_IDS = frozenset({"latest", "search", "bulk", ".", ".."})
_REASON_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}")
INT64_END = 2**63
"""Integers from minus this up to, and without, this are those that every database keeps."""
_encode = msgspec.json.Encoder().encode
_encode_sorted = msgspec.json.Encoder(order="sorted").encode
_encode_subclasses = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_named_resources = TypeAdapter[NamedResources](NamedResources)


def shown(value: object) -> str:
    """``value`` for an error message: short, even if it is large or contains itself."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 150, 150
    return short.repr(value)


def check_id(value: object, what: str) -> str:
    """``value``, if it is a well-formed id; ``what`` names it in the error.

    Raises:
        InvalidId: it is not.
    """
    if isinstance(value, str) and _ID.fullmatch(value) and value not in _RESERVED_IDS:
        return value
    raise InvalidId(
        f"{what} {shown(value)} is not a valid id; use 1 to 128 characters of A-Z a-z 0-9 . _ ~ : @ - "
        "(latest, search and bulk are reserved)"
    )


def check_one_of(value: object, allowed: Sequence[str], what: str) -> None:
    """Raise ``InvalidValue`` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise InvalidValue(f"{what} {shown(value)} is not one of {', '.join(allowed)}")


def check_text(value: object, what: str) -> str:
    """``value``, if it is a string that every database and JSON can hold. Raises ``InvalidValue`` or ``NotJson``."""
    if not isinstance(value, str):
        raise InvalidValue(f"{what} {shown(value)} is a {type(value).__name__}; give a string")
    encode_json(value, what)
    return value


def check_version(value: object) -> int:
    """``value``, if it can be the version of resources."""
    if type(value) is not int or not 1 <= value < INT64_END:
        raise InvalidValue(f"version {shown(value)} is not valid; versions are 1, 2, 3 …")
    return value


def check_finite(value: object, what: str, *, above: float | None = None) -> float:
    """``value`` as a float, if it is a finite number (greater than ``above``, where given)."""
    try:
        number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or (above is not None and number <= above):
        wanted = "a finite number" if above is None else f"a finite number above {above:g}"
        raise InvalidValue(f"{what} {shown(value)} is not {wanted}")
    return number


def check_paging(limit: object, offset: object, sort_by: str | None, sortable: Sequence[str]) -> None:
    """Check how a page is asked for.

    Raises:
        InvalidValue: ``limit`` is neither -1 nor at least 1, ``offset`` is negative, or ``sort_by`` unknown.
    """
    if type(limit) is not int or (limit < 1 and limit != -1) or limit >= INT64_END:
        raise InvalidValue(f"limit {shown(limit)} is not valid; give at least 1, or -1 for all")
    if type(offset) is not int or not 0 <= offset < INT64_END:
        raise InvalidValue(f"offset {shown(offset)} is not valid; give 0 or more")
    if sort_by is not None and sort_by not in sortable:
        raise InvalidValue(f"cannot sort by {shown(sort_by)}; allowed are {', '.join(sortable)}")


def encode_json(value: object, what: str) -> bytes:
    """``value`` as compact JSON; ``what`` names it in errors.

    Raises:
        NotJson: it contains a value that strict JSON does not have (tuples count as arrays).
        TooLarge: it is larger than ``MAX_JSON_BYTES`` or deeper than ``MAX_DEPTH``.
    """
    if type(value) is EncodedJson:
        return value
    exact = check_json_value(value, what)
    try:
        encoded = _encode(value) if exact else _encode_subclasses(value).encode()
    except UnicodeEncodeError as error:
        raise NotJson(f"{what} holds a lone surrogate, which UTF-8 cannot carry: {error}") from error
    if len(encoded) > MAX_JSON_BYTES or b"\\" in encoded:  # a NUL is written with a backslash
        check_json_size(encoded, what)
    return encoded


def canonical(encoded: bytes) -> bytes:
    """The same JSON with sorted keys, so that equal content has equal bytes and therefore equal digests."""
    if type(encoded) is EncodedJson:
        return encoded.canonical
    return _encode_sorted(msgspec.json.decode(encoded))


def encode_object(value: Mapping[str, Any] | EncodedJson | None, what: str) -> bytes | None:
    """A JSON object, or None where there is none. Raises as ``encode_json``."""
    if value is None or type(value) is EncodedJson:
        return value
    if not isinstance(value, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise NotJson(f"{what} is a {type(value).__name__}; give a dict with string keys")
    return encode_json(dict(value), what)


def encode_required(value: Mapping[str, Any] | EncodedJson, what: str) -> bytes:
    """A JSON object that must not be None. Raises as ``encode_json``."""
    encoded = encode_object(value, what)
    if encoded is None:
        raise InvalidValue(f"{what} cannot be None; give a dict, or leave it out")
    return encoded


def encode_policy(config: RolloutConfig | None) -> RolloutPolicy:
    """A rollout's config as an immutable value; None means the default.

    Raises:
        InvalidValue: it is not a config, or has become a bad one since it was made.
    """
    if config is None:
        return RolloutPolicy()
    if not isinstance(config, RolloutConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidValue(f"config is a {type(config).__name__}; give a RolloutConfig")
    try:
        checked = RolloutConfig.model_validate(config.__dict__)
    except ValidationError as error:
        raise InvalidValue(f"config is not valid: {error}") from error
    return RolloutPolicy(
        timeout_seconds=checked.timeout_seconds,
        unresponsive_seconds=checked.unresponsive_seconds,
        max_attempts=checked.max_attempts,
        retry_condition=tuple(checked.retry_condition),
    )


def encode_resources(resources: Mapping[str, ResourceUnion] | EncodedJson) -> bytes:
    """Named resources as JSON. Raises as ``encode_json``, and ``InvalidValue`` for what is no resource."""
    if type(resources) is EncodedJson:
        return resources
    if not isinstance(resources, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidValue(f"resources is a {type(resources).__name__}; give a dict of names to resources")
    for name, resource in resources.items():
        if not name or not isinstance(name, str) or not isinstance(resource, Resource):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidValue(
                f"resources[{shown(name)}] is a {type(resource).__name__}; give non-empty names and LLM, ProxyLLM or "
                "PromptTemplate resources"
            )
    encoded = encode_json({name: dict(each.__dict__) for name, each in resources.items()}, "resources")
    try:
        _named_resources.validate_json(encoded)
    except ValidationError as error:
        raise InvalidValue(f"resources could not be read again: {error}") from error
    return encoded


def reason_of(code: str | None, message: str | None, default_code: str) -> Reason | None:
    """The reason that a caller gives; None if it gives neither code nor message.

    Raises:
        InvalidValue: the code is not in lower_snake_case, or is the store's own, or a text holds what JSON cannot.
    """
    if code is None and message is None:
        return None
    code = default_code if code is None else code
    if not isinstance(code, str) or not _REASON_CODE.fullmatch(code):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidValue(f"reason_code {shown(code)} is not valid; use up to 64 characters of a-z 0-9 _")
    if code in reasons.STORE_ONLY:
        raise InvalidValue(f"reason_code {code!r} is given by the store alone; give another code")
    message = code if message is None else message
    return Reason(code, check_text(message, "reason_message"))


def holds_nul(encoded: bytes) -> bool:
    """Whether a string of this JSON, which is valid, holds a NUL. Time and memory are linear, whatever it is."""
    if b"\\" not in encoded or b"\\u0000" not in encoded:  # one byte is found sooner
        return False
    # Without the escaped backslashes, every backslash that is left begins another escape.
    return b"\\\\" not in encoded or b"\\u0000" in encoded.replace(b"\\\\", b"")


def check_json_size(encoded: bytes, what: str) -> None:
    """Raise if encoded JSON is too large, or holds a NUL; ``what`` names it.

    Raises:
        TooLarge: it has more than ``MAX_JSON_BYTES``.
        NotJson: there is a NUL in one of its strings.
    """
    if len(encoded) > MAX_JSON_BYTES:
        raise TooLarge(
            f"{what} has {len(encoded):,} bytes as JSON; the store takes {MAX_JSON_BYTES:,}. "
            "Store large data elsewhere and put a reference here"
        )
    if holds_nul(encoded):
        raise NotJson(f"{what} holds a NUL character, which not every database can store; remove it")


def check_json_value(value: object, what: str, depth: int = 0) -> bool:
    """Check that ``value`` is made of what strict JSON has; ``what`` names it.

    Returns:
        Whether it is made of the types themselves; if not, of subclasses of some.

    Raises:
        NotJson: it holds something else.
        TooLarge: it is nested deeper than ``MAX_DEPTH``, or contains itself.
    """
    kind = type(value)
    if kind is str or value is None or kind is bool:
        return True
    if depth > MAX_DEPTH:
        raise TooLarge(f"{what} is nested deeper than {MAX_DEPTH} levels (or contains itself)")
    if isinstance(value, dict):
        exact = kind is dict
        for key, item in cast(dict[object, object], value).items():
            if not isinstance(key, str):
                raise NotJson(f"{what} has the key {key!r}, a {type(key).__name__}; JSON keys are strings")
            exact &= (type(item) is str or check_json_value(item, what, depth + 1)) and type(key) is str
        return exact
    if isinstance(value, (list, tuple)):
        exact = kind is list or kind is tuple
        for item in cast(Sequence[object], value):
            exact &= type(item) is str or check_json_value(item, what, depth + 1)
        return exact
    if isinstance(value, int):
        if not -INT64_END <= value < INT64_END:
            raise NotJson(f"{what} holds an integer outside ±2^63; send it as a string")
        return kind is int
    if isinstance(value, float):
        if not math.isfinite(value):
            raise NotJson(f"{what} holds {value!r}, which JSON does not have; use None or a string")
        return kind is float
    if isinstance(value, str):
        return False
    raise NotJson(
        f"{what} holds a {kind.__module__}.{kind.__qualname__}, which is not JSON; "
        "convert it to dicts, lists, strings and numbers first (pydantic: model_dump(mode='json'))"
    )
