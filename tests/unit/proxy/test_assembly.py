"""Chunks of streams, put together; and replies of odd shapes, read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agentlightning.proxy.dialects import ChatCompletions, Completions, WireDialect
from agentlightning.proxy.dialects.base import CAPTURE_FIELDS, CaptureField, ReplyStream, event_of
from asked import ASKED

CHAT = ChatCompletions()


def assembled(
    *choices: dict[str, Any], dialect: WireDialect = CHAT, hidden: frozenset[CaptureField] = frozenset()
) -> tuple[ReplyStream, dict[str, Any]]:
    """One chunk for each choice, put together."""
    stream = dialect.open_stream(hidden, ASKED)
    for choice in choices:
        feed(stream, {"id": "c", "created": 1, "model": "m", "choices": [choice]})
    return stream, json.loads(stream.recorded().body)


def feed(stream: ReplyStream, chunk: dict[str, Any]) -> None:
    """Hand a chunk to a stream as an event."""
    stream.feed(event_of(json.dumps(chunk).encode()))


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


@pytest.mark.parametrize(
    ("pieces", "whole"),
    [
        ([[], [{"url": "a"}], [{"url": "b"}]], [{"url": "a"}, {"url": "b"}]),
        ([[], [{"index": 0, "x": "a"}], [], [{"index": 0, "x": "b"}]], [{"x": "ab"}]),
        ([["a"], [], [{"index": 0}]], ["a", {"index": 0}]),
        ([[], []], []),
    ],
)
def test_an_empty_list_does_not_say_what_follows(pieces: list[list[Any]], whole: list[Any]) -> None:
    assert message_of(*({"parts": piece} for piece in pieces))["parts"] == whole


def call(index: int | None, id: str | None, name: str | None, arguments: str) -> dict[str, Any]:
    """A piece of a tool call."""
    function = {"arguments": arguments} | ({} if name is None else {"name": name})
    places = {} if index is None else {"index": index}
    return {"tool_calls": [{**places, **({} if id is None else {"id": id, "type": "function"}), "function": function}]}


@pytest.mark.parametrize("index", [0, None])
def test_tool_calls_with_other_ids_are_others_though_all_say_index_0(index: int | None) -> None:
    message = message_of(
        call(index, "a", "f", "{"),
        call(index, None, None, "1}"),
        call(index, "b", "g", "{"),
        call(index, None, None, "2}"),
        call(index, "a", None, ""),
    )
    assert [(each["id"], each["function"]) for each in message["tool_calls"]] == [
        ("a", {"name": "f", "arguments": "{1}"}),
        ("b", {"name": "g", "arguments": "{2}"}),
    ]


def test_a_piece_with_an_id_of_its_own_but_without_a_name_is_of_the_same_call() -> None:
    message = message_of(call(0, "a", "f", "{"), call(0, "x", None, "1"), call(0, "y", "", "}"))
    assert [(each["id"], each["function"]["arguments"]) for each in message["tool_calls"]] == [("a", "{1}")]


def test_constants_that_each_piece_repeats_are_said_once() -> None:
    details = [
        {"type": "reasoning.text", "text": text, "format": "f-v1", "provider": "p", "index": 0, **more}
        for text, more in (("let me ", {}), ("see", {}), ("", {"signature": "S=="}))
    ]
    message = message_of(*({"reasoning_details": [each], "model_name": "m"} for each in details))
    assert message["reasoning_details"] == [
        {"type": "reasoning.text", "text": "let me see", "format": "f-v1", "provider": "p", "signature": "S=="}
    ]
    assert message["model_name"] == "m"
    assert message_of({"content": "ha"}, {"content": "ha"})["content"] == "haha"


def test_content_is_a_list_and_then_a_text_or_the_other_way_round() -> None:
    thought = [{"type": "thinking", "thinking": [{"type": "text", "text": text}]} for text in ("let ", "me")]
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    message = message_of(
        *({"content": [part]} for part in thought),
        {"content": "4"},
        {"content": ""},
        {"content": "2"},
        {"content": [image]},
    )
    assert message["content"] == [
        {"type": "thinking", "thinking": [{"type": "text", "text": "let me"}]},
        {"type": "text", "text": "42"},
        image,
    ]
    message = message_of({"content": "4"}, {"content": [{"type": "text", "text": "2"}]})
    assert message["content"] == [{"type": "text", "text": "42"}]


def test_choices_are_kept_apart_and_in_order() -> None:
    stream, body = assembled(
        {"index": 1, "delta": {"content": "b"}, "token_ids": [2]},
        {"index": 0, "delta": {"content": "a"}, "token_ids": [1]},
        {"index": 1, "delta": {"content": "B"}, "finish_reason": "length", "token_ids": [22]},
    )
    assert [choice["message"]["content"] for choice in body["choices"]] == ["a", "bB"]
    assert [choice["token_ids"] for choice in body["choices"]] == [[1], [2, 22]]
    assert not stream.is_complete
    feed(stream, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "stop_reason": 7}]})
    assert stream.is_complete
    answer = stream.recorded()
    assert answer.finish_reasons == ["stop", "length"]
    assert list(answer.token_ids or ()) == [1]
    assert json.loads(answer.body)["choices"][0]["stop_reason"] == 7


def test_hidden_numbers_are_known_and_not_shown() -> None:
    entry = {"token": "a", "logprob": -0.5}
    choice = {"index": 0, "delta": {"content": "a"}, "token_ids": [1], "logprobs": {"content": [entry]}}
    for hidden in (frozenset[CaptureField](), frozenset[CaptureField](("token_ids", "logprobs"))):
        stream, body = assembled(choice, choice, hidden=hidden)
        answer = stream.recorded()
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
    stream, body = assembled(*pieces, dialect=Completions())
    assert list(stream.recorded().logprobs or ()) == [-1.0, -2.0]
    assert body["choices"][0]["text"] == "ab"
    assert body["choices"][0]["logprobs"] == {"tokens": ["a", "b"], "token_logprobs": [-1.0, -2], "text_offset": [0, 0]}


def test_one_missing_log_probability_makes_all_unusable() -> None:
    good = {"index": 0, "delta": {}, "logprobs": {"content": [{"logprob": -1.0}]}}
    stream, _ = assembled(good, {"index": 0, "delta": {}, "logprobs": {"content": [{"logprob": None}]}}, good)
    assert stream.recorded().logprobs is None


@pytest.mark.parametrize("odd", [[2**63], [-(2**63) - 1], [True], ["2"], 2])
def test_token_ids_that_no_span_can_hold_make_all_of_the_choice_unusable(odd: object) -> None:
    good, last = ({"index": 0, "delta": {"content": "a"}, "token_ids": [each]} for each in (2**63 - 1, -(2**63)))
    stream, body = assembled(good, {"index": 0, "delta": {"content": "b"}, "token_ids": odd}, last)
    assert stream.recorded().token_ids is None, "those of the other chunks do not stand for the whole text"
    assert body["choices"][0]["message"]["content"] == "aba"
    assert "token_ids" not in body["choices"][0]
    stream, _ = assembled(good, {"index": 0, "delta": {}, "token_ids": None}, last)
    assert list(stream.recorded().token_ids or ()) == [2**63 - 1, -(2**63)]


@pytest.mark.parametrize("huge", [2**63, 2**70, 10**400], ids=["2**63", "2**70", "10**400"])
def test_numbers_that_no_span_can_hold_are_left_out_of_the_record(huge: int) -> None:
    usage = {"prompt_tokens": huge, "completion_tokens": 2}
    choice = {"index": 0, "token_ids": [huge], "logprobs": {"content": [{"logprob": 10**400}]}, "finish_reason": "stop"}
    reply = {"usage": usage, "prompt_token_ids": [huge], "choices": [choice | {"message": {"content": "a"}}]}
    whole = CHAT.read_reply(json.dumps(reply).encode(), frozenset(), ASKED)
    stream = CHAT.open_stream(frozenset(), ASKED)
    feed(stream, reply | {"choices": [choice | {"delta": {"content": "a"}}]})
    for answer in (whole, stream.recorded()):
        assert answer is not None
        assert (answer.prompt_token_ids, answer.token_ids, answer.logprobs) == (None, None, None)
        assert (answer.input_tokens, answer.output_tokens, answer.finish_reasons) == (None, 2, ["stop"])
        assert json.loads(answer.body)["usage"] == usage, "the agent reads what the backend wrote"


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
    stream = CHAT.open_stream(CAPTURE_FIELDS, ASKED)
    feed(stream, chunk)
    stream.recorded()
    assert CHAT.read_reply(json.dumps(chunk).encode(), CAPTURE_FIELDS, ASKED) is not None


def test_nothing_came() -> None:
    answer = CHAT.open_stream(frozenset(), ASKED).recorded()
    assert (answer.body, answer.token_ids, answer.finish_reasons) == (b"", None, [])
