"""`ModelCall`: what training needs of one model call, read from its span.

Messages are read as `instrumentations` says; token ids are written by our proxy, or by instrumentations of vLLM under
names of their own. Nothing that is missing or malformed raises: it stays None or empty.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

from agentlightning.adapter.instrumentations import PROXY, instrumentation_of, is_cut, read_told
from agentlightning.adapter.replies import Choice, finish_reason_of
from agentlightning.adapter.shapes import Message, as_text, decoded, first, object_of, objects
from agentlightning.semconv import LLMCallAttributes
from agentlightning.types import Span, Triplet
from agentlightning.types.recorded_calls import each_choice

_PROMPT_IDS = (LLMCallAttributes.PROMPT_TOKEN_IDS.value, "prompt_token_ids")
_RESPONSE_IDS = (LLMCallAttributes.RESPONSE_TOKEN_IDS.value, "response_token_ids")
_LOGPROBS = (LLMCallAttributes.RESPONSE_LOGPROBS.value, "response_logprobs")
"""Each: the name that our proxy writes, and the one that instrumentations of vLLM write."""
_NO_TEXTS = "no messages were recorded"
_SHORTENED = "its texts were shortened, because they are too large for a span"
_CUT = "its texts were cut by the library that wrote them, or by a limit for spans"
_VERSION = (LLMCallAttributes.MODEL_VERSION.value,)


@dataclass
class Conversation:
    """The messages of one model call."""

    messages: list[Message] = field(default_factory=list[Message])
    """The request. A text completion's prompt is one message of the user."""

    reply: Message | None = None
    """The first choice of the reply; None if it was not recorded."""

    tools: list[Message] | None = None
    """The tools that the model could call."""


@dataclass(frozen=True)
class ModelCall:
    """One model call, as one span tells of it. What the span does not say is None or empty."""

    span: Span
    instrumentation: str
    """How it was recorded: the name of one of ``INSTRUMENTATIONS``; empty if only the span's name tells of a call."""
    conversation: Conversation
    model: str | None
    model_version: str | None
    response_id: str | None
    finish_reason: str | None
    """In OpenAI's words, whatever the library's are."""
    prompt_token_ids: list[int]
    response_token_ids: list[int]
    logprobs: list[float] | None
    """Natural logarithms of probabilities, one for each of `response_token_ids`."""
    agent_path: tuple[str, ...] = ()
    """The agents that the call was made in, the outermost first, as far as spans around it name them."""
    further_choices: Sequence[Choice] = ()
    """The other choices of the reply, as far as a library wrote them. See ``each_choice``."""
    asked: int | None = None
    """How many choices were asked for, as far as a library wrote it."""
    is_cut: bool = False
    """Whether only the beginning of what a library wrote is there."""

    @property
    def is_proxied(self) -> bool:
        """Whether our proxy recorded it."""
        return self.instrumentation == PROXY

    @property
    def has_token_ids(self) -> bool:
        """Whether the token ids of prompt and reply were recorded."""
        return bool(self.prompt_token_ids) and bool(self.response_token_ids)

    @property
    def has_tools(self) -> bool:
        """Whether the model could call tools."""
        return bool(self.conversation.tools)

    def each_choice(self) -> list[ModelCall]:
        """Return the call as if each choice of its reply were the only one."""
        spans = each_choice(self.span)
        if len(spans) > 1:
            return [read_model_call(span, self.agent_path) for span in spans]
        return [self, *(self._with(choice) for choice in self.further_choices)]

    def _with(self, choice: Choice) -> ModelCall:
        said = replace(self.conversation, reply=choice.message)
        return replace(self, conversation=said, finish_reason=finish_reason_of(choice))

    @property
    def problem(self) -> str | None:
        """Why the call cannot be used for training; None if it can."""
        problem = self.problem_of_reply
        if problem is not None or self.has_token_ids:
            return problem
        problem = self.problem_of_texts
        return "neither token ids nor messages were recorded" if problem == _NO_TEXTS else problem

    @property
    def problem_of_reply(self) -> str | None:
        """Why what was recorded is no reply to learn from, be it tokens or texts; None if it is one."""
        if self.failed:
            return f"the call failed: {self.span.status.description or 'no description'}"
        if LLMCallAttributes.UNUSABLE.value in self.span.attributes:
            return str(self.span.attributes[LLMCallAttributes.UNUSABLE.value])
        if self.is_merged:
            count = 1 + len(self.further_choices)
            return f"{self.asked} choices were asked for and {count} recorded, which may be several as one text"
        return None

    @property
    def problem_of_texts(self) -> str | None:
        """Why the texts of the call are not those of the conversation; None if they are."""
        if LLMCallAttributes.SHORTENED.value in self.span.attributes:
            return _SHORTENED
        if self.is_cut:
            return _CUT
        if self.conversation.messages and self.conversation.reply is not None:
            return None
        return _NO_TEXTS

    @property
    def is_merged(self) -> bool:
        """Whether a library wrote fewer choices than were asked for: some write those of a stream as one text."""
        if self.is_proxied or self.asked is None or self.conversation.reply is None:
            return False
        return 1 + len(self.further_choices) < self.asked

    @property
    def failed(self) -> bool:
        """Whether the span says that the call failed."""
        return self.span.status.status_code == "ERROR"

    @cached_property
    def request_key(self) -> str | None:
        """The same for calls with the same messages, however they were recorded; None without messages."""
        messages = self.conversation.messages
        return _digest([_essence(each) for each in messages]) if messages else None

    @cached_property
    def prefix_keys(self) -> list[str]:
        """For each message, what is the same for all calls whose messages are the same up to it."""
        keys = [""]
        for message in self.conversation.messages:
            keys.append(_digest([keys[-1], _essence(message)]))
        return keys[1:]

    @cached_property
    def whole_key(self) -> str | None:
        """What ``prefix_keys`` of a call has that goes on from this one and its reply; None without a reply."""
        reply = self.conversation.reply
        return None if reply is None else _digest([(self.prefix_keys or [""])[-1], _essence(reply)])

    @cached_property
    def reply_key(self) -> str | None:
        """The same for calls with the same reply, however it was recorded; None without one."""
        reply = self.conversation.reply
        if reply is None:
            return None
        further = [_essence(each.message) for each in self.further_choices if each.message is not None]
        return _digest([_essence(reply), *further] if further else _essence(reply))

    def triplet(self, agent_name: str, reward: float | None) -> Triplet:
        """Return the call as a training example.

        ``prompt`` has ``token_ids``, ``messages`` and ``tools``; ``response`` has ``token_ids`` and ``message``.
        """
        return Triplet(
            prompt={
                "token_ids": self.prompt_token_ids,
                "messages": self.conversation.messages,
                "tools": self.conversation.tools,
            },
            response={"token_ids": self.response_token_ids, "message": self.conversation.reply},
            reward=reward,
            metadata={
                "logprobs": self.logprobs,
                "model": self.model,
                "model_version": self.model_version,
                "response_id": self.response_id,
                "finish_reason": self.finish_reason,
                "agent_name": agent_name,
                "span_id": self.span.span_id,
                "sequence_id": self.span.sequence_id,
            },
        )


def read_model_call(span: Span, agent_path: tuple[str, ...] = ()) -> ModelCall:
    """Read the span of a model call, which agents made."""
    attributes: Mapping[str, Any] = span.attributes
    told = read_told(span)
    prompt_ids, response_ids = first(attributes, _PROMPT_IDS), first(attributes, _RESPONSE_IDS)
    if not (prompt_ids and response_ids):  # perhaps the reply itself has them
        body = object_of(attributes.get(LLMCallAttributes.RESPONSE.value))
        choice = next(iter(objects(body.get("choices"))), dict[str, Any]())
        prompt_ids = prompt_ids or body.get("prompt_token_ids") or choice.get("prompt_token_ids")
        response_ids = response_ids or choice.get("token_ids")
    choices = told.choices or [Choice()]
    # Ids in attributes of their own are those of one choice, which is not known if there are several.
    is_one = len(choices) == 1 or instrumentation_of(span) == PROXY
    response_ids = _integers(response_ids) if is_one else list[int]()
    version = first(attributes, _VERSION)
    return ModelCall(
        span=span,
        instrumentation=instrumentation_of(span) or "",
        conversation=Conversation(list(told.messages), choices[0].message, told.tools),
        model=told.model,
        model_version=None if version is None else str(version),
        response_id=told.response_id,
        finish_reason=finish_reason_of(choices[0]),
        prompt_token_ids=_integers(prompt_ids),
        response_token_ids=response_ids,
        logprobs=_logprobs(first(attributes, _LOGPROBS), len(response_ids)),
        agent_path=agent_path,
        further_choices=choices[1:],
        asked=told.asked,
        is_cut=is_cut(span),
    )


def has_token_ids(span: Span) -> bool:
    """Whether the token ids of prompt and reply were recorded in attributes of their own."""
    attributes = span.attributes
    return bool(first(attributes, _PROMPT_IDS)) and bool(first(attributes, _RESPONSE_IDS))


# --- What two records of one call have in common ---------------------------------------------------


def _essence(message: Message) -> list[Any]:
    """What every library records of a message: no ids of tool calls, no thoughts, no shape of texts."""
    role = str(message.get("role"))
    calls = [cast("Mapping[str, Any]", each.get("function") or {}) for each in objects(message.get("tool_calls"))]
    return [
        "system" if role == "developer" else role,
        _plain(message.get("content")) or "",
        [[str(call.get("name")), decoded(call.get("arguments"))] for call in calls],
    ]


def _plain(content: Any) -> object:
    """The text of a message, if it is only text."""
    if not isinstance(content, list):
        return content
    parts = objects(content)
    is_text = len(parts) == len(cast("list[Any]", content)) and all(part.get("type") == "text" for part in parts)
    return "".join(as_text(part.get("text")) for part in parts) if is_text else cast("Any", content)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# --- Tokens ----------------------------------------------------------------------------------------


def _integers(value: Any) -> list[int]:
    items = list(cast("Sequence[Any]", value)) if isinstance(value, list | tuple) else []
    return items if all(type(item) is int for item in items) else []


def _logprobs(value: Any, count: int) -> list[float] | None:
    """Return log-probabilities only if there is a finite one for each token; others would train on wrong ratios."""
    if not isinstance(value, list | tuple) or len(cast("Sequence[Any]", value)) != count:
        return None
    numbers = [float(item) for item in cast("Sequence[Any]", value) if isinstance(item, int | float)]
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None
