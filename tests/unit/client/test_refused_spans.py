"""Spans that a store refuses: how many calls it takes to store the others, and in which order they are stored."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest

from agentlightning.errors import AgentLightningError, IdReused, InvalidValue, NotFound, RefusedSpan, StaleAttempt
from agentlightning.http import codec
from agentlightning.http.client.client import LightningStoreClient
from agentlightning.http.server.server import LightningStoreServer
from agentlightning.store.refusals import MOST_NAMED, send_apart
from agentlightning.store.sqlite.store import InMemoryLightningStore
from agentlightning.tracer.sender import add_spans_apart
from agentlightning.types import AttemptedRollout, Span
from asgi_calls import AsgiCalls
from scenes import span_of, started

MANY, BAD = 1000, range(37, 1000, 100)


class _Counting:
    """A client that counts what it sends."""

    def __init__(self, client: LightningStoreClient) -> None:
        self._client = client
        self.calls: list[int] = []

    async def add_many_spans(self, spans: Sequence[Span]) -> object:
        self.calls.append(len(spans))
        return await self._client.add_many_spans(spans)


class _Scene(NamedTuple):
    attempted: AttemptedRollout
    sent: _Counting
    client: LightningStoreClient


@asynccontextmanager
async def _scene() -> AsyncIterator[_Scene]:
    """An attempt in the store of a server."""
    async with (
        InMemoryLightningStore() as store,
        LightningStoreServer(store, port=0) as server,
        LightningStoreClient(server.endpoint, spool_dir=None) as client,
    ):
        yield _Scene(await started(client), _Counting(client), client)


def _numbered(attempted: AttemptedRollout, number: int) -> Span:
    return span_of(attempted, name=f"{number}", span_id=f"{number + 1:016x}")


@pytest.mark.parametrize("kind", ["reused", "gone", "invalid"])
async def test_one_more_call_stores_the_rest_in_order(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async with _scene() as (attempted, sent, client):
        spans = [_numbered(attempted, number) for number in range(MANY)]
        if kind == "reused":
            await client.add_many_spans([spans[place].model_copy(update={"name": "before"}) for place in BAD])
        else:
            bad: dict[str, Any] = {"attempt_id": "at-gone"} if kind == "gone" else {"attributes": {"k": object()}}
            for place in BAD:
                spans[place] = spans[place].model_copy(update=bad)
        lost = await add_spans_apart(sent, spans)  # pyright: ignore[reportArgumentType]
        left_out = len(BAD) if kind == "gone" else 0
        assert sent.calls == [MANY, MANY - left_out]
        assert lost == left_out
        stored = await client.query_spans(attempted.rollout_id, limit=-1)
        names = [span.name for span in stored if span.name != "before"]
        assert names == [span.name for span in spans if kind != "gone" or span.attempt_id != "at-gone"]


async def test_a_server_that_names_none_is_asked_about_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control, and what a server does that cannot name them."""
    monkeypatch.setattr(codec, "MOST_NAMED", 0)
    async with _scene() as (attempted, sent, client):
        spans = [_numbered(attempted, number) for number in range(MANY)]
        await client.add_many_spans([spans[place].model_copy(update={"name": "before"}) for place in BAD])
        assert await add_spans_apart(sent, spans) == 0  # pyright: ignore[reportArgumentType]
        assert len(sent.calls) > 100
        stored = await client.query_spans(attempted.rollout_id, limit=-1)
        assert [span.name for span in stored if span.name != "before"] == [f"{number}" for number in range(MANY)]


async def test_what_is_refused_in_place_of_another_span_is_lost_and_not_sent_for_ever() -> None:
    calls: list[int] = []

    class Wilful:
        async def add_many_spans(self, spans: Sequence[Span]) -> object:
            calls.append(len(spans))
            refused = [place for place, span in enumerate(spans) if span.span_id == wanted.span_id]
            if refused:
                error = InvalidValue("not this one")
                error.refused_spans = [RefusedSpan(place, wanted.span_id, InvalidValue("no")) for place in refused]
                raise error
            return spans

    async with _scene() as (attempted, _, _):
        spans = [_numbered(attempted, number) for number in range(5)]
        wanted = spans[2]
        assert await add_spans_apart(Wilful(), spans) == 1  # pyright: ignore[reportArgumentType]
    assert calls == [5, 5, 4]


@pytest.mark.parametrize("places", [[-1], [4], [1, 1], [2, 1]])
async def test_names_that_do_not_fit_are_not_believed(places: list[int]) -> None:
    taken: list[int] = []
    put_away: list[int] = []

    async def send(some: Sequence[int]) -> None:
        if 2 in some:
            error = IdReused("one of them")
            error.refused_spans = [RefusedSpan(place, "s", IdReused("this one")) for place in places]
            raise error
        taken.extend(some)

    async def replace(some: Sequence[int], _: AgentLightningError) -> Sequence[int]:
        put_away.extend(some)
        return ()

    await send_apart(range(4), send, replace, attempt_of=lambda _: "at-1")
    assert (taken, put_away) == ([0, 1, 3], [2])


async def test_spans_of_one_attempt_that_the_store_does_not_know_are_put_away_together() -> None:
    groups: list[Sequence[str]] = []

    async def send(some: Sequence[str]) -> None:
        known = {"a": None, "b": NotFound("b is not here"), "c": StaleAttempt("c has ended")}
        errors = [(place, why) for place, each in enumerate(some) if (why := known[each[0]])]
        if errors:
            error = NotFound("some are not here")
            error.refused_spans = [RefusedSpan(place, some[place], why) for place, why in errors]
            raise error

    async def replace(some: Sequence[str], _: AgentLightningError) -> Sequence[str]:
        groups.append(some)
        return ()

    await send_apart(["a1", "b1", "b2", "c1", "b3", "a2"], send, replace, attempt_of=lambda each: each[0])
    assert groups == [["b1", "b2"], ["c1"], ["b3"]]


async def test_an_error_about_spans_of_a_later_request_names_their_places_in_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agentlightning.http.client.span_delivery._CHUNK_SPANS", 4)
    async with _scene() as (attempted, _, client):
        spans = [_numbered(attempted, number) for number in range(10)]
        await client.add_many_spans([spans[place].model_copy(update={"name": "before"}) for place in (5, 7)])
        with pytest.raises(IdReused) as raised:
            await client.add_many_spans(spans)
        assert [(each.place, each.span_id) for each in raised.value.refused_spans] == [
            (place, spans[place].span_id) for place in (5, 7)
        ]


async def test_a_server_names_what_is_wrong_with_each_span_and_at_most_so_many() -> None:
    async with InMemoryLightningStore() as store:
        server, attempted = AsgiCalls(store), await started(store)
        whole = json.loads(_numbered(attempted, 0).model_dump_json())
        wrong = [
            {**whole, "span_id": 7},
            {**whole, "attributes": {"a": [[]]}},
            {**whole, "start_time": "soon"},
            {**whole, "span_id": "x" * 500},
            {},
            "no span",
        ]
        answer = await server.call("POST", "/agl/v1/spans/bulk", json.dumps({"spans": [whole, *wrong, whole]}).encode())
        assert answer.status == 422
        refused = json.loads(answer.body)["refused_spans"]
        assert [(each["index"], each["span_id"]) for each in refused] == [
            (1, ""),
            (2, whole["span_id"]),
            (3, whole["span_id"]),
            (4, "x" * 128),
            (5, ""),
            (6, ""),
        ]
        assert all(each["code"] in ("invalid_value", "invalid_id", "not_json") for each in refused)
        assert "attribute" in refused[1]["detail"]
        assert "start_time" in refused[2]["detail"]

        answer = await server.call("POST", "/agl/v1/spans/bulk", json.dumps({"spans": [{}] * 2000}).encode())
        assert len(json.loads(answer.body)["refused_spans"]) == MOST_NAMED
        for body in (b"[]", b"{", b'{"spans":7}', b'{"spans":[]} '):
            answer = await server.call("POST", "/agl/v1/spans/bulk", body)
            assert "refused_spans" not in json.loads(answer.body or b"{}")
