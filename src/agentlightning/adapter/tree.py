"""`TraceTree`: the spans of an attempt as a tree, its model calls, and their rewards."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from agentlightning.adapter.calls import has_token_ids, read_model_call, response_id_of
from agentlightning.semconv import GenAIAttributes
from agentlightning.types import Span, Triplet
from agentlightning.types.rewards import get_reward_value

T = TypeVar("T")

LLM_CALL_MATCH = r"openai\.chat|openai\.completion|^(chat|text_completion|generate_content)( |$)"
"""Matches the names of spans of model calls: those of AgentOps and OpenLLMetry, and of OpenTelemetry's conventions."""

_AGENT_NAMES = (GenAIAttributes.AGENT_NAME.value, "agent.name")


class RewardMatchPolicy(StrEnum):
    """Which reward belongs to a model call."""

    FIRST_SIBLING = "first_sibling"
    """The first reward after it below the same parent, unless another call comes between."""

    FIRST_OCCURRENCE = "first_occurrence"
    """The first reward after it in time, anywhere in the tree."""


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

    # --- Building --------------------------------------------------------------------------------

    @classmethod
    def from_spans(cls, spans: Sequence[Span]) -> TraceTree:
        """Build the tree of some spans, with children in the order of their times.

        A span whose parent is missing, or that is its own ancestor, counts as one without a parent. If there are
        several of those, they get a virtual root.

        Raises:
            ValueError: there are no spans.
        """
        nodes = {span.span_id: cls(span.span_id, span) for span in spans}
        if not nodes:
            raise ValueError("a tree cannot be built from no spans; give at least one")
        roots: list[TraceTree] = []
        root_ids = _root_ids({node.id: node.span.parent_id for node in nodes.values()})
        for node in nodes.values():
            (roots if node.id in root_ids else nodes[str(node.span.parent_id)].children).append(node)
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
        direct child of this tree moves below the shortest other span that was open during its whole time.
        """
        # The ids of the spans below each child, which may not become its parent.
        inside = {child.id: {node.id for node in child.traverse()} for child in self.children}
        everyone = [node for node in self.traverse() if node is not self]
        for child in list(self.children):
            around = [
                node
                for node in everyone
                if node.id not in inside[child.id]
                and node.start_time <= child.start_time
                and child.end_time <= node.end_time
                and (node.start_time, node.end_time) != (child.start_time, child.end_time)
            ]
            if not around:
                continue
            parent = min(around, key=lambda node: node.end_time - node.start_time)
            self.children.remove(child)
            parent.children.append(child)
            parent.children.sort(key=_when)
            for members in inside.values():
                if parent.id in members:
                    members |= inside[child.id]

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
        llm_call_match: str,
        agent_match: str | None,
        within_matching_subtree: str | None = None,
        within_reward: bool | None = None,
        within_llm_call: bool | None = None,
        existing_llm_call_response_ids: set[str] | None = None,
    ) -> list[tuple[TraceTree, str]]:
        """Return the spans of model calls in the order of their times, each with the name of its agent.

        Args:
            llm_call_match: regular expression that is searched for in their names.
            agent_match: only calls of agents in whose name this is found; None: all calls.
            within_matching_subtree: the agent that this tree is part of; None: none.
            within_reward: whether this tree is part of a reward; its calls are left out then. None: all are taken.
            within_llm_call: whether this tree is part of a model call. Of calls inside of each other one is
                kept: the outermost, unless only an inner one has token ids. None: all are taken.
            existing_llm_call_response_ids: ids of replies that were seen before; the ids found are added. Of
                several calls with the same reply one is kept, preferably with token ids. None: all are taken.
        """
        is_call = re.compile(llm_call_match)
        found: list[_FoundCall] = []
        pending: list[tuple[TraceTree, str | None, bool, str | None]] = [
            (self, within_matching_subtree, bool(within_reward), None)
        ]
        while pending:
            node, agent, in_reward, outermost = pending.pop()
            name = node.agent_name()
            if name is not None and (agent_match is None or re.search(agent_match, name)):
                agent = name
            in_reward = in_reward or (within_reward is not None and node.is_reward_span())
            if is_call.search(node.span.name) and not in_reward and (agent_match is None or agent is not None):
                outermost = outermost or node.id
                found.append(_FoundCall(node, agent or "", outermost))
            pending.extend((child, agent, in_reward, outermost) for child in node.children)
        if within_llm_call is not None:
            found = [] if within_llm_call else _without_nested(found)
        if existing_llm_call_response_ids is not None:
            found = _without_repeated_replies(found, existing_llm_call_response_ids)
        return [(call.node, call.agent) for call in sorted(found, key=lambda call: _when(call.node))]

    def match_rewards(
        self, reward_match: RewardMatchPolicy | str, llm_calls: Sequence[TraceTree]
    ) -> dict[str, float | None]:
        """Return the reward of each call, by the id of its span; None for a call without one."""
        calls = {call.id for call in llm_calls}
        if RewardMatchPolicy(reward_match) is RewardMatchPolicy.FIRST_SIBLING:
            matched = dict[str, float | None].fromkeys(calls)
            for node in self.traverse():
                matched |= _sibling_rewards(node.children, calls)
            return matched
        rewards = sorted((node for node in self.traverse() if node.is_reward_span()), key=_when)
        times = [_when(node) for node in rewards]
        following = {call.id: bisect_right(times, _when(call)) for call in llm_calls}
        return {
            id: get_reward_value(rewards[place].span) if place < len(rewards) else None
            for id, place in following.items()
        }

    def span_to_triplet(self, span: Span, agent_name: str) -> Triplet:
        """Return one model call as a training example, without a reward. See ``ModelCall.triplet``."""
        return read_model_call(span).triplet(agent_name, None)

    def to_trajectory(
        self,
        llm_call_match: str = LLM_CALL_MATCH,
        agent_match: str | None = None,
        exclude_llm_call_in_reward: bool = True,
        dedup_llm_call: bool = True,
        reward_match: RewardMatchPolicy = RewardMatchPolicy.FIRST_OCCURRENCE,
        final_reward: float | None = None,
        _skip_empty_token_spans: bool = False,
    ) -> list[Triplet]:
        """Return the model calls as training examples, in the order of their times.

        Args:
            llm_call_match, agent_match: see ``find_llm_calls``.
            exclude_llm_call_in_reward: leave out calls that a reward function made.
            dedup_llm_call: take each call once, although several instrumentations may have recorded it.
            reward_match: which reward belongs to which call.
            final_reward: the reward of the last call, if it has none of its own.
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
        triplets = [read_model_call(call.span).triplet(agent, rewards[call.id]) for call, agent in kept]
        if triplets and triplets[-1].reward is None:
            triplets[-1].reward = final_reward
        return triplets


class _FoundCall(NamedTuple):
    """A span of a model call, found in a tree."""

    node: TraceTree
    agent: str
    outermost: str
    """The id of the outermost call that contains it; its own if none does."""


def _without_nested(calls: Sequence[_FoundCall]) -> list[_FoundCall]:
    """Keep one record of each call that several instrumentations recorded inside of each other.

    The outermost record is kept; but if only inner ones have token ids, those are, because the others cannot be
    trained on.
    """
    groups: dict[str, list[_FoundCall]] = {}
    for call in calls:
        groups.setdefault(call.outermost, []).append(call)
    kept: list[_FoundCall] = []
    for outermost, group in groups.items():
        recorded = [call for call in group if has_token_ids(call.node.span)]
        are_inner = bool(recorded) and all(call.node.id != outermost for call in recorded)
        kept += recorded if are_inner else [call for call in group if call.node.id == outermost]
    return kept


def _without_repeated_replies(calls: Sequence[_FoundCall], seen: set[str]) -> list[_FoundCall]:
    """Keep one call for each response id that is not in ``seen``, preferably with token ids; add the ids to it."""
    kept: list[_FoundCall] = []
    for call in sorted(calls, key=lambda call: not has_token_ids(call.node.span)):
        response_id = response_id_of(call.node.span)
        if response_id is None or response_id not in seen:
            kept.append(call)
        if response_id is not None:
            seen.add(response_id)
    return kept


def _when(node: TraceTree) -> tuple[float, int]:
    # The sequence id orders spans that began at the same time: clocks of different hosts are coarse.
    return node.start_time, node.span.sequence_id


def _root_ids(parents: dict[str, str | None]) -> set[str]:
    """Return the ids of spans that nothing is above of: without a parent here, or the first one of a cycle."""
    roots: set[str] = set()
    settled: set[str] = set()
    for current in parents:
        path: set[str] = set()
        while current not in settled and current not in path:
            path.add(current)
            parent = parents[current]
            if parent is None or parent not in parents:
                break
            current = parent
        if current not in settled:
            roots.add(current)
        settled |= path
    return roots


def _sibling_rewards(siblings: Sequence[TraceTree], calls: set[str]) -> dict[str, float | None]:
    matched: dict[str, float | None] = {}
    waiting: str | None = None
    for node in siblings:
        if node.id in calls:
            waiting = node.id
        elif waiting is not None and node.is_reward_span():
            matched[waiting] = get_reward_value(node.span)
            waiting = None
    return matched
