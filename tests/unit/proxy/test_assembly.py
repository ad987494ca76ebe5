"""Chunks of streams, put together; and replies of odd shapes, read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agentlightning.proxy.assembly import ReplyAssembly
from agentlightning.proxy.capture import CallKind, without_asked
from agentlightning.proxy.models import Ask
from agentlightning.proxy.replies import read_answer


def assembled(
    *choices: dict[str, Any], kind: CallKind = "chat", hidden: frozenset[Ask] = frozenset()
) -> tuple[ReplyAssembly, dict[str, Any]]:
    """One chunk for each choice, put together."""
    assembly = ReplyAssembly(kind, hidden)
    for choice in choices:
        assembly.add({"id": "c", "created": 1, "model": "m", "choices": [choice]})
    return assembly, json.loads(assembly.answer().body)


def message_of(*deltas: dict[str, Any]) -> dict[str, Any]:
    """The message that these deltas make."""
    _, body = assembled(*({"index": 0, "delta": delta} for delta in deltas))
    return body["choices"][0]["message"]


def test_several_tool_calls_whose_arguments_come_in_turns() -> None:
    message = message_of(
        {
            "role": "assistant",
            "tool_calls": [{"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}],
        },
        {"tool_calls": [{"index": 1, "id": "b", "type": "function", "function": {"name": "g", "arguments": "{"}}]},
        {
            "tool_calls": [
                {"index": 0, "function": {"arguments": '{"x":'}},
                {"index": 1, "function": {"arguments": "}"}},
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": " 1}"}}]},
    )
    assert message == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
            {"id": "b", "type": "function", "function": {"name": "g", "arguments": "}".join(["{", ""])}},
        ],
    }


def test_what_backends_repeat_in_every_chunk_is_taken_once() -> None:
    call = {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": "x"}}
    message = message_of({"role": "assistant", "tool_calls": [call]}, {"role": "assistant", "tool_calls": [call]})
    assert message["role"] == "assistant"
    assert message["tool_calls"] == [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "xx"}}]


def test_other_texts_and_lists_of_a_message_are_kept() -> None:
    message = message_of(
        {"role": "assistant", "content": "", "reasoning_content": "Let me "},
        {"reasoning_content": "see.", "annotations": [{"url": "a"}]},
        {"content": "Yes", "annotations": [{"url": "b"}], "audio": {"data": "AA"}},
        {"content": ".", "refusal": None, "audio": {"data": "BB"}},
    )
    assert message == {
        "role": "assistant",
        "content": "Yes.",
        "reasoning_content": "Let me see.",
        "annotations": [{"url": "a"}, {"url": "b"}],
        "audio": {"data": "AABB"},
    }


def test_choices_are_kept_apart_and_in_order() -> None:
    assembly, body = assembled(
        {"index": 1, "delta": {"content": "b"}, "token_ids": [2]},
        {"index": 0, "delta": {"content": "a"}, "token_ids": [1]},
        {"index": 1, "delta": {"content": "B"}, "finish_reason": "length", "token_ids": [22]},
    )
    assert [choice["message"]["content"] for choice in body["choices"]] == ["a", "bB"]
    assert [choice["token_ids"] for choice in body["choices"]] == [[1], [2, 22]]
    assert not assembly.is_finished
    assembly.add({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "stop_reason": 7}]})
    assert assembly.is_finished
    answer = assembly.answer()
    assert answer.finish_reasons == ["stop", "length"]
    assert list(answer.token_ids or ()) == [1]
    assert json.loads(answer.body)["choices"][0]["stop_reason"] == 7


def test_hidden_numbers_are_known_and_not_shown() -> None:
    entry = {"token": "a", "logprob": -0.5}
    choice = {"index": 0, "delta": {"content": "a"}, "token_ids": [1], "logprobs": {"content": [entry]}}
    for hidden in (frozenset[Ask](), frozenset[Ask](("token_ids", "logprobs"))):
        assembly, body = assembled(choice, choice, hidden=hidden)
        answer = assembly.answer()
        assert (list(answer.token_ids or ()), list(answer.logprobs or ())) == ([1, 1], [-0.5, -0.5])
        shown = body["choices"][0]
        assert ("token_ids" in shown, shown["logprobs"] is not None) == (not hidden, not hidden)
    _, body = assembled(choice, choice)
    assert body["choices"][0]["logprobs"] == {"content": [entry, entry]}


def test_log_probabilities_of_text_completions() -> None:
    pieces = [
        {"index": 0, "text": text, "logprobs": {"tokens": [text], "token_logprobs": [number], "text_offset": [0]}}
        for text, number in (("a", -1.0), ("b", -2))
    ]
    assembly, body = assembled(*pieces, kind="text_completion")
    assert list(assembly.answer().logprobs or ()) == [-1.0, -2.0]
    assert body["choices"][0]["text"] == "ab"
    assert body["choices"][0]["logprobs"] == {"tokens": ["a", "b"], "token_logprobs": [-1.0, -2], "text_offset": [0, 0]}


def test_one_missing_log_probability_makes_all_unusable() -> None:
    good = {"index": 0, "delta": {}, "logprobs": {"content": [{"logprob": -1.0}]}}
    assembly, _ = assembled(good, {"index": 0, "delta": {}, "logprobs": {"content": [{"logprob": None}]}}, good)
    assert assembly.answer().logprobs is None


@pytest.mark.parametrize(
    "chunk",
    [
        {},
        {"choices": None},
        {"choices": [3, None]},
        {"choices": [{"index": "x", "delta": 3, "token_ids": "no", "logprobs": 4, "finish_reason": 5}]},
        {"choices": [{"delta": {"tool_calls": "x", "content": 3}}, {"delta": {"tool_calls": [3]}}]},
        {"choices": [{"delta": {"tool_calls": [{"index": 0}]}}, {"delta": {"tool_calls": [{}]}}]},
        {"id": 3, "model": [], "usage": 7, "prompt_token_ids": [1.5]},
        {"choices": {"a": 1}},
        {"choices": "x"},
    ],
)
def test_no_shape_of_a_chunk_or_reply_breaks_the_record(chunk: dict[str, Any]) -> None:
    assembly = ReplyAssembly("chat", frozenset())
    assembly.add(chunk)
    assembly.answer()
    read_answer(chunk)
    without_asked(chunk, frozenset({"token_ids", "logprobs", "usage"}))


def test_nothing_came() -> None:
    answer = ReplyAssembly("chat", frozenset()).answer()
    assert (answer.body, answer.token_ids, answer.finish_reasons) == (b"", None, [])
