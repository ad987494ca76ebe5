"""`ModelCall`: what training needs of one model call, read from its span."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from agentlightning.adapter.conversations import Conversation, read_conversation, read_json_object
from agentlightning.semconv import GenAIAttributes, LLMCallAttributes
from agentlightning.types import Span, Triplet

__all__ = ["ModelCall", "has_token_ids", "read_model_call", "response_id_of"]

_PROMPT_IDS = (LLMCallAttributes.PROMPT_TOKEN_IDS.value, "prompt_token_ids")
_RESPONSE_IDS = (LLMCallAttributes.RESPONSE_TOKEN_IDS.value, "response_token_ids")
_LOGPROBS = (LLMCallAttributes.RESPONSE_LOGPROBS.value, "response_logprobs")
"""Ours, and what other instrumentations of vLLM write."""


@dataclass(frozen=True)
class ModelCall:
    """One call. What its span does not say is None or empty."""

    span: Span
    conversation: Conversation
    model: str | None
    model_version: str | None
    response_id: str | None
    finish_reason: str | None
    prompt_token_ids: list[int]
    response_token_ids: list[int]
    logprobs: list[float] | None
    """One for each of `response_token_ids`."""

    @property
    def problem(self) -> str | None:
        """Why nothing can be learned from it; None if something can."""
        if self.span.status.status_code == "ERROR":
            return f"the call failed: {self.span.status.description or 'no description'}"
        if self.response_token_ids and self.prompt_token_ids:
            return None
        if self.conversation.messages and self.conversation.reply is not None:
            return None
        return "neither token ids nor messages were recorded"

    def triplet(self, agent_name: str, reward: float | None) -> Triplet:
        """The call as a training example.

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


def response_id_of(span: Span) -> str | None:
    """The id that the backend gave its reply."""
    value = span.attributes.get(GenAIAttributes.RESPONSE_ID.value)
    return str(value) if value else None


def has_token_ids(span: Span) -> bool:
    """Whether the tokens of prompt and response were recorded."""
    attributes = span.attributes
    return bool(_first(attributes, _PROMPT_IDS)) and bool(_first(attributes, _RESPONSE_IDS))


def read_model_call(span: Span) -> ModelCall:
    """What the span of a model call says. Nothing raises: holes stay holes."""
    attributes: Mapping[str, Any] = span.attributes
    reply_body = read_json_object(attributes.get(LLMCallAttributes.RESPONSE.value))
    choices = reply_body.get("choices")
    choice = _object(cast("list[Any]", choices)[0]) if isinstance(choices, list) and choices else {}
    response_ids = _integers(_first(attributes, _RESPONSE_IDS) or choice.get("token_ids"))
    prompt_ids = _integers(
        _first(attributes, _PROMPT_IDS) or reply_body.get("prompt_token_ids") or choice.get("prompt_token_ids")
    )
    finish_reasons = attributes.get(GenAIAttributes.RESPONSE_FINISH_REASONS.value)
    return ModelCall(
        span=span,
        conversation=read_conversation(span),
        model=_text(attributes, GenAIAttributes.REQUEST_MODEL, GenAIAttributes.RESPONSE_MODEL),
        model_version=_text(attributes, LLMCallAttributes.MODEL_VERSION),
        response_id=response_id_of(span),
        finish_reason=str(finish_reasons[0]) if isinstance(finish_reasons, list | tuple) and finish_reasons else None,
        prompt_token_ids=prompt_ids,
        response_token_ids=response_ids,
        logprobs=_logprobs(_first(attributes, _LOGPROBS), len(response_ids)),
    )


def _first(attributes: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((attributes[name] for name in names if name in attributes), None)


def _text(attributes: Mapping[str, Any], *names: GenAIAttributes | LLMCallAttributes) -> str | None:
    return next((str(attributes[name.value]) for name in names if name.value in attributes), None)


def _integers(value: Any) -> list[int]:
    items = list(cast("Sequence[Any]", value)) if isinstance(value, list | tuple) else []
    return items if all(type(item) is int for item in items) else []


def _logprobs(value: Any, count: int) -> list[float] | None:
    """Log-probabilities only where there is one for each token."""
    if not isinstance(value, list | tuple) or len(cast("Sequence[Any]", value)) != count:
        return None
    numbers = [float(item) for item in cast("Sequence[Any]", value) if isinstance(item, int | float)]
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _object(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}
