"""The adapters: spans in, training examples (triplets) or conversations out."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias, TypedDict, TypeVar

from agentlightning.adapter.calls import Conversation, ModelCall, has_token_ids
from agentlightning.adapter.filters import Filter, side_calls
from agentlightning.adapter.records import RecordedCall, without_nested, without_repeated
from agentlightning.adapter.shapes import Message
from agentlightning.adapter.tree import RewardMatchPolicy, TraceTree
from agentlightning.errors import InvalidValue
from agentlightning.types import Span, Triplet
from agentlightning.types.attempt_spans import by_attempt, newest_attempts, order_of, used_default_resources
from agentlightning.types.attributes import filter_and_unflatten_attributes

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

T_from = TypeVar("T_from")
T_to = TypeVar("T_to")
T = TypeVar("T")

Attempts: TypeAlias = Literal["newest", "all"]
"""Whose calls an adapter uses, if it gets spans of several attempts of a rollout."""

_NO_TOKEN_IDS = "token ids of prompt or response were not recorded; does the backend know return_token_ids?"

_EARLIER = "an earlier attempt of the rollout made the call; attempts='all' uses these too"
_DEFAULTS = "the attempt ran with default resources, and not with those of its rollout"
_REPEATED = "another record of a call that is used"
_FILTERED = "call_filter leaves the call out"
_ON_THE_SIDE = (
    "a call on the side: it has no tools, and is not part of a conversation that has some; call_filter=None uses it"
)
_NO_AGENT = "no agent that agent_match finds made the call"

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
    """A span of a model call that nothing was made of."""

    span_id: str
    name: str
    reason: str


@dataclass(frozen=True)
class Adapted(Generic[T]):
    """What an adapter made, in the order of the spans, and the spans that it could not use."""

    made: list[T]
    unusable: list[UnusableSpan]
    set_aside: list[UnusableSpan] = field(default_factory=list[UnusableSpan])
    """Spans of model calls that were left out on purpose: further records of the same call, and what was asked for."""

    @property
    def has_calls(self) -> bool:
        """Whether any span tells of a model call, whatever became of it."""
        return bool(self.made or self.unusable or self.set_aside)

    def made_with_warning(self) -> list[T]:
        """Return what was made; log the spans that were not used: how many per reason, and the first one of each.

        It is a warning for unusable spans, and information for those set aside.
        """
        if self.unusable:
            what = "%d spans of model calls could not be used: %s"
            _logger.warning(what, len(self.unusable), _by_reason(self.unusable))
        if self.set_aside:
            _logger.info("%d spans of model calls are set aside: %s", len(self.set_aside), _by_reason(self.set_aside))
        return self.made


def _by_reason(spans: Sequence[UnusableSpan]) -> str:
    counts = Counter(each.reason for each in spans)
    first = {each.reason: each.span_id for each in reversed(spans)}
    return "; ".join(f"{count}× {reason} (span {first[reason]})" for reason, count in counts.most_common())


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


class TracerTraceToTriplet(TraceToTripletBase):
    """Makes triplets from all records of calls: of a tracer with any instrumentation, of the proxy, or of both.

    A call that several of them recorded makes one triplet: that of the proxy, which has token ids. A call without
    token ids still makes a triplet if its messages were recorded; its ``token_ids`` are empty then. Calls and rewards
    have the order in which the store got them; times count only where spans have no sequence ids.

    Args:
        repair_hierarchy: put spans that lost their parent below the span that they happened in.
        llm_call_match: regular expression that is searched for in the names of spans; it alone finds the model calls.
            None: the attributes of the spans tell, or where they say nothing, usual names.
        agent_match: only calls of agents in whose name this regular expression is found; None: all calls.
        exclude_llm_call_in_reward: leave out calls that a reward function made.
        reward_match: which reward belongs to which call.
        _skip_empty_token_spans: calls without token ids are unusable.
        call_filter: only calls for which it returns true, such as ``CallFilter(has_tools=True)``; ``main``: all but
            those on the side, such as one for a title (``docs/capture.md`` has the rule); None: all calls.
        attempts: the calls of the newest attempt of each rollout, or of all attempts, each by itself.
    """

    def __init__(
        self,
        repair_hierarchy: bool = True,
        llm_call_match: str | None = None,
        agent_match: str | None = None,
        exclude_llm_call_in_reward: bool = True,
        reward_match: RewardMatchPolicy = RewardMatchPolicy.FIRST_OCCURRENCE,
        _skip_empty_token_spans: bool = False,
        *,
        call_filter: Filter = "main",
        attempts: Attempts = "newest",
    ) -> None:
        self._repair_hierarchy = repair_hierarchy
        self._reward_match = RewardMatchPolicy(reward_match)
        self._skip_empty_token_spans = _skip_empty_token_spans
        self._finder = _CallFinder(llm_call_match, agent_match, exclude_llm_call_in_reward, call_filter, attempts)

    def visualize(
        self,
        source: Sequence[Span] | Sequence[ReadableSpan],
        /,
        filename: str = "trace_tree",
        interested_span_match: str | None = None,
    ) -> TraceTree:
        """Write the tree of the spans to ``FILENAME.dot``, and return it. See ``TraceTree.visualize``."""
        tree = self._tree(_as_spans(source))
        tree.visualize(filename, interested_span_match)
        return tree

    def examine(self, source: Sequence[Span] | Sequence[ReadableSpan], /) -> Adapted[Triplet]:
        """Return the triplets in the order of the calls, attempt by attempt, and the spans that none were made of."""
        adapted = Adapted[Triplet]([], [])
        for spans in self._finder.attempts_of(_as_spans(source), adapted):
            tree = self._tree(spans)
            records = self._finder.calls_of(tree, adapted)
            rewards = tree.rewards_of(self._reward_match, {each.call.span.span_id: each.span_ids for each in records})
            for each in records:
                _add_triplet(adapted, each, rewards[each.call.span.span_id], self._skip_empty_token_spans)
        return adapted

    def _tree(self, spans: Sequence[Span]) -> TraceTree:
        tree = TraceTree.from_spans(spans)
        if self._repair_hierarchy:
            tree.repair_hierarchy()
        return tree


class LlmProxyTraceToTriplet(TraceToTripletBase):
    """Makes triplets from the calls that the LLM proxy recorded, and from nothing else.

    Calls must have token ids. A call's reward is the first one that the store got after it. The spans need not form
    one tree, because the proxy knows the attempt of a call, but not always the agent's span that made it.

    Args:
        call_filter: see ``TracerTraceToTriplet``.
        attempts: the calls of the newest attempt of each rollout, or of all attempts, each by itself.
    """

    def __init__(self, *, call_filter: Filter = "main", attempts: Attempts = "newest") -> None:
        self._finder = _CallFinder(None, None, False, call_filter, attempts, only_proxied=True)

    def examine(self, source: Sequence[Span] | Sequence[ReadableSpan], /) -> Adapted[Triplet]:
        """Return the triplets in the order of the calls, attempt by attempt, and the spans that none were made of."""
        adapted = Adapted[Triplet]([], [])
        for spans in self._finder.attempts_of(_as_spans(source), adapted):
            tree = TraceTree.from_spans(spans)
            records = self._finder.calls_of(tree, adapted)
            calls = {each.call.span.span_id: each.span_ids for each in records}
            rewards = tree.rewards_of(RewardMatchPolicy.FIRST_OCCURRENCE, calls)
            for each in records:
                each.agent = None
                _add_triplet(adapted, each, rewards[each.call.span.span_id], needs_token_ids=True)
        return adapted

    def find_calls(self, source: Sequence[Span] | Sequence[ReadableSpan], /) -> Adapted[ModelCall]:
        """Return the calls that ``examine`` makes triplets of, one for each choice of a reply."""
        adapted = Adapted[ModelCall]([], [])
        for spans in self._finder.attempts_of(_as_spans(source), adapted):
            for each in self._finder.calls_of(TraceTree.from_spans(spans), adapted):
                for call in each.call.each_choice():
                    problem = call.problem or (None if call.has_token_ids else _NO_TOKEN_IDS)
                    if problem is None:
                        adapted.made.append(call)
                    else:
                        adapted.unusable.append(_unusable(call.span, problem))
        return adapted


def _as_spans(source: Sequence[Span] | Sequence[ReadableSpan]) -> list[Span]:
    return [span if isinstance(span, Span) else Span.from_opentelemetry(span, "", "", 0) for span in source]


def _add_triplet(adapted: Adapted[Triplet], record: RecordedCall, reward: float | None, needs_token_ids: bool) -> None:
    for call in record.call.each_choice():
        problem = call.problem
        if problem is None and needs_token_ids and not call.has_token_ids:
            problem = _NO_TOKEN_IDS
        if problem is None:
            adapted.made.append(call.triplet(record.agent or "", reward))
        else:
            adapted.unusable.append(_unusable(call.span, problem))


def _unusable(span: Span, reason: str) -> UnusableSpan:
    return UnusableSpan(span.span_id, span.name, reason)


@dataclass(frozen=True)
class _CallFinder:
    """Finds the calls that an adapter is to use, and says of the others why it does not."""

    llm_call_match: str | None
    agent_match: str | None
    exclude_in_reward: bool
    call_filter: Filter
    attempts: Attempts
    only_proxied: bool = False

    def __post_init__(self) -> None:
        if self.attempts not in ("newest", "all"):
            raise InvalidValue(f"attempts={self.attempts!r} is neither 'newest' nor 'all'")
        if not callable(self.call_filter) and self.call_filter not in ("main", None):
            raise InvalidValue(f"call_filter={self.call_filter!r} is neither a function, nor 'main', nor None")

    def attempts_of(self, spans: Sequence[Span], adapted: Adapted[Any]) -> Iterator[list[Span]]:
        """Yield the spans of each attempt that is to be used."""
        groups = by_attempt(spans)
        used = groups.keys() if self.attempts == "all" else set(newest_attempts(list(groups)).values())
        for key, group in groups.items():
            problem = _EARLIER if key not in used else _DEFAULTS if used_default_resources(group) is not None else None
            if problem is None:
                yield group
            else:
                records = self._records(TraceTree.from_spans(group))
                adapted.unusable.extend(_unusable(each.call.span, problem) for each in records)

    def calls_of(self, tree: TraceTree, adapted: Adapted[Any]) -> list[RecordedCall]:
        """Return one record of each call of an attempt, in the order of the store."""
        records = self._set_aside(self._records(tree), adapted, lambda each: each.left_out)
        order = order_of([each.call.span for each in records])
        kept = sorted(without_nested(records), key=lambda each: order(each.call.span))
        kept = kept if self.only_proxied else without_repeated(kept)
        repeated = [span_id for each in kept for span_id in each.span_ids[1:]]
        names = {each.call.span.span_id: each.call.span.name for each in records} if repeated else {}
        adapted.set_aside.extend(UnusableSpan(span_id, names[span_id], _REPEATED) for span_id in repeated)
        aside = side_calls([each.call for each in kept]) if self.call_filter == "main" else set[str]()
        return self._set_aside(kept, adapted, lambda each: self._why_not(each, aside))

    def _records(self, tree: TraceTree) -> list[RecordedCall]:
        records = tree.records(self.llm_call_match, self.agent_match)
        if self.only_proxied:
            records = [each for each in records if each.call.is_proxied or has_token_ids(each.call.span)]
        for each in records:
            each.left_out = each.left_out if self.exclude_in_reward else None
        return records

    def _why_not(self, record: RecordedCall, aside: set[str]) -> str | None:
        if self.agent_match is not None and record.agent is None:
            return _NO_AGENT
        if record.call.span.span_id in aside:
            return _ON_THE_SIDE
        return _FILTERED if callable(self.call_filter) and not self.call_filter(record.call) else None

    def _set_aside(
        self, records: Sequence[RecordedCall], adapted: Adapted[Any], why: Callable[[RecordedCall], str | None]
    ) -> list[RecordedCall]:
        reasons = [why(each) for each in records]
        adapted.set_aside.extend(
            _unusable(each.call.span, reason)
            for each, reason in zip(records, reasons, strict=True)
            if reason is not None
        )
        return [each for each, reason in zip(records, reasons, strict=True) if reason is None]


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
    """Makes one conversation of each model call, in the order of the calls, attempt by attempt.

    Args:
        llm_call_match, call_filter, attempts: see ``TracerTraceToTriplet``.
    """

    def __init__(
        self,
        llm_call_match: str | None = None,
        *,
        call_filter: Filter = "main",
        attempts: Attempts = "newest",
    ) -> None:
        self._finder = _CallFinder(llm_call_match, None, False, call_filter, attempts)

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
        """Return the conversations, and the spans of model calls that none were made of."""
        adapted = Adapted[OpenAIMessages]([], [])
        for spans in self._finder.attempts_of(source, adapted):
            below: dict[str | None, list[Span]] = defaultdict(list)
            for span in spans:
                below[span.parent_id].append(span)
            tree = TraceTree.from_spans(spans)
            for each in self._finder.calls_of(tree, adapted):
                choices = each.call.each_choice()
                tools = (
                    below[each.call.span.span_id] if len(choices) == 1 else []
                )  # not known for which choice they ran
                for call in choices:
                    self._add_conversation(adapted, call, tools)
        return adapted

    def adapt(self, source: Sequence[Span], /) -> list[OpenAIMessages]:
        """Return the conversations of ``examine``, and log the spans that cannot be used."""
        return self.examine(source).made_with_warning()

    def _add_conversation(self, adapted: Adapted[OpenAIMessages], call: ModelCall, below: Sequence[Span]) -> None:
        conversation = call.conversation
        problem = call.problem_of_reply or call.problem_of_texts
        if problem is not None or conversation.reply is None:
            adapted.unusable.append(_unusable(call.span, str(problem)))
            return
        if not conversation.reply.get("tool_calls"):
            tool_calls = list(self.get_tool_calls(call.span, below))
            if tool_calls:
                conversation.reply = {**conversation.reply, "tool_calls": tool_calls}
        adapted.made.extend(convert_to_openai_messages([conversation]))
