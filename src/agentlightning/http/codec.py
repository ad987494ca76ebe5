"""Results and errors as bytes, and back: what server and client must agree on.

Errors travel as problem details (RFC 9457) with the stable ``code`` of their class, and are raised on
the other side as what they were.
"""

from __future__ import annotations

import http
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, Literal, cast

import msgspec
from pydantic import BaseModel, Field, TypeAdapter

from agentlightning.errors import (
    AgentLightningError,
    BadRequest,
    InvalidValue,
    NotJson,
    RefusedSpan,
    StoreUnavailable,
    TooLarge,
    error_classes,
)
from agentlightning.http.routes import Route
from agentlightning.store.refusals import MOST_NAMED
from agentlightning.store.validation import INT64_END, MAX_DEPTH, holds_nul
from agentlightning.types import PaginatedResult

PROBLEM_TYPE = "application/problem+json"
_DETAIL_CHARACTERS = 300


# --- Results -------------------------------------------------------------------------------------

encode_json_value = msgspec.json.Encoder().encode
"""A value of JSON's own types as compact JSON."""


def encode_result(route: Route, result: Any) -> bytes:
    """The body of a reply with the result of the route's method (for spans in bulk: ``sequence_ids_of`` it).

    Records may be JSON already, as bytes.
    """
    if isinstance(result, bytes):
        return result
    if route.reply_field is not None:
        return encode_json_value({route.reply_field: result})
    if isinstance(result, PaginatedResult):
        return b"".join(page_parts(cast("PaginatedResult[BaseModel]", result)))
    if isinstance(result, Sequence):
        return b"".join(list_parts(cast("Sequence[Any]", result)))
    return _record(result)


_PART_BYTES = 64 * 1024


def list_parts(items: Iterable[Any]) -> Iterator[bytes]:
    """The body of a reply with a list, in parts of moderate size, so that a long one is never there in the whole."""
    return _in_parts(items, b"[", b"]")


def page_parts(page: PaginatedResult[Any]) -> Iterator[bytes]:
    """The body of a reply with one page, in parts as ``list_parts``."""
    return _in_parts(page.items, PAGE_BEGIN, page_end(page.limit, page.offset, page.total))


PAGE_BEGIN = b'{"items":['


def page_end(limit: int, offset: int, total: int) -> bytes:
    """What comes after the records of a page."""
    return f'],"limit":{limit},"offset":{offset},"total":{total}}}'.encode()


def _in_parts(items: Iterable[Any], begin: bytes, end: bytes) -> Iterator[bytes]:
    part, size, comma = [begin], 0, b""
    for item in items:
        encoded = _record(item)
        part += comma, encoded
        size, comma = size + len(encoded), b","
        if size >= _PART_BYTES:
            yield b"".join(part)
            part, size = [], 0
    part.append(end)
    yield b"".join(part)


def decode_reply(route: Route, content: bytes) -> Any:
    """The result that a 2xx reply carries.

    Raises:
        StoreUnavailable: it is not a reply of this route, so something other than a store server answered.
    """
    try:
        reply = _adapter(route).validate_json(content)
    except ValueError as error:
        raise StoreUnavailable(
            f"the reply to {route.verb} {route.path} is not what a store server sends ({content[:80]!r}); "
            "check the address and any proxy in between"
        ) from error
    return reply if route.reply_field is None else getattr(reply, route.reply_field)


@cache
def _adapter(route: Route) -> TypeAdapter[Any]:
    return TypeAdapter(route.reply)


def _record(record: Any) -> bytes:
    """One record as JSON. Spans set by themselves how non-finite numbers are written."""
    if isinstance(record, bytes):
        return record
    if isinstance(record, BaseModel):
        return record.model_dump_json().encode()
    return json.dumps(record, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()


# --- Errors --------------------------------------------------------------------------------------


class RefusedSpanProblem(BaseModel):
    """Why one span of a request was refused."""

    index: int = Field(ge=0)
    """Its place in the request, from 0."""
    span_id: str
    code: str
    detail: str


class Problem(BaseModel):
    """Why a request was refused (RFC 9457, problem details)."""

    type: Literal["about:blank"] = "about:blank"
    title: str
    status: int
    code: str
    """Stable, for programs: the code of the exception that the same call raises in Python."""
    detail: str
    request_id: str
    errors: Sequence[dict[str, Any]] | None = None
    """Which parts of the body or the query are not valid."""
    refused_spans: Sequence[RefusedSpanProblem] | None = None
    """Which spans of the body are refused, in their order, where that is known; at most 256 of them. The others may
    be sent again at once, without these."""


def encode_problem(error: AgentLightningError, request_id: str, *, status: int | None = None) -> bytes:
    """The body of a reply that refuses a request.

    Args:
        error: what its class and message say.
        request_id: names the request in the server's log.
        status: the HTTP status, where it is not that of the class.
    """
    status = error.status if status is None else status
    places = error.places if isinstance(error, InvalidValue) else ()
    problem = Problem(
        title=http.HTTPStatus(status).phrase,
        status=status,
        code=error.code,
        detail=error.message,
        request_id=request_id,
        errors=[dict(each) for each in places] or None,
        refused_spans=[
            RefusedSpanProblem(index=place, span_id=span_id, code=why.code, detail=why.message[:_DETAIL_CHARACTERS])
            for place, span_id, why in error.refused_spans[:MOST_NAMED]
        ]
        or None,
    )
    return problem.model_dump_json(exclude_none=True).encode()


def decode_error(status: int, content: bytes) -> AgentLightningError:
    """The error that a reply outside 2xx stands for, to be raised.

    A problem document of a store server becomes the exception that was raised there. The reply of a proxy in between
    becomes ``BadRequest`` (4xx) or ``StoreUnavailable``.
    """
    try:
        problem = Problem.model_validate_json(content)
    except ValueError:
        message = f"the server answered {status}: {content[:200]!r}"
        return BadRequest(message) if 400 <= status < 500 and status != 429 else StoreUnavailable(message)
    kinds = error_classes()
    kind = kinds.get(problem.code)
    if kind is None:  # of a newer version
        kind = BadRequest if status < 500 and status != 429 else StoreUnavailable
    error = kind(problem.detail)
    error.refused_spans = [
        RefusedSpan(each.index, each.span_id, kinds.get(each.code, kind)(each.detail))
        for each in problem.refused_spans or ()
    ]
    return error


# --- Strict JSON: the checks of every body, before anything else reads it ---------------------------

MAX_BODY_DEPTH = MAX_DEPTH + 6
"""The deepest nesting of a body: that of a stored value, plus the objects and arrays of the wire around it."""
MAX_NODES = 1_000_000
"""The most keys and values in one body: decoded, each takes far more memory than its bytes."""

_decode = msgspec.json.Decoder().decode
_STRING = re.compile(rb'"[^"]*+"')
_SPACED_COLONS = (b" :", b"\t:", b"\n:", b"\r:")


def decode_strict(raw: bytes, what: str = "the body") -> Any:
    """The value that ``raw`` stands for; ``what`` names it in errors.

    Raises:
        NotJson: it is not strict JSON, or holds a NUL.
        TooLarge: it is nested deeper than ``MAX_BODY_DEPTH``, or has more than ``MAX_NODES`` keys and values.
    """
    if len(raw) > MAX_NODES:
        check_node_count(raw, what)
    try:
        value = _decode(raw)
    except RecursionError as error:
        raise _too_deep(what) from error
    except (msgspec.MsgspecError, ValueError) as error:
        raise NotJson(f"{what} is not JSON: {_reason(raw, error)}") from error
    if b"\\" in raw and holds_nul(raw):
        raise NotJson(f"{what} holds a NUL character, which not every database can store; remove it")
    # Most bodies have fewer brackets than may be nested, and no run of digits as long as those of an integer beyond 64
    # bits. To see this in their bytes takes a tenth of the time of a walk over the decoded values.
    is_simple = raw.count(b"{") + raw.count(b"[") <= MAX_BODY_DEPTH and b"0" * 19 not in raw.translate(_DIGITS)
    if not is_simple or encode_json_value(value) != raw:
        keys = keys_in([value], what)
        if keys and encode_json_value(value) != raw:  # JSON that we would write ourselves has no key twice
            check_unique_keys(raw, keys, what)
    return value


_DIGITS = bytes(48 if 48 <= each < 58 else each for each in range(256))
"""For ``bytes.translate``: makes a 0 of every digit."""


def keys_in(container: Any, what: str, depth: int = MAX_BODY_DEPTH + 1) -> int:
    """How many keys all objects in this one have together; checks depth and integers on the way."""
    if depth == 0:
        raise _too_deep(what)
    keys, items = 0, container
    if type(container) is dict:
        items = cast("dict[str, Any]", container).values()
        keys = len(items)
    for item in items:
        kind = cast("type[Any]", type(item))
        if kind is dict or kind is list:
            keys += keys_in(item, what, depth - 1)
        elif kind is int and not -INT64_END <= item < INT64_END:
            raise NotJson(f"{what} holds an integer outside ±2^63; send it as a string")
    return keys


def check_unique_keys(raw: bytes, keys: int, what: str) -> None:
    """Raise if there are more keys in the text than there are in the decoded value.

    In nearly all JSON every key is directly followed by its colon, so that the keys can be counted by
    counting ``":`` outside of strings. Inside of strings it is ``\\":``, unless the backslash before
    the quote is itself escaped. Where counting does not settle it, all objects are looked at.
    """
    if not any(spaced in raw for spaced in _SPACED_COLONS) and b'\\\\"' not in raw:
        found = raw.count(b'":') - (raw.count(b'\\":') if b"\\" in raw else 0)
        if found == keys:
            return

    def unique(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise NotJson(f"{what} has the key {key[:80]!r} twice in one object; give each key once")
            seen.add(key)

    json.loads(raw, object_pairs_hook=unique)


def check_node_count(raw: bytes, what: str) -> None:
    """Raise ``TooLarge`` if there are more than ``MAX_NODES`` keys and values, before anything is decoded."""
    # Each node but the first comes after one of these, so this bounds their number.
    if len(raw) <= MAX_NODES or sum(map(raw.count, (b",", b":", b"[", b"{"))) <= MAX_NODES:
        return
    # What only looks like a node, inside of a string, does not count. Without escapes, a string ends at the next quote.
    text = raw.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in raw else raw
    if text.count(b'"') > 2 * MAX_NODES:  # each string is a key or a value
        raise _too_many(what)
    outside = _STRING.sub(b"", text)
    if sum(map(outside.count, (b",", b":", b"[", b"{"))) >= MAX_NODES:
        raise _too_many(what)


def _too_many(what: str) -> TooLarge:
    return TooLarge(f"{what} has more than {MAX_NODES:,} keys and values; send less at a time")


def _too_deep(what: str) -> TooLarge:
    return TooLarge(f"{what} is nested deeper than {MAX_BODY_DEPTH} levels")


def _reason(raw: bytes, error: Exception) -> str:
    if not raw.strip():
        return "it is empty"
    if raw.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        return "it begins with a byte order mark; send UTF-8 without one"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 ({error.reason})"
    if re.search(rb"\\u[dD][89a-fA-F]", raw) and "truncated" in str(error):
        return "it holds half of a surrogate pair, which is no character"
    return str(error)
