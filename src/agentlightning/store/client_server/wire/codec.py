"""Results and errors as bytes, and back: what server and client must agree on.

Errors travel as problem details (RFC 9457) with the stable ``code`` of their class, and are raised on
the other side as what they were.
"""

from __future__ import annotations

import http
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, cast

from pydantic import BaseModel, TypeAdapter

from agentlightning.errors import AgentLightningError, BadRequest, StoreUnavailable, error_classes
from agentlightning.store.client_server.wire.messages import Problem
from agentlightning.store.client_server.wire.routes import Route
from agentlightning.types import PaginatedResult, Span

__all__ = [
    "JSON_TYPE",
    "PROBLEM_TYPE",
    "decode_error",
    "decode_reply",
    "encode_page_parts",
    "encode_problem",
    "encode_result",
    "sequence_ids_of",
]

JSON_TYPE = "application/json"
PROBLEM_TYPE = "application/problem+json"


# --- Results -------------------------------------------------------------------------------------


def encode_result(route: Route, result: Any) -> bytes:
    """The body of a reply with the result of the route's method (for spans in bulk: ``sequence_ids_of`` it).

    Records may be JSON already, as bytes.
    """
    if route.reply_field is not None:
        return json.dumps({route.reply_field: result}, separators=(",", ":")).encode()
    if isinstance(result, PaginatedResult):
        return b"".join(encode_page_parts(cast("PaginatedResult[BaseModel]", result)))
    if isinstance(result, Sequence) and not isinstance(result, bytes):
        return b"[" + b",".join([_record(each) for each in cast("Sequence[BaseModel]", result)]) + b"]"
    return _record(result)


def encode_page_parts(page: PaginatedResult[Any], items_per_part: int = 256) -> Iterable[bytes]:
    """The body of a reply with one page, in parts, so that a large one is never in memory as a whole."""
    yield b'{"items":['
    for start in range(0, len(page.items), items_per_part):
        part = b",".join([_record(each) for each in page.items[start : start + items_per_part]])
        yield b"," + part if start else part
    yield f'],"limit":{page.limit},"offset":{page.offset},"total":{page.total}}}'.encode()


def sequence_ids_of(given: Sequence[Span], stored: Sequence[Span]) -> list[int]:
    """The sequence id of each span given; 0 where it is not among those that are new.

    Both in the same order; of spans with equal ids, the first is the one that was stored.
    """
    new = {(span.rollout_id, span.attempt_id, span.span_id): span.sequence_id for span in stored}
    return [new.pop((span.rollout_id, span.attempt_id, span.span_id), 0) for span in given]


def decode_reply(route: Route, content: bytes) -> Any:
    """The result that a 2xx reply carries.

    Raises:
        StoreUnavailable: it is not what the route replies, so something that is no server of ours answered.
    """
    try:
        reply = _adapter(route).validate_json(content)
    except ValueError as error:
        raise StoreUnavailable(
            f"the reply to {route.verb} {route.path} is not what a store server sends ({content[:80]!r}); "
            "check the address, and what stands between"
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


def encode_problem(
    error: AgentLightningError,
    request_id: str,
    *,
    status: int | None = None,
    errors: Sequence[Mapping[str, Any]] | None = None,
) -> bytes:
    """The body of a reply that refuses a request.

    Args:
        error: what its class and message say.
        request_id: names the request in the server's log.
        status: the HTTP status, where it is not that of the class.
        errors: which parts of the request are not valid.
    """
    status = error.status if status is None else status
    problem = Problem(
        title=http.HTTPStatus(status).phrase,
        status=status,
        code=error.code,
        detail=error.message,
        request_id=request_id,
        errors=None if errors is None else [dict(each) for each in errors],
    )
    return problem.model_dump_json(exclude_none=True).encode()


def decode_error(status: int, content: bytes) -> AgentLightningError:
    """The error that a reply outside 2xx stands for, to be raised.

    A problem of our own becomes what it was on the server. Whatever a proxy between says becomes
    ``BadRequest`` (4xx) or ``StoreUnavailable``.
    """
    try:
        problem = Problem.model_validate_json(content)
    except ValueError:
        message = f"the server answered {status}: {content[:200]!r}"
        return BadRequest(message) if 400 <= status < 500 and status != 429 else StoreUnavailable(message)
    kind = error_classes().get(problem.code)
    if kind is None:  # of a newer version
        kind = BadRequest if status < 500 and status != 429 else StoreUnavailable
    return kind(problem.detail)
