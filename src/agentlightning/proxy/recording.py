"""What is known of a model call while it goes on, and the one span that it becomes.

The names of the span's attributes are those of ``semconv``.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from agentlightning.proxy.dialects.base import ModelRequest, ProxyError, RecordedReply, WireDialect
from agentlightning.proxy.sizes import body_text, split_numbers, text_limit
from agentlightning.semconv import GenAIAttributes, LLMCallAttributes, UnusableReason, choice_attribute
from agentlightning.tracer.conversion import fits, sanitize_text
from agentlightning.types.plain_spans import (
    PlainAttributes,
    PlainContext,
    PlainResource,
    PlainSpan,
    PlainStatus,
    PlainValue,
)

_MAX_TEXT_CHARS = 2_000
_REQUEST_NUMBERS: Mapping[str, GenAIAttributes] = {
    "temperature": GenAIAttributes.REQUEST_TEMPERATURE,
    "top_p": GenAIAttributes.REQUEST_TOP_P,
    "max_tokens": GenAIAttributes.REQUEST_MAX_TOKENS,
    "max_completion_tokens": GenAIAttributes.REQUEST_MAX_TOKENS,
    "seed": GenAIAttributes.REQUEST_SEED,
}
DISCONNECTED = "client_disconnected"
"""The ``error.type`` of a call whose reply the agent did not wait for."""
_OVERHEAD_BYTES = 1_000
_TOKEN_BYTES = 36
"""The size of a number in a list, as Python keeps it."""


class CallOrigin(NamedTuple):
    """Which attempt a call belongs to, and which span of the agent is its parent."""

    rollout_id: str
    attempt_id: str
    trace_id: str | None = None
    parent_span_id: str | None = None


class Prefix(NamedTuple):
    """What a call repeats of an earlier one, whose span is in the store."""

    span_id: str
    tokens: int
    """So many of its prompt and reply, taken together."""
    messages: int
    fields: tuple[str, ...]
    """Of the request, beside its messages."""
    is_shortened: bool
    """Whether the texts of these messages and fields are not whole there."""


@dataclass(slots=True)
class CallRecord:
    """One call: filled in while it goes on, made a span at its end."""

    dialect: WireDialect
    origin: CallOrigin | None
    """None: the call belongs to no attempt and is not recorded."""
    start_time: float = field(default_factory=time.time)
    started: float = field(default_factory=time.perf_counter)
    raw_request: bytes = b""
    request: ModelRequest | None = None
    backend: str | None = None
    model_version: str | None = None
    retries: int = 0
    imposed: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """Sampling parameters that the proxy changed, each with what the agent ``asked`` and what was ``sent``."""
    first_byte: float | None = None
    """When the backend's first byte of the reply came, on the clock of ``started``."""
    ended: float | None = None
    status: int | None = None
    """The HTTP status that the agent got."""
    reply: RecordedReply = field(default_factory=RecordedReply)
    error_type: str | None = None
    error_message: str | None = None
    span_id: str = field(default_factory=lambda: secrets.token_hex(8))
    trace_id: str = field(default_factory=lambda: secrets.token_hex(16))
    """Unless its origin is part of a trace."""
    is_shortened: bool = False
    """Whether the texts of the request are not whole in its span; known once that is made."""

    @property
    def unusable(self) -> UnusableReason | None:
        """Why the call is no example to learn from; None: it is one."""
        if self.error_type is None:
            return self.reply.unusable
        return UnusableReason.NOT_RECEIVED if self.error_type == DISCONNECTED else UnusableReason.CALL_FAILED

    def fail(self, error_type: str, message: str, status: int | None = None) -> None:
        """Record that the call failed."""
        self.error_type, self.error_message = error_type, message
        self.status = status if status is not None else self.status

    def refuse(self, error: ProxyError) -> None:
        """Record that the call ended with an error of the proxy's own, which is all that the agent got."""
        self.fail(error.code, error.message, error.status)
        self.reply.body = self.dialect.error_body(error)

    def span_bytes(self) -> int:
        """Return about how much memory the call's span takes."""
        tokens = len(self.reply.prompt_token_ids or ()) + sum(
            2 * len(each.token_ids or ()) for each in self.reply.choices
        )
        return _OVERHEAD_BYTES + len(self.raw_request) + len(self.reply.body) + _TOKEN_BYTES * tokens


def spans_of(record: CallRecord, prefix: Prefix | None = None) -> list[PlainSpan]:
    """Return the span of a call that has ended, after those of parts that do not fit into it, without sequence ids: the
    store issues them. Raises ``ValueError`` if the call belongs to no attempt.

    Args:
        prefix: what the span need not say, because an earlier one does.
    """
    if record.origin is None:
        raise ValueError("a call that belongs to no attempt has no span")
    ended = record.ended if record.ended is not None else record.started
    model = record.request.model if record.request else "unknown"
    status = PlainStatus(status_code="OK")
    if record.error_type is not None:
        status = PlainStatus("ERROR", sanitize_text(record.error_message or record.error_type))
    numbers, pieces = split_numbers(_token_attributes(record.reply, prefix))
    attributes = _attributes_of(record, ended, prefix, text_limit(numbers)) | numbers
    name = f"{record.dialect.operation} {model}"
    span = _span(record.origin, name, status, attributes, record.start_time, record.trace_id, record.span_id)
    span.end_time = record.start_time + (ended - record.started)
    inside = record.origin._replace(parent_span_id=record.span_id)
    parts: list[PlainSpan] = []
    for of, values in pieces:
        held: PlainAttributes = {LLMCallAttributes.PART_OF.value: of, LLMCallAttributes.PART_VALUES.value: values}
        parts.append(_span(inside, "part of a call", PlainStatus("OK"), held, record.start_time, record.trace_id))
    if parts:
        attributes[LLMCallAttributes.PARTS.value] = [part.span_id for part in parts]
    return [*parts, span]


def retraction_of(record: CallRecord) -> PlainSpan:
    """Return a span below that of a recorded call: its reply was not received after all, see ``CALL_SPAN_ID``. Raises
    ``ValueError`` if the call belongs to no attempt."""
    if record.origin is None:
        raise ValueError("a call that belongs to no attempt has no span")
    why = "the agent closed the connection while its call was being recorded"
    attributes: PlainAttributes = {
        LLMCallAttributes.UNUSABLE.value: UnusableReason.NOT_RECEIVED.value,
        LLMCallAttributes.CALL_SPAN_ID.value: record.span_id,
        GenAIAttributes.ERROR_TYPE.value: DISCONNECTED,
    }
    origin = record.origin._replace(parent_span_id=record.span_id)
    return _span(origin, "reply not received", PlainStatus("ERROR", why), attributes, time.time(), record.trace_id)


def refusal_of(origin: CallOrigin, method: str, path: str, error: ProxyError) -> PlainSpan:
    """Return the span of a request below an attempt's URL that is no model call of a wire."""
    attributes: PlainAttributes = {
        GenAIAttributes.ERROR_TYPE.value: error.code,
        GenAIAttributes.HTTP_STATUS_CODE.value: error.status,
        "http.request.method": sanitize_text(method),
        "url.path": sanitize_text(path[:_MAX_TEXT_CHARS]),
    }
    status = PlainStatus("ERROR", sanitize_text(error.message[:_MAX_TEXT_CHARS]))
    return _span(origin, "refused request", status, attributes, time.time(), secrets.token_hex(16))


def _span(
    origin: CallOrigin,
    name: str,
    status: PlainStatus,
    attributes: PlainAttributes,
    now: float,
    trace_id: str,
    span_id: str | None = None,
) -> PlainSpan:
    """Return a span that is over at once."""
    trace_id, span_id = origin.trace_id or trace_id, span_id or secrets.token_hex(8)
    return PlainSpan(
        rollout_id=origin.rollout_id,
        attempt_id=origin.attempt_id,
        sequence_id=0,
        trace_id=trace_id,
        span_id=span_id,
        parent_id=origin.parent_span_id,
        name=sanitize_text(name),
        status=status,
        attributes=attributes,
        events=[],
        links=[],
        start_time=now,
        end_time=now,
        context=PlainContext(trace_id=trace_id, span_id=span_id, is_remote=False, trace_state={}),
        parent=None,
        resource=PlainResource(attributes={"service.name": "agentlightning-proxy"}, schema_url=""),
    )


def _attributes_of(record: CallRecord, ended: float, prefix: Prefix | None, limit: int) -> PlainAttributes:
    request, reply = record.request, record.reply
    body: Mapping[str, Any] = {} if request is None else request.body
    response, response_is_short = body_text(reply.body, limit)
    found: dict[GenAIAttributes | LLMCallAttributes, PlainValue | None] = {
        GenAIAttributes.OPERATION_NAME: record.dialect.operation,
        GenAIAttributes.PROVIDER_NAME: record.dialect.provider,
        GenAIAttributes.REQUEST_MODEL: request and request.model,
        **{
            attribute: body[name]
            for name, attribute in _REQUEST_NUMBERS.items()
            if type(body.get(name)) in (int, float) and -(2**63) <= body[name] < 2**63
        },
        LLMCallAttributes.WIRE: record.dialect.name,
        LLMCallAttributes.NOTES: [*request.notes] or None if request else None,
        LLMCallAttributes.IMPOSED_SAMPLING: msgspec.json.encode(record.imposed).decode() if record.imposed else None,
        LLMCallAttributes.BACKEND: record.backend,
        LLMCallAttributes.MODEL_VERSION: record.model_version or reply.fingerprint,
        GenAIAttributes.RESPONSE_ID: reply.response_id,
        GenAIAttributes.RESPONSE_MODEL: reply.model,
        GenAIAttributes.RESPONSE_FINISH_REASONS: [*reply.finish_reasons] or None,
        GenAIAttributes.USAGE_INPUT_TOKENS: reply.input_tokens,
        GenAIAttributes.USAGE_OUTPUT_TOKENS: reply.output_tokens,
        LLMCallAttributes.RESPONSE: response,
        LLMCallAttributes.UNUSABLE: record.unusable and record.unusable.value,
        GenAIAttributes.HTTP_STATUS_CODE: record.status,
        GenAIAttributes.ERROR_TYPE: record.error_type,
        LLMCallAttributes.LATENCY_SECONDS: ended - record.started,
        LLMCallAttributes.RETRIES: record.retries,
        LLMCallAttributes.STREAMED: request is not None and request.is_streamed,
        LLMCallAttributes.FIRST_BYTE_SECONDS: None if record.first_byte is None else record.first_byte - record.started,
    }
    found |= _request_attributes(record, prefix, limit)
    shortened: list[str | bool | int | float] = [*["request"] * record.is_shortened, *["response"] * response_is_short]
    found[LLMCallAttributes.SHORTENED] = shortened or None
    return {name.value: _mended(value) for name, value in found.items() if value is not None}


def _request_attributes(
    record: CallRecord, prefix: Prefix | None, limit: int
) -> dict[GenAIAttributes | LLMCallAttributes, PlainValue | None]:
    """Return the request, or what it does not repeat of an earlier one."""
    if prefix is None or not (prefix.messages or prefix.fields):
        text, record.is_shortened = body_text(record.raw_request, limit)
        about: PlainValue | None = None if prefix is None else prefix.span_id
        return {LLMCallAttributes.REQUEST: text, LLMCallAttributes.PREFIX_SPAN_ID: about}
    request = msgspec.json.decode(record.raw_request)
    rest = {name: value for name, value in request.items() if name not in prefix.fields}
    if prefix.messages:
        rest["messages"] = rest["messages"][prefix.messages :]
    text, is_short = body_text(msgspec.json.encode(rest), limit)
    record.is_shortened = is_short or prefix.is_shortened
    return {
        LLMCallAttributes.REQUEST_REST: text,
        LLMCallAttributes.PREFIX_SPAN_ID: prefix.span_id,
        LLMCallAttributes.PREFIX_MESSAGES: prefix.messages,
        LLMCallAttributes.PREFIX_FIELDS: [*prefix.fields] or None,
    }


def _token_attributes(reply: RecordedReply, prefix: Prefix | None) -> PlainAttributes:
    """Return ids and log-probabilities: of the first choice, and below ``llm.choices.n`` of each further one."""
    found: dict[str, Sequence[int] | Sequence[float] | None] = {
        LLMCallAttributes.PROMPT_TOKEN_IDS.value: reply.prompt_token_ids
    }
    repeated = 0 if prefix is None else prefix.tokens
    if repeated and reply.prompt_token_ids is not None:
        found = {LLMCallAttributes.PROMPT_TOKEN_IDS_REST.value: reply.prompt_token_ids[repeated:]}
    for number, choice in enumerate(reply.choices):
        tokens, logprobs = choice.token_ids, choice.logprobs
        if logprobs is not None and tokens is not None and len(logprobs) != len(tokens):
            logprobs = None  # they do not stand beside their tokens
        if number:
            found[choice_attribute(LLMCallAttributes.PROMPT_TOKEN_IDS, number)] = choice.prompt_token_ids
        found[choice_attribute(LLMCallAttributes.RESPONSE_TOKEN_IDS, number)] = tokens
        found[choice_attribute(LLMCallAttributes.RESPONSE_LOGPROBS, number)] = logprobs
    attributes: PlainAttributes = {name: list(numbers) for name, numbers in found.items() if numbers is not None}
    return attributes | {LLMCallAttributes.PREFIX_TOKENS.value: repeated} if repeated else attributes


def _mended(value: PlainValue) -> PlainValue:
    """Return a value as stores take it: without NUL and without halves of surrogate pairs."""
    if isinstance(value, str):
        return value if fits(value) else sanitize_text(value)
    if isinstance(value, list) and value and isinstance(value[0], str):
        return [sanitize_text(str(each)) for each in value]
    return value
