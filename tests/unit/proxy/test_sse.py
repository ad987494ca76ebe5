"""Streams of events, cut wherever the network cuts them."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, strategies as st

from agentlightning.proxy.calls import StreamRelay
from agentlightning.proxy.dialects import ChatCompletions
from agentlightning.proxy.dialects.base import (
    CAPTURE_FIELDS,
    CaptureField,
    EventSplitter,
    EventTooLarge,
    ReplyStream,
    Scrubber,
    data_of,
    event_of,
)
from asked import ASKED

_LINE_ENDS = st.sampled_from([b"\n\n", b"\r\n\r\n", b"\r\r"])
_EVENTS = st.lists(
    st.tuples(
        st.sampled_from([b'data: {"a": "\xc3\xa9"}', b": ping", b"data: x\ndata: y", b"id: 1\ndata:z"]), _LINE_ENDS
    )
)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """``data`` in pieces."""
    edges = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@given(_EVENTS, st.lists(st.integers(min_value=0, max_value=10_000)), st.sampled_from([b"", b"data: half"]))
def test_events_are_the_same_however_the_stream_is_cut(
    events: list[tuple[bytes, bytes]], places: list[int], rest: bytes
) -> None:
    whole = [text + end for text, end in events]
    splitter = EventSplitter(1000)
    found = [event for piece in cut(b"".join(whole) + rest, places) for event in splitter.feed(piece)]
    assert found == whole
    assert splitter.rest() == rest


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: {}\n\n", b"{}"),
        (b"data:{}\r\n\r\n", b"{}"),
        (b"data: a\ndata: b\n\n", b"a\nb"),
        (b"event: x\nid: 3\ndata: {}\n\n", b"{}"),
        (b": ping\n\n", None),
        (b"data:\n\n", b""),
        (b"\xef\xbb\xbfdata: {}\n\n", b"{}"),
        (b"data: a\rdata: b\r\r", b"a\nb"),
        (b"\n\n", None),
    ],
)
def test_the_data_of_an_event(event: bytes, data: bytes | None) -> None:
    assert data_of(event) == data


def test_an_event_that_never_ends_is_given_up() -> None:
    splitter = EventSplitter(100)
    splitter.feed(b"data: " + b"x" * 90)
    with pytest.raises(EventTooLarge):
        splitter.feed(b"x" * 20)


def test_an_event_in_very_many_pieces_is_not_looked_through_again_for_each() -> None:
    event = b"data: " + b"x" * 2_000_000 + b"\r\n\r\n"
    splitter = EventSplitter(len(event))
    pieces = [event[start : start + 100] for start in range(0, len(event), 100)]  # minutes, if each looked at all
    assert [found for piece in pieces for found in splitter.feed(piece)] == [event]


# --- The relay ---------------------------------------------------------------------------------------------

KEY = "sk-key-of-the-backend"
SCRUBBER = Scrubber(KEY, {"X-Auth-Token": "Token tok-0123456789"})


def relay(
    scrubber: Scrubber | None = None, hidden: frozenset[CaptureField] = frozenset()
) -> tuple[StreamRelay, ReplyStream]:
    """A streamed chat on its way, and what reads it."""
    stream = ChatCompletions().open_stream(hidden, ASKED)
    return StreamRelay(stream, scrubber or Scrubber()), stream


def chunk(text: str, **more: object) -> bytes:
    """A chunk of a streamed chat, as an event."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None, **more}
    return event_of(json.dumps({"id": "c", "choices": [choice]}).encode())


@given(st.lists(st.integers(min_value=0, max_value=10_000)))
def test_what_the_agent_sees_is_the_same_however_the_stream_is_cut(places: list[int]) -> None:
    stream = (
        chunk("Hello ") + b": ping\r\n\r\n" + chunk("wörld") + chunk("", finish_reason="stop") + b"data: [DONE]\n\nrest"
    )
    tee, read = relay()
    shown = b"".join(tee.feed(piece) for piece in cut(stream, places))
    assert shown + tee.ending() == stream
    assert tee.ending() == b"data: [DONE]\n\nrest", "the end is held back"
    assert read.is_complete
    assert json.loads(read.recorded().body)["choices"][0]["message"]["content"] == "Hello wörld"


def test_the_last_event_may_lack_its_empty_line() -> None:
    """It is read, and what is hidden in it stays hidden."""
    usage = event_of(b'{"id": "c", "choices": [], "usage": {"completion_tokens": 1}}').rstrip()
    for last in (chunk("", finish_reason="stop", token_ids=[7]).rstrip(), usage):
        tee, read = relay(hidden=CAPTURE_FIELDS)
        tee.feed(chunk("a", finish_reason=None if last is not usage else "stop") + last)
        tee.read_rest()
        assert read.is_complete
        shown = tee.ending()
        assert b"token_ids" not in shown
        assert b"completion_tokens" not in shown
        assert (b"stop" in shown) is (last is not usage)


def test_a_stream_that_is_none_passes_as_it_is() -> None:
    stream = b"data: no json\n\ndata: [1]\n\ndata: 3\n\nevent: x\n\n" + event_of(b'{"choices": 3}')
    tee, read = relay(hidden=CAPTURE_FIELDS)
    assert tee.feed(stream).startswith(b"data: no json\n\ndata: [1]\n\ndata: 3\n\nevent: x\n\n")
    assert not read.is_complete
    assert tee.ending() == b""


def test_secrets_are_taken_out_of_streams() -> None:
    tee, read = relay(SCRUBBER)
    shown = tee.feed(chunk(f"{KEY} and tok-0123456789")) + tee.feed(b"data: [DONE] " + KEY.encode())
    assert b"*** and ***" in shown
    recorded = read.recorded()
    recorded.scrub(SCRUBBER)
    assert KEY.encode() not in shown + tee.ending() + recorded.body


def test_a_key_with_slashes_is_known_however_json_writes_it() -> None:
    assert Scrubber("k/e/y/0123456").text(r"k/e/y/0123456 and k\/e\/y\/0123456") == "*** and ***"


def test_words_that_are_no_secrets_stay() -> None:
    assert Scrubber("EMPTY", {"X-Team": "blue-team"}).text("the blue-team is EMPTY") == "the blue-team is EMPTY"
