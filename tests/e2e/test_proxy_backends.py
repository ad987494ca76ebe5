"""Backends that fail, refuse, break off or come in several: what the agent gets, and what is on record."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from openai import APIError, APIStatusError, AsyncOpenAI

from agentlightning.proxy import calls, upstream
from agentlightning.semconv import GenAIAttributes as GenAI, LLMCallAttributes as Call
from agentlightning.store.sqlite.store import SqliteLightningStore
from openai_backend import BreakOff, Compress, Fail, Hold, OpenAIBackend, Say, Write
from proxied import MESSAGES, Proxied, attribute, body_of, proxied

BUSY = Fail(503, headers={"Retry-After": "0"})
KEY = "sk-upstream-0123456789abcdef"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "_FIRST_PAUSE_SECONDS", 0.01)


async def ask(scene: Proxied, **question: Any) -> Any:
    """The reply to one question; of a stream, its text."""
    async with scene.client() as agent:
        reply: Any = await agent.chat.completions.create(**{"model": "policy", "messages": MESSAGES, **question})
        if not question.get("stream"):
            return reply
        return "".join([chunk.choices[0].delta.content or "" async for chunk in reply])


# --- Trying again --------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [BUSY, Fail(500), Fail(429), BreakOff(0)])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_failed_before_its_first_byte_is_tried_again(step: Any, stream: bool) -> None:
    backend = OpenAIBackend()
    backend.plan(step, step)
    async with proxied(backend) as scene:
        reply = await ask(scene, stream=stream)
        assert (reply if stream else reply.choices[0].message.content).startswith("word0")
        span = await scene.only_span()
        assert (len(backend.seen), attribute(span, Call.RETRIES), span.status.status_code) == (3, 2, "OK")


async def test_the_number_of_retries_is_what_was_asked_for() -> None:
    backend = OpenAIBackend()
    backend.plan(BUSY, BUSY)
    async with proxied(backend, num_retries=0) as scene:
        with pytest.raises(APIStatusError) as caught:
            await ask(scene)
        assert (caught.value.status_code, len(backend.seen)) == (503, 1)


async def test_when_all_tries_fail_the_agent_gets_the_last_answer() -> None:
    backend = OpenAIBackend()
    broken = Fail(500, {"error": {"message": "out of memory", "code": "oom"}})
    backend.plan(BUSY, BUSY, broken, broken)  # the last one is asked for nothing that the agent did not ask for
    async with proxied(backend) as scene:
        with pytest.raises(APIStatusError, match="out of memory") as caught:
            await ask(scene)
        assert caught.value.status_code == 500
        span = await scene.only_span()
        assert (span.status.status_code, span.status.description) == ("ERROR", "out of memory")
        assert (attribute(span, GenAI.ERROR_TYPE), attribute(span, GenAI.HTTP_STATUS_CODE)) == ("oom", 500)


async def test_a_long_retry_after_is_left_to_the_agent() -> None:
    backend = OpenAIBackend()
    backend.plan(Fail(429, headers={"Retry-After": "60"}))
    async with proxied(backend) as scene:
        with pytest.raises(APIStatusError) as caught:
            await ask(scene)
        assert caught.value.response.headers["retry-after"] == "60"
        assert len(backend.seen) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_backend_that_compresses_though_nobody_asked(stream: bool) -> None:
    backend = OpenAIBackend()
    backend.plan(Compress())
    async with proxied(backend) as scene:
        reply = await ask(scene, stream=stream)
        text = reply if stream else reply.choices[0].message.content
        assert text == "word0 word1 word2 word3 "
        span = await scene.only_span()
        assert body_of(span, Call.RESPONSE)["choices"][0]["message"]["content"] == text


async def test_nothing_is_repeated_after_the_first_byte() -> None:
    backend = OpenAIBackend()
    backend.plan(BreakOff(2))
    async with proxied(backend) as scene:
        async with scene.client() as agent:
            stream = await agent.chat.completions.create(model="policy", messages=MESSAGES, stream=True)
            words = [(await anext(stream)).choices[0].delta.content for _ in range(2)]
            assert words == ["word0 ", "word1 "]
            with pytest.raises(APIError, match="broke off"):
                await anext(stream)
        assert len(backend.seen) == 1
        span = await scene.only_span()
        assert attribute(span, GenAI.ERROR_TYPE) == "backend_broke_off"
        assert body_of(span, Call.RESPONSE)["choices"][0]["message"]["content"] == "word0 word1 "


async def test_a_backend_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    params = {"model": "openai/m", "api_base": f"http://127.0.0.1:{port}/v1"}
    async with proxied(entries=[{"model_name": "policy", "litellm_params": params}]) as scene:
        with pytest.raises(APIStatusError, match=r"cannot be reached.*tried 3 times") as caught:
            await ask(scene)
        assert (caught.value.status_code, caught.value.code) == (502, "backend_unreachable")
        assert attribute(await scene.only_span(), GenAI.ERROR_TYPE) == "backend_unreachable"


async def test_a_backend_that_says_nothing() -> None:
    backend, hold = OpenAIBackend(), Hold(0)
    backend.plan(hold)
    with backend:
        async with proxied(entries=[backend.entry(timeout=0.1)]) as scene:
            with pytest.raises(APIStatusError, match=r"sent nothing for 0.1 s") as caught:
                await ask(scene)
            assert (caught.value.status_code, len(backend.seen)) == (504, 1)


# --- Several backends ------------------------------------------------------------------------------------


async def test_all_calls_of_a_rollout_go_to_one_backend_and_rollouts_spread() -> None:
    backends = [OpenAIBackend() for _ in range(3)]
    async with proxied(*backends) as scene:
        chosen: Counter[str] = Counter()
        for _ in range(24):
            rollout = await scene.store.start_rollout({})
            llm = scene.proxy.as_resource(rollout.rollout_id, rollout.attempt.attempt_id)
            async with AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key) as agent:
                for _ in range(3):
                    await agent.chat.completions.create(model="policy", messages=MESSAGES)
            spans = await scene.store.query_spans(rollout.rollout_id)
            (name,) = {str(attribute(span, Call.BACKEND)) for span in spans}
            chosen[name] += 1
        assert len(chosen) == 3
        assert sum(len(backend.seen) for backend in backends) == 72


async def test_another_backend_takes_over_from_one_that_is_down() -> None:
    backends = [OpenAIBackend() for _ in range(2)]
    async with proxied(*backends) as scene:
        await ask(scene)
        down, other = sorted(backends, key=lambda backend: len(backend.seen), reverse=True)
        down.stop()
        await ask(scene)
        await ask(scene)
        _, second, third = await scene.spans()
        assert [attribute(span, Call.RETRIES) for span in (second, third)] == [1, 0], "the third knows better at once"
        assert len(other.seen) == 2


async def test_a_new_model_list_counts_at_once() -> None:
    first, second = OpenAIBackend(), OpenAIBackend()
    with second:
        async with proxied(first) as scene:
            await ask(scene)
            scene.proxy.update_model_list([second.entry()])
            await ask(scene)
            assert (len(first.seen), len(second.seen)) == (1, 1)


# --- What backends are asked for ---------------------------------------------------------------------------


async def test_the_backend_is_asked_for_tokens_and_the_agents_wishes_stay() -> None:
    backend = OpenAIBackend()
    with backend:
        entry = backend.entry(temperature=0.1, top_p=0.9, extra_body={"seed": 7}, extra_headers={"x-team": "blue"})
        async with proxied(entries=[entry]) as scene:
            await ask(scene, stream=True, temperature=0.7, seed=1)
            seen = backend.seen[0]
            assert seen.body == {
                "model": "upstream-policy",
                "messages": MESSAGES,
                "stream": True,
                "temperature": 0.7,
                "top_p": 0.9,
                "seed": 7,
                "return_token_ids": True,
                "logprobs": True,
                "stream_options": {"include_usage": True},
            }
            assert seen.headers["x-team"] == "blue"


async def test_what_is_not_to_be_asked_for_is_not() -> None:
    backend = OpenAIBackend()
    async with proxied(backend, ask_for=()) as scene:
        await ask(scene, stream=True)
        assert backend.seen[0].body.keys() == {"model", "messages", "stream"}
        span = await scene.only_span()
        assert attribute(span, Call.RESPONSE_TOKEN_IDS) is None
        assert attribute(span, GenAI.USAGE_OUTPUT_TOKENS) is None


async def test_a_backend_is_asked_once_for_what_it_does_not_know(caplog: pytest.LogCaptureFixture) -> None:
    backend = OpenAIBackend(takes=frozenset({"logprobs"}))
    async with proxied(backend) as scene:
        await ask(scene)
        await ask(scene)
        bodies = [seen.body for seen in backend.seen]
        assert [body.get("return_token_ids") for body in bodies] == [True, None, None]
        assert all(body["logprobs"] for body in bodies)
        for span in await scene.spans():
            assert span.status.status_code == "OK"
            assert attribute(span, Call.RESPONSE_LOGPROBS) == [-0.1, -0.2, -0.3, -0.4]
            assert attribute(span, Call.RESPONSE_TOKEN_IDS) is None
        assert [record.message for record in caplog.records if "cannot be asked for token_ids" in record.message]
        await ask(scene, stream=True)
        assert [seen.body.get("stream_options") for seen in backend.seen[3:]] == [{"include_usage": True}, None]


async def test_a_mistake_of_the_agent_teaches_nothing_about_the_backend() -> None:
    backend = OpenAIBackend()
    mistake = Fail(400, {"error": {"message": "messages are too long", "code": "context_length_exceeded"}})
    backend.plan(mistake, mistake)
    async with proxied(backend) as scene:
        with pytest.raises(APIStatusError, match="too long"):
            await ask(scene)
        await ask(scene)
        assert backend.seen[-1].body["return_token_ids"] is True
        backend.plan(mistake)
        before = len(backend.seen)
        with pytest.raises(APIStatusError, match="too long"):
            await ask(scene)
        assert len(backend.seen) == before + 1, "what it takes is known by now"


async def test_what_a_backend_takes_can_be_said() -> None:
    backend = OpenAIBackend(takes=frozenset())
    with backend:
        async with proxied(entries=[backend.entry() | {"model_info": {"ask_for": []}}]) as scene:
            await ask(scene)
            assert len(backend.seen) == 1


TOOLS: Any = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


async def test_what_a_backend_cannot_do_is_remembered_per_kind_of_call_and_not_for_ever() -> None:
    backend = OpenAIBackend()
    conflict = Fail(400, {"error": {"message": "logprobs is not supported with tools + stream"}})
    async with proxied(backend) as scene:
        await ask(scene)
        await ask(scene, stream=True)
        backend.plan(conflict)
        await ask(scene, stream=True, tools=TOOLS)
        await ask(scene, stream=True, tools=TOOLS)
        await ask(scene, stream=True)
        asked = [seen.body.get("logprobs") for seen in backend.seen]
        assert asked == [True, True, True, None, None, True]
        memory = scene.proxy._session.upstream._memory  # type: ignore[union-attr]
        memory._clock = lambda: time.monotonic() + 601.0
        await ask(scene, stream=True, tools=TOOLS)
        assert backend.seen[-1].body["logprobs"] is True


@pytest.mark.parametrize("retries", [0, 2])
async def test_an_agent_sees_no_failure_that_only_the_proxys_wishes_cause(retries: int) -> None:
    backend = OpenAIBackend(fails_for="logprobs")
    async with proxied(backend, num_retries=retries) as scene:
        for _ in range(4):
            assert (await ask(scene)).choices[0].message.content.startswith("word0")
        asked = [seen.body.get("logprobs") for seen in backend.seen]
        assert asked == [True, None, True, None, True, None, None], "it may have failed for another reason, at first"
        assert all(span.status.status_code == "OK" for span in await scene.spans())


@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize(
    "failure",
    [BreakOff(0), *(Fail(status) for status in (402, 403, 404, 405, 413, 415, 500, 502, 504))],
    ids=lambda each: str(getattr(each, "status", "broken off")),
)
async def test_no_failure_of_any_kind_reaches_the_agent_while_the_proxy_asks_for_more(
    failure: Any, retries: int
) -> None:
    backend = OpenAIBackend(fails_for="return_token_ids", fails_with=failure)
    async with proxied(backend, num_retries=retries) as scene:
        for _ in range(4):
            assert await ask(scene, stream=retries > 0)
        assert all(span.status.status_code == "OK" for span in await scene.spans())
        before = len(backend.seen)
        await ask(scene, stream=retries > 0)
        assert len(backend.seen) == before + 1, "what comes three times in a row is learned"


async def test_a_backend_that_is_busy_only_when_it_is_asked_for_more() -> None:
    backend = OpenAIBackend(fails_for="return_token_ids", fails_with=BUSY)
    async with proxied(backend) as scene:
        assert await ask(scene)
        assert ["return_token_ids" in seen.body for seen in backend.seen] == [True, True, True, False]


async def test_a_backend_that_is_busy_is_asked_for_what_it_took_before() -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene:
        await ask(scene)
        backend.plan(BUSY, BUSY, BUSY)
        with pytest.raises(APIStatusError):
            await ask(scene)
        assert all("return_token_ids" in seen.body for seen in backend.seen)


async def test_failures_with_answers_in_between_teach_nothing() -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene:
        for _ in range(4):
            await ask(scene)
            backend.plan(Fail(500))
            await ask(scene)
        await ask(scene)
        assert "return_token_ids" in backend.seen[-1].body


async def test_sglang_is_asked_in_headers_for_what_its_streams_may_not_ask_for_in_the_body() -> None:
    backend = OpenAIBackend(takes=frozenset({"logprobs", "stream_options"}))
    async with proxied(backend) as scene:
        await ask(scene, stream=True)
        await ask(scene, stream=True, extra_body={"return_token_ids": False})
        assert [seen.headers.get("x-sglext-return-output-ids") for seen in backend.seen] == [None, "true", "true"]


@pytest.mark.parametrize("kind", ["text/plain", "application/json"])
async def test_a_stream_under_another_content_type_is_one(kind: str) -> None:
    backend, hold = OpenAIBackend(), Hold(1)
    backend.content_type = kind
    backend.plan(hold)
    async with proxied(backend) as scene, scene.client() as agent:
        stream = await agent.chat.completions.create(model="policy", messages=MESSAGES, stream=True)
        assert (await anext(stream)).choices[0].delta.content == "word0 "
        hold.release.set()
        assert len([chunk async for chunk in stream]) == 4
        span = await scene.only_span()
        assert attribute(span, Call.RESPONSE_TOKEN_IDS) == [1000, 1001, 1002, 1003]
        backend.plan(Write(b'{"choices": []}'))
        await agent.chat.completions.with_raw_response.create(model="policy", messages=MESSAGES, stream=True)
        assert body_of((await scene.spans())[-1], Call.RESPONSE) == {"choices": []}


# --- Errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 404, 409, 413, 422])
async def test_a_refusal_of_the_backend_is_the_agents_to_know(status: int) -> None:
    error = {"message": "no such tool", "type": "invalid_request_error", "param": "tools", "code": "bad_tool"}
    backend = OpenAIBackend()
    async with proxied(backend, ask_for=()) as scene:
        backend.plan(Fail(status, {"error": error}))
        with pytest.raises(APIStatusError) as caught:
            await ask(scene)
        assert (caught.value.status_code, caught.value.body) == (status, error)
        span = await scene.only_span()
        assert (span.status.status_code, span.status.description) == ("ERROR", "no such tool")
        assert attribute(span, GenAI.HTTP_STATUS_CODE) == status
        assert body_of(span, Call.RESPONSE) == {"error": error}
        assert len(backend.seen) == 1


async def test_an_unknown_model_is_named_and_recorded() -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene:
        with pytest.raises(APIStatusError, match="'gpt-9' does not exist here; this proxy serves: policy") as caught:
            await ask(scene, model="gpt-9")
        assert (caught.value.status_code, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
        span = await scene.only_span()
        assert (span.name, attribute(span, GenAI.ERROR_TYPE)) == ("chat gpt-9", "model_not_found")
        assert backend.seen == []


@pytest.mark.parametrize("error", [{"message": "no"}, {"message": "logprobs is not supported"}])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_under_a_status_of_success_that_the_proxys_wishes_cause(stream: bool, error: Any) -> None:
    """An error that names a field is learned from; another may have had its own reason, until it comes again."""
    backend = OpenAIBackend()
    async with proxied(backend) as scene:
        for number in range(4):
            if number == 0 or (error["message"] == "no" and number < 3):
                backend.plan(Say([{"error": error}]) if stream else Fail(200, {"error": error}))
            await ask(scene, stream=stream)
        asked = ["return_token_ids" in seen.body for seen in backend.seen]
        assert asked == ([True] * 5 if "logprobs" in error["message"] else [True, False] * 3 + [False])
        assert all(span.status.status_code == "OK" for span in await scene.spans())


async def test_an_error_after_a_beginning_without_content_is_not_the_agents_either() -> None:
    """Some servers send the first chunk before they know that they cannot do what the proxy asks for."""
    backend = OpenAIBackend()
    begin = {"id": "c", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    async with proxied(backend) as scene:
        backend.plan(Say([begin, {"error": {"message": "logprobs is not supported"}}]))
        await ask(scene, stream=True)
        assert len(backend.seen) == 2
        assert (await scene.only_span()).status.status_code == "OK"


async def test_an_error_inside_of_a_stream_is_recorded() -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene:
        for _ in range(2):  # with what the proxy asks for, and without
            backend.plan(Say([{"error": {"message": "GPU on fire", "code": "fire"}}]))
        with pytest.raises(APIError, match="GPU on fire"):
            await ask(scene, stream=True)
        span = await scene.only_span()
        assert (attribute(span, GenAI.ERROR_TYPE), span.status.description) == ("fire", "GPU on fire")


async def test_an_error_inside_of_a_stream_may_be_a_text() -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene:
        for _ in range(2):  # with what the proxy asks for, and without
            backend.plan(Say([{"error": "GPU on fire"}]))
        with pytest.raises(APIError):
            await ask(scene, stream=True)
        span = await scene.only_span()
        assert (span.status.status_code, span.status.description) == ("ERROR", "GPU on fire")


async def test_a_reply_that_is_none_is_recorded_as_a_failure() -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene:
        backend.plan(Write(b"<html>welcome</html>"))
        with pytest.raises(json.JSONDecodeError):
            await ask(scene)
        span = await scene.only_span()
        assert (span.status.status_code, attribute(span, GenAI.ERROR_TYPE)) == ("ERROR", "invalid_reply")
        assert attribute(span, Call.RESPONSE) == "<html>welcome</html>"


@pytest.mark.parametrize("stream", [False, True])
async def test_numbers_that_no_span_can_hold_do_not_spoil_the_record(stream: bool) -> None:
    backend = OpenAIBackend()
    choice = {"index": 0, "token_ids": [2**63], "finish_reason": "stop"}
    says = {"role": "assistant", "content": "hi"}
    reply = {"id": "c", "usage": {"prompt_tokens": 2**70, "completion_tokens": 1}, "prompt_token_ids": [2**63]}
    async with proxied(backend) as scene:
        whole = json.dumps(reply | {"choices": [choice | {"message": says}]}).encode()
        backend.plan(Say([reply | {"choices": [choice | {"delta": says}]}]) if stream else Write(whole))
        assert await ask(scene, stream=stream)
        span = await scene.only_span()
        assert (span.status.status_code, attribute(span, GenAI.USAGE_OUTPUT_TOKENS)) == ("OK", 1)
        for name in (GenAI.USAGE_INPUT_TOKENS, Call.PROMPT_TOKEN_IDS, Call.RESPONSE_TOKEN_IDS):
            assert attribute(span, name) is None
        assert body_of(span, Call.RESPONSE)["choices"][0]["message"] == says


async def test_a_stream_without_end_is_cut_off_and_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_MAX_REPLY_BYTES", 1_000_000)
    backend = OpenAIBackend()
    delta = {"index": 0, "delta": {"content": "x" * 10_000}, "finish_reason": None}
    async with proxied(backend) as scene:
        backend.plan(Say({"id": "c", "choices": [delta]} for _ in itertools.count()))
        with pytest.raises(APIError, match="over 1,000,000 bytes"):
            await ask(scene, stream=True)
        span = await scene.only_span()
        assert (span.status.status_code, attribute(span, GenAI.ERROR_TYPE)) == ("ERROR", "reply_too_large")


async def test_streams_share_the_memory_of_all_calls_and_give_it_back() -> None:
    backend = OpenAIBackend()
    delta = {"index": 0, "delta": {"content": "x" * 10_000}, "finish_reason": None}
    async with proxied(backend) as scene:
        gate = scene.proxy._session.admission  # type: ignore[union-attr]
        gate._max_bytes = 1_000_000
        backend.plan(Say({"id": "c", "choices": [delta]} for _ in itertools.count()))
        with pytest.raises(APIError, match="near the proxy's limit"):
            await ask(scene, stream=True)
        assert (await ask(scene, stream=True)).startswith("word0")
        assert gate._bytes == 0


# --- Keys --------------------------------------------------------------------------------------------------


async def test_the_backends_key_goes_to_the_backend_and_nowhere_else(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    backend = OpenAIBackend(key=KEY, says=lambda seen: f"your header was {seen.headers['Authorization']}")
    leaks = Fail(400, {"error": {"message": f"bad request with {KEY}", "code": KEY}})
    with backend:
        entries = [backend.entry(), backend.entry("locked", api_key="sk-another-key-000000")]
        async with proxied(entries=entries) as scene:
            seen_by_agent: list[str] = [(await ask(scene)).model_dump_json()]
            seen_by_agent.append(await ask(scene, stream=True))
            backend.plan(leaks)
            for question in ({}, {"model": "locked"}, {"model": "unknown"}):
                with pytest.raises(APIStatusError) as caught:
                    await ask(scene, **question)
                seen_by_agent += [str(caught.value), str(caught.value.response.headers), caught.value.response.text]
            assert backend.seen[0].headers["Authorization"] == f"Bearer {KEY}"
            assert "your header was Bearer ***" in seen_by_agent[1]
            stored = [span.model_dump_json() for span in await scene.spans()]
            assert len(stored) == 5
            everything = [*seen_by_agent, *stored, caplog.text, repr(scene.proxy), scene.llm.model_dump_json()]
            for text in everything:
                assert KEY not in text
                assert "sk-another-key" not in text
            assert "does not accept the key that the proxy has" in seen_by_agent[-4]


async def test_a_key_in_the_head_of_a_stream_is_hidden_too(tmp_path: Path) -> None:
    database = tmp_path / "store.db"
    named = {"id": f"c-{KEY}", "model": KEY, "system_fingerprint": KEY}
    choice = {"index": 0, "delta": {"content": f"I have {KEY}"}, "finish_reason": "stop"}
    with OpenAIBackend(key=KEY) as backend:
        async with SqliteLightningStore(database) as store, proxied(entries=[backend.entry()]) as scene:
            rollout = await store.start_rollout("any")
            scene.proxy.set_store(store)
            scene.llm = scene.proxy.as_resource(rollout.rollout_id, rollout.attempt.attempt_id)
            backend.plan(Say([{**named, "choices": [choice]}], {"X-Request-Id": KEY}))
            async with (
                scene.client() as agent,
                agent.chat.completions.with_streaming_response.create(
                    model="policy", messages=MESSAGES, stream=True
                ) as reply,
            ):
                seen_by_agent = f"{reply.headers} {await reply.text()}"
            assert len(await store.query_spans(rollout.rollout_id)) == 1
            on_the_disk = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert KEY not in seen_by_agent
    assert "I have ***" in seen_by_agent
    assert b"I have ***" in on_the_disk, "the call is there"
    assert KEY.encode() not in on_the_disk


async def test_the_agents_key_does_not_go_to_the_backend() -> None:
    backend = OpenAIBackend()
    async with proxied(backend, api_key="key-of-the-proxy") as scene:
        await ask(scene)
        assert "key-of-the-proxy" not in json.dumps([seen.headers for seen in backend.seen])


async def test_a_redirect_is_not_followed_with_the_key() -> None:
    backend = OpenAIBackend(key=KEY)
    backend.plan(Fail(307, {"error": {"message": "elsewhere"}}, {"Location": "http://127.0.0.1:9/"}))
    async with proxied(backend) as scene:
        with pytest.raises(APIStatusError, match="a redirect") as caught:
            await ask(scene)
        assert (caught.value.status_code, len(backend.seen)) == (502, 1)


async def test_a_refused_key_is_not_shown_in_part_by_an_event_either() -> None:
    with OpenAIBackend() as backend:
        async with proxied(entries=[backend.entry(api_key=KEY)]) as scene:
            backend.plan(Write(b'data: {"error": {"message": "wrong: sk-upst...cdef"}}\n\n', 401, "text/event-stream"))
            with pytest.raises(APIStatusError) as caught:
                await ask(scene, stream=True)
            assert (caught.value.status_code, caught.value.code) == (401, "backend_key_refused")
            assert "sk-upst" not in caught.value.response.text + (await scene.only_span()).model_dump_json()


async def test_a_wrong_key_of_the_proxy_is_explained_and_the_backends_words_are_not_shown() -> None:
    backend = OpenAIBackend(key=KEY)
    with backend:
        async with proxied(entries=[backend.entry(api_key="sk-wrong-wrong")]) as scene:
            with pytest.raises(APIStatusError, match=r"correct api_key in the proxy's model list") as caught:
                await ask(scene)
            assert (caught.value.status_code, caught.value.code) == (401, "backend_key_refused")
            await asyncio.sleep(0)
            assert attribute(await scene.only_span(), GenAI.ERROR_TYPE) == "backend_key_refused"
