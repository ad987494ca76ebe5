"""What a model answered, as it is recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast


@dataclass(slots=True)
class Answer:
    """The facts of a reply. What it did not say is None or empty."""

    body: bytes = b""
    """The reply as the agent got it, as JSON; of a stream, what the same call would have got without streaming."""
    response_id: str | None = None
    model: str | None = None
    fingerprint: str | None = None
    """What the backend says of its weights."""
    finish_reasons: list[str] = field(default_factory=list[str])
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt_token_ids: Sequence[int] | None = None
    token_ids: Sequence[int] | None = None
    """Of the first choice."""
    logprobs: Sequence[float] | None = None
    """Of the first choice, one for each of its tokens."""


def read_answer(reply: dict[str, Any]) -> Answer:
    """The facts of a whole reply, chat or text. What has another shape than OpenAI's is passed over."""
    answer = Answer()
    read_head(reply, answer)
    read_usage(reply.get("usage"), answer)
    answer.prompt_token_ids = integers(reply.get("prompt_token_ids"))
    for number, facts in enumerate(choices_of(reply)):
        reason = facts.get("finish_reason")
        if isinstance(reason, str):
            answer.finish_reasons.append(reason)
        if number == 0:
            answer.token_ids = integers(facts.get("token_ids"))
            answer.logprobs = logprobs_of(facts.get("logprobs"))
            if answer.prompt_token_ids is None:  # where vLLM puts them in text completions
                answer.prompt_token_ids = integers(facts.get("prompt_token_ids"))
    return answer


def choices_of(reply: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices of a reply or of a chunk of one, as far as they are objects."""
    choices = reply.get("choices")
    if not isinstance(choices, list):
        return []
    return [cast("dict[str, Any]", choice) for choice in cast("list[Any]", choices) if isinstance(choice, dict)]


def read_head(reply: dict[str, Any], answer: Answer) -> None:
    """Take over who answered: id, model, fingerprint."""
    answer.response_id = _text(reply.get("id")) or answer.response_id
    answer.model = _text(reply.get("model")) or answer.model
    answer.fingerprint = _text(reply.get("system_fingerprint")) or answer.fingerprint


def read_usage(usage: object, answer: Answer) -> None:
    """Take over the numbers of tokens."""
    if isinstance(usage, dict):
        counts = cast("dict[str, Any]", usage)
        answer.input_tokens = _count(counts.get("prompt_tokens"))
        answer.output_tokens = _count(counts.get("completion_tokens"))


def integers(value: object) -> Sequence[int] | None:
    """``value``, if it is a list of integers."""
    if isinstance(value, list) and all(type(each) is int for each in cast("list[Any]", value)):
        return cast("list[int]", value)
    return None


def logprobs_of(value: object) -> Sequence[float] | None:
    """The log-probability of each token, from a choice's ``logprobs`` of a chat or of a text completion."""
    if not isinstance(value, dict):
        return None
    facts = cast("dict[str, Any]", value)
    content = facts.get("content")
    if isinstance(content, list):
        numbers = [_logprob_of(each) for each in cast("list[Any]", content)]
    else:
        numbers = facts.get("token_logprobs")
    if not isinstance(numbers, list) or not all(_is_number(each) for each in cast("list[Any]", numbers)):
        return None
    return [float(each) for each in cast("list[float]", numbers)]


def _logprob_of(entry: object) -> object:
    return cast("dict[str, Any]", entry).get("logprob") if isinstance(entry, dict) else None


def _is_number(value: object) -> bool:
    return type(value) is float or type(value) is int


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _count(value: object) -> int | None:
    return value if type(value) is int else None
