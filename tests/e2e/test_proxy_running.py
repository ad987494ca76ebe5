"""A proxy while it runs: pauses, hang-ups, limits, stores that are away, and its start and end."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import re
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import aiohttp
import pytest
from openai import APIStatusError, AsyncOpenAI, AuthenticationError, InternalServerError, RateLimitError

from agentlightning import (
    LLM,
    InMemoryLightningStore,
    LLMProxy,
    LlmProxyTraceToTriplet,
    ProxyLLM,
    Span,
    get_active_llm_proxy,
    set_active_llm_proxy,
)
from agentlightning.errors import InvalidValue, NotFound, StoreUnavailable
from agentlightning.proxy import llm_proxy, session as session_module
from agentlightning.proxy.admission import CallAdmission
from agentlightning.proxy.app import ProxyApp
from agentlightning.semconv import GenAIAttributes as GenAI, LLMCallAttributes as Call
from agentlightning.serving import connections as connection
from agentlightning.serving.connections import ConnectionBounds
from openai_backend import WAIT_SECONDS, Hold, OpenAIBackend
from proxied import MESSAGES, Proxied, attribute, body_of, proxied

MEBIBYTE = 1024 * 1024


async def ask(scene: Proxied, **options: Any) -> Any:
    async with scene.client(**options) as agent:
        return await agent.chat.completions.create(model="policy", messages=MESSAGES)


async def reached(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, WAIT_SECONDS)


async def health(proxy: LLMProxy) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.get(f"{proxy.url}/health") as response:
        return await response.json()


# --- Pauses ---------------------------------------------------------------------------------------------


async def test_a_pause_lets_calls_end_and_turns_new_ones_away() -> None:
    backend, hold = OpenAIBackend(), Hold(0)
    backend.plan(hold)
    async with proxied(backend) as scene:
        first = asyncio.create_task(ask(scene))
        await reached(hold.reached)
        assert await scene.proxy.pause(hold_seconds=0, retry_after_seconds=2.5, timeout_seconds=0.01) == 1
        assert (await health(scene.proxy))["status"] == "paused"
        with pytest.raises(RateLimitError) as caught:
            await ask(scene)
        assert caught.value.code == "proxy_paused"
        headers = caught.value.response.headers
        assert (headers["retry-after"], headers["retry-after-ms"]) == ("3", "2500")
        drained = asyncio.create_task(scene.proxy.pause())
        hold.release.set()
        assert await drained == 0
        assert (await first).choices[0].message.content
        await scene.proxy.resume()
        await ask(scene)
        assert len(await scene.spans()) == 2, "a call that was turned away is not a call"


async def test_openais_client_comes_back_after_a_pause_by_itself() -> None:
    async with proxied(OpenAIBackend()) as scene:
        await scene.proxy.pause(hold_seconds=0, retry_after_seconds=0.05)
        call = asyncio.create_task(ask(scene, max_retries=1000))
        await asyncio.sleep(0)
        scene.proxy.set_model_version("step-2")
        await scene.proxy.resume()
        assert (await call).choices[0].message.content
        assert attribute(await scene.only_span(), Call.MODEL_VERSION) == "step-2"


async def test_a_pause_holds_calls() -> None:
    async with proxied(OpenAIBackend()) as scene:
        await scene.proxy.pause()
        call = asyncio.create_task(ask(scene))
        done, _ = await asyncio.wait({call}, timeout=0.1)
        assert not done
        await scene.proxy.resume()
        assert (await call).choices[0].message.content
        await scene.proxy.pause(hold_seconds=0.01)
        with pytest.raises(RateLimitError) as caught:
            await ask(scene)
        assert 20 <= float(caught.value.response.headers["retry-after"]) <= 60, "OpenAI's clients ignore more than 60"


async def test_a_pause_that_follows_at_once_holds_the_held_calls_again() -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        admission = CallAdmission(max_calls=10)
        begun = asyncio.Event()

        async def call() -> None:
            begun.set()
            async with admission.place() as place:
                await place.admitted()
                assert not admission.is_paused

        await admission.pause(1.0, WAIT_SECONDS, None)
        held = asyncio.create_task(call())
        await begun.wait()
        await admission.resume()
        await admission.pause(1.0, WAIT_SECONDS, None)
        done, _ = await asyncio.wait({held}, timeout=0.05)
        assert not done
        await admission.resume()
        await held


@pytest.mark.parametrize("size", [10, 3_000_000], ids=["small", "large"])
async def test_a_held_call_whose_agent_hangs_up_frees_its_place_and_is_never_made(size: int) -> None:
    backend = OpenAIBackend()
    messages: Any = [{"role": "user", "content": "x" * size}]
    async with proxied(backend, max_calls=1) as scene, scene.client() as agent:
        await scene.proxy.pause()
        call = asyncio.create_task(agent.chat.completions.create(model="policy", messages=messages))
        await _until(scene.proxy, "calls_held", 1)
        call.cancel()
        await asyncio.wait({call})
        await _until(scene.proxy, "calls_held", 0)
        assert (await health(scene.proxy))["calls_unusable"] == {"not_received": 1}
        asked_again = asyncio.create_task(ask(scene))  # there is room for one
        await _until(scene.proxy, "calls_held", 1)
        await scene.proxy.resume()
        assert (await asked_again).choices[0].message.content
        assert await scene.proxy.pause() == 0
        await scene.proxy.stop()
        assert len(backend.seen) == 1, "the call that nobody waited for was not sent"
        spans = await scene.spans()
        examined = LlmProxyTraceToTriplet().examine(spans)
        assert ([each.reason for each in examined.unusable], len(examined.made)) == (
            ["the call failed: the agent closed the connection before the reply had ended"],
            1,
        )
        assert {attribute(each, Call.UNUSABLE) for each in spans} == {"not_received", None}


async def _until(proxy: LLMProxy, name: str, count: int) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while (await health(proxy))[name] != count:
            await asyncio.sleep(0.01)


async def test_a_large_request_that_is_held_is_not_taken_for_a_slow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "BYTES_PER_SECOND", 1e9)
    _bound(monkeypatch, header_seconds=0.05, body_seconds=0.05)
    messages: Any = [{"role": "user", "content": "x" * 3_000_000}]
    async with proxied(OpenAIBackend()) as scene, scene.client() as agent:
        await scene.proxy.pause(hold_seconds=0.5)  # longer than the request may take to arrive
        with pytest.raises(RateLimitError, match="paused"):
            await agent.chat.completions.create(model="policy", messages=messages)


async def test_a_version_can_be_that_of_one_model() -> None:
    backend = OpenAIBackend()
    with backend:
        async with proxied(entries=[backend.entry(), backend.entry("judge")]) as scene:
            scene.proxy.set_model_version("step-1", model="policy")
            async with scene.client() as agent:
                for model in ("policy", "judge"):
                    await agent.chat.completions.create(model=model, messages=MESSAGES)
            assert [attribute(span, Call.MODEL_VERSION) for span in await scene.spans()] == ["step-1", "fp-test"]


# --- Agents that hang up --------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_when_the_agent_hangs_up_so_does_the_proxy(stream: bool) -> None:
    backend, hold = OpenAIBackend(), Hold(2 if stream else 0)
    backend.plan(hold)
    async with proxied(backend) as scene:
        async with aiohttp.ClientSession() as session:
            question = {"model": "policy", "messages": MESSAGES, "stream": stream}
            call = asyncio.create_task(session.post(f"{scene.llm.endpoint}/chat/completions", json=question))
            await reached(hold.reached)
            if stream:
                response = await call
                await response.content.readuntil(b"word1")
                response.close()
            else:
                call.cancel()
                await asyncio.wait({call})
        await reached(hold.hung_up)
        await scene.proxy.pause(timeout_seconds=WAIT_SECONDS)
        await scene.proxy.stop()  # brings what is recorded to the store
        span = await scene.only_span()
        assert attribute(span, GenAI.ERROR_TYPE) == "client_disconnected"
        if stream:
            assert body_of(span, Call.RESPONSE)["choices"][0]["message"]["content"] == "word0 word1 "


async def test_an_agent_that_hangs_up_while_its_call_is_recorded_leaves_its_span_and_a_word_about_it() -> None:
    async with AwayStore() as store, proxied(OpenAIBackend(), record_wait_seconds=0.2) as scene:
        rollout = await store.start_rollout({})
        scene.proxy.set_store(store)
        llm = scene.proxy.as_resource(rollout.rollout_id, rollout.attempt.attempt_id)
        store.is_away = True
        async with aiohttp.ClientSession() as session:
            question = {"model": "policy", "messages": MESSAGES}
            call = asyncio.create_task(session.post(f"{llm.endpoint}/chat/completions", json=question))
            async with asyncio.timeout(WAIT_SECONDS):
                while (await health(scene.proxy))["spans_waiting"] == 0:
                    await asyncio.sleep(0.01)
            call.cancel()
            await asyncio.wait({call})
        assert await scene.proxy.pause(timeout_seconds=WAIT_SECONDS) == 0
        store.is_away = False
        await scene.proxy.stop()
        span, word = await store.query_spans(rollout.rollout_id)
        assert span.status.status_code == "OK", "the backend had answered"
        assert (word.parent_id, attribute(word, Call.CALL_SPAN_ID)) == (span.span_id, span.span_id)
        assert attribute(word, Call.UNUSABLE) == "not_received"
        examined = LlmProxyTraceToTriplet().examine([span, word])
        assert ([each.reason for each in examined.unusable], examined.made) == (["not_received"], [])


async def test_an_agent_that_goes_when_it_has_all_that_the_model_wrote_has_received_it() -> None:
    backend, hold = OpenAIBackend(), Hold(5)  # before usage and [DONE]
    backend.plan(hold)
    async with proxied(backend) as scene:
        async with aiohttp.ClientSession() as session:
            question = {"model": "policy", "messages": MESSAGES, "stream": True}
            response = await session.post(f"{scene.llm.endpoint}/chat/completions", json=question)
            await response.content.readuntil(b'"stop"')
            response.close()
        await reached(hold.hung_up)
        await scene.proxy.pause(timeout_seconds=WAIT_SECONDS)
        await scene.proxy.stop()
        span = await scene.only_span()
        assert (span.status.status_code, attribute(span, Call.UNUSABLE)) == ("OK", None)
        assert attribute(span, Call.RESPONSE_TOKEN_IDS) == [1000, 1001, 1002, 1003]


# --- Requests that are no model calls ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "key", "status"),
    [
        ("POST", "/v1/embeddings", "the-right-key", 404),
        ("GET", "/v1/chat/completions", "the-right-key", 405),
        ("POST", "/v1/chat/completions", "wrong", 401),
    ],
)
async def test_a_refused_request_of_an_attempt_is_on_record(
    method: str, path: str, key: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with proxied(OpenAIBackend(), api_key="the-right-key") as scene, aiohttp.ClientSession() as session:
        url = scene.llm.endpoint.removesuffix("/v1") + path
        async with session.request(method, url, headers={"Authorization": f"Bearer {key}"}) as response:
            assert response.status == status
        span = await scene.only_span()
        assert (span.status.status_code, attribute(span, GenAI.HTTP_STATUS_CODE)) == ("ERROR", status)
        assert span.attributes["url.path"] == url.removeprefix(scene.proxy.url)
        assert (await health(scene.proxy))["requests_refused"] == 1
        assert [each for each in caplog.messages if "was refused" in each]
        async with session.request(method, f"{scene.proxy.url}{path}") as response:
            assert response.status in (401, status)
        assert len(await scene.spans()) == 1, "it is of no attempt"


async def test_refused_requests_do_not_flood_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "_MAX_REFUSALS", 2)
    async with proxied(OpenAIBackend()) as scene, aiohttp.ClientSession() as session:
        for _ in range(4):
            async with session.get(f"{scene.llm.endpoint}/nothing") as response:
                assert response.status == 404
        assert len(await scene.spans()) == 2
        assert (await health(scene.proxy))["requests_refused"] == 4


async def test_a_stop_while_a_call_is_recorded_lets_the_reply_out() -> None:
    async with AwayStore() as store, proxied(OpenAIBackend(), grace_seconds=0.05) as scene:
        scene.proxy.set_store(store)
        store.is_away = True
        call = asyncio.create_task(ask(scene))
        async with asyncio.timeout(WAIT_SECONDS):
            while (await health(scene.proxy))["spans_waiting"] == 0:
                await asyncio.sleep(0.01)
        await scene.proxy.stop()
        assert (await call).choices[0].message.content


# --- Limits ----------------------------------------------------------------------------------------------


async def test_a_request_that_is_too_large_is_refused_while_it_comes() -> None:
    async with proxied(OpenAIBackend()) as scene:
        path = scene.llm.endpoint.removeprefix(scene.proxy.url)
        head = f"POST {path}/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        said = [f"{head}Content-Length: {33 * MEBIBYTE}\r\n\r\n".encode()]
        piece = f"{MEBIBYTE:x}\r\n".encode() + b"x" * MEBIBYTE + b"\r\n"
        unsaid = [f"{head}Transfer-Encoding: chunked\r\n\r\n".encode(), *[piece] * 33]
        for pieces in (said, unsaid):
            reply = await sent_raw(scene.proxy, pieces)
            assert reply.startswith(b"HTTP/1.1 413")
            assert b"request_too_large" in reply
        spans = await scene.spans()
        assert [attribute(span, GenAI.ERROR_TYPE) for span in spans] == ["request_too_large"] * 2


async def sent_raw(proxy: LLMProxy, pieces: list[bytes]) -> bytes:
    """The beginning of the reply to a request that is sent as it is."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(proxy))
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            with suppress(ConnectionError):  # it may be told before it has sent everything
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
            return await reader.readuntil(b"}}")
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'{"messages": []}', "model_required"),
        (b'{"model": 3}', "model_required"),
        (b'{"model": "policy", "x": NaN}', "invalid_json"),
        (b"\xff", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
    ],
)
async def test_a_request_that_is_none_is_refused_with_the_reason(body: bytes, code: str) -> None:
    async with proxied(OpenAIBackend()) as scene, aiohttp.ClientSession() as session:
        async with session.post(f"{scene.llm.endpoint}/chat/completions", data=body) as response:
            assert response.status == 400
            assert (await response.json())["error"]["code"] == code
        assert attribute(await scene.only_span(), GenAI.ERROR_TYPE) == code


async def test_a_request_and_a_reply_too_large_for_a_span_are_shortened() -> None:
    backend = OpenAIBackend(says=lambda _: "very " * 400_000)
    async with proxied(backend) as scene, scene.client() as agent:
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 6_000_000}}
        messages: Any = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, image]}]
        reply = await agent.chat.completions.create(model="policy", messages=messages)
        assert len(reply.choices[0].message.content or "") == 2_000_000
        span = await scene.only_span()
        text, url = body_of(span, Call.REQUEST)["messages"][0]["content"]
        assert text["text"] == "What is this?"
        assert url["image_url"]["url"].endswith("(shortened: 6000022 characters)")
        assert body_of(span, Call.RESPONSE)["choices"][0]["message"]["content"].endswith(
            "(shortened: 2000000 characters)"
        )


async def test_words_that_no_store_takes_are_mended() -> None:
    backend = OpenAIBackend(says=lambda _: "a\0b \U0001f600")
    async with proxied(backend) as scene, scene.client() as agent:
        reply = await agent.chat.completions.create(model="policy", messages=MESSAGES)
        assert (reply.choices[0].message.content or "").startswith("a\0b")
        stream = await agent.chat.completions.create(model="policy", messages=MESSAGES, stream=True)
        assert [chunk async for chunk in stream]
        with pytest.raises(APIStatusError):
            await agent.chat.completions.create(model="pol\0icy", messages=MESSAGES)
        assert len(await scene.spans()) == 3


async def test_more_calls_than_allowed_are_turned_away() -> None:
    backend, hold = OpenAIBackend(), Hold(0)
    backend.plan(hold)
    async with proxied(backend, max_calls=1) as scene:
        first = asyncio.create_task(ask(scene))
        await reached(hold.reached)
        with pytest.raises(InternalServerError) as caught:
            await ask(scene)
        assert (caught.value.code, caught.value.response.headers["retry-after"]) == ("proxy_overloaded", "1")
        hold.release.set()
        await first


async def test_calls_that_take_up_too_much_memory_are_turned_away() -> None:
    backend, hold = OpenAIBackend(), Hold(0)
    backend.plan(hold)
    async with proxied(backend) as scene, scene.client() as agent:
        scene.proxy._session.admission._max_bytes = 100_000  # type: ignore[union-attr]
        messages: Any = [{"role": "user", "content": "x" * 60_000}]
        first = asyncio.create_task(agent.chat.completions.create(model="policy", messages=messages))
        await reached(hold.reached)
        with pytest.raises(InternalServerError, match="near the proxy's limit"):
            await agent.chat.completions.create(model="policy", messages=messages)
        hold.release.set()
        await first
        await agent.chat.completions.create(model="policy", messages=messages)
        assert len(await scene.spans()) == 3


@pytest.mark.parametrize(
    ("sent", "seconds", "status"),
    [
        (b"", 0.05, 408),
        (b"POST /v1/chat/completions HTTP/1.1\r\nHost: x", 0.05, 408),
        (b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{", 0.05, 408),
        (b"GET /health HTTP/1.1\r\nX: " + b"x" * 70_000, WAIT_SECONDS, 431),
    ],
)
async def test_a_request_that_does_not_arrive_is_sent_away(
    sent: bytes, seconds: float, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _bound(monkeypatch, header_seconds=seconds, body_seconds=seconds)
    async with proxied(OpenAIBackend(), api_key="") as scene:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(scene.proxy))
        writer.write(sent)
        async with asyncio.timeout(WAIT_SECONDS):
            assert (await reader.read()).startswith(f"HTTP/1.1 {status}".encode())
        writer.close()


async def test_more_connections_than_allowed_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    _bound(monkeypatch, connections=2)
    async with proxied(OpenAIBackend()) as scene:
        open_ones = [await asyncio.open_connection("127.0.0.1", port_of(scene.proxy)) for _ in range(3)]
        async with asyncio.timeout(WAIT_SECONDS):
            assert (await open_ones[2][0].read()).startswith(b"HTTP/1.1 503")
        for _, writer in open_ones:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
        await ask(scene, max_retries=100)


def _bound(monkeypatch: pytest.MonkeyPatch, **bounds: Any) -> None:
    """Proxies have these bounds from now on."""

    def made(connections: int, connections_per_address: int) -> ConnectionBounds:
        return ConnectionBounds(
            **({"connections": connections, "connections_per_address": connections_per_address} | bounds)
        )

    monkeypatch.setattr(llm_proxy, "ConnectionBounds", made)


def port_of(proxy: LLMProxy) -> int:
    return int(proxy.url.rpartition(":")[2])


async def test_urls_that_are_not_served_say_what_is() -> None:
    async with proxied(OpenAIBackend(), api_key="") as scene, aiohttp.ClientSession() as session:
        for method, path, status in (("POST", "/v1/embeddings", 404), ("GET", "/v1/chat/completions", 405)):
            async with session.request(method, scene.proxy.url + path) as response:
                assert response.status == status
                assert "the proxy serves POST /v1/chat/completions" in (await response.json())["error"]["message"]
        for rollout_id in ("latest", "a b", "x" * 200):
            url = f"{scene.proxy.url}/rollout/{rollout_id}/attempt/at-1/v1/chat/completions"
            async with session.post(url, json={}) as response:
                assert (response.status, (await response.json())["error"]["code"]) == (400, "invalid_id")


# --- The store ---------------------------------------------------------------------------------------------


class AwayStore(InMemoryLightningStore):
    """A store that cannot be reached for as long as the test says."""

    is_away = False

    async def add_many_spans(self, spans: Sequence[Span]) -> Sequence[Span]:
        if self.is_away:
            raise StoreUnavailable("the store is away")
        return await super().add_many_spans(spans)


async def test_calls_go_on_while_the_store_is_away_and_nothing_is_lost() -> None:
    async with AwayStore() as store, proxied(OpenAIBackend(), record_wait_seconds=0.01) as scene:
        rollout = await store.start_rollout({})
        scene.proxy.set_store(store)
        scene.llm = scene.proxy.as_resource(rollout.rollout_id, rollout.attempt.attempt_id)
        store.is_away = True
        for _ in range(3):
            assert (await ask(scene)).choices[0].message.content
        assert (await health(scene.proxy))["spans_waiting"] == 3
        store.is_away = False
        await scene.proxy.stop()
        assert len(list(await store.query_spans(rollout.rollout_id))) == 3


async def test_a_stop_says_how_many_spans_are_lost(caplog: pytest.LogCaptureFixture) -> None:
    async with AwayStore() as store, proxied(OpenAIBackend(), record_wait_seconds=0, grace_seconds=0.05) as scene:
        scene.proxy.set_store(store)
        store.is_away = True
        await ask(scene)
        await scene.proxy.stop()
        assert "1 spans of model calls are lost" in caplog.text


async def test_a_span_that_the_store_refuses_does_not_hold_up_the_others(caplog: pytest.LogCaptureFixture) -> None:
    async with proxied(OpenAIBackend()) as scene:
        unknown = scene.proxy.as_resource("ro-unknown", "at-unknown")
        async with scene.client() as agent, AsyncOpenAI(base_url=unknown.endpoint, api_key="any") as stranger:
            calls = [each.chat.completions.create(model="policy", messages=MESSAGES) for each in (agent, stranger) * 5]
            await asyncio.gather(*calls)
        assert len(await scene.spans()) == 5
        assert (await health(scene.proxy))["spans_lost"] == 5
        refused = re.findall(r"the store refuses (\d+) span\(s\) of rollout ro-unknown", caplog.text)
        assert sum(map(int, refused)) == 5


async def test_a_call_that_cannot_be_recorded_is_not_made() -> None:
    backend = OpenAIBackend()
    with backend:
        proxy = LLMProxy(model_list=[backend.entry()])
        await proxy.start()
        try:
            llm = proxy.as_resource("ro-1", "at-1")
            async with AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key, max_retries=0) as agent:
                with pytest.raises(InternalServerError, match="no store"):
                    await agent.chat.completions.create(model="policy", messages=MESSAGES)
        finally:
            await proxy.stop()
        assert backend.seen == []


# --- Start and end --------------------------------------------------------------------------------------------


async def test_a_stop_cuts_off_calls_that_do_not_end_and_records_them() -> None:
    backend, whole, streamed = OpenAIBackend(), Hold(0), Hold(2)
    backend.plan(whole, streamed)
    async with proxied(backend, grace_seconds=0.05) as scene, scene.client() as agent:
        first = asyncio.create_task(ask(scene))
        await reached(whole.reached)
        stream = await agent.chat.completions.create(model="policy", messages=MESSAGES, stream=True)
        await reached(streamed.reached)
        await scene.proxy.stop()
        with pytest.raises(InternalServerError, match="stopped during the call"):
            await first
        with pytest.raises(Exception, match="stopped during the call"):
            _ = [chunk async for chunk in stream]
        assert {attribute(span, GenAI.ERROR_TYPE) for span in await scene.spans()} == {"proxy_stopped"}
        assert len(await scene.spans()) == 2


async def test_start_stop_and_restart() -> None:
    backend = OpenAIBackend()
    with backend:
        proxy = LLMProxy(model_list=[backend.entry()])
        assert not proxy.is_running()
        with pytest.raises(InvalidValue, match="after start"):
            proxy.as_resource()
        with pytest.raises(InvalidValue, match="start it first"):
            await proxy.pause()
        await proxy.stop()
        await proxy.start()
        url = proxy.url
        await proxy.start()
        assert proxy.is_running()
        assert get_active_llm_proxy() is proxy
        await proxy.restart()
        assert (proxy.url, (await health(proxy))["status"]) == (url, "ok")
        await proxy.stop()
        await proxy.stop()
        assert not proxy.is_running()
        with pytest.raises(NotFound, match="no LLM proxy is active"):
            get_active_llm_proxy()
        set_active_llm_proxy(proxy)
        assert get_active_llm_proxy() is proxy
        port = port_of(proxy)
        taken = rf"port {port} on 127\.0\.0\.1 is taken by process {os.getpid()} "
        with socket.create_server(("127.0.0.1", port)), pytest.raises(InvalidValue, match=taken):
            await LLMProxy(port=port).start()
        assert not [thread for thread in threading.enumerate() if thread.name == "agl-llm-proxy"]


async def test_a_start_that_is_cancelled_leaves_no_server_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, release = threading.Event(), threading.Event()

    class SlowApp(ProxyApp):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            entered.set()
            assert release.wait(WAIT_SECONDS)

    monkeypatch.setattr(llm_proxy, "ProxyApp", SlowApp)
    proxy = LLMProxy()
    start = asyncio.create_task(proxy.start())
    await reached(entered)
    start.cancel()
    release.set()  # the start goes on in its thread, although nobody waits for it
    with pytest.raises(asyncio.CancelledError):
        await start
    assert not proxy.is_running()
    assert not [thread for thread in threading.enumerate() if thread.name == "agl-llm-proxy"]
    await proxy.start()
    assert (await health(proxy))["status"] == "ok"
    await proxy.stop()


def test_a_proxy_serves_agents_while_the_loop_that_started_it_is_busy_or_gone() -> None:
    backend = OpenAIBackend()
    with backend:
        proxy = LLMProxy(model_list=[backend.entry()])
        asyncio.run(proxy.start())
        try:
            from openai import OpenAI

            with OpenAI(base_url=proxy.as_resource().get_base_url(), api_key="any", max_retries=0) as agent:
                assert agent.chat.completions.create(model="policy", messages=MESSAGES).choices
        finally:
            asyncio.run(proxy.stop())


async def test_a_copy_in_another_process_knows_where_the_proxy_is_and_does_not_run() -> None:
    async with proxied(OpenAIBackend()) as scene:
        scene.proxy._store = None  # stores are copied in their own ways
        copy = pickle.loads(pickle.dumps(scene.proxy))
        assert not copy.is_running()
        assert copy.as_resource() == scene.proxy.as_resource()
        await copy.stop()
        assert scene.proxy.is_running()


# --- Who may call ------------------------------------------------------------------------------------------------


async def test_a_proxy_with_a_key_wants_it() -> None:
    backend = OpenAIBackend()
    async with proxied(backend, api_key="key-of-the-proxy") as scene:
        assert scene.llm.api_key == "key-of-the-proxy"
        await ask(scene)
        async with AsyncOpenAI(base_url=scene.llm.endpoint, api_key="wrong") as stranger:
            with pytest.raises(AuthenticationError, match="missing or wrong"):
                await stranger.chat.completions.create(model="policy", messages=MESSAGES)
            with pytest.raises(AuthenticationError, match="missing or wrong"):
                await stranger.models.list()
        names = [span.name for span in await scene.spans()]
        assert names == ["chat policy", "refused request", "refused request"]
        assert len(backend.seen) == 1


async def test_a_proxy_that_others_can_reach_always_has_a_key() -> None:
    async with proxied(OpenAIBackend(), host="0.0.0.0") as scene:
        assert len(scene.llm.api_key or "") >= 32
        assert not scene.proxy.url.startswith("http://0.0.0.0")
        await ask(scene)
        async with AsyncOpenAI(base_url=scene.llm.endpoint, api_key="not-needed") as stranger:
            with pytest.raises(AuthenticationError):
                await stranger.chat.completions.create(model="policy", messages=MESSAGES)


@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Host": "evil.example"}])
async def test_a_web_page_cannot_call_a_proxy_without_a_key(headers: dict[str, str]) -> None:
    backend = OpenAIBackend()
    async with proxied(backend, api_key="") as scene, aiohttp.ClientSession(headers=headers) as browser:
        question = json.dumps({"model": "policy", "messages": MESSAGES})
        async with browser.post(f"{scene.llm.endpoint}/chat/completions", data=question) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (403, "forbidden_origin")
        assert backend.seen == []


# --- Resources ---------------------------------------------------------------------------------------------------


async def test_resources_for_agents() -> None:
    entries = [
        {"model_name": name, "litellm_params": {"model": "openai/any", "api_base": "http://127.0.0.1:9/v1"}}
        for name in ("policy", "policy", "judge")
    ]
    proxy = LLMProxy(port=4321, model_list=entries[:2], api_key="key-of-the-user")
    resource = proxy.as_resource(sampling_parameters={"temperature": 0})
    assert type(resource) is ProxyLLM
    assert (resource.model, resource.sampling_parameters) == ("policy", {"temperature": 0})
    assert resource.get_base_url("r", "a") == "http://127.0.0.1:4321/rollout/r/attempt/a/v1"
    scoped = proxy.as_resource("r", "a")
    assert type(scoped) is LLM
    assert scoped.endpoint == resource.get_base_url("r", "a")
    with pytest.raises(ValueError, match="both ids, or neither"):
        proxy.as_resource("r")
    with pytest.raises(ValueError, match="does not serve the model 'judge'"):
        proxy.as_resource(model="judge")
    with pytest.raises(ValueError, match="say which model"):
        LLMProxy(port=4321, model_list=entries).as_resource()
    public = LLMProxy(model_list=entries, public_url="https://gpu.example/llm/v1/").as_resource(model="judge")
    assert public.get_base_url("r", "a") == "https://gpu.example/llm/rollout/r/attempt/a/v1"
