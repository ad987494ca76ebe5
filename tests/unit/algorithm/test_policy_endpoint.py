"""The policy behind its endpoint, asked by OpenAI's own client and by bare HTTP."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from agentlightning.demo.policy_endpoint import PolicyEndpoint
from agentlightning.demo.softmax_policy import SoftmaxPolicy
from agentlightning.errors import InvalidValue
from certificates import self_signed

CHAT = {"model": "policy", "messages": [{"role": "user", "content": "red or blue?"}]}


def policy() -> SoftmaxPolicy:
    return SoftmaxPolicy(["red", "green", "blue"], logits={(0, 2): [0.0, math.log(2), math.log(5)]})


@asynccontextmanager
async def client(**arguments: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    endpoint = PolicyEndpoint(policy(), **arguments)
    await endpoint.start()
    try:
        async with openai.AsyncOpenAI(base_url=endpoint.url, api_key=endpoint.api_key or "none", max_retries=0) as made:
            yield made
    finally:
        await endpoint.stop()


@asynccontextmanager
async def session() -> AsyncIterator[tuple[aiohttp.ClientSession, str]]:
    endpoint = PolicyEndpoint(policy())
    await endpoint.start()
    try:
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {endpoint.api_key}"}) as made:
            yield made, endpoint.url
    finally:
        await endpoint.stop()


async def post(url: str, made: aiohttp.ClientSession, body: Any) -> tuple[int, dict[str, Any]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with made.post(url, data=data) as reply:
        return reply.status, await reply.json()


async def test_a_chat_by_the_openai_client() -> None:
    async with client() as ai:
        reply = await ai.chat.completions.create(**CHAT, temperature=0, logprobs=True, top_logprobs=2)
        models = [model.id async for model in ai.models.list()]
    assert models == ["policy"]
    choice = reply.choices[0]
    assert (choice.message.content, choice.finish_reason, reply.system_fingerprint) == ("blue", "stop", "0")
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    (token,) = choice.logprobs.content
    assert token.logprob == pytest.approx(math.log(5 / 8))
    assert [top.token for top in token.top_logprobs] == ["blue", "green"]
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (2, 1)


async def test_a_stream_says_the_same_as_the_whole_reply() -> None:
    async with client() as ai:
        stream = await ai.chat.completions.create(
            **CHAT, temperature=0, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        words = [
            chunk.choices[0].text
            async for chunk in await ai.completions.create(
                model="policy", prompt="red blue", temperature=0, stream=True
            )
        ]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "blue"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices] == [None, "stop"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 3
    assert words == ["blue", ""]


async def test_token_ids_stand_where_vllm_has_them() -> None:
    async with session() as (made, url):
        asked = {**CHAT, "temperature": 0, "return_token_ids": True, "logprobs": True}
        _, chat = await post(f"{url}/chat/completions", made, asked)
        _, text = await post(
            f"{url}/completions",
            made,
            {"model": "policy", "prompt": [0, 2], "temperature": 0, "return_token_ids": True, "logprobs": 1},
        )
        _, plain = await post(f"{url}/chat/completions", made, CHAT)
        async with made.post(f"{url}/chat/completions", json={**asked, "stream": True}) as reply:
            assert reply.content_type == "text/event-stream"
            events = [line[6:] for line in (await reply.text()).splitlines() if line]
    assert chat["prompt_token_ids"] == [0, 2]
    assert chat["choices"][0]["token_ids"] == [2]
    assert text["choices"][0]["prompt_token_ids"] == [0, 2]
    assert text["choices"][0]["token_ids"] == [2]
    assert text["choices"][0]["logprobs"]["token_logprobs"] == [pytest.approx(math.log(5 / 8))]
    assert "prompt_token_ids" not in plain
    assert "token_ids" not in plain["choices"][0]
    assert events.pop() == "[DONE]"
    first, last = map(json.loads, events)
    assert first["prompt_token_ids"] == [0, 2]
    assert first["choices"][0]["token_ids"] == [2]
    assert first["choices"][0]["logprobs"]["content"][0]["logprob"] == pytest.approx(math.log(5 / 8))
    assert "prompt_token_ids" not in last


async def test_chance_is_repeatable_where_it_is_asked_for() -> None:
    async def words(ai: openai.AsyncOpenAI, **more: Any) -> list[str | None]:
        reply = await ai.chat.completions.create(**CHAT, n=20, **more)
        return [choice.message.content for choice in reply.choices]

    async with client(seed=1) as one, client(seed=1) as same, client(seed=2) as other:
        first = await words(one)
        assert first == await words(same)
        assert first != await words(other)
        assert await words(one, seed=9) == await words(other, seed=9)
        assert set(first) > {"blue"}, "it was drawn, not the most probable one"
        assert set(await words(one, top_p=0.5)) == {"blue"}


async def test_what_the_policy_learns_is_said_with_the_next_call() -> None:
    endpoint = PolicyEndpoint(policy())
    await endpoint.start()
    try:
        async with openai.AsyncOpenAI(base_url=endpoint.url, api_key=endpoint.api_key) as ai:
            endpoint.policy.set_logits((0, 2), [9, 0, 0])
            endpoint.version = "1"
            reply = await ai.chat.completions.create(**CHAT, temperature=0)
    finally:
        await endpoint.stop()
    assert (reply.choices[0].message.content, reply.system_fingerprint) == ("red", "1")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "not JSON"),
        (b'{"n": ' + b"9" * 5_000 + b"}", "5000 digits"),
        (b"[" * 100_000, "not JSON"),
        ([1], "not a JSON object"),
        ({"model": "policy"}, "messages"),
        ({**CHAT, "messages": []}, "messages"),
        ({**CHAT, "temperature": -1}, "temperature"),
        ({**CHAT, "n": 0}, "n "),
        ({**CHAT, "top_p": 0}, "top_p"),
        ({**CHAT, "max_tokens": 0}, "max_tokens"),
        ({**CHAT, "logit_bias": {"1": 5}}, "logit_bias is not offered"),
        ({**CHAT, "response_format": {"type": "json_object"}}, "response_format is not offered"),
    ],
)
async def test_bad_requests_are_400_and_say_what_is_wrong(body: Any, says: str) -> None:
    async with session() as (made, url):
        status, reply = await post(f"{url}/chat/completions", made, body)
    assert status == 400
    assert says in reply["error"]["message"]


async def test_unknown_models_and_tokens() -> None:
    async with session() as (made, url):
        status, reply = await post(f"{url}/chat/completions", made, {**CHAT, "model": "other"})
        assert (status, reply["error"]["code"]) == (404, "model_not_found")
        status, reply = await post(f"{url}/completions", made, {"model": "policy", "prompt": [7]})
        assert (status, "outside 0 to 2" in reply["error"]["message"]) == (400, True)


async def test_parts_of_messages_and_harmless_fields() -> None:
    parts = [{"type": "text", "text": "red or"}, {"type": "text", "text": "blue?"}]
    body = {**CHAT, "messages": [{"role": "system", "content": None}, {"role": "user", "content": parts}]}
    async with session() as (made, url):
        harmless = {"user": "me", "stop": ["x"], "presence_penalty": 1, "response_format": {"type": "text"}}
        status, reply = await post(f"{url}/chat/completions", made, {**body, **harmless, "temperature": 0})
    assert (status, reply["choices"][0]["message"]["content"]) == (200, "blue")


async def test_start_and_stop_may_be_repeated_and_the_port_is_free_after() -> None:
    endpoint = PolicyEndpoint(policy())
    await endpoint.stop()
    await endpoint.start()
    await endpoint.start()
    assert endpoint.is_running()
    port = int(endpoint.url.split(":")[2].split("/")[0])
    await endpoint.stop()
    await endpoint.stop()
    assert not endpoint.is_running()
    with socket.create_server(("127.0.0.1", port)):
        taken = PolicyEndpoint(policy(), port=port)
        with pytest.raises(OSError, match="is taken"):
            await taken.start()
        assert not taken.is_running()
    await endpoint.start()
    await asyncio.gather(endpoint.stop(), endpoint.stop())


async def test_others_do_not_ask_the_policy() -> None:
    endpoint = PolicyEndpoint(policy())
    await endpoint.start()
    try:
        assert len(endpoint.api_key or "") >= 32
        async with openai.AsyncOpenAI(base_url=endpoint.url, api_key="any", max_retries=0) as stranger:
            for asks in (stranger.chat.completions.create(**CHAT), stranger.models.list()._get_page()):
                with pytest.raises(openai.AuthenticationError, match="use the api_key of the LLM resource"):
                    await asks
        async with aiohttp.ClientSession() as made:
            assert (await post(f"{endpoint.url}/completions", made, {}))[0] == 401
    finally:
        await endpoint.stop()
    async with client(api_key="") as anybody:  # the negative control, on purpose
        assert (await anybody.with_options(api_key="any").chat.completions.create(**CHAT)).choices


async def test_a_policy_without_a_key_is_not_reached_from_elsewhere() -> None:
    with pytest.raises(InvalidValue, match=r"other machines can reach '0\.0\.0\.0'.*api_key=''"):
        await PolicyEndpoint(policy(), "0.0.0.0", api_key="").start()


async def test_a_policy_with_a_certificate(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    endpoint = PolicyEndpoint(policy(), tls_certificate=certificate, tls_key=key)
    await endpoint.start()
    try:
        trusted = ssl.create_default_context(cafile=str(certificate))
        headers = {"Authorization": f"Bearer {endpoint.api_key}"}
        async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(ssl=trusted)) as made:
            assert endpoint.url.startswith("https://127.0.0.1:")
            assert (await post(f"{endpoint.url}/chat/completions", made, CHAT))[0] == 200
    finally:
        await endpoint.stop()
