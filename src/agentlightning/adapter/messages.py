"""`TraceToMessages`: model calls as conversations in OpenAI's shape, for fine-tuning and for people."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

from agentlightning.adapter.base import Adapted, TraceAdapter, UnusableSpan
from agentlightning.adapter.calls import Conversation, Message, read_model_call
from agentlightning.adapter.tree import LLM_CALL_MATCH, TraceTree
from agentlightning.types import Span
from agentlightning.types.attributes import filter_and_unflatten_attributes

_logger = logging.getLogger(__name__)


class OpenAIMessages(TypedDict):
    """One model call: its messages, with the reply as the last one, and the tools that the model could call."""

    messages: list[Message]
    tools: list[Message] | None


def group_genai_dict(data: Mapping[str, Any], prefix: str) -> dict[str, Any] | list[Any]:
    """Return what stands below ``prefix`` in flat attributes, nested again; keys 0, 1, 2 … become a list."""
    return filter_and_unflatten_attributes(data, prefix)


def convert_to_openai_messages(prompt_completion_list: Iterable[Conversation]) -> Iterator[OpenAIMessages]:
    """Yield each conversation with its reply at the end; one without a reply ends with the request."""
    for conversation in prompt_completion_list:
        replies = [] if conversation.reply is None else [conversation.reply]
        yield OpenAIMessages(messages=[*conversation.messages, *replies], tools=conversation.tools)


class TraceToMessages(TraceAdapter[list[OpenAIMessages]]):
    """Makes one conversation of each model call, in the order of the calls.

    Args:
        llm_call_match: regular expression that is searched for in the names of spans; it finds the model calls.
    """

    def __init__(self, llm_call_match: str = LLM_CALL_MATCH) -> None:
        self._llm_call_match = llm_call_match

    def get_tool_calls(self, completion: Span, all_spans: Sequence[Span], /) -> Iterable[Message]:
        """Yield the tools that ran below a model call's span, as OpenAI's tool calls.

        Some instrumentations do not record the calls in the reply, but as spans: ``gen_ai.tool.name`` of
        OpenTelemetry, or ``tool.name`` of AgentOps.
        """
        for span in all_spans:
            if span.parent_id != completion.span_id:
                continue
            attributes: Mapping[str, Any] = span.attributes
            name = attributes.get("gen_ai.tool.name", attributes.get("tool.name"))
            if name is None:
                continue
            arguments = attributes.get("gen_ai.tool.call.arguments", attributes.get("tool.parameters", "{}"))
            call_id = attributes.get("gen_ai.tool.call.id", attributes.get("tool.call.id", span.span_id))
            yield {
                "id": str(call_id),
                "type": "function",
                "function": {"name": str(name), "arguments": str(arguments)},
            }

    def examine(self, source: Sequence[Span], /) -> Adapted[OpenAIMessages]:
        """Return the conversations, and the spans of model calls that none could be made of."""
        if not source:
            return Adapted([], [])
        calls = TraceTree.from_spans(source).find_llm_calls(
            llm_call_match=self._llm_call_match,
            agent_match=None,
            within_llm_call=False,
            existing_llm_call_response_ids=set(),
        )
        conversations: list[Conversation] = []
        unusable: list[UnusableSpan] = []
        for call, _ in calls:
            read = read_model_call(call.span)
            conversation = read.conversation
            if not conversation.messages or conversation.reply is None:
                failed = call.span.status.status_code == "ERROR"
                unusable.append(
                    UnusableSpan.of(call.span, (read.problem or "") if failed else "no messages were recorded")
                )
                continue
            if not conversation.reply.get("tool_calls"):
                tool_calls = list(self.get_tool_calls(call.span, source))
                if tool_calls:
                    conversation.reply = {**conversation.reply, "tool_calls": tool_calls}
            conversations.append(conversation)
        return Adapted(list(convert_to_openai_messages(conversations)), unusable)

    def adapt(self, source: Sequence[Span], /) -> list[OpenAIMessages]:
        """Return the conversations of ``examine``, and log the spans that cannot be used."""
        return self.examine(source).made_with_warning(_logger)
