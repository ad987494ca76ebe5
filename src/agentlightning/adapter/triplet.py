"""Adapters that make training examples (triplets) from the spans of an attempt."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from agentlightning.adapter.base import Adapted, TraceAdapter, UnusableSpan
from agentlightning.adapter.calls import has_token_ids, read_model_call
from agentlightning.adapter.tree import LLM_CALL_MATCH, RewardMatchPolicy as RewardMatchPolicy, TraceTree as TraceTree
from agentlightning.semconv import LLMCallAttributes
from agentlightning.types import Span, Triplet
from agentlightning.types.rewards import get_reward_value

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan


_logger = logging.getLogger(__name__)

_NO_TOKEN_IDS = "token ids of prompt or response were not recorded; does the backend know return_token_ids?"


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
        return self.examine(source).made_with_warning(_logger)


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
        made: list[Triplet] = []
        unusable: list[UnusableSpan] = []
        for call, agent in calls:
            read = read_model_call(call.span)
            problem = read.problem
            if problem is None and self._skip_empty_token_spans and not has_token_ids(call.span):
                problem = _NO_TOKEN_IDS
            if problem is None:
                made.append(read.triplet(agent, rewards[call.id]))
            else:
                unusable.append(UnusableSpan.of(call.span, problem))
        return Adapted(made, unusable)

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
        made: list[Triplet] = []
        unusable: list[UnusableSpan] = []
        reward: float | None = None
        for span in reversed(spans):  # so that the last reward seen is the first one after the call
            value = get_reward_value(span)
            if value is not None:
                reward = value
            elif LLMCallAttributes.REQUEST.value in span.attributes or has_token_ids(span):
                read = read_model_call(span)
                problem = read.problem or (None if read.prompt_token_ids and read.response_token_ids else _NO_TOKEN_IDS)
                if problem is None:
                    made.append(read.triplet("", reward))
                else:
                    unusable.append(UnusableSpan.of(span, problem))
        return Adapted(made[::-1], unusable[::-1])


def _as_spans(source: Sequence[Span] | Sequence[ReadableSpan]) -> list[Span]:
    """Return the spans as records; those of the OpenTelemetry SDK are converted."""
    return [span if isinstance(span, Span) else Span.from_opentelemetry(span, "", "", 0) for span in source]
