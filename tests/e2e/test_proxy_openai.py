"""OpenAI's own client against the proxy: it sees what it would see without, and every call is on record."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from openai import AsyncOpenAI, NotFoundError

from agentlightning.semconv import GenAIAttributes as GenAI, LLMCallAttributes as Call
from openai_backend import PROMPT_TOKEN_IDS, WAIT_SECONDS, Hold, OpenAIBackend
from proxied import MESSAGES, attribute, body_of, proxied

TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
LOGPROBS = {"logprobs": True}
TOKEN_IDS = {"extra_body": {"return_token_ids": True}}
USAGE = {"stream_options": {"include_usage": True}}


def direct(backend: OpenAIBackend) -> AsyncOpenAI:
    """A client that goes past the proxy."""
    return AsyncOpenAI(base_url=backend.url, api_key="any", max_retries=0)


async def chunks_of(client: AsyncOpenAI, **question: Any) -> list[dict[str, Any]]:
    stream = await client.chat.completions.create(stream=True, messages=MESSAGES, **question)
    return [chunk.model_dump() async for chunk in stream]


@pytest.mark.parametrize("extra", [{}, LOGPROBS, TOKEN_IDS, {"tools": TOOLS}, LOGPROBS | TOKEN_IDS])
async def test_a_reply_is_what_the_backend_would_have_said_without_the_proxy(extra: dict[str, Any]) -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene, scene.client() as agent, direct(backend) as other:
        through = await agent.chat.completions.create(model="policy", messages=MESSAGES, **extra)
        plain = await other.chat.completions.create(model="upstream-policy", messages=MESSAGES, **extra)
        assert through.model_dump() == plain.model_dump()
        span = await scene.only_span()
        assert body_of(span, Call.RESPONSE) == plain.model_dump(exclude_unset=True)


@pytest.mark.parametrize("extra", [{}, LOGPROBS, TOKEN_IDS, USAGE, {"tools": TOOLS}, LOGPROBS | TOKEN_IDS | USAGE])
async def test_a_stream_is_what_the_backend_would_have_sent_without_the_proxy(extra: dict[str, Any]) -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene, scene.client() as agent, direct(backend) as other:
        through = await chunks_of(agent, model="policy", **extra)
        assert through == await chunks_of(other, model="upstream-policy", **extra)
        if "stream_options" not in extra:
            assert all(chunk["usage"] is None for chunk in through)


@pytest.mark.parametrize("extra", [{}, LOGPROBS, TOKEN_IDS, {"tools": TOOLS}, LOGPROBS | TOKEN_IDS])
async def test_a_stream_is_recorded_as_the_reply_that_it_would_have_been(extra: dict[str, Any]) -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene, scene.client() as agent, direct(backend) as other:
        await chunks_of(agent, model="policy", **extra)
        plain = await other.chat.completions.create(model="upstream-policy", messages=MESSAGES, **extra)
        span = await scene.only_span()
        recorded = body_of(span, Call.RESPONSE)
        assert recorded == plain.model_dump(exclude_unset=True)
        assert recorded["usage"]["total_tokens"] > 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("extra", [{}, {"logprobs": 1}, TOKEN_IDS])
async def test_text_completions(stream: bool, extra: dict[str, Any]) -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene, scene.client() as agent, direct(backend) as other:
        question: dict[str, Any] = {"prompt": "Say words.", **extra}
        plain = await other.completions.create(model="upstream-policy", **question)
        through: Any = await agent.completions.create(model="policy", stream=stream, **question)
        if stream:
            text = "".join([chunk.choices[0].text async for chunk in through])
            assert text == plain.choices[0].text
        else:
            assert through.model_dump() == plain.model_dump()
        span = await scene.only_span()
        assert span.name == "text_completion policy"
        assert body_of(span, Call.RESPONSE)["choices"][0]["text"] == plain.choices[0].text
        assert attribute(span, Call.RESPONSE_TOKEN_IDS) == [1000, 1001, 1002, 1003]
        assert attribute(span, Call.RESPONSE_LOGPROBS) == [-0.1, -0.2, -0.3, -0.4]
        assert attribute(span, Call.PROMPT_TOKEN_IDS) == PROMPT_TOKEN_IDS
        assert attribute(span, Call.STREAMED) is stream


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_is_one_span_with_everything_that_training_needs(stream: bool) -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene:
        question: Any = {"model": "policy", "messages": MESSAGES, "temperature": 0.5, "max_tokens": 9, "seed": 3}

        def ask() -> None:
            with scene.sync_client() as agent:
                reply = agent.chat.completions.create(**question, stream=stream)
                if stream:
                    assert len(list(reply)) == 5

        await asyncio.to_thread(ask)
        span = await scene.only_span()
        assert (span.name, span.status.status_code, span.sequence_id) == ("chat policy", "OK", 1)
        expected = {
            GenAI.OPERATION_NAME: "chat",
            GenAI.REQUEST_MODEL: "policy",
            GenAI.REQUEST_TEMPERATURE: 0.5,
            GenAI.REQUEST_MAX_TOKENS: 9,
            GenAI.REQUEST_SEED: 3,
            GenAI.RESPONSE_ID: "cmpl-1",
            GenAI.RESPONSE_MODEL: "upstream-policy",
            GenAI.RESPONSE_FINISH_REASONS: ["stop"],
            GenAI.USAGE_INPUT_TOKENS: 3,
            GenAI.USAGE_OUTPUT_TOKENS: 4,
            GenAI.HTTP_STATUS_CODE: 200,
            GenAI.ERROR_TYPE: None,
            Call.PROMPT_TOKEN_IDS: PROMPT_TOKEN_IDS,
            Call.RESPONSE_TOKEN_IDS: [1000, 1001, 1002, 1003],
            Call.RESPONSE_LOGPROBS: [-0.1, -0.2, -0.3, -0.4],
            Call.MODEL_VERSION: "fp-test",
            Call.RETRIES: 0,
            Call.STREAMED: stream,
        }
        assert {name: attribute(span, name) for name in expected} == expected
        assert attribute(span, Call.BACKEND).startswith("upstream-policy@127.0.0.1:")
        assert body_of(span, Call.REQUEST) == question | ({"stream": True} if stream else {"stream": False})
        assert 0 < attribute(span, Call.FIRST_BYTE_SECONDS) <= attribute(span, Call.LATENCY_SECONDS)
        assert span.start_time is not None
        assert span.end_time is not None
        assert span.end_time - span.start_time == pytest.approx(attribute(span, Call.LATENCY_SECONDS), abs=1e-4)


async def test_words_reach_the_agent_while_the_backend_still_speaks() -> None:
    backend, hold = OpenAIBackend(), Hold(2)
    backend.plan(hold)
    async with proxied(backend) as scene, scene.client() as agent:
        stream = await agent.chat.completions.create(model="policy", messages=MESSAGES, stream=True)
        async with asyncio.timeout(WAIT_SECONDS):
            first = [(await anext(stream)).choices[0].delta.content for _ in range(2)]
        assert first == ["word0 ", "word1 "]
        assert not hold.release.is_set()
        assert await scene.spans() == []
        hold.release.set()
        assert [chunk.choices[0].delta.content async for chunk in stream] == ["word2 ", "word3 ", None]
        await scene.only_span()


async def test_the_store_has_the_span_by_the_time_the_agent_has_the_reply() -> None:
    async with proxied(OpenAIBackend()) as scene, scene.client() as agent:
        for number in range(1, 11):
            await agent.chat.completions.create(model="policy", messages=MESSAGES)
            assert len(await scene.spans()) == 2 * number - 1
            await chunks_of(agent, model="policy")
            assert len(await scene.spans()) == 2 * number
        assert [span.sequence_id for span in await scene.spans()] == list(range(1, 21))


async def test_many_calls_at_once_are_all_recorded() -> None:
    async with proxied(OpenAIBackend()) as scene, scene.client() as agent:
        calls = (agent.chat.completions.create(model="policy", messages=MESSAGES) for _ in range(50))
        assert len(await asyncio.gather(*calls)) == 50
        spans = await scene.spans()
        assert len({span.span_id for span in spans}) == 50
        assert sorted(span.sequence_id for span in spans) == list(range(1, 51))


async def test_the_tool_loop_of_an_agent() -> None:
    async with proxied(OpenAIBackend()) as scene, scene.client() as agent:
        messages: Any = list(MESSAGES)
        reply = await agent.chat.completions.create(model="policy", messages=messages, tools=TOOLS)
        call: Any = (reply.choices[0].message.tool_calls or [])[0]
        assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Paris"}')
        messages += [
            reply.choices[0].message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "rain"},
        ]
        stream = await agent.chat.completions.create(model="policy", messages=messages, tools=TOOLS, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]).startswith("word0")
        first, second = await scene.spans()
        assert attribute(first, GenAI.RESPONSE_FINISH_REASONS) == ["tool_calls"]
        assert body_of(second, Call.REQUEST)["messages"][-1]["content"] == "rain"


async def test_models_are_listed() -> None:
    params = {"model": "openai/any", "api_base": "http://127.0.0.1:9/v1"}
    entries = [{"model_name": name, "litellm_params": params} for name in ("policy", "judge", "policy")]
    async with proxied(entries=entries) as scene, scene.client() as agent:
        assert [model.id async for model in agent.models.list()] == ["policy", "judge"]
        assert (await agent.models.retrieve("judge")).id == "judge"
        with pytest.raises(NotFoundError, match="serves: policy, judge"):
            await agent.models.retrieve("other")


async def test_a_call_without_ids_is_passed_on_and_not_recorded() -> None:
    async with proxied(OpenAIBackend()) as scene:
        llm = scene.proxy.as_resource()
        async with AsyncOpenAI(base_url=llm.get_base_url(), api_key=llm.api_key) as nobody:
            reply = await nobody.chat.completions.create(model="policy", messages=MESSAGES)
        assert reply.choices[0].message.content
        assert (await scene.store.statistics())["total_spans"] == 0


async def test_headers_can_say_for_which_attempt_a_call_is() -> None:
    async with proxied(OpenAIBackend()) as scene:
        attempt = await scene.store.get_latest_attempt(scene.rollout_id)
        headers = {"x-rollout-id": scene.rollout_id, "x-attempt-id": attempt.attempt_id if attempt else ""}
        async with AsyncOpenAI(base_url=scene.proxy.url, api_key=scene.proxy.api_key, default_headers=headers) as agent:
            await agent.chat.completions.create(model="policy", messages=MESSAGES)
        assert (await scene.only_span()).name == "chat policy"


async def test_a_call_joins_the_trace_of_the_agent() -> None:
    async with proxied(OpenAIBackend()) as scene:
        trace_id, parent_id = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
        headers = {"traceparent": f"00-{trace_id}-{parent_id}-01"}
        async with scene.client(default_headers=headers) as agent:
            await agent.chat.completions.create(model="policy", messages=MESSAGES)
        span = await scene.only_span()
        assert (span.trace_id, span.parent_id) == (trace_id, parent_id)
