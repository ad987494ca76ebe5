"""Random conversations and streams in each translated wire: the backend and the agent get what was said."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest

from agentlightning.proxy.calls import StreamRelay
from agentlightning.proxy.dialects import ChatCompletions, GenerateContent, Messages, Responses
from agentlightning.proxy.dialects.base import CAPTURE_FIELDS, CaptureField, ModelRequest, Scrubber
from agentlightning.proxy.dialects.translated import TranslatedDialect
from random_streams import Choice, random_stream
from wires import READERS, Said, chat_of, google_of, messages_of, random_turns, responses_of

WIRES: list[TranslatedDialect] = [Messages(), Responses(), GenerateContent()]
CONVERSATIONS = {"messages": messages_of, "responses": responses_of, "generate_content": google_of}
PARAMS = {"generate_content": {"model": "policy", "action": "streamGenerateContent", "alt": "sse"}}
REASONS = {
    "messages": {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"},
    "responses": {"length": "max_output_tokens", "tool_calls": "completed", "stop": "completed"},
    "generate_content": {"length": "MAX_TOKENS", "tool_calls": "STOP", "stop": "STOP"},
}


def asked(wire: TranslatedDialect) -> ModelRequest:
    body = {
        "model": "policy",
        "stream": True,
        "max_tokens": 1,
        **CONVERSATIONS[wire.name](random_turns(random.Random(1))),
    }
    return wire.read_request(json.dumps(body).encode(), PARAMS.get(wire.name, {}))


def joined(text: str) -> str:
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def check_said(wire: TranslatedDialect, said: Said, choice: Choice, usage: tuple[int, int]) -> None:
    message = choice.message
    assert joined(said.text) == message.get("content", "") + message.get("refusal", "")
    assert joined(said.reasoning) == message.get("reasoning_content", "")
    calls = [
        (call["id"], call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in message.get("tool_calls", [])
    ]
    assert said.calls == calls
    expected = REASONS[wire.name][choice.finish_reason]
    if wire.name == "messages" and choice.finish_reason == "stop":
        stops = isinstance(choice.others.get("stop_reason"), str)
        expected = "stop_sequence" if stops else "tool_use" if calls else expected
    assert said.reason == expected
    assert said.usage == usage


def check_stream(seed: int, wire: TranslatedDialect, request: ModelRequest) -> None:
    rng = random.Random(seed)
    made = random_stream(rng)
    hidden = frozenset[CaptureField](each for each in sorted(CAPTURE_FIELDS) if rng.random() < 0.7)
    stream, plain = wire.open_stream(hidden, request), ChatCompletions().open_stream(hidden, request)
    relay, other = StreamRelay(stream, Scrubber()), StreamRelay(plain, Scrubber())
    edges = sorted({0, len(made.data), *(rng.randrange(len(made.data) + 1) for _ in range(rng.randrange(6)))})
    shown = b"".join(relay.feed(made.data[start:end]) for start, end in itertools.pairwise(edges)) + relay.ending()
    other.feed(made.data)
    assert stream.recorded() == plain.recorded()
    written = sum(len(choice.token_ids) for choice in made.choices)
    check_said(wire, READERS[wire.name](shown), made.choices[0], (len(made.prompt_token_ids), written))


@pytest.mark.parametrize("wire", WIRES, ids=lambda wire: wire.name)
@pytest.mark.parametrize(
    "count", [pytest.param(3_500, id="short"), pytest.param(200_000, id="long", marks=pytest.mark.slow)]
)
@pytest.mark.timeout(3_600)
def test_random_streams_say_the_same_in_each_wire(wire: TranslatedDialect, count: int) -> None:
    request = asked(wire)
    for seed in range(count):
        try:
            check_stream(seed, wire, request)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise


def plain(messages: list[dict[str, Any]], wire: str) -> list[dict[str, Any]]:
    """Messages as the wire can say them: what Google's tools say is an object, and has the tool's name."""
    if wire != "generate_content":
        return messages
    found = [{name: value for name, value in message.items() if name != "name"} for message in messages]
    return [
        {**message, "content": json.loads(message["content"])["output"]} if message["role"] == "tool" else message
        for message in found
    ]


@pytest.mark.parametrize("wire", WIRES, ids=lambda wire: wire.name)
def test_random_conversations_reach_the_backend_as_they_would_as_a_chat(wire: TranslatedDialect) -> None:
    for seed in range(1_000):
        turns = random_turns(random.Random(seed))
        body = json.dumps({"stream": True, **CONVERSATIONS[wire.name](turns)}).encode()
        request = wire.read_request(body, PARAMS.get(wire.name, {}))
        assert plain(request.body["messages"], wire.name) == chat_of(turns), seed
        assert (request.model, request.is_streamed, request.body["max_tokens"]) == ("policy", True, 9)
        assert request.notes == ()
        assert json.loads(request.recorded or b"") == request.body


@pytest.mark.parametrize("wire", WIRES, ids=lambda wire: wire.name)
def test_a_stream_that_loses_a_piece_is_seen_by_these_tests(wire: TranslatedDialect) -> None:
    """The negative control: without one event that carries text, the check fails."""
    request = asked(wire)
    chunk = {"id": "c", "choices": [{"index": 0, "delta": {"content": "word "}, "finish_reason": None}]}
    end = {"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    usage = {"id": "c", "choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    for kept in (2, 1):
        stream = wire.open_stream(frozenset(), request)
        chunks = [*[chunk] * kept, end, usage]
        shown = b"".join(stream.feed(b"data: " + json.dumps(each).encode() + b"\n\n") for each in chunks)
        said = READERS[wire.name](shown + stream.feed(b"data: [DONE]\n\n") + stream.end())
        choice = Choice({"content": "word word "}, "stop", [1], [0.0])
        if kept == 2:
            check_said(wire, said, choice, (1, 1))
        else:
            with pytest.raises(AssertionError):
                check_said(wire, said, choice, (1, 1))
