"""Makes samples of an attempt's calls.

Each call of a conversation repeats what was said before. Trained one by one, the first turns would be trained again
with every later call. So the calls of an attempt are put into a tree: the parent of a call is the earlier call whose
prompt and reply, taken together, are the longest exact beginning of its own prompt, token by token. Each path from a
root to a leaf is one sample, and each reply is trained in the first of the samples that it is in.

A harness that rewrites its history (cuts it, sums it up, or writes arguments of tools anew, so that other tokens come
out) begins a new path there: nothing is ever trained that the model did not write after exactly these tokens.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from agentlightning.adapter.adapters import Adapted, LlmProxyTraceToTriplet, UnusableSpan
from agentlightning.adapter.calls import ModelCall
from agentlightning.samples.sample import Sample, Turn
from agentlightning.types import Span
from agentlightning.types.attempt_spans import by_attempt
from agentlightning.types.rewards import find_final_reward, find_reward_spans, get_rewards_from_span


@dataclass(frozen=True)
class SampleSet:
    """What was made of spans, and what was not, so that nothing is dropped silently."""

    samples: list[Sample] = field(default_factory=list[Sample])
    unusable: list[UnusableSpan] = field(default_factory=list[UnusableSpan])
    """Calls that cannot be trained on, each with its reason."""
    set_aside: list[UnusableSpan] = field(default_factory=list[UnusableSpan])
    """Calls that were left out on purpose: on the side, of another model, further records of a call."""
    retokenized: list[str] = field(default_factory=list[str])
    """Span ids of calls that go on with an earlier conversation by their messages, but not by their tokens: the agent
    or the server wrote the history anew. They are trained, as samples of their own."""

    def numbers(self) -> dict[str, float]:
        """Return counts, for ``Algorithm.report``."""
        return {
            "samples": float(len(self.samples)),
            "samples_truncated": float(sum(sample.is_truncated for sample in self.samples)),
            "tokens_trained": float(sum(sum(sample.sampled) for sample in self.samples)),
            "tokens_total": float(sum(len(sample.input_ids) for sample in self.samples)),
            "calls_unusable": float(len(self.unusable)),
            "calls_set_aside": float(len(self.set_aside)),
            "calls_retokenized": float(len(self.retokenized)),
        }

    def why_unusable(self) -> Counter[str]:
        """Return how many calls are unusable, by reason."""
        return Counter(each.reason for each in self.unusable)


def build_samples(
    spans: Sequence[Span],
    *,
    model: str | None = None,
    adapter: LlmProxyTraceToTriplet | None = None,
    groups: Mapping[str, str] | None = None,
) -> SampleSet:
    """Make samples of the calls in spans of any number of attempts.

    Args:
        spans: all spans of each attempt.
        model: only calls of this model; None: of all.
        adapter: finds the calls, and says which attempts and which side calls are used. Default: those of the newest
            attempt of each rollout, without calls on the side.
        groups: the group of each rollout, by its id.

    Returns:
        Samples attempt by attempt, in the order of their first calls.
    """
    finder = adapter or LlmProxyTraceToTriplet()
    made = SampleSet()
    for (rollout_id, attempt_id), own, calls in _by_attempt(spans, finder, made):
        tree = _Tree()
        for call in calls:
            if model is not None and call.model not in (None, model):
                made.set_aside.append(UnusableSpan(call.span.span_id, call.span.name, f"a call of {call.model!r}"))
            elif tree.add(call):
                made.retokenized.append(call.span.span_id)
        rewards = find_reward_spans(own)
        for path in tree.paths():
            made.samples.append(
                _sample(
                    path,
                    rollout_id,
                    attempt_id,
                    reward=find_final_reward(own),
                    rewards={each.name: each.value for each in get_rewards_from_span(rewards[-1])} if rewards else {},
                    group=None if groups is None else groups.get(rollout_id),
                )
            )
    return made


def _by_attempt(
    spans: Sequence[Span], finder: LlmProxyTraceToTriplet, made: SampleSet
) -> list[tuple[tuple[str, str], list[Span], list[ModelCall]]]:
    """Return ids, spans and usable calls of each attempt that has some."""
    found: Adapted[ModelCall] = finder.find_calls(spans)
    made.unusable.extend(found.unusable)
    made.set_aside.extend(found.set_aside)
    calls: dict[tuple[str, str], list[ModelCall]] = {}
    for call in found.made:
        calls.setdefault((call.span.rollout_id, call.span.attempt_id), []).append(call)
    return [(key, own, calls[key]) for key, own in by_attempt(spans).items() if key in calls]


@dataclass(eq=False)
class _Node:
    """One call."""

    call: ModelCall
    tokens: bytes
    """Prompt and reply, as ``array`` keeps them."""
    parent: _Node | None = None
    is_leaf: bool = True
    is_claimed: bool = False
    """Whether a sample trains its reply already."""

    @property
    def length(self) -> int:
        """In bytes."""
        return len(self.tokens)


class _Tree:
    """The calls of one attempt."""

    def __init__(self) -> None:
        self._nodes: list[_Node] = []
        self._by_length: list[_Node] = []
        self._by_whole_key: dict[str, _Node] = {}

    def add(self, call: ModelCall) -> bool:
        """Take the next call. Returns whether it goes on with an earlier one by its messages, not by its tokens."""
        prompt = array("q", call.prompt_token_ids).tobytes()
        node = _Node(call, prompt + array("q", call.response_token_ids).tobytes())
        # The longest is tried first; most conversations go on where they were.
        end = bisect_right(self._by_length, len(prompt), key=lambda each: each.length)
        node.parent = next((each for each in reversed(self._by_length[:end]) if prompt.startswith(each.tokens)), None)
        is_last = bool(self._nodes) and node.parent is self._nodes[-1]
        is_anew = not is_last and self._is_written_anew(node)
        if node.parent is not None:
            node.parent.is_leaf = False
        self._nodes.append(node)
        insort(self._by_length, node, key=lambda each: each.length)
        return is_anew

    def _is_written_anew(self, node: _Node) -> bool:
        for each in self._nodes[len(self._by_whole_key) :]:  # their keys take time, and most attempts need none
            self._by_whole_key.setdefault(each.call.whole_key or each.call.span.span_id, each)
        known = (self._by_whole_key.get(key) for key in reversed(node.call.prefix_keys))
        continued = next((each for each in known if each is not None), None)
        return continued is not None and continued is not node.parent

    def paths(self) -> list[list[_Node]]:
        """Return the calls of each path from a root to a leaf, in the order of the leaves."""
        found: list[list[_Node]] = []
        for leaf in self._nodes:
            if not leaf.is_leaf:
                continue
            path: list[_Node] = []
            node: _Node | None = leaf
            while node is not None:
                path.append(node)
                node = node.parent
            found.append(path[::-1])
        return found


def _sample(
    path: Sequence[_Node],
    rollout_id: str,
    attempt_id: str,
    *,
    reward: float | None,
    rewards: Mapping[str, float],
    group: str | None,
) -> Sample:
    """Return the sample of a path, which trains those of its replies that no earlier one trains."""
    ids: list[int] = []
    sampled: list[bool] = []
    logprobs: list[float] = []
    turns: list[Turn] = []
    has_logprobs = True
    for node in path:
        call, is_trained = node.call, not node.is_claimed
        node.is_claimed = True
        fresh = call.prompt_token_ids[len(ids) :]
        ids += fresh
        sampled += [False] * len(fresh)
        logprobs += [0.0] * len(fresh)
        start, count = len(ids), len(call.response_token_ids)
        ids += call.response_token_ids
        sampled += [is_trained] * count
        if is_trained and call.logprobs is None:
            has_logprobs = False
        logprobs += call.logprobs if is_trained and call.logprobs is not None else [0.0] * count
        about = (call.span.span_id, call.model, call.model_version, call.finish_reason)
        turns.append(Turn(start, len(ids), *about, is_trained))
    return Sample(
        input_ids=ids,
        sampled=sampled,
        logprobs=logprobs if has_logprobs else None,
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        turns=tuple(turns),
        reward=reward,
        rewards=rewards,
        group=group,
    )
