"""The spans of an attempt as a transcript: who said what, in the order of the store. Pure: spans in, entries out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from agentlightning.adapter.adapters import TraceToMessages
from agentlightning.adapter.calls import ModelCall
from agentlightning.adapter.filters import side_calls
from agentlightning.adapter.records import RecordedCall, without_nested, without_repeated
from agentlightning.adapter.shapes import Message, as_text, object_of, objects
from agentlightning.adapter.tree import TraceTree
from agentlightning.cli.waterfall import raised
from agentlightning.emitter.emit import get_message_value, get_object_value
from agentlightning.semconv import AGL_EXCEPTION, AGL_MESSAGE, AGL_OBJECT, GenAIAttributes, LightningSpanAttributes
from agentlightning.types import Span
from agentlightning.types.attempt_spans import order_of
from agentlightning.types.attributes import filter_and_unflatten_attributes
from agentlightning.types.recorded_calls import whole_calls
from agentlightning.types.rewards import get_rewards_from_span

Kind: TypeAlias = Literal["message", "reply", "tool", "emitted", "reward", "error"]

_TOOL_NAMES = ("gen_ai.tool.name", "tool.name", LightningSpanAttributes.OPERATION_NAME.value)
_ARGUMENTS = ("gen_ai.tool.call.arguments", "tool.parameters", LightningSpanAttributes.OPERATION_INPUT.value)
_RESULTS = ("gen_ai.tool.call.result", "tool.result", LightningSpanAttributes.OPERATION_OUTPUT.value)
_INPUT_TOKENS = (GenAIAttributes.USAGE_INPUT_TOKENS.value, "gen_ai.usage.prompt_tokens", "llm.token_count.prompt")
_OUTPUT_TOKENS = (
    GenAIAttributes.USAGE_OUTPUT_TOKENS.value,
    "gen_ai.usage.completion_tokens",
    "llm.token_count.completion",
)
_NOT_RECORDED = "the messages of this call were not recorded"


@dataclass(frozen=True)
class TranscriptEntry:
    """One thing that was said or done in an attempt."""

    kind: Kind
    """``message``: what a model was told; ``reply``: what it answered; ``tool``: a tool, or an operation of the agent,
    that no message tells of; ``emitted``: what the agent recorded itself; ``reward``; ``error``."""
    role: str
    """``system``, ``user``, ``assistant``, ``tool``; for other kinds than the first two what they are called."""
    text: str
    span_id: str
    sequence_id: int
    tool_calls: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    """What a reply asks for: ``id``, ``name`` and ``arguments`` (as JSON) of each call."""
    tool_call_id: str | None = None
    """The call that this is the result of."""
    side: str | None = None
    """Why the call that it is part of is a call on the side; None: it is not."""
    model: str | None = None
    finish_reason: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    seconds: float | None = None
    problem: str | None = None
    """Why nothing can be learned from a reply; None if something can."""


def transcript_of(spans: Sequence[Span]) -> list[TranscriptEntry]:
    """What was said and done in one attempt, in the order of the store.

    A call that several libraries recorded is there once, and of its messages only those that no earlier call of the
    same conversation had.
    """
    if not spans:
        return []
    spans = whole_calls(spans)
    tree = TraceTree.from_spans(spans)
    tree.repair_hierarchy()
    order = order_of(spans)
    records = sorted(without_nested(tree.records(None, None)), key=lambda each: order(each.call.span))
    calls = {each.call.span.span_id: each for each in without_repeated(records)}
    told = {span_id for each in calls.values() for span_id in each.span_ids}
    main = [each.call for each in calls.values() if each.left_out is None]
    aside = dict.fromkeys(side_calls(main), "side call")
    aside |= {span_id: each.left_out for span_id, each in calls.items() if each.left_out is not None}
    dialogue = _Dialogue(spans, [each.call for each in calls.values()])
    entries: list[TranscriptEntry] = []
    for span in sorted(spans, key=order):
        if span.span_id in calls:
            entries += dialogue.of_call(calls[span.span_id], aside.get(span.span_id))
        elif span.span_id not in told:
            entries += dialogue.of_other(span)
    return entries


class _Dialogue:
    """What was said so far."""

    def __init__(self, spans: Sequence[Span], calls: Sequence[ModelCall]) -> None:
        self._spans = spans
        self._said: set[str] = set()
        """Keys of conversations, up to each of their messages."""
        self._results = {
            _text(message.get("content"))
            for call in calls
            for message in call.conversation.messages
            if message.get("role") == "tool"
        }
        """The results of tools that messages tell."""
        self._answered = Counter(name for name, _ in {pair for call in calls for pair in _answers(call)})
        """How many calls of each tool have an answer among the messages, whatever their spans say of it."""
        self._errors: set[str] = set()

    def of_call(self, record: RecordedCall, side: str | None) -> Iterator[TranscriptEntry]:
        call = record.call
        messages = call.conversation.messages
        for message, key in zip(messages, call.prefix_keys, strict=True):
            if key not in self._said:
                self._said.add(key)
                yield _message(call.span, message, side)
        for number, choice in enumerate(call.each_choice()):
            self._said.add(choice.whole_key or "")
            yield self._reply(choice, side, f"choice {number + 1}" if number else "")

    def _reply(self, call: ModelCall, side: str | None, which: str) -> TranscriptEntry:
        span, reply = call.span, call.conversation.reply or {}
        asked = objects(reply.get("tool_calls")) or list(TraceToMessages().get_tool_calls(span, self._spans))
        said = _text(reply.get("content"))
        if not (said or asked or call.failed or call.conversation.messages):
            said = f"({_NOT_RECORDED})"
        seconds = None if None in (span.start_time, span.end_time) else (span.end_time or 0) - (span.start_time or 0)
        return TranscriptEntry(
            "reply",
            f"assistant {which}".strip(),
            said,
            span.span_id,
            span.sequence_id,
            [_tool_call(each) for each in asked],
            side=side,
            model=call.model,
            finish_reason=call.finish_reason,
            input_tokens=_tokens(span, _INPUT_TOKENS, call.prompt_token_ids),
            output_tokens=_tokens(span, _OUTPUT_TOKENS, call.response_token_ids),
            seconds=seconds,
            problem=call.problem,
        )

    def of_other(self, span: Span) -> Iterator[TranscriptEntry]:
        """What a span tells that is no model call."""

        def entry(kind: Kind, role: str, text: str, **more: Any) -> TranscriptEntry:
            return TranscriptEntry(kind, role, text, span.span_id, span.sequence_id, **more)

        if span.name == AGL_MESSAGE:
            yield entry("emitted", "message", get_message_value(span) or "")
        elif span.name == AGL_OBJECT:
            yield entry("emitted", "object", _text(get_object_value(span)))
        for each in get_rewards_from_span(span):
            yield entry("reward", "reward" if each.name == "primary" else f"reward {each.name}", f"{each.value:.6g}")
        name = _first(span.attributes, _TOOL_NAMES)
        if name is not None:
            result = _text(_told(span.attributes, _RESULTS))
            if result not in self._results and not self._answered[str(name)]:
                asked = _call("", name, _told(span.attributes, _ARGUMENTS))
                yield entry("tool", str(name), result, tool_calls=[asked])
            self._answered[str(name)] -= self._answered[str(name)] > 0
        failure = _failure(span)
        if failure and failure not in self._errors:  # it passes through spans around this one, which say it again
            self._errors.add(failure)
            yield entry("error", "error", failure)


def _message(span: Span, message: Message, side: str | None) -> TranscriptEntry:
    call_id = message.get("tool_call_id")
    return TranscriptEntry(
        "message",
        str(message.get("role")),
        _text(message.get("content")),
        span.span_id,
        span.sequence_id,
        [_tool_call(each) for each in objects(message.get("tool_calls"))],
        tool_call_id=None if call_id is None else str(call_id),
        side=side,
    )


def _answers(call: ModelCall) -> Iterator[tuple[str, str]]:
    """Name and id of each call of a tool that a later message has the result of."""
    names: dict[str, str] = {}
    for message in call.conversation.messages:
        for each in objects(message.get("tool_calls")):
            asked = _tool_call(each)
            names[asked["id"]] = asked["name"]
        call_id = str(message.get("tool_call_id"))
        if message.get("role") == "tool" and call_id in names:
            yield names[call_id], call_id


def _tool_call(given: Mapping[str, Any]) -> dict[str, str]:
    function = object_of(given.get("function"))
    return _call(given.get("id") or "", function.get("name"), function.get("arguments"))


def _call(call_id: Any, name: Any, arguments: Any) -> dict[str, str]:
    return {"id": str(call_id), "name": str(name), "arguments": _text(arguments)}


def _text(value: Any) -> str:
    """What is to be read of a value: a text, the texts among parts, anything else as JSON."""
    if value is None or value in ({}, []):
        return ""
    parts = objects(value)
    if parts and all("type" in each for each in parts):
        shown = [each.get("text") if each["type"] == "text" else f"[{each['type']}]" for each in parts]
        return "\n".join(as_text(each) for each in shown)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _first(attributes: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((attributes[name] for name in names if name in attributes), None)


def _told(attributes: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The value of the first of these attributes that is there; that of an operation may be flattened below it."""
    found = _first(attributes, names)
    return filter_and_unflatten_attributes(attributes, names[-1]) if found is None else found


def _tokens(span: Span, names: Sequence[str], ids: Sequence[int]) -> int | None:
    """How many tokens a span says that there were, or else how many it has; None: it says nothing."""
    value = _first(span.attributes, names)
    return int(value) if isinstance(value, int | float) else len(ids) or None


def _failure(span: Span) -> str:
    """The exception that a span tells of, or why its status says that it failed; empty if neither."""
    told = [raised(each) for each in span.events if each.name == "exception"]
    if span.name == AGL_EXCEPTION:
        kind, message = (span.attributes.get(f"exception.{each}", "") for each in ("type", "message"))
        told.append(f"{kind}: {message}".strip(": "))
    if span.status.status_code == "ERROR" and not any(told):
        told.append(span.status.description or f"{span.name} failed")
    return next(filter(None, told), "")
