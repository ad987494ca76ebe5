"""Google's own client against the proxy: parts, streams, tools and counts, and the span of each call."""

from __future__ import annotations

from typing import Any

import pytest
from google import genai
from google.genai import errors, types

from agentlightning.semconv import GenAIAttributes as GenAI, LLMCallAttributes as Call
from openai_backend import PROMPT_TOKEN_IDS, Fail, OpenAIBackend, Say
from proxied import Proxied, attribute, body_of, proxied

pytestmark = pytest.mark.filterwarnings("ignore:Inheritance class AiohttpClientSession:DeprecationWarning")
SAID = "word0 word1 word2 word3 "
WEATHER = types.FunctionDeclaration(
    name="weather",
    description="The weather of a city.",
    parameters=types.Schema(
        type=types.Type.OBJECT,
        properties={"city": types.Schema(type=types.Type.STRING, nullable=True)},
        required=["city"],
    ),
)
TOOLS: Any = [types.Tool(function_declarations=[WEATHER])]


def client(scene: Proxied) -> Any:
    """The client as an agent of the attempt has it; it does not repeat calls."""
    options = types.HttpOptions(base_url=scene.llm.endpoint, retry_options=types.HttpRetryOptions(attempts=1))
    return genai.Client(api_key=scene.llm.api_key, http_options=options).aio


async def ask(agent: Any, stream: bool, contents: Any, **config: Any) -> list[types.Part]:
    """The parts of the reply; those of a stream one after the other, without the empty one at its end."""
    asked = {"model": "policy", "contents": contents, "config": types.GenerateContentConfig(**config)}
    if not stream:
        return (await agent.models.generate_content(**asked)).candidates[0].content.parts
    chunks = [chunk async for chunk in await agent.models.generate_content_stream(**asked)]
    assert chunks[-1].candidates[0].finish_reason is not None
    return [part for chunk in chunks for part in chunk.candidates[0].content.parts if part.text != ""]


async def test_a_reply_is_recorded_as_a_chat_completion() -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene:
        config = types.GenerateContentConfig(
            system_instruction="Be brief.", temperature=0.5, max_output_tokens=64, stop_sequences=["END"]
        )
        reply = await client(scene).models.generate_content(model="policy", contents="Say words.", config=config)
        assert (reply.text, reply.candidates[0].finish_reason) == (SAID, types.FinishReason.STOP)
        usage = reply.usage_metadata
        assert (usage.prompt_token_count, usage.candidates_token_count, usage.total_token_count) == (3, 4, 7)
        sent = backend.seen[0].body
        assert sent["messages"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Say words."},
        ]
        assert (sent["temperature"], sent["max_tokens"], sent["stop"]) == (0.5, 64, ["END"])
        span = await scene.only_span()
        assert (attribute(span, Call.WIRE), attribute(span, GenAI.PROVIDER_NAME)) == ("generate_content", "gcp.gemini")
        assert attribute(span, Call.PROMPT_TOKEN_IDS) == PROMPT_TOKEN_IDS
        assert attribute(span, Call.RESPONSE_TOKEN_IDS) == [1000, 1001, 1002, 1003]
        assert body_of(span, Call.RESPONSE)["choices"][0]["message"]["content"] == SAID


async def test_a_stream_has_a_chunk_for_each_piece() -> None:
    async with proxied(OpenAIBackend()) as scene:
        parts = await ask(client(scene), True, "Say words.")
        assert [part.text for part in parts] == ["word0 ", "word1 ", "word2 ", "word3 "]
        assert attribute(await scene.only_span(), Call.RESPONSE_TOKEN_IDS) == [1000, 1001, 1002, 1003]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("with_ids", [False, True])
async def test_two_turns_with_a_tool(stream: bool, with_ids: bool) -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene:
        agent = client(scene)
        contents: list[Any] = [types.Content(role="user", parts=[types.Part(text="Weather?")])]
        (part,) = await ask(agent, stream, contents, tools=TOOLS)
        call = part.function_call
        assert call is not None
        assert call.name == "weather"
        call_id = call.id if with_ids else None
        made = types.Part(function_call=types.FunctionCall(id=call_id, name=call.name, args=call.args))
        told = types.Part(
            function_response=types.FunctionResponse(id=call_id, name=call.name, response={"output": "sunny"})
        )
        contents += [types.Content(role="model", parts=[made]), types.Content(role="user", parts=[told])]
        await ask(agent, stream, contents, tools=TOOLS)
        sent = backend.seen[1].body["messages"]
        assert [message["role"] for message in sent] == ["user", "assistant", "tool"]
        assert sent[2]["tool_call_id"] == sent[1]["tool_calls"][0]["id"]
        assert sent[2]["content"] == '{"output":"sunny"}'
        assert backend.seen[0].body["tools"][0]["function"]["parameters"] == {
            "type": "object", "properties": {"city": {"type": ["string", "null"]}}, "required": ["city"],
        }  # fmt: skip


def _chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c1", "object": "chat.completion.chunk", "model": "m", "choices": [choice]}


def _call(index: int, call_id: str, arguments: str) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {"index": index, "id": call_id, "type": "function", "function": function}


async def test_thoughts_and_parallel_calls() -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene:
        calls = [_call(0, "a", '{"city":"Rome"}'), _call(1, "b", '{"city":"Oslo"}')]
        backend.plan(Say([
            _chunk({"reasoning_content": "hm"}), _chunk({"content": "Look."}),
            *[_chunk({"tool_calls": [call]}) for call in calls], _chunk({}, "tool_calls"),
        ]))  # fmt: skip
        thought, text, *made = await ask(client(scene), True, "Weather?", tools=TOOLS)
        assert (thought.text, thought.thought, text.text) == ("hm", True, "Look.")
        assert [(part.function_call.id, part.function_call.args) for part in made if part.function_call] == [
            ("a", {"city": "Rome"}),
            ("b", {"city": "Oslo"}),
        ]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_is_no_json_is_malformed_as_the_wire_says_it(stream: bool) -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene:
        broken = _call(0, "a", '{"city":')
        if stream:
            backend.plan(Say([_chunk({"tool_calls": [broken]}), _chunk({}, "tool_calls")]))
            replies = await client(scene).models.generate_content_stream(model="policy", contents="Weather?")
            reply = [chunk async for chunk in replies][-1]
        else:
            choice = {"index": 0, "finish_reason": "tool_calls", "message": {"content": None, "tool_calls": [broken]}}
            backend.plan(Fail(200, {"id": "c1", "object": "chat.completion", "choices": [choice]}))
            reply = await client(scene).models.generate_content(model="policy", contents="Weather?")
        assert reply.candidates[0].finish_reason == types.FinishReason.MALFORMED_FUNCTION_CALL


async def test_images_and_forced_calls_reach_the_backend() -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene:
        calling = types.FunctionCallingConfig(mode=types.FunctionCallingConfigMode.ANY)
        await ask(
            client(scene), False, [types.Part.from_bytes(data=b"hi", mime_type="image/png"), "See?"], tools=TOOLS,
            tool_config=types.ToolConfig(function_calling_config=calling),
        )  # fmt: skip
        sent = backend.seen[0].body
        assert sent["tool_choice"] == "required"
        assert sent["messages"][0]["content"] == [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}},
            {"type": "text", "text": "See?"},
        ]


async def test_errors_and_models_have_the_shape_of_the_wire() -> None:
    backend = OpenAIBackend()
    async with proxied(backend, num_retries=0) as scene:
        agent = client(scene)
        backend.plan(Fail(429))
        with pytest.raises(errors.ClientError) as caught:
            await ask(agent, False, "Say words.")
        assert (caught.value.code, caught.value.status) == (429, "RESOURCE_EXHAUSTED")
        with pytest.raises(errors.ClientError, match="does not exist"):
            await agent.models.generate_content(model="other", contents="Say words.")
        assert (await agent.models.get(model="policy")).name == "models/policy"
        assert [model.name async for model in await agent.models.list()] == ["models/policy"]


async def test_tokens_are_counted_by_the_backend_or_estimated() -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene:
        count = await client(scene).models.count_tokens(model="policy", contents="Say words.")
        assert 1 < count.total_tokens < 40
        backend.counts = 7
        assert (await client(scene).models.count_tokens(model="policy", contents="Say words.")).total_tokens == 7
        assert backend.seen[-1].body["messages"] == [{"role": "user", "content": "Say words."}]
        assert await scene.spans() == []
