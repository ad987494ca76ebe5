"""The arguments of writing methods, validated and encoded before a transaction begins.

The client uses the same functions, so that a bad argument fails there as it would in the store, without a request.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast, get_args

from msgspec.structs import replace

from agentlightning.errors import InvalidValue, TooLarge
from agentlightning.lifecycle import reasons
from agentlightning.lifecycle.records import RolloutPolicy, RolloutRow
from agentlightning.store.contract import EncodedJson
from agentlightning.store.operations.attempts import Report
from agentlightning.store.operations.rollouts import Draft, Edit
from agentlightning.store.operations.spans import SpanDraft
from agentlightning.store.refusals import find_refused, refusal_of
from agentlightning.store.sources import IdSource
from agentlightning.store.span_json import body_of, encode_span
from agentlightning.store.validation import (
    MAX_BATCH,
    canonical,
    check_finite,
    check_id,
    check_one_of,
    encode_json,
    encode_object,
    encode_policy,
    encode_required,
    encode_resources,
    reason_of,
    shown,
)
from agentlightning.types import (
    UNSET,
    AttemptEnd,
    AttemptStatus,
    EnqueueRolloutRequest,
    RolloutMode,
    RolloutStatus,
    Span,
)
from agentlightning.types.plain_spans import PlainSpan, SpanOrPlain

_CLAIM_LIMIT = 1_000
_MODES = get_args(RolloutMode)
_ROLLOUT_STATES = get_args(RolloutStatus)
_ATTEMPT_STATES = get_args(AttemptStatus)
_ATTEMPT_ENDS = get_args(AttemptEnd)
_UNSUCCESSFUL = tuple(each for each in _ATTEMPT_ENDS if each != "succeeded")


def check_batch(items: Sequence[Any], what: str) -> None:
    """Raise ``InvalidValue`` if this is not a list, ``TooLarge`` if it has more than ``MAX_BATCH`` items."""
    if not isinstance(items, Sequence) or isinstance(items, (str, bytes)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidValue(f"{what} is a {type(items).__name__}; give a list")
    if len(items) > MAX_BATCH:
        raise TooLarge(f"{len(items):,} {what} in one call; send at most {MAX_BATCH:,} at a time")


def check_ids(values: Sequence[str], what: str) -> Sequence[str]:
    """``values``, if they are a batch of well-formed ids; ``what`` is their name in the plural. Raises as its parts."""
    check_batch(values, what)
    for each in values:
        check_id(each, what.removesuffix("s"))
    return values


def check_claim_limit(limit: object, *, least: int = 1, what: str = "limit") -> None:
    """Raise ``InvalidValue`` unless this many rollouts may be claimed at a time."""
    if type(limit) is not int or not least <= limit <= _CLAIM_LIMIT:
        raise InvalidValue(f"{what} {shown(limit)} is not valid; claim {least} to {_CLAIM_LIMIT} rollouts at a time")


def check_pairs(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The list of (rollout_id, attempt_id) pairs, validated.

    Raises:
        InvalidValue: an item is not a pair, or an id is not valid.
    """
    check_batch(pairs, "ids")
    checked: list[tuple[str, str]] = []
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidValue(f"{shown(pair)} is not a pair of rollout_id and attempt_id")
        checked.append((check_id(pair[0], "rollout_id"), check_id(pair[1], "attempt_id")))
    return checked


def digest_of(*parts: bytes) -> bytes:
    """A digest of 16 bytes that differs between requests (BLAKE2b over the parts and their lengths)."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


def draft_of(request: EnqueueRolloutRequest | Draft, ids: IdSource | None, *, started: bool = False) -> Draft:
    """A new rollout: ``queuing``, or ``preparing`` because it is ``started`` at once.

    Args:
        request: what a caller asks for, or the draft that this has made of it before without ``ids``.
        ids: makes its id, if the caller gives none; None: that is to be done later.
        started: whether it has an attempt from the beginning.

    Raises:
        InvalidValue: a field is not valid.
    """
    if isinstance(request, Draft):
        row = request.row
        return request if row.rollout_id or ids is None else Draft(replace(row, rollout_id=ids.mint("ro-")), False)
    if not isinstance(request, EnqueueRolloutRequest):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidValue(f"{shown(request)} is a {type(request).__name__}; give an EnqueueRolloutRequest")
    if type(request.priority) is not int or not -(2**31) <= request.priority < 2**31:
        raise InvalidValue(f"priority {shown(request.priority)} is not valid; give a signed 32-bit number")
    mode, resources_id = request.mode, request.resources_id
    if mode is not None:
        check_one_of(mode, _MODES, "mode")
    if resources_id is not None:
        check_id(resources_id, "resources_id")
    repeatable = request.rollout_id is not None
    rollout_id = request.rollout_id
    if rollout_id is not None:
        check_id(rollout_id, "rollout_id")
    else:
        rollout_id = "" if ids is None else ids.mint("ro-")
    content = encode_json(request.input, "input")
    metadata = encode_object(request.metadata, "metadata")
    policy = encode_policy(request.config)
    digest = b""
    if repeatable or started:
        told = repr((started, mode, resources_id, policy, request.priority, metadata is None))
        digest = digest_of(canonical(content), b"" if metadata is None else canonical(metadata), told.encode())
    row = RolloutRow(
        seq=0,
        version=1,
        rollout_id=rollout_id,
        status="preparing" if started else "queuing",
        priority=request.priority,
        input=content,
        mode=mode,
        resources_id=resources_id,
        resources_version=None,
        policy=policy,
        metadata=metadata,
        start_time=0.0,
        end_time=None,
        reason_code=None,
        reason_message=None,
        attempts=0,
        redeliveries=0,
        latest_attempt_id=None,
        digest=digest,
    )
    return Draft(row, repeatable)


def encode_ahead(arguments: dict[str, Any]) -> None:
    """Check and encode those arguments of a method that are JSON, so that the store only has to keep them.

    Raises:
        InvalidValue: one of them is not valid.
    """
    for name, encode in _JSON_ARGUMENTS.items():
        value = arguments.get(name)
        if value is not None:
            encoded = encode(value, name)
            arguments[name] = ahead = EncodedJson(encoded)
            ahead.canonical = canonical(encoded)


_JSON_ARGUMENTS: Mapping[str, Callable[[Any, str], Any]] = {
    "input": encode_json,
    "metadata": encode_object,
    "heartbeat_stats": encode_required,
    "registration": encode_required,
    "resources": lambda value, _: encode_resources(value),
}


def edit_of(fields: Mapping[str, Any], status: Any, reason_code: str | None, reason_message: str | None) -> Edit:
    """Changes to a rollout; fields that are ``UNSET`` are not among them.

    Raises:
        InvalidValue: a field is not valid.
    """
    if status is not UNSET:
        check_one_of(status, _ROLLOUT_STATES, "status")
    wanted: RolloutStatus | None = None if status is UNSET else status
    changed: Any = {name: _FIELDS[name](value) for name, value in fields.items() if value is not UNSET}
    default = reasons.BY_STATUS.get(wanted or "", reasons.REPORTED)
    return Edit(changed, wanted, reason_of(reason_code, reason_message, default))


def _mode(value: Any) -> Any:
    if value is not None:
        check_one_of(value, _MODES, "mode")
    return value


def encode_config(value: Any) -> RolloutPolicy:
    """The config that replaces another one. Raises as ``encode_policy``, and ``InvalidValue`` for None."""
    if value is None:
        raise InvalidValue("config cannot be None; give a RolloutConfig, or leave it out")
    return encode_policy(value)


_FIELDS: Mapping[str, Callable[[Any], Any]] = {
    "input": lambda value: encode_json(value, "input"),
    "mode": _mode,
    "resources_id": lambda value: None if value is None else check_id(value, "resources_id"),
    "config": encode_config,
    "metadata": lambda value: encode_object(value, "metadata"),
}
"""How the fields of a rollout that callers give are checked and encoded."""


def report_of(
    status: Any,
    worker_id: Any,
    last_heartbeat_time: Any,
    metadata: Any,
    reason_code: str | None,
    reason_message: str | None,
    retry: bool | None,
) -> Report:
    """A worker's report about its attempt; fields that are ``UNSET`` are not part of it.

    Raises:
        InvalidValue: a field is not valid.
    """
    if status is not UNSET:
        check_one_of(status, _ATTEMPT_STATES, "status")
    if retry is not None and (type(retry) is not bool or status not in _UNSUCCESSFUL):
        raise InvalidValue(
            f"retry is {shown(retry)} and status {shown(status)}; give it of an attempt that did not succeed"
        )
    default = reasons.COMPLETED if status == "succeeded" else reasons.REPORTED
    beaten = last_heartbeat_time
    return Report(
        status=None if status is UNSET else status,
        reason=reason_of(reason_code, reason_message, default),
        worker_id=None if worker_id is UNSET else check_id(worker_id, "worker_id"),
        last_heartbeat_time=None if beaten is UNSET else check_finite(beaten, "last_heartbeat_time"),
        metadata=None if metadata is UNSET else (encode_object(metadata, "metadata"),),
        retry=retry,
    )


def final_report_of(
    status: Any, metadata: Any, reason_code: str | None, reason_message: str | None, retry: bool | None
) -> Report:
    """A worker's report that its attempt has ended.

    Raises:
        InvalidValue: a field is not valid, or the status is not one that an attempt ends in.
    """
    check_one_of(status, _ATTEMPT_ENDS, "status")
    return report_of(status, UNSET, UNSET, metadata, reason_code, reason_message, retry)


def span_drafts(spans: Sequence[SpanOrPlain]) -> list[SpanDraft]:
    """Spans, checked and encoded. Raises as ``encode_spans``. A server gives drafts that it made itself."""
    if isinstance(spans, list) and spans and isinstance(spans[0], SpanDraft):
        return cast("list[SpanDraft]", spans)
    return [
        SpanDraft(span.rollout_id, span.attempt_id, span.sequence_id, span.span_id, body_of(span, encoded))
        for span, encoded in zip(spans, encode_spans(spans), strict=True)
    ]


def check_spans_of(spans: Sequence[SpanOrPlain], rollout_id: str, attempt_id: str) -> None:
    """Raise ``InvalidValue`` if there is a span of another attempt."""
    for span in spans:
        if (span.rollout_id, span.attempt_id) != (rollout_id, attempt_id):
            raise InvalidValue(
                f"span {span.span_id!r} is of attempt {span.attempt_id!r} of rollout {span.rollout_id!r}, not of "
                f"attempt {attempt_id!r} of rollout {rollout_id!r}, which is finished; send it by add_many_spans"
            )


def encode_spans(spans: Sequence[SpanOrPlain]) -> list[bytes]:
    """Spans as JSON, each whole.

    Raises:
        InvalidValue, NotJson, TooLarge: one of the spans is not valid; then all are refused. The error names those that
            are not.
    """
    check_batch(spans, "spans")
    try:
        return _encode_spans(spans)
    except InvalidValue as error:
        refused = find_refused(spans, lambda span: _encode_spans([span]), lambda span: getattr(span, "span_id", None))
        raise (refusal_of(refused) if refused else error) from None


def _encode_spans(spans: Sequence[SpanOrPlain]) -> list[bytes]:
    checked: set[str] = set()
    encoded: list[bytes] = []
    for span in spans:
        if not isinstance(span, (Span, PlainSpan)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidValue(f"{shown(span)} is a {type(span).__name__}; give a Span")
        if type(span.rollout_id) is not str or span.rollout_id not in checked:
            checked.add(check_id(span.rollout_id, "rollout_id"))
        if type(span.attempt_id) is not str or span.attempt_id not in checked:
            checked.add(check_id(span.attempt_id, "attempt_id"))
        encoded.append(encode_span(span))
    return encoded
