"""The adapters: spans in, training examples (triplets) or conversations out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar

from agentlightning.adapter.calls import Conversation, Message, has_token_ids, read_model_call
from agentlightning.adapter.tree import LLM_CALL_MATCH, RewardMatchPolicy, TraceTree
from agentlightning.semconv import LLMCallAttributes
from agentlightning.types import Span, Triplet
from agentlightning.types.attributes import filter_and_unflatten_attributes
from agentlightning.types.rewards import get_reward_value

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

T_from = TypeVar("T_from")
T_to = TypeVar("T_to")
T = TypeVar("T")

_NO_TOKEN_IDS = "token ids of prompt or response were not recorded; does the backend know return_token_ids?"

_logger = logging.getLogger(__name__)


class Adapter(Generic[T_from, T_to]):
    """Converts one kind of data into another. A subclass implements `adapt`."""

    def __call__(self, source: T_from, /) -> T_to:
        """Call `adapt`."""
        return self.adapt(source)

    def adapt(self, source: T_from, /) -> T_to:
        """Convert ``source``, which is not changed.

        Raises:
            NotImplementedError: the subclass does not implement it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no adapt method; an adapter must implement one")


class OtelTraceAdapter(Adapter[Sequence["ReadableSpan"], T_to], Generic[T_to]):
    """An adapter whose source is spans of the OpenTelemetry SDK."""


class TraceAdapter(Adapter[Sequence[Span], T_to], Generic[T_to]):
    """An adapter whose source is spans as the store keeps them."""


@dataclass(frozen=True)
class UnusableSpan:
    """A span of a model call that nothing could be made of."""

    span_id: str
    name: str
    reason: str


@dataclass(frozen=True)
class Adapted(Generic[T]):
    """What an adapter made, in the order of the spans, and the spans that it could not use."""

    made: list[T]
    unusable: list[UnusableSpan]

    def made_with_warning(self) -> list[T]:
        """Return what was made; log one warning about the unusable spans: how many per reason, and the first one."""
        if self.unusable:
            counts = Counter(each.reason for each in self.unusable)
            first = {each.reason: each.span_id for each in reversed(self.unusable)}
            reasons = "; ".join(f"{count}× {reason} (span {first[reason]})" for reason, count in counts.most_common())
            _logger.warning("%d spans of model calls could not be used: %s", len(self.unusable), reasons)
        return self.made


# --- Triplets ----------------------------------------------------------------------------------------


class TraceToTripletBase(TraceAdapter[list[Triplet]]):
    """Makes one triplet from each model call that can be trained on. A subclass implements `examine`."""

    def examine(self, source: Sequence[Span] | Sequence[ReadableSpan], /) -> Adapted[Triplet]:
        """Return the triplets in the order of the calls, and the spans of calls that none could be made of.

        Raises:
            NotImplementedError: the subclass does not implement it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no examine method; an adapter must implement one")

    def adapt(self, source: Sequence[Span] | Sequence[ReadableSpan], /) -> list[Triplet]:
        """Return the triplets of ``examine``, and log the spans that cannot be used."""
        return self.examine(source).made_with_warning()


def _triplet(span: Span, agent_name: str, reward: float | None, *, needs_token_ids: bool) -> Triplet | UnusableSpan:
    call = read_model_call(span)
    problem = call.problem
    if problem is None and needs_token_ids and not (call.prompt_token_ids and call.response_token_ids):
        problem = _NO_TOKEN_IDS
    return call.triplet(agent_name, reward) if problem is None else UnusableSpan(span.span_id, span.name, problem)


def _sorted_out(results: Sequence[T | UnusableSpan]) -> Adapted[T]:
    return Adapted(
        [each for each in results if not isinstance(each, UnusableSpan)],
        [each for each in results if isinstance(each, UnusableSpan)],
    )


class TracerTraceToTriplet(TraceToTripletBase):
    """Makes triplets from all records of calls: of a tracer with any instrumentation, of the proxy, or of both.

    A call without token ids still makes a triplet if its messages were recorded; its ``token_ids`` are empty then.

    Args:
        repair_hierarchy: put spans that lost their parent below the span that they happened in.
        llm_call_match: regular expression that is searched for in the names of spans; it finds the model calls.
        agent_match: only calls of agents in whose name this regular expression is found; None: all calls.
        exclude_llm_call_in_reward: leave out calls that a reward function made.
        reward_match: which reward belongs to which call.
        _skip_empty_token_spans: calls without token ids are unusable.
    """

    def __init__(
        self,
        repair_hierarchy: bool = True,
        llm_call_match: str = LLM_CALL_MATCH,
        agent_match: str | None = None,
        exclude_llm_call_in_reward: bool = True,
        reward_match: RewardMatchPolicy = RewardMatchPolicy.FIRST_OCCURRENCE,
        _skip_empty_token_spans: bool = False,
    ) -> None:
        self._repair_hierarchy = repair_hierarchy
        self._llm_call_match = llm_call_match
        self._agent_match = agent_match
        self._exclude_llm_call_in_reward = exclude_llm_call_in_reward
        self._reward_match = RewardMatchPolicy(reward_match)
        self._skip_empty_token_spans = _skip_empty_token_spans

    def visualize(
        self,
        source: Sequence[Span] | Sequence[ReadableSpan],
        /,
        filename: str = "trace_tree",
        interested_span_match: str | None = None,
    ) -> TraceTree:
        """Write the tree of the spans to ``FILENAME.dot``, and return it. See ``TraceTree.visualize``."""
        tree = self._tree(source)
        tree.visualize(filename, interested_span_match)
        return tree

    def examine(self, source: Sequence[Span] | Sequence[ReadableSpan], /) -> Adapted[Triplet]:
        """Return the triplets in the order of the calls, and the spans of calls that none could be made of."""
        if not source:
            return Adapted([], [])
        tree = self._tree(source)
        calls = tree.find_llm_calls(
            llm_call_match=self._llm_call_match,
            agent_match=self._agent_match,
            within_reward=False if self._exclude_llm_call_in_reward else None,
            within_llm_call=False,
            existing_llm_call_response_ids=set(),
        )
        rewards = tree.match_rewards(self._reward_match, [call for call, _ in calls])
        strict = self._skip_empty_token_spans
        return _sorted_out(
            [_triplet(call.span, agent, rewards[call.id], needs_token_ids=strict) for call, agent in calls]
        )

    def _tree(self, source: Sequence[Span] | Sequence[ReadableSpan]) -> TraceTree:
        tree = TraceTree.from_spans(_as_spans(source))
        if self._repair_hierarchy:
            tree.repair_hierarchy()
        return tree


class LlmProxyTraceToTriplet(TraceToTripletBase):
    """Makes triplets from the calls that the LLM proxy recorded, and from nothing else.

    Calls must have token ids. A call's reward is the first one that was emitted after it began. The spans need not
    form one tree, because the proxy knows the attempt of a call, but not always the agent's span that made it.
    """

    def examine(self, source: Sequence[Span] | Sequence[ReadableSpan], /) -> Adapted[Triplet]:
        """Return the triplets in the order of the calls, and the spans of calls that none could be made of."""
        spans = sorted(_as_spans(source), key=lambda span: (span.start_time or 0.0, span.sequence_id))
        results: list[Triplet | UnusableSpan] = []
        reward: float | None = None
        for span in reversed(spans):  # so that the last reward seen is the first one after the call
            value = get_reward_value(span)
            if value is not None:
                reward = value
            elif LLMCallAttributes.REQUEST.value in span.attributes or has_token_ids(span):
                results.append(_triplet(span, "", reward, needs_token_ids=True))
        return _sorted_out(results[::-1])


def _as_spans(source: Sequence[Span] | Sequence[ReadableSpan]) -> list[Span]:
    return [span if isinstance(span, Span) else Span.from_opentelemetry(span, "", "", 0) for span in source]


# --- Conversations in OpenAI's shape, for fine-tuning and for people ---------------------------------


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
            attributes: Mapping[str, Any] = span.attributes
            name = attributes.get("gen_ai.tool.name", attributes.get("tool.name"))
            if span.parent_id != completion.span_id or name is None:
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
        return _sorted_out([self._conversation(call.span, source) for call, _ in calls])

    def adapt(self, source: Sequence[Span], /) -> list[OpenAIMessages]:
        """Return the conversations of ``examine``, and log the spans that cannot be used."""
        return self.examine(source).made_with_warning()

    def _conversation(self, span: Span, source: Sequence[Span]) -> OpenAIMessages | UnusableSpan:
        call = read_model_call(span)
        conversation = call.conversation
        if not conversation.messages or conversation.reply is None:
            failed = span.status.status_code == "ERROR" and call.problem is not None
            return UnusableSpan(span.span_id, span.name, str(call.problem) if failed else "no messages were recorded")
        if not conversation.reply.get("tool_calls"):
            tool_calls = list(self.get_tool_calls(span, source))
            if tool_calls:
                conversation.reply = {**conversation.reply, "tool_calls": tool_calls}
        return next(convert_to_openai_messages([conversation]))
