"""Spans as the things that record model calls write them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest

from agentlightning.types import Span, TraceStatus

MakeSpan: TypeAlias = Callable[..., Span]


@pytest.fixture
def span() -> MakeSpan:
    """Makes spans that follow each other by a second, and last half a second, unless told otherwise."""
    numbers = itertools.count(1)

    def make(
        name: str,
        attributes: dict[str, Any] | None = None,
        *,
        parent: Span | str | None = None,
        at: tuple[float, float] | None = None,
        error: str | None = None,
        span_id: str | None = None,
    ) -> Span:
        number = next(numbers)
        start, end = at or (100.0 + number, 100.5 + number)
        return Span.from_attributes(
            attributes=attributes or {},
            rollout_id="ro-1",
            attempt_id="at-1",
            sequence_id=number,
            name=name,
            span_id=span_id or f"{number:016x}",
            trace_id="f" * 32,
            parent_id=parent.span_id if isinstance(parent, Span) else parent,
            start_time=start,
            end_time=end,
            status=None if error is None else TraceStatus(status_code="ERROR", description=error),
        )

    return make


@pytest.fixture
def reward(span: MakeSpan) -> Callable[..., Span]:
    """Makes spans of rewards."""

    def make(value: float, **arguments: Any) -> Span:
        return span("agentlightning.annotation", {"agentlightning.reward.0.value": value}, **arguments)

    return make


@pytest.fixture
def proxied(span: MakeSpan) -> Callable[..., Span]:
    """Makes spans of model calls as our proxy records them."""

    def make(
        asked: str,
        said: str,
        tokens: tuple[list[int], list[int]] | None = None,
        logprobs: list[float] | None = None,
        more: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> Span:
        message = {"role": "assistant", "content": said}
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": "policy",
            "gen_ai.response.finish_reasons": ["stop"],
            "agentlightning.llm.model_version": "3",
            "agentlightning.llm.request": json.dumps({"messages": [{"role": "user", "content": asked}]}),
            "agentlightning.llm.response": json.dumps({"choices": [{"message": message}]}),
            **(more or {}),
        }
        if tokens is not None:
            attributes["agentlightning.llm.prompt_token_ids"], attributes["agentlightning.llm.response_token_ids"] = (
                tokens
            )
        if logprobs is not None:
            attributes["agentlightning.llm.response_logprobs"] = logprobs
        return span("chat policy", attributes, **arguments)

    return make
