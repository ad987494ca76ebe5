"""Random valid streams: the record is what was said, the agent sees all of it but what only the proxy asked for."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest

from agentlightning.proxy.calls import StreamRelay
from agentlightning.proxy.dialects import ChatCompletions
from agentlightning.proxy.dialects.base import CAPTURE_FIELDS, CaptureField, Scrubber
from agentlightning.semconv import UnusableReason
from asked import ASKED
from random_streams import Stream, events_of, put_together, random_stream

CHAT = ChatCompletions()
ID_NAMES = ("token_ids", "response_token_ids")
HIDDEN_NAMES = {
    "token_ids": (*ID_NAMES, "prompt_token_ids", "sglext"),
    "logprobs": (),
    "usage": ("usage",),
}


def relayed(rng: random.Random, data: bytes, hidden: frozenset[CaptureField]) -> tuple[Any, bytes]:
    """The record of a stream that came in random pieces, and what the agent got."""
    stream = CHAT.open_stream(hidden, ASKED)
    relay = StreamRelay(stream, Scrubber())
    edges = sorted({0, len(data), *(rng.randrange(len(data) + 1) for _ in range(rng.randrange(6)))})
    shown = b"".join(relay.feed(data[start:end]) for start, end in itertools.pairwise(edges))
    assert stream.is_done
    return stream.recorded(), shown + relay.ending()


def check(seed: int) -> None:
    rng = random.Random(seed)
    made = random_stream(rng)
    hidden = frozenset[CaptureField](each for each in sorted(CAPTURE_FIELDS) if rng.random() < 0.7)
    record, shown = relayed(rng, made.data, hidden)
    check_record(made, record)
    check_view(made, shown, hidden)
    if seed % 8 == 0:
        check_loss(rng, made, hidden)


def check_loss(rng: random.Random, made: Stream, hidden: frozenset[CaptureField]) -> None:
    """A server that loses the ids of one chunk makes no example."""
    pieces = [piece for chunk in made.chunks for piece in chunk["choices"] if any(piece.get(name) for name in ID_NAMES)]
    victim = rng.choice(pieces)
    for name in ID_NAMES:
        victim.pop(name, None)
    less = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in made.chunks) + "data: [DONE]\n\n"
    record, _ = relayed(rng, less.encode(), hidden)
    has_none = all(choice.token_ids is None for choice in record.choices)
    assert has_none or record.unusable == UnusableReason.TOKEN_IDS_INCOMPLETE


def check_record(made: Stream, record: Any) -> None:
    assert record.unusable is None
    assert record.error is None
    assert record.response_id == made.head["id"]
    assert list(record.prompt_token_ids) == made.prompt_token_ids
    body = json.loads(record.body)
    for index, choice in enumerate(made.choices):
        kept, said = record.choices[index], body["choices"][index]
        assert list(kept.token_ids) == choice.token_ids
        assert list(kept.logprobs) == choice.logprobs
        assert kept.finish_reason == said["finish_reason"] == choice.finish_reason
        assert said["message"] == {"content": None, **choice.message}
        assert {name: said[name] for name in choice.others} == choice.others


def check_view(made: Stream, shown: bytes, hidden: frozenset[CaptureField]) -> None:
    events = events_of(shown)
    assert events[-1] == "[DONE]"
    chunks: list[Any] = [json.loads(event) for event in events[:-1]]
    for name in (name for each in hidden for name in HIDDEN_NAMES[each]):
        assert not any(name in chunk or any(name in piece for piece in chunk["choices"]) for chunk in chunks)
    for index, choice in put_together(chunks).items():
        expected = made.choices[index]
        assert choice["message"] == expected.message
        assert choice["finish_reason"] == expected.finish_reason
        assert {name: choice[name] for name in expected.others} == expected.others
        assert ("logprobs" in choice) <= ("logprobs" not in hidden)
    if not hidden:
        assert shown == made.data


def check_all(seeds: range) -> None:
    for seed in seeds:
        try:
            check(seed)
        except Exception as error:
            raise AssertionError(f"the stream of the seed {seed}") from error


@pytest.mark.parametrize("part", range(4))
def test_20_000_random_streams_are_recorded_and_shown_exactly(part: int) -> None:
    check_all(range(5_000 * part, 5_000 * (part + 1)))


@pytest.mark.slow
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("part", range(10))
def test_a_million_random_streams_are_recorded_and_shown_exactly(part: int) -> None:
    check_all(range(100_000 * part, 100_000 * (part + 1)))
