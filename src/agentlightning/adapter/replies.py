"""Replies as the wires and tracing libraries write them: their choices, each as a message of OpenAI's chat API.

A reply has several choices if several were asked for (`n`). Libraries write a list for other things too: the items of
one reply (OpenAI's Responses API), the pieces of one stream, or a thought before the answer. So a list is taken for
choices only if each entry has a finish reason of its own, or as many choices were asked for; else it is one reply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from agentlightning.adapter.shapes import (
    THOUGHTS,
    Message,
    as_text,
    decoded,
    first,
    object_of,
    objects,
    one_message,
)


class Choice(NamedTuple):
    """One choice of a reply. What is not known of it is None."""

    message: Message | None = None
    finish_reason: str | None = None


class ReadReply(NamedTuple):
    """What a reply says. Without choices it says nothing that a model wrote."""

    choices: Sequence[Choice] = ()
    response_id: str | None = None
    model: str | None = None


def reply_of(value: Any, asked: int | None = None) -> ReadReply:
    """Return what the body of a reply says, in any of the wires' shapes, or a message, or a text; also as JSON.

    A text of JSON that is none of these is a text that the model said.

    Args:
        value: the reply.
        asked: how many choices were asked for; None: not known.
    """
    told = decoded(value)
    if isinstance(told, list) and told and all(isinstance(each, dict) for each in cast("list[Any]", told)):
        return ReadReply(choices_of([Choice(reply_message(each)) for each in objects(told)], asked))
    reply = _reply_of_body(cast("Mapping[str, Any]", told)) if isinstance(told, dict) else ReadReply()
    says_nothing = not any(choice.message is not None for choice in reply.choices)
    if says_nothing and isinstance(value, str) and (reply == ReadReply() or not isinstance(told, dict)):
        return ReadReply([Choice({"role": "assistant", "content": told if isinstance(told, str) else value})])
    return reply


def reply_message(value: Any) -> Message | None:
    """Return a message of a model, or a text as one; None if it is no such."""
    found = [message for message in one_message(value, "assistant") if message["role"] != "tool"]
    if not found or found[0]["role"] in THOUGHTS:
        return None
    return {**found[0], "role": "assistant"}  # Logfire repeats the role as often as the stream did


def choices_of(entries: Sequence[Choice], asked: int | None = None) -> list[Choice]:
    """Return the choices of a reply that is written as a list, see the module's text.

    Args:
        entries: with a message, or with None where an entry says nothing that a model wrote.
        asked: how many choices were asked for; None: not known.
    """
    said = [each for each in entries if each.message is not None]
    if len(said) > 1 and (len(said) == asked or all(each.finish_reason for each in said)):
        return said
    reasons = [each.finish_reason for each in entries if each.finish_reason]
    message = joined([each.message for each in said if each.message is not None])
    return [] if message is None and not reasons else [Choice(message, reasons[-1] if reasons else None)]


def joined(messages: Sequence[Message]) -> Message | None:
    """Return messages that are parts of one reply as one message; None without any."""
    if len(messages) < 2:
        return messages[0] if messages else None
    texts = [message["content"] for message in messages if message.get("content")]
    said: Message = {"role": "assistant", "content": "".join(map(as_text, texts)) if texts else None}
    calls = [call for message in messages for call in message.get("tool_calls", [])]
    return {**said, "tool_calls": calls} if calls else said


def _reply_of_body(body: Mapping[str, Any]) -> ReadReply:
    head = (_text(body, "id", "responseId"), _text(body, "model", "modelVersion"))
    for name in ("choices", "candidates"):
        if name in body:
            return ReadReply([_choice(each) for each in objects(body[name])], *head)
    if "generations" in body:  # LangChain
        return _reply_of_langchain(body)
    if isinstance(body.get("output"), list):  # the Responses API
        items = [item for item in objects(body["output"]) if item.get("type") not in THOUGHTS]
        messages = [message for item in items for message in one_message(item)]
        return ReadReply([Choice(joined(messages), _text(body, "status"))], *head)
    if isinstance(body.get("message"), dict | str):
        return ReadReply([Choice(reply_message(body["message"]), _text(body, "finish_reason"))])
    reason = _text(body, "finish_reason", "stop_reason", "finishReason")
    if {"role", "content", "tool_calls", "parts", "kwargs"} & body.keys() or body.get("type") == "function_call":
        return ReadReply([Choice(reply_message(body), reason)], *head)
    return ReadReply(() if reason is None else [Choice(None, reason)], *head)


def _choice(given: Mapping[str, Any]) -> Choice:
    message = first(given, ("message", "content", "text"))
    reason = _text(given, "finish_reason", "finishReason")
    return Choice(None if message is None else reply_message(message), reason)


def _reply_of_langchain(body: Mapping[str, Any]) -> ReadReply:
    batch = decoded(body["generations"])
    batch = batch[0] if isinstance(batch, list) and batch and isinstance(batch[0], list) else batch  # pyright: ignore[reportUnknownVariableType]
    choices: list[Choice] = []
    for generation in objects(batch):
        said, information = first(generation, ("message", "text")), generation.get("generation_info")
        reason = _text(cast("Any", information), "finish_reason") if isinstance(information, dict) else None
        choices.append(Choice(None if said is None else reply_message(said), reason))
    known = object_of(body.get("llm_output"))
    return ReadReply(choices, _text(known, "id"), _text(known, "model_name"))


# --- Why a reply ended -----------------------------------------------------------------------------

_REASONS = {
    "tool_calls": ("tool_call", "tool-calls", "tool_use", "function_call", "function_calls"),
    "stop": ("end_turn", "stop_sequence", "complete", "completed", "eos"),
    "length": ("max_tokens", "max_output_tokens", "model_length", "incomplete"),
    "content_filter": ("content-filter", "safety", "content_filtered"),
}
_REASON_OF = {given: reason for reason, all_given in _REASONS.items() for given in (reason, *all_given)}


def finish_reason_of(choice: Choice) -> str | None:
    """Return why a reply ended in OpenAI's words: ``stop``, ``length``, ``tool_calls`` or ``content_filter``.

    A reply that calls tools has ended with ``tool_calls``, although some libraries say ``stop``. A reason that is
    not known stays as it is.
    """
    message, reason = choice
    told = None if reason is None else _REASON_OF.get(reason.lower(), reason)
    return "tool_calls" if told == "stop" and message is not None and message.get("tool_calls") else told


def _text(values: Mapping[str, Any], *names: str) -> str | None:
    told = first(values, names)
    return None if told is None else str(told)
