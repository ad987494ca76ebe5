"""`TraceTree`: the spans of an attempt as a tree, its model calls, and their rewards."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from agentlightning.adapter.calls import has_token_ids, read_model_call
from agentlightning.adapter.containment import shortest_around
from agentlightning.adapter.instrumentations import PROXY, instrumentation_of, is_told_otherwise
from agentlightning.adapter.records import RecordedCall, without_nested, without_repeated
from agentlightning.semconv import GenAIAttributes
from agentlightning.types import Span, Triplet
from agentlightning.types.attempt_spans import AttemptKey, by_attempt, order_of
from agentlightning.types.recorded_calls import whole_calls
from agentlightning.types.rewards import get_reward_value

T = TypeVar("T")

LLM_CALL_MATCH = r"openai\.chat|openai\.completion|^(chat|text_completion|generate_content)( |$)"
"""Matches the names of spans of model calls: those of AgentOps and OpenLLMetry, and of OpenTelemetry's conventions.

Only asked of spans whose attributes say nothing."""

_AGENT_NAMES = (GenAIAttributes.AGENT_NAME.value, "agent.name")
_IN_REWARD = "a reward function made the call"


class RewardMatchPolicy(StrEnum):
    """Which reward belongs to a model call."""

    FIRST_SIBLING = "first_sibling"
    """The first reward after it below the same parent, unless another call comes between, in the order of the store."""

    FIRST_OCCURRENCE = "first_occurrence"
    """The first reward after it in the order of the store, anywhere in the tree."""


class TraceTree:
    """A span with its descendants.

    Nothing here recurses, because traces of agents that call themselves can be thousands of levels deep.

    Args:
        id: the id of the span.
        span: the span itself.
        children: the trees of the spans whose parent it is.
    """

    def __init__(self, id: str, span: Span, children: list[TraceTree] | None = None) -> None:
        self.id = id
        self.span = span
        self.children = children if children is not None else []
        self.is_guessed = False
        """Whether it stands where it does because of its times, not because of the parent that its span names."""

    # --- Building --------------------------------------------------------------------------------

    @classmethod
    def from_spans(cls, spans: Sequence[Span]) -> TraceTree:
        """Build the tree of some spans, with children in the order of their times.

        A span is never put below one of another attempt, whatever its parent's id is. A span whose parent is missing,
        or that is its own ancestor, counts as one without a parent. If there are several of those, they get a virtual
        root.

        Raises:
            ValueError: there are no spans.
        """
        whole = [span for group in by_attempt(spans).values() for span in whole_calls(group)]
        nodes = {_place_of(span, span.span_id): cls(span.span_id, span) for span in whole}
        if not nodes:
            raise ValueError("a tree cannot be built from no spans; give at least one")
        roots: list[TraceTree] = []
        parents = {place: _place_of(node.span, node.span.parent_id) for place, node in nodes.items()}
        root_places = _roots_of(parents)
        for place, node in nodes.items():
            (roots if place in root_places else nodes[parents[place]].children).append(node)
        for node in nodes.values():
            node.children.sort(key=_when)
        if len(roots) == 1:
            return roots[0]
        roots.sort(key=_when)
        first = roots[0].span
        virtual = Span.from_attributes(
            attributes={},
            rollout_id=first.rollout_id,
            attempt_id=first.attempt_id,
            trace_id=first.trace_id,
            start_time=min(node.start_time for node in roots),
            end_time=max(node.end_time for node in nodes.values()),
        )
        return cls(virtual.span_id, virtual, roots)

    def add_child(self, child: TraceTree) -> None:
        """Add a tree below this span, after its other children."""
        self.children.append(child)

    def repair_hierarchy(self) -> None:
        """Move spans that lost their parent below the span that they happened in.

        Instrumentations that do not know of each other write spans as siblings where one contains the other. Each
        direct child of this tree moves below the shortest other span that was open during its whole time. Times are
        compared within one trace of one process only: the clocks of two hosts need not agree, and so the proxy's
        records stay where they are.
        """
        top = {id(node): child for child in self.children for node in child.traverse()}
        processes: dict[tuple[str, str], list[TraceTree]] = defaultdict(list)
        for node in self.traverse():
            if node is not self and instrumentation_of(node.span) != PROXY:
                processes[node.span.trace_id, repr(sorted(node.span.resource.attributes.items()))].append(node)
        parents: dict[int, TraceTree] = {}
        for nodes in processes.values():
            children = [node for node in nodes if top[id(node)] is node]
            # One that is longer than the child it belongs to contains it, and so nothing that the child belongs into.
            around = [node for node in nodes if top[id(node)] is node or not _contains(node, top[id(node)])]
            found = shortest_around([_times(node) for node in children], [_times(node) for node in around])
            parents |= {
                id(child): around[place] for child, place in zip(children, found, strict=True) if place is not None
            }
        self._move(parents, top)

    def _move(self, parents: Mapping[int, TraceTree], top: Mapping[int, TraceTree]) -> None:
        """Move direct children below their new parents, unless these have themselves come to stand below them."""
        above: dict[int, TraceTree] = {}

        def top_now(node: TraceTree) -> TraceTree:
            found = top[id(node)]
            while id(found) in above:
                above[id(found)] = found = above.get(id(above[id(found)]), above[id(found)])
            return found

        for child in self.children:
            parent = parents.get(id(child))
            if parent is None or top_now(parent) is child:
                continue
            above[id(child)] = top_now(parent)
            child.is_guessed = True
            parent.children.append(child)
        self.children = [child for child in self.children if id(child) not in above]
        for parent in {id(each): each for each in parents.values()}.values():
            parent.children.sort(key=_when)

    # --- Reading ---------------------------------------------------------------------------------

    @property
    def start_time(self) -> float:
        """When the span began, in seconds since the Unix epoch; 0 if it is not known."""
        return self.span.start_time or 0.0

    @property
    def end_time(self) -> float:
        """When the span ended, in seconds since the Unix epoch; its start if it is not known."""
        return self.start_time if self.span.end_time is None else self.span.end_time

    def traverse(self) -> list[TraceTree]:
        """Return all nodes of the tree, each before its children."""
        found: list[TraceTree] = []
        pending: list[TraceTree] = [self]
        while pending:
            node = pending.pop()
            found.append(node)
            pending.extend(reversed(node.children))
        return found

    def find_id(self, id: str) -> TraceTree | None:
        """Return the tree of the span with this id; None if it is not here."""
        return next((node for node in self.traverse() if node.id == id), None)

    def names_tuple(self) -> tuple[str, list[Any]]:
        """Return the name of the span, and the same of each child."""
        return self._fold(lambda node, children: (node.span.name, children))

    def to_json(self) -> dict[str, Any]:
        """Return the tree as a JSON object: ``id``, ``span`` and ``children``."""
        return self._fold(
            lambda node, children: {"id": node.id, "span": node.span.model_dump(mode="json"), "children": children}
        )

    def _fold(self, make: Callable[[TraceTree, list[Any]], T]) -> T:
        """What is made of this node and of what was made of its children."""
        made: dict[str, T] = {}
        for node in reversed(self.traverse()):
            made[node.id] = make(node, [made[child.id] for child in node.children])
        return made[self.id]

    def visualize(self, filename: str, interested_span_match: str | None = None) -> None:
        """Write the tree to ``FILENAME.dot``, in the language of Graphviz (https://graphviz.org/doc/info/lang.html).

        Args:
            filename: the path of the file, without its extension.
            interested_span_match: regular expression; spans in whose names it is found are coloured.
        """
        lines = ["digraph trace {", "  node [shape=box];"]
        for node in self.traverse():
            marked = interested_span_match is not None and re.search(interested_span_match, node.span.name)
            label = f"{node.span.name}\n{node.end_time - node.start_time:.3f} s".replace("\\", "\\\\")
            quoted = label.replace('"', '\\"').replace("\n", "\\n")
            style = ' style=filled fillcolor="lightblue"' if marked else ""
            lines.append(f'  "{node.id}" [label="{quoted}"{style}];')
            lines.extend(f'  "{node.id}" -> "{child.id}";' for child in node.children)
        Path(f"{filename}.dot").write_text("\n".join([*lines, "}"]) + "\n", encoding="utf-8")

    def agent_name(self) -> str | None:
        """Return the agent that the span names; None if it names none."""
        attributes = self.span.attributes
        named = next((attributes[name] for name in _AGENT_NAMES if attributes.get(name)), None)
        return None if named is None else str(named)

    def maybe_reward_dict(self) -> dict[str, Any]:
        """Return ``{"type": "reward", "value": …}`` if the span carries a reward, otherwise an empty object."""
        value = get_reward_value(self.span)
        return {} if value is None else {"type": "reward", "value": value}

    def is_reward_span(self) -> bool:
        """Whether the span carries a reward."""
        return get_reward_value(self.span) is not None

    # --- Model calls and rewards -----------------------------------------------------------------

    def find_llm_calls(
        self,
        *,
        llm_call_match: str | None,
        agent_match: str | None,
        within_matching_subtree: str | None = None,
        within_reward: bool | None = None,
        within_llm_call: bool | None = None,
        existing_llm_call_response_ids: set[str] | None = None,
    ) -> list[tuple[TraceTree, str]]:
        """Return the spans of model calls in their order, each with the name of its agent.

        Args:
            llm_call_match: regular expression that is searched for in their names; None: their attributes tell.
            agent_match: only calls of agents in whose name this is found; None: all calls.
            within_matching_subtree: the agent that this tree is part of; None: none.
            within_reward: whether this tree is part of a reward; its calls are left out then. None: all are taken.
            within_llm_call: whether this tree is part of a model call. Of records of the same call inside of each
                other one is kept: the outermost, unless only an inner one has token ids. None: all are taken.
            existing_llm_call_response_ids: the ids of the replies found are added. Of several records of the same
                call (see ``records``) one is kept, preferably with token ids. None: all are taken.
        """
        records = self.records(llm_call_match, agent_match, within_matching_subtree)
        if within_reward is not None:
            records = [] if within_reward else [each for each in records if each.left_out is None]
        if within_llm_call is not None:
            records = [] if within_llm_call else without_nested(records)
        order = order_of([each.call.span for each in records])
        records.sort(key=lambda each: order(each.call.span))
        if existing_llm_call_response_ids is not None:
            records = without_repeated(records)
            existing_llm_call_response_ids |= {each.call.response_id for each in records if each.call.response_id}
        nodes = {id(node.span): node for node in self.traverse()}
        return [
            (nodes[id(each.call.span)], each.agent or "")
            for each in records
            if agent_match is None or each.agent is not None
        ]

    def records(
        self, llm_call_match: str | None, agent_match: str | None, agent: str | None = None
    ) -> list[RecordedCall]:
        """Return what each span of a model call tells, those inside of others after these.

        Args:
            llm_call_match: see ``find_llm_calls``.
            agent_match: which agents' names the records get; None: the innermost ones.
            agent: the agent that this tree is part of; None: none.
        """
        by_name = re.compile(LLM_CALL_MATCH if llm_call_match is None else llm_call_match)
        is_agent = re.compile(agent_match or "")
        found: list[RecordedCall] = []
        path = () if agent is None else (agent,)
        pending: list[tuple[TraceTree, str | None, tuple[str, ...], bool, RecordedCall | None, bool]] = [
            (self, agent, path, False, None, False)
        ]
        while pending:
            node, agent, path, in_reward, above, is_guessed = pending.pop()
            name = node.agent_name()
            if name is not None:
                path = path if path[-1:] == (name,) else (*path, name)
                agent = name if is_agent.search(name) else agent
            in_reward = in_reward or node.is_reward_span()
            is_guessed = is_guessed or node.is_guessed
            if node._is_call(by_name, is_name_enough=llm_call_match is not None):
                record = RecordedCall(read_model_call(node.span, path), agent, above, is_guessed)
                record.left_out = _IN_REWARD if in_reward else None
                found.append(record)
                above, is_guessed = record, False
            pending.extend((child, agent, path, in_reward, above, is_guessed) for child in reversed(node.children))
        return found

    def _is_call(self, by_name: re.Pattern[str], *, is_name_enough: bool) -> bool:
        if is_name_enough:
            return by_name.search(self.span.name) is not None
        if instrumentation_of(self.span) is not None or has_token_ids(self.span):
            return True
        return by_name.search(self.span.name) is not None and not is_told_otherwise(self.span)

    def match_rewards(
        self, reward_match: RewardMatchPolicy | str, llm_calls: Sequence[TraceTree]
    ) -> dict[str, float | None]:
        """Return the reward of each call, by the id of its span; None for a call without one.

        Rewards come in the order of the store (see ``order_of``), and belong to calls of their own attempt only.
        """
        return self.rewards_of(reward_match, {call.id: [call.id] for call in llm_calls})

    def rewards_of(
        self, reward_match: RewardMatchPolicy | str, calls: Mapping[str, Sequence[str]]
    ) -> dict[str, float | None]:
        """Return the reward of each call by its id; None for a call without one.

        Args:
            reward_match: which reward belongs to which call.
            calls: the ids of the spans that tell of a call, by the id of the one that the call is known by.
        """
        call_of = {span_id: call for call, span_ids in calls.items() for span_id in span_ids}
        attempts: dict[AttemptKey, list[Span]] = defaultdict(list)
        nodes = self.traverse()
        for node in nodes:
            if node.id in call_of or node.is_reward_span():
                attempts[node.span.rollout_id, node.span.attempt_id].append(node.span)
        families = [[child.span for child in node.children] for node in nodes] if _by_sibling(reward_match) else None
        matched = dict[str, float | None].fromkeys(calls)
        for spans in attempts.values():
            order = order_of(spans)
            if families is None:
                matched |= _first_occurrences(sorted(spans, key=order), set(calls), order)
            else:
                known = set(map(id, spans))
                for family in families:
                    siblings = sorted((span for span in family if id(span) in known), key=order)
                    matched |= _sibling_rewards(siblings, call_of)
        return matched

    def span_to_triplet(self, span: Span, agent_name: str) -> Triplet:
        """Return one model call as a training example, without a reward. See ``ModelCall.triplet``."""
        return read_model_call(span).triplet(agent_name, None)

    def to_trajectory(
        self,
        llm_call_match: str | None = None,
        agent_match: str | None = None,
        exclude_llm_call_in_reward: bool = True,
        dedup_llm_call: bool = True,
        reward_match: RewardMatchPolicy = RewardMatchPolicy.FIRST_OCCURRENCE,
        final_reward: float | None = None,
        _skip_empty_token_spans: bool = False,
    ) -> list[Triplet]:
        """Return the model calls as training examples, in their order: one for each choice of a reply.

        Calls that cannot be used are left out; an adapter's ``examine`` says why.

        Args:
            llm_call_match, agent_match: see ``find_llm_calls``.
            exclude_llm_call_in_reward: leave out calls that a reward function made.
            dedup_llm_call: take each call once, although several instrumentations may have recorded it.
            reward_match: which reward belongs to which call.
            final_reward: the reward of the last call, of all its choices, if it has none of its own.
            _skip_empty_token_spans: leave out calls without token ids.
        """
        calls = self.find_llm_calls(
            llm_call_match=llm_call_match,
            agent_match=agent_match,
            within_reward=False if exclude_llm_call_in_reward else None,
            within_llm_call=False if dedup_llm_call else None,
            existing_llm_call_response_ids=set() if dedup_llm_call else None,
        )
        kept = [(call, agent) for call, agent in calls if not _skip_empty_token_spans or has_token_ids(call.span)]
        rewards = self.match_rewards(reward_match, [call for call, _ in kept])
        choices = [(each, agent) for call, agent in kept for each in read_model_call(call.span).each_choice()]
        last = choices[-1][0].span.span_id if choices else None
        rewards |= {last: final_reward} if last is not None and rewards[last] is None else {}
        usable = [(each, agent) for each, agent in choices if each.problem is None]
        return [each.triplet(agent, rewards[each.span.span_id]) for each, agent in usable]


def _when(node: TraceTree) -> tuple[float, int]:
    # The sequence id orders spans that began at the same time: clocks of different hosts are coarse.
    return node.start_time, node.span.sequence_id


def _times(node: TraceTree) -> tuple[float, float]:
    return node.start_time, node.end_time


def _contains(node: TraceTree, other: TraceTree) -> bool:
    return node.start_time <= other.start_time and other.end_time <= node.end_time


_Place = tuple[str, str, str | None]
"""Where a span stands: rollout, attempt, and id."""


def _place_of(span: Span, span_id: str | None) -> _Place:
    return span.rollout_id, span.attempt_id, span_id


def _roots_of(parents: Mapping[_Place, _Place]) -> set[_Place]:
    """Return the spans that nothing is above of: without a parent here, or the first one of a cycle."""
    roots: set[_Place] = set()
    settled: set[_Place] = set()
    for current in parents:
        path: set[_Place] = set()
        while current not in settled and current not in path:
            path.add(current)
            parent = parents[current]
            if parent not in parents:
                break
            current = parent
        if current not in settled:
            roots.add(current)
        settled |= path
    return roots


def _by_sibling(reward_match: RewardMatchPolicy | str) -> bool:
    return RewardMatchPolicy(reward_match) is RewardMatchPolicy.FIRST_SIBLING


def _first_occurrences(
    spans: Sequence[Span], calls: set[str], order: Callable[[Span], tuple[float, float]]
) -> dict[str, float | None]:
    values = [(order(span), value) for span in spans if (value := get_reward_value(span)) is not None]
    places = [place for place, _ in values]
    following = {span.span_id: bisect_right(places, order(span)) for span in spans if span.span_id in calls}
    return {call: values[place][1] if place < len(values) else None for call, place in following.items()}


def _sibling_rewards(siblings: Sequence[Span], call_of: Mapping[str, str]) -> dict[str, float | None]:
    matched: dict[str, float | None] = {}
    waiting: str | None = None
    for span in siblings:
        if span.span_id in call_of:
            waiting = call_of[span.span_id]
        elif waiting is not None and (value := get_reward_value(span)) is not None:
            matched[waiting] = value
            waiting = None
    return matched
