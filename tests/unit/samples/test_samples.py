"""Samples: every token that the model wrote is trained once, after exactly the tokens that it was written after."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest

from agentlightning import Span, build_samples
from agentlightning.semconv import AGL_ANNOTATION, GenAIAttributes as GenAI, LLMCallAttributes as Call
from agentlightning.types import TraceStatus


class Spans(list[Span]):
    """The spans of some attempts, in the order of the store."""

    def call(
        self,
        prompt: Sequence[int],
        reply: Sequence[int],
        *,
        attempt: str = "at-1",
        rollout: str = "ro-1",
        logprobs: Sequence[float] | None = None,
        finish: str = "stop",
        version: str | None = None,
        messages: list[Any] | None = None,
        model: str = "policy",
        more: dict[str, Any] | None = None,
    ) -> str:
        """Add a call; returns its span's id."""
        request = {"model": model, "messages": messages or [{"role": "user", "content": str(prompt)}]}
        said = {"role": "assistant", "content": f"reply {len(self)}"}
        attributes: dict[str, Any] = {
            GenAI.OPERATION_NAME.value: "chat",
            GenAI.REQUEST_MODEL.value: model,
            GenAI.RESPONSE_FINISH_REASONS.value: [finish],
            Call.REQUEST.value: json.dumps(request),
            Call.RESPONSE.value: json.dumps({"choices": [{"index": 0, "message": said, "finish_reason": finish}]}),
            Call.PROMPT_TOKEN_IDS.value: list(prompt),
            Call.RESPONSE_TOKEN_IDS.value: list(reply),
            Call.RESPONSE_LOGPROBS.value: list(logprobs or [-0.5] * len(reply)),
            **({} if version is None else {Call.MODEL_VERSION.value: version}),
            **(more or {}),
        }
        return self._add(f"chat {model}", rollout, attempt, attributes)

    def reward(self, value: float, *, attempt: str = "at-1", rollout: str = "ro-1") -> None:
        fields = {"agentlightning.reward.0.name": "primary", "agentlightning.reward.0.value": value}
        self._add(AGL_ANNOTATION, rollout, attempt, fields)

    def _add(self, name: str, rollout: str, attempt: str, attributes: dict[str, Any]) -> str:
        number = len(self) + 1
        span_id = f"{number:016x}"
        self.append(
            Span.from_attributes(
                rollout_id=rollout, attempt_id=attempt, sequence_id=number, trace_id="1" * 32, span_id=span_id,
                name=name, attributes=attributes, status=TraceStatus(status_code="OK"),
            )
        )  # fmt: skip
        return span_id


def test_a_conversation_is_one_sample() -> None:
    spans = Spans()
    spans.call([1, 2], [3, 4], logprobs=[-0.1, -0.2], finish="tool_calls", version="v1")
    spans.call([1, 2, 3, 4, 5, 6], [7], logprobs=[-0.3], version="v2")
    spans.reward(0.5)
    made = build_samples(spans, groups={"ro-1": "task-7"})
    (sample,) = made.samples
    assert sample.input_ids == [1, 2, 3, 4, 5, 6, 7]
    assert sample.sampled == [False, False, True, True, False, False, True]
    assert sample.logprobs == [0.0, 0.0, -0.1, -0.2, 0.0, 0.0, -0.3]
    assert (sample.reward, sample.rewards, sample.group) == (0.5, {"primary": 0.5}, "task-7")
    assert [(turn.start, turn.end, turn.is_trained) for turn in sample.turns] == [(2, 4, True), (6, 7, True)]
    assert (sample.model_versions, sample.finish_reason, sample.prompt_length) == (("v1", "v2"), "stop", 2)
    assert (made.unusable, made.retokenized, sample.is_truncated) == ([], [], False)


def test_two_ways_on_from_one_turn_train_it_once() -> None:
    spans = Spans()
    spans.call([1], [2])
    spans.call([1, 2, 3], [4])
    spans.call([1, 2, 5], [6, 7])
    first, second = build_samples(spans).samples
    assert (first.input_ids, first.sampled) == ([1, 2, 3, 4], [False, True, False, True])
    assert (second.input_ids, second.sampled) == ([1, 2, 5, 6, 7], [False, False, False, True, True])
    assert [turn.is_trained for turn in second.turns] == [False, True]


def test_the_parent_is_the_longest_beginning_not_the_last_call() -> None:
    spans = Spans()
    spans.call([1], [2])
    spans.call([1, 2, 3], [4])
    spans.call([9], [8])
    spans.call([1, 2, 3, 4, 5], [6])
    one, other = build_samples(spans).samples
    assert (one.input_ids, other.input_ids) == ([9, 8], [1, 2, 3, 4, 5, 6])
    assert sum(other.sampled) == 3


def test_history_written_anew_begins_a_new_row_and_is_counted() -> None:
    """The agent's library wrote the arguments of a tool call with blanks: the same messages, other tokens."""
    spans = Spans()
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":1,"y":[2]}'}}
    user = {"role": "user", "content": "Go."}
    reply = {"role": "assistant", "content": None, "tool_calls": [call]}
    response = json.dumps({"choices": [{"index": 0, "message": reply, "finish_reason": "tool_calls"}]})
    spans.call([1], [2, 3], messages=[user], more={Call.RESPONSE.value: response})
    anew = {**call, "function": {"name": "f", "arguments": '{"x": 1, "y": [2]}'}}
    told = {"role": "tool", "tool_call_id": "a", "content": "done"}
    history = [user, {**reply, "tool_calls": [anew]}, told]
    second = spans.call([1, 2, 9, 3, 5], [6], messages=history)
    made = build_samples(spans)
    assert [sample.input_ids for sample in made.samples] == [[1, 2, 3], [1, 2, 9, 3, 5, 6]]
    assert [sum(sample.sampled) for sample in made.samples] == [2, 1]
    assert made.retokenized == [second]


def test_what_cannot_be_trained_is_said_with_its_reason() -> None:
    spans = Spans()
    spans.call([1], [2])
    spans.call([1, 2, 3], [4], more={Call.UNUSABLE.value: "token_ids_incomplete"})
    spans.call([], [])
    spans.call([5], [6], model="other")
    made = build_samples(spans, model="policy")
    assert [sample.input_ids for sample in made.samples] == [[1, 2]]
    assert made.why_unusable()["token_ids_incomplete"] == 1
    assert len(made.unusable) == 2
    assert [each.reason for each in made.set_aside] == ["a call of 'other'"]
    assert made.numbers()["calls_unusable"] == 2


def test_attempts_and_rollouts_do_not_mix() -> None:
    spans = Spans()
    spans.call([1], [2], attempt="at-1")
    spans.reward(1.0, attempt="at-1")
    spans.call([1, 2, 3], [4], attempt="at-2")
    spans.call([1, 2, 3], [4], rollout="ro-2", attempt="at-3")
    spans.reward(0.25, rollout="ro-2", attempt="at-3")
    made = build_samples(spans)
    assert [(sample.attempt_id, sample.input_ids, sample.reward) for sample in made.samples] == [
        ("at-2", [1, 2, 3, 4], None),
        ("at-3", [1, 2, 3, 4], 0.25),
    ]
    assert len(made.unusable) == 1  # the call of the attempt that has a successor


def test_a_missing_log_probability_is_none_and_a_cut_reply_is_marked() -> None:
    spans = Spans()
    spans.call([1], [2, 3], finish="length", more={Call.RESPONSE_LOGPROBS.value: [-0.1]})
    (sample,) = build_samples(spans).samples
    assert sample.logprobs is None
    assert sample.is_truncated


def test_each_choice_of_a_reply_is_a_sample() -> None:
    spans = Spans()
    choices = [
        {"index": n, "message": {"role": "assistant", "content": str(n)}, "finish_reason": "stop"} for n in (0, 1)
    ]
    spans.call([1], [2], more={
        Call.RESPONSE.value: json.dumps({"choices": choices}),
        "agentlightning.llm.choices.1.response_token_ids": [3, 4],
        "agentlightning.llm.choices.1.response_logprobs": [-1.0, -2.0],
    })  # fmt: skip
    one, other = build_samples(spans).samples
    assert (one.input_ids, other.input_ids) == ([1, 2], [1, 3, 4])
    assert other.logprobs == [0.0, -1.0, -2.0]


def check_exact(spans: Spans, calls: dict[str, tuple[list[int], list[int]]]) -> None:
    """Every reply is trained once, and stands after exactly its prompt."""
    trained: list[str] = []
    for sample in build_samples(spans).samples:
        assert len(sample.input_ids) == len(sample.sampled) == len(sample.logprobs or [])
        marked = [False] * len(sample.input_ids)
        for turn in sample.turns:
            prompt, reply = calls[turn.span_id]
            assert sample.input_ids[: turn.start] == prompt
            assert sample.input_ids[turn.start : turn.end] == reply
            if turn.is_trained:
                trained.append(turn.span_id)
                marked[turn.start : turn.end] = [True] * len(reply)
        assert sample.sampled == marked
    assert sorted(trained) == sorted(calls)


def random_attempt(rng: random.Random) -> tuple[Spans, dict[str, tuple[list[int], list[int]]]]:
    """Calls that go on with any earlier one, begin anew, or cut the history. Few tokens, so that many are the same."""
    spans, calls = Spans(), dict[str, tuple[list[int], list[int]]]()
    wholes: list[list[int]] = [[]]
    for _ in range(rng.randrange(1, 12)):
        before = list(rng.choice(wholes))
        if rng.random() < 0.2:
            before = before[: rng.randrange(len(before) + 1)]
        prompt = before + [rng.randrange(3) for _ in range(rng.randrange(1, 4))]
        reply = [rng.randrange(3) for _ in range(rng.randrange(1, 4))]
        calls[spans.call(prompt, reply)] = (prompt, reply)
        wholes.append(prompt + reply)
    return spans, calls


def test_random_attempts_are_exact() -> None:
    for seed in range(300):
        spans, calls = random_attempt(random.Random(seed))
        check_exact(spans, calls)


def test_the_check_sees_a_reply_that_is_trained_twice() -> None:
    """The negative control."""
    spans = Spans()
    calls = {spans.call([1], [2]): ([1], [2]), spans.call([1, 2, 3], [4]): ([1, 2, 9], [4])}
    with pytest.raises(AssertionError):
        check_exact(spans, calls)
