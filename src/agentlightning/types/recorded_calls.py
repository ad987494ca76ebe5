"""Model calls as the proxy stores them, put together: what one span leaves to others, and what a later span says of it.

A call of a long conversation repeats all that was said before. So that an attempt does not store that again with every
call, a span may name an earlier one (``PREFIX_SPAN_ID``) whose prompt and reply its own prompt begins with. Numbers
that do not fit into one span are in spans beside it (``PARTS``). Attributes that are not whole have names of their own,
so that nobody takes them for whole ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgspec

from agentlightning.semconv import GenAIAttributes, LLMCallAttributes as Call, UnusableReason, choice_attribute
from agentlightning.types.spans import Span

_REFERENCES = (Call.PREFIX_SPAN_ID.value, Call.PARTS.value)
_MISSING = {Call.UNUSABLE.value: UnusableReason.PREFIX_MISSING.value}
_OF_CHOICES = (Call.PROMPT_TOKEN_IDS, Call.RESPONSE_TOKEN_IDS, Call.RESPONSE_LOGPROBS)


class _Incomplete(Exception):
    """A span that another one refers to is not here, or has not what that one takes from it."""


def whole_calls(spans: Sequence[Span]) -> list[Span]:
    """Return the spans of one attempt with every model call whole; the spans given are not changed.

    A call that refers to a span that is not among ``spans`` is marked unusable (``prefix_missing``), and so is one
    whose reply was not received.
    """
    marks = {
        str(span.attributes[Call.CALL_SPAN_ID.value]): span.attributes[Call.UNUSABLE.value]
        for span in spans
        if Call.CALL_SPAN_ID.value in span.attributes and Call.UNUSABLE.value in span.attributes
    }
    if not marks and not any(name in span.attributes for span in spans for name in _REFERENCES):
        return [*spans]
    known = {span.span_id: span for span in spans}
    made: dict[str, Mapping[str, Any]] = {}
    whole: list[Span] = []
    for span in spans:
        _make(span, known, made)
        attributes = {**made[span.span_id]}
        if span.span_id in marks:
            attributes[Call.UNUSABLE.value] = marks[span.span_id]
        is_new = attributes != span.attributes
        whole.append(span.model_copy(update={"attributes": attributes}) if is_new else span)
    return whole


def _make(span: Span, known: Mapping[str, Span], made: dict[str, Mapping[str, Any]]) -> None:
    """Put together the attributes of a span, after those of the spans that it begins with."""
    pending = {span.span_id: span}  # a dictionary, because references may go round in a circle
    while pending:
        current = next(reversed(pending.values()))
        before = known.get(str(current.attributes.get(Call.PREFIX_SPAN_ID.value)))
        if before is not None and before.span_id not in made and before.span_id not in pending:
            pending[before.span_id] = before
            continue
        del pending[current.span_id]
        if current.span_id in made:
            continue
        try:
            made[current.span_id] = _with_prefix(_with_parts(current.attributes, known), made)
        except _Incomplete:
            known_part = {Call.REQUEST.value: current.attributes.get(Call.REQUEST_REST.value, "{}")}
            made[current.span_id] = {**known_part, **current.attributes, **_MISSING}


def _with_parts(attributes: Mapping[str, Any], known: Mapping[str, Span]) -> Mapping[str, Any]:
    part_ids = attributes.get(Call.PARTS.value)
    if part_ids is None:
        return attributes
    lists: dict[str, list[Any]] = {}
    for part_id in part_ids:
        part = known.get(str(part_id))
        if part is None:
            raise _Incomplete
        values = cast("Sequence[Any]", part.attributes.get(Call.PART_VALUES.value, ()))
        lists.setdefault(str(part.attributes.get(Call.PART_OF.value)), []).extend(values)
    return {name: value for name, value in attributes.items() if name != Call.PARTS.value} | lists


def _with_prefix(attributes: Mapping[str, Any], made: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    earlier_id = attributes.get(Call.PREFIX_SPAN_ID.value)
    if earlier_id is None:
        return attributes
    earlier = made.get(str(earlier_id))
    if earlier is None or earlier.get(Call.UNUSABLE.value) == UnusableReason.PREFIX_MISSING.value:
        raise _Incomplete
    whole = {name: value for name, value in attributes.items() if name not in _UNFINISHED}
    if Call.PROMPT_TOKEN_IDS_REST.value in attributes:
        count = int(attributes.get(Call.PREFIX_TOKENS.value, 0))
        ids = [*earlier.get(Call.PROMPT_TOKEN_IDS.value, ()), *earlier.get(Call.RESPONSE_TOKEN_IDS.value, ())][:count]
        if len(ids) < count:
            raise _Incomplete
        whole[Call.PROMPT_TOKEN_IDS.value] = [*ids, *attributes[Call.PROMPT_TOKEN_IDS_REST.value]]
    if Call.REQUEST_REST.value in attributes:
        whole[Call.REQUEST.value] = _whole_request(attributes, str(earlier.get(Call.REQUEST.value, "")))
    return whole


def _whole_request(attributes: Mapping[str, Any], earlier: str) -> str:
    count = int(attributes.get(Call.PREFIX_MESSAGES.value, 0))
    names = cast("Sequence[str]", attributes.get(Call.PREFIX_FIELDS.value, ()))
    try:
        before = msgspec.json.decode(earlier)
        request = msgspec.json.decode(str(attributes[Call.REQUEST_REST.value]))
        request |= {name: before[name] for name in names}
        if count:
            messages = before["messages"][:count]
            if len(messages) < count:
                raise _Incomplete
            request["messages"] = messages + request["messages"]
    except (msgspec.MsgspecError, TypeError, KeyError) as error:
        raise _Incomplete from error
    return msgspec.json.encode(request).decode()


_UNFINISHED = frozenset({
    Call.PREFIX_SPAN_ID.value, Call.PREFIX_TOKENS.value, Call.PREFIX_MESSAGES.value, Call.PREFIX_FIELDS.value,
    Call.PROMPT_TOKEN_IDS_REST.value, Call.REQUEST_REST.value,
})  # fmt: skip
"""The attributes of a call that are not there when it is whole."""


def each_choice(span: Span) -> list[Span]:
    """Return the span of a whole call once for each choice of its reply, as if that were the only one."""
    count, choices, reply = 1, list[Any](), dict[str, Any]()
    while any(choice_attribute(each, count) in span.attributes for each in _OF_CHOICES):
        count += 1
    try:
        reply = dict(msgspec.json.decode(str(span.attributes.get(Call.RESPONSE.value))))
        choices = list(reply["choices"])
    except (msgspec.MsgspecError, TypeError, KeyError, ValueError):  # it was shortened
        pass
    count = max(count, len(choices))
    if count < 2:
        return [span]
    reasons = span.attributes.get(GenAIAttributes.RESPONSE_FINISH_REASONS.value)
    told = list(map(str, reasons)) if isinstance(reasons, list | tuple) and len(reasons) == count else None
    return [
        _of_choice(span, number, None if told is None else told[number], reply, choices[number : number + 1])
        for number in range(count)
    ]


def _of_choice(span: Span, number: int, reason: str | None, reply: Mapping[str, Any], choices: Sequence[Any]) -> Span:
    attributes: dict[str, Any] = {
        name: value for name, value in span.attributes.items() if not name.startswith(Call.CHOICES.value)
    }
    for each in _OF_CHOICES:
        value = span.attributes.get(choice_attribute(each, number))
        if value is not None:
            attributes[each.value] = value
        elif each is not Call.PROMPT_TOKEN_IDS:
            attributes.pop(each.value, None)
    if reason is None and choices and isinstance(choices[0], dict):
        reason = cast("dict[str, Any]", choices[0]).get("finish_reason")
    attributes.pop(GenAIAttributes.RESPONSE_FINISH_REASONS.value, None)
    if reason is not None:
        attributes[GenAIAttributes.RESPONSE_FINISH_REASONS.value] = [reason]
    if reply:
        attributes[Call.RESPONSE.value] = msgspec.json.encode({**reply, "choices": choices}).decode()
    return span.model_copy(update={"attributes": attributes})
