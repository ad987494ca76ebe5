"""What each kind of server says of tokens is read exactly, and hidden from agents that did not ask for it.

No real server runs here: the replies have the shapes that the servers' own documents give, which each test names.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from agentlightning.proxy.dialects import ChatCompletions, Completions
from agentlightning.proxy.dialects.base import CAPTURE_FIELDS, RecordedReply, data_of, event_of
from agentlightning.semconv import UnusableReason
from asked import ASKED

CHAT = ChatCompletions()
ENTRY: dict[str, Any] = {"token": "hi", "logprob": -0.5, "bytes": [104, 105], "top_logprobs": []}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def whole(reply: dict[str, Any], dialect: ChatCompletions | Completions = CHAT) -> tuple[RecordedReply, dict[str, Any]]:
    """The record of a reply, and what the agent gets."""
    record = dialect.read_reply(json.dumps(reply).encode(), CAPTURE_FIELDS, ASKED)
    assert record is not None
    return record, json.loads(record.body)


def streamed(*chunks: dict[str, Any]) -> tuple[RecordedReply, list[Any]]:
    """The record of a stream, and the chunks that the agent gets."""
    stream = CHAT.open_stream(CAPTURE_FIELDS, ASKED)
    shown = [stream.feed(event_of(json.dumps({"id": "x", **chunk}).encode())) for chunk in chunks]
    return stream.recorded(), [json.loads(data_of(event) or b"") for event in shown if event]


def tokens(record: RecordedReply) -> tuple[list[int], list[int], list[float], UnusableReason | None]:
    """Prompt, reply and log-probabilities, and whether they can be used."""
    return (
        list(record.prompt_token_ids or ()),
        list(record.token_ids or ()),
        list(record.logprobs or ()),
        record.unusable,
    )


def choice(**more: Any) -> dict[str, Any]:
    """A choice of a whole chat reply of two tokens."""
    message = {"role": "assistant", "content": "hihi"}
    return {"index": 0, "message": message, "finish_reason": "stop", "logprobs": {"content": [ENTRY, ENTRY]}, **more}


@pytest.mark.parametrize("name", ["response_token_ids", "token_ids"])
def test_sglang_says_both_in_each_choice(name: str) -> None:
    """https://github.com/sgl-project/sglang/pull/30917; SGLang 0.5.23 says ``response_token_ids``."""
    record, shown = whole({"choices": [choice(prompt_token_ids=[1, 2, 3], **{name: [7, 8]})], "usage": USAGE})
    assert tokens(record) == ([1, 2, 3], [7, 8], [-0.5, -0.5], None)
    assert shown["choices"] == [choice(logprobs=None)]


def test_sglang_says_ids_of_streams_in_an_extension_at_the_end() -> None:
    """https://github.com/sgl-project/sglang/pull/34488: ``sglext`` with ``input_ids``, and ``output_ids`` per choice,
    in a last chunk without choices."""
    logprobs = {"content": [ENTRY, ENTRY]}
    record, shown = streamed(
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "hihi"}, "logprobs": logprobs}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": USAGE},
        {"choices": [], "sglext": {"input_ids": [1, 2, 3], "output_ids": [[7, 8]]}},
    )
    assert tokens(record) == ([1, 2, 3], [7, 8], [-0.5, -0.5], None)
    assert [each["choices"][0]["delta"].get("content") for each in shown] == ["hihi", None]
    both = {"input_ids": [1, 2, 3], "output_ids": [[7, 8], [9]], "cached_tokens_details": {"device": 1}}
    usage = USAGE | {"completion_tokens": 3}
    record, body = whole({"choices": [choice(), choice(index=1, logprobs=None)], "usage": usage, "sglext": both})
    assert [list(each.token_ids or ()) for each in record.choices] == [[7, 8], [9]]
    assert body["sglext"] == {"cached_tokens_details": {"device": 1}}, "what is not there because of the proxy stays"


def test_llama_cpp_says_ids_beside_log_probabilities() -> None:
    """https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md, under
    ``completion_probabilities``: each entry has an ``id``. Without log-probabilities the field is absent."""
    entries = [{"id": number, **ENTRY} for number in (7, 8)]
    without = {name: value for name, value in choice().items() if name != "logprobs"}
    record, shown = whole({"choices": [choice(logprobs={"content": entries})], "usage": USAGE})
    assert tokens(record) == ([], [7, 8], [-0.5, -0.5], None)
    assert shown["choices"] == [without]
    deltas = [
        {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": None, "logprobs": {"content": [entry]}}]}
        for entry in entries
    ]
    end = [{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}, {"choices": [], "usage": USAGE}]
    record, chunks = streamed(*deltas, *end)
    assert tokens(record) == ([], [7, 8], [-0.5, -0.5], None)
    assert [list(each["choices"][0]) for each in chunks[:2]] == [["index", "delta", "finish_reason"]] * 2
    record, _ = streamed(deltas[0], *end)  # it sends no entry for a token that ends inside of a character
    assert record.unusable == UnusableReason.TOKEN_IDS_INCOMPLETE


def test_a_verbose_llama_cpp_says_ids_in_a_field_of_its_own() -> None:
    """https://github.com/ggml-org/llama.cpp/pull/12246 (``__verbose`` of a verbose server) and the README under
    ``return_tokens``: ``tokens``, and ``completion_probabilities`` if they were asked for."""
    verbose = {"tokens": [7, 8], "completion_probabilities": [{"id": 7}], "content": "hihi"}
    record, shown = whole({"choices": [choice(logprobs=None)], "usage": USAGE, "__verbose": verbose})
    assert tokens(record)[1] == [7, 8]
    assert shown["__verbose"] == {"tokens": [7, 8], "content": "hihi"}
    record, _ = streamed(
        {"choices": [{"index": 0, "delta": {"content": "hi"}}], "__verbose": {"tokens": [7]}},
        {"choices": [{"index": 0, "delta": {"content": "hi"}}], "__verbose": {"tokens": [8]}},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "__verbose": {"tokens": []}},
        {"choices": [], "usage": USAGE},
    )
    assert tokens(record) == ([], [7, 8], [], None)


def test_vllm_sends_chunks_of_ids_alone_which_the_agent_does_not_get() -> None:
    """With ``return_token_ids`` vLLM sends a chunk where a parser holds the text back; without, it does not."""
    record, shown = streamed(
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "prompt_token_ids": [1, 2, 3]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": None, "token_ids": [7]}]},
        {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop", "token_ids": [8]}]},
        {"choices": [], "usage": USAGE},
    )
    assert tokens(record) == ([1, 2, 3], [7, 8], [], None)
    assert [each["choices"][0]["delta"].get("content") for each in shown] == ["", "hi"]


def test_every_choice_is_recorded_and_several_prompts_are_told_apart() -> None:
    """https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html: ``n``, and ``prompt`` as a list."""
    choices = [choice(index=number, token_ids=ids) for number, ids in enumerate(([7, 8], [9]))]
    usage = USAGE | {"completion_tokens": 3}
    record, _ = whole({"choices": choices, "prompt_token_ids": [1, 2, 3], "usage": usage})
    assert [(list(each.token_ids or ()), each.prompt_token_ids) for each in record.choices] == [
        ([7, 8], None),
        ([9], None),
    ]
    assert record.unusable is None
    texts: list[dict[str, Any]] = [
        {"index": number, "text": "x", "finish_reason": "stop", "token_ids": [9], "prompt_token_ids": prompt}
        for number, prompt in enumerate(([1, 2], [3]))
    ]
    record, _ = whole({"choices": texts, "usage": USAGE}, Completions())
    assert (record.prompt_token_ids, record.unusable) == ([1, 2], None)
    assert [each.prompt_token_ids for each in record.choices] == [None, [3]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"usage": USAGE | {"completion_tokens": 9}}, UnusableReason.TOKEN_IDS_INCOMPLETE),
        ({"usage": USAGE | {"prompt_tokens": 4}}, UnusableReason.PROMPT_TOKEN_IDS_INCOMPLETE),
        ({"usage": None}, None),
        ({"usage": None, "choices": [choice(token_ids=[7])]}, UnusableReason.TOKEN_IDS_INCOMPLETE),
        ({"choices": [choice(token_ids=[7, 8]), choice(index=1)]}, UnusableReason.TOKEN_IDS_INCOMPLETE),
        ({"choices": [choice(token_ids=[7, 8], finish_reason="error")]}, UnusableReason.FINISHED_WITH_ERROR),
        ({"choices": [choice(token_ids=[7, 8], finish_reason="abort")]}, UnusableReason.FINISHED_WITH_ERROR),
        ({"choices": [choice()]}, None),
    ],
)
def test_a_reply_that_does_not_add_up_is_marked(change: dict[str, Any], reason: UnusableReason | None) -> None:
    reply = {"choices": [choice(token_ids=[7, 8])], "prompt_token_ids": [1, 2, 3], "usage": USAGE, **change}
    assert whole(reply)[0].unusable == reason
    chunks = [{"choices": [{"delta": each["message"], **each, "message": None}]} for each in reply["choices"]]
    end = {"choices": [], "usage": reply["usage"], "prompt_token_ids": [1, 2, 3]}
    assert streamed(*chunks, end)[0].unusable == reason


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (r'"\ud83d"', None),
        ("[" + "9" * 5000 + "]", None),
        ("[NaN, -Infinity, 1e999]", None),
        ('"\x01"', r'"\u0001"'),
    ],
)
def test_chunks_that_only_some_parsers_read_lose_what_is_hidden_and_nothing_else(text: str, meant: str | None) -> None:
    stream = CHAT.open_stream(CAPTURE_FIELDS, ASKED)
    chunk = '{"choices":[{"index":0,"delta":{"content":"a"},"token_ids":[7],"x":%s}]}'
    shown = stream.feed(event_of((chunk % text).encode()))
    expected = chunk.replace(',"token_ids":[7]', "") % (meant or text)
    assert shown.decode().replace(" ", "") == f"data: {expected}\n\n".replace(" ", "")
    assert list(stream.recorded().token_ids or ()) == [7]
    whole_chunk = chunk.replace('"delta"', '"message"')
    record = CHAT.read_reply((whole_chunk % text).encode(), CAPTURE_FIELDS, ASKED)
    assert record is not None
    assert b"token_ids" not in record.body


def test_a_character_in_two_halves_is_put_together() -> None:
    stream = CHAT.open_stream(CAPTURE_FIELDS, ASKED)
    for text in (r"A \ud83d", r"\ude00", r" \ud800"):
        stream.feed(b'data: {"choices":[{"index":0,"delta":{"content":"' + text.encode() + b'"}}]}\n\n')
    record = stream.recorded()
    assert json.loads(record.body)["choices"][0]["message"]["content"] == "A \N{GRINNING FACE} \ud800"
    assert record.unusable is None


def test_a_chunk_that_is_no_json_makes_the_call_unusable() -> None:
    stream = CHAT.open_stream(CAPTURE_FIELDS, ASKED)
    assert stream.feed(b"data: {\n\n") == b"data: {\n\n"
    assert stream.recorded().unusable == UnusableReason.UNREADABLE_CHUNK


def test_other_lines_of_an_event_stay() -> None:
    stream = CHAT.open_stream(CAPTURE_FIELDS, ASKED)
    chunk = {"choices": [{"index": 0, "delta": {"content": "a"}}]}
    event = f"id: 3\nevent: message\ndata: {json.dumps(chunk | {'prompt_token_ids': [1]})}\n\n".encode()
    assert stream.feed(event) == b"id: 3\nevent: message\n" + event_of(
        json.dumps(chunk, separators=(",", ":")).encode()
    )


@pytest.mark.parametrize(
    "reply",
    [{"error": {"message": "no", "code": 429}}, {"object": "error", "message": "no", "code": 429}],
)
def test_an_error_under_a_status_that_says_success_is_one(reply: dict[str, Any]) -> None:
    """https://openrouter.ai/docs/api-reference/errors: errors after the first token have the status 200."""
    record = CHAT.read_reply(json.dumps(reply).encode(), CAPTURE_FIELDS, ASKED)
    assert record is not None
    assert record.error is not None
    assert record.error.message == "no"
    stream = CHAT.open_stream(CAPTURE_FIELDS, ASKED)
    stream.feed(event_of(json.dumps(reply).encode()))
    assert stream.error is not None
    assert stream.error.message == "no"


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ({"code": 500, "message": "boom", "data": None}, "boom"),
        ({"detail": "logprobs unsupported"}, "logprobs unsupported"),
        ({"type": "error", "message": "boom"}, "boom"),
        ({"choices": []}, "HTTP status 200"),
        ({"choices": [{"message": {"content": "a"}, "finish_reason": "stop", "error": {"message": "cut"}}]}, "cut"),
    ],
)
def test_an_error_of_any_shape_under_a_status_of_success_is_an_error(reply: dict[str, Any], said: str) -> None:
    record = CHAT.read_reply(json.dumps(reply).encode(), CAPTURE_FIELDS, ASKED)
    assert record is not None
    assert record.error is not None
    assert said in record.error.message


@pytest.mark.parametrize("reason", ["ERROR", "failed", "cancelled", "timeout", "insufficient_system_resource"])
def test_a_finish_reason_of_failure_makes_no_example(reason: str) -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "a"}, "finish_reason": reason}
    record = CHAT.read_reply(json.dumps({"choices": [choice]}).encode(), CAPTURE_FIELDS, ASKED)
    assert record is not None
    assert record.unusable == UnusableReason.FINISHED_WITH_ERROR


@pytest.mark.parametrize(("lost", "reason"), [(None, None), (1, UnusableReason.TOKEN_IDS_INCOMPLETE)])
def test_a_piece_without_ids_is_noticed_also_without_usage(lost: int | None, reason: UnusableReason | None) -> None:
    stream = CHAT.open_stream(CAPTURE_FIELDS, ASKED)
    stream.feed(_event({"delta": {"role": "assistant", "content": ""}}))
    for number, text in enumerate("abc"):
        ids = {} if number == lost else {"token_ids": [number]}
        stream.feed(_event({"delta": {"content": text}, **ids}))
    stream.feed(_event({"delta": {}, "finish_reason": "stop"}))
    assert stream.recorded().unusable == reason


def _event(choice: dict[str, Any]) -> bytes:
    return event_of(json.dumps({"choices": [{"index": 0, **choice}]}).encode())
