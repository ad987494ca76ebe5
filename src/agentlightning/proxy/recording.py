"""One span for each model call, named as ``semconv`` says."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, cast

import msgspec

from agentlightning.proxy.records import CallRecord
from agentlightning.semconv import GenAIAttributes, LLMCallAttributes
from agentlightning.types import Attributes, AttributeValue, OtelResource, Span, SpanContext, TraceStatus

__all__ = ["span_of"]

_MAX_BODY_CHARS = 1_500_000
"""A request or a reply longer than this is shortened: the store takes spans up to 4 MiB."""
_LONG_TEXT_CHARS = 2_000
_RESOURCE: Attributes = {"service.name": "agentlightning-proxy"}
_REQUEST_NUMBERS: Mapping[str, GenAIAttributes] = {
    "temperature": GenAIAttributes.REQUEST_TEMPERATURE,
    "top_p": GenAIAttributes.REQUEST_TOP_P,
    "max_tokens": GenAIAttributes.REQUEST_MAX_TOKENS,
    "max_completion_tokens": GenAIAttributes.REQUEST_MAX_TOKENS,
    "seed": GenAIAttributes.REQUEST_SEED,
}


def span_of(record: CallRecord) -> Span:
    """The span of a call that has ended, without a sequence id: the store issues it.

    Raises:
        ValueError: the call belongs to no attempt.
    """
    if record.caller is None:
        raise ValueError("a call that belongs to no attempt has no span")
    ended = record.ended if record.ended is not None else record.started
    trace_id = record.caller.trace_id or secrets.token_hex(16)
    span_id = secrets.token_hex(8)
    model = record.question.model if record.question else "unknown"
    # Nothing here comes from outside unchecked, and validating thousands of token ids takes longer than the call.
    return Span.model_construct(
        rollout_id=record.caller.rollout_id,
        attempt_id=record.caller.attempt_id,
        sequence_id=0,
        trace_id=trace_id,
        span_id=span_id,
        parent_id=record.caller.parent_span_id,
        name=_mended(f"{record.kind} {model}"),
        status=_status_of(record),
        attributes=_attributes_of(record, ended),
        events=[],
        links=[],
        start_time=record.start_time,
        end_time=record.start_time + (ended - record.started),
        context=SpanContext(trace_id=trace_id, span_id=span_id, is_remote=False, trace_state={}),
        parent=None,
        resource=OtelResource(attributes=dict(_RESOURCE), schema_url=""),
    )


def _status_of(record: CallRecord) -> TraceStatus:
    if record.error_type is None:
        return TraceStatus(status_code="OK")
    return TraceStatus(status_code="ERROR", description=_mended(record.error_message or record.error_type))


def _attributes_of(record: CallRecord, ended: float) -> Attributes:
    answer = record.answer
    found: dict[GenAIAttributes | LLMCallAttributes, AttributeValue | None] = {
        GenAIAttributes.OPERATION_NAME: record.kind,
        GenAIAttributes.PROVIDER_NAME: "openai",
        **_request_attributes(record),
        LLMCallAttributes.BACKEND: record.backend,
        LLMCallAttributes.MODEL_VERSION: record.model_version or answer.fingerprint,
        GenAIAttributes.RESPONSE_ID: answer.response_id,
        GenAIAttributes.RESPONSE_MODEL: answer.model,
        GenAIAttributes.RESPONSE_FINISH_REASONS: answer.finish_reasons or None,
        GenAIAttributes.USAGE_INPUT_TOKENS: answer.input_tokens,
        GenAIAttributes.USAGE_OUTPUT_TOKENS: answer.output_tokens,
        LLMCallAttributes.RESPONSE: _body_text(answer.body) if answer.body else None,
        **_token_attributes(record),
        GenAIAttributes.HTTP_STATUS_CODE: record.status,
        GenAIAttributes.ERROR_TYPE: None if record.error_type is None else _mended(record.error_type),
        LLMCallAttributes.LATENCY_SECONDS: ended - record.started,
        LLMCallAttributes.RETRIES: record.retries,
        LLMCallAttributes.STREAMED: bool(record.question and record.question.is_streamed),
    }
    if record.first_byte is not None:
        found[LLMCallAttributes.FIRST_BYTE_SECONDS] = record.first_byte - record.started
    return {
        name.value: _mended(value) if isinstance(value, str) else value
        for name, value in found.items()
        if value is not None
    }


def _request_attributes(record: CallRecord) -> dict[GenAIAttributes | LLMCallAttributes, AttributeValue | None]:
    found: dict[GenAIAttributes | LLMCallAttributes, AttributeValue | None] = {
        LLMCallAttributes.REQUEST: _body_text(record.request) if record.request else None,
    }
    if record.question is not None:
        found[GenAIAttributes.REQUEST_MODEL] = record.question.model
        for name, attribute in _REQUEST_NUMBERS.items():
            value = record.question.body.get(name)
            if type(value) in (int, float) and -(2**63) <= value < 2**63:
                found[attribute] = value
    return found


def _token_attributes(record: CallRecord) -> dict[GenAIAttributes | LLMCallAttributes, AttributeValue | None]:
    """Token ids and log-probabilities: the latter only where each stands beside its token."""
    answer = record.answer
    logprobs = answer.logprobs
    if logprobs is not None and answer.token_ids is not None and len(logprobs) != len(answer.token_ids):
        logprobs = None
    return {
        LLMCallAttributes.PROMPT_TOKEN_IDS: None if answer.prompt_token_ids is None else list(answer.prompt_token_ids),
        LLMCallAttributes.RESPONSE_TOKEN_IDS: None if answer.token_ids is None else list(answer.token_ids),
        LLMCallAttributes.RESPONSE_LOGPROBS: None if logprobs is None else list(logprobs),
    }


def _mended(text: str) -> str:
    """``text`` as any store takes it: without NUL."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}") if "\0" in text else text


def _body_text(body: bytes) -> str:
    """A body as text; one that is too long for the store is shortened, and stays JSON."""
    if len(body) <= _MAX_BODY_CHARS:
        return body.decode("utf-8", "replace")
    try:
        shortened = msgspec.json.encode(_shortened(msgspec.json.decode(body)))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        shortened = None
    if shortened is None or len(shortened) > _MAX_BODY_CHARS:
        shortened = msgspec.json.encode({"agentlightning.shortened": f"{len(body)} bytes, too large for a span"})
    return shortened.decode()


def _shortened(value: Any) -> Any:
    """``value`` with long texts cut, which say how long they were: images are sent as texts of megabytes."""
    if isinstance(value, str):
        if len(value) <= _LONG_TEXT_CHARS:
            return value
        return f"{value[:_LONG_TEXT_CHARS]}… (shortened: {len(value)} characters)"
    if isinstance(value, list):
        return [_shortened(each) for each in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {name: _shortened(each) for name, each in cast("dict[str, Any]", value).items()}
    return value
