"""Anthropic's own client against the proxy: every documented block and event, and the span of each call."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest
from anthropic import AsyncAnthropic

from agentlightning.semconv import GenAIAttributes as GenAI, LLMCallAttributes as Call
from openai_backend import PROMPT_TOKEN_IDS, Fail, OpenAIBackend, Say
from proxied import Proxied, attribute, body_of, proxied

ASK: Any = {"model": "policy", "max_tokens": 64, "messages": [{"role": "user", "content": "Say words."}]}
TOOL: Any = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
SAID = "word0 word1 word2 word3 "


def client(scene: Proxied, **options: Any) -> AsyncAnthropic:
    return AsyncAnthropic(base_url=scene.llm.endpoint, api_key=scene.llm.api_key, **{"max_retries": 0, **options})


async def test_a_message_is_answered_and_recorded_as_a_chat_completion() -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene, client(scene) as agent:
        message = await agent.messages.create(
            **ASK, system="Be brief.", stop_sequences=["END"], extra_body={"temperature": 0.5}
        )
        assert [block.model_dump(exclude_none=True) for block in message.content] == [{"type": "text", "text": SAID}]
        assert (message.type, message.role, message.model, message.stop_reason) == (
            "message", "assistant", "policy", "end_turn",
        )  # fmt: skip
        assert (message.usage.input_tokens, message.usage.output_tokens) == (3, 4)
        sent = backend.seen[0].body
        assert sent["messages"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Say words."},
        ]
        assert (sent["max_tokens"], sent["stop"], sent["temperature"]) == (64, ["END"], 0.5)
        span = await scene.only_span()
        assert (attribute(span, Call.WIRE), attribute(span, GenAI.PROVIDER_NAME)) == ("messages", "anthropic")
        assert attribute(span, Call.PROMPT_TOKEN_IDS) == PROMPT_TOKEN_IDS
        assert attribute(span, Call.RESPONSE_TOKEN_IDS) == [1000, 1001, 1002, 1003]
        assert body_of(span, Call.REQUEST)["messages"] == sent["messages"]
        assert body_of(span, Call.RESPONSE)["choices"][0]["message"]["content"] == SAID


async def test_a_stream_has_the_events_of_the_wire_in_their_order() -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene, client(scene) as agent:
        async with agent.messages.stream(**ASK) as stream:
            kinds = [event.type async for event in stream]
            message = await stream.get_final_message()
        raw = [kind for kind in kinds if kind != "text"]  # which the client adds
        assert raw == [
            "message_start", "content_block_start", *["content_block_delta"] * 4, "content_block_stop",
            "message_delta", "message_stop",
        ]  # fmt: skip
        assert message.content[0].model_dump(exclude_none=True) == {"type": "text", "text": SAID}
        assert (message.stop_reason, message.usage.output_tokens) == ("end_turn", 4)
        span = await scene.only_span()
        assert attribute(span, Call.RESPONSE_TOKEN_IDS) == [1000, 1001, 1002, 1003]
        assert attribute(span, Call.STREAMED) is True


@pytest.mark.parametrize("stream", [False, True])
async def test_two_turns_with_a_tool(stream: bool) -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene, client(scene) as agent:
        first = await _ask(agent, stream, **ASK, tools=[TOOL], tool_choice={"type": "any"})
        assert first.stop_reason == "tool_use"
        (call,) = first.content
        assert (call.type, call.name) == ("tool_use", "weather")
        assert isinstance(call.input, dict)
        told = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
        messages = [
            *ASK["messages"],
            {"role": "assistant", "content": [block.model_dump() for block in first.content]},
            {"role": "user", "content": [told, {"type": "text", "text": "And?"}]},
        ]
        second = await _ask(agent, stream, **{**ASK, "messages": messages}, tools=[TOOL])
        assert second.stop_reason == "end_turn"
        sent = backend.seen[1].body
        assert sent["tools"][0]["function"]["parameters"] == TOOL["input_schema"]
        assert backend.seen[0].body["tool_choice"] == "required"
        assert [message["role"] for message in sent["messages"]] == ["user", "assistant", "tool", "user"]
        (made,) = sent["messages"][1]["tool_calls"]
        assert (made["id"], json.loads(made["function"]["arguments"])) == (call.id, call.input)
        assert sent["messages"][2] == {"role": "tool", "tool_call_id": call.id, "content": "sunny"}


async def _ask(agent: AsyncAnthropic, stream: bool, **question: Any) -> Any:
    if not stream:
        return await agent.messages.create(**question)
    async with agent.messages.stream(**question) as events:
        async for _ in events:
            pass
        return await events.get_final_message()


def _chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c1", "object": "chat.completion.chunk", "model": "m", "choices": [choice], **more}


def _call(index: int, call_id: str | None, name: str | None, arguments: str) -> dict[str, Any]:
    function = {"arguments": arguments} | ({} if name is None else {"name": name})
    return {"index": index, "function": function} | ({} if call_id is None else {"id": call_id, "type": "function"})


async def test_reasoning_text_and_mixed_tool_calls_are_blocks_one_after_the_other() -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene, client(scene) as agent:
        backend.plan(Say([
            _chunk({"role": "assistant", "reasoning_content": "hm"}),
            _chunk({"reasoning_content": "m"}),
            _chunk({"content": "Look"}),
            _chunk({"content": "ing."}),
            _chunk({"tool_calls": [_call(0, "a", "weather", '{"ci')]}),
            _chunk({"tool_calls": [_call(1, "b", "weather", '{"city":')]}),
            _chunk({"tool_calls": [_call(0, None, None, 'ty":"Rome"}')]}),
            _chunk({"tool_calls": [_call(1, None, None, '"Oslo"}')]}),
            _chunk({}, "tool_calls"),
            {"id": "c1", "object": "chat.completion.chunk", "choices": [],
             "usage": {"prompt_tokens": 9, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 4}}},
        ]))  # fmt: skip
        message = await _ask(agent, True, **ASK, tools=[TOOL])
        assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
        assert (message.content[0].thinking, message.content[1].text) == ("hmm", "Looking.")
        assert [(block.id, block.input) for block in message.content[2:]] == [
            ("a", {"city": "Rome"}),
            ("b", {"city": "Oslo"}),
        ]
        usage = message.usage
        assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (5, 4, 7)


async def test_a_history_with_images_and_thinking_reaches_the_backend() -> None:
    backend = OpenAIBackend()
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    history: Any = [
        {"role": "user", "content": [{"type": "text", "text": "See", "cache_control": {"type": "ephemeral"}}, image]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "a cat", "signature": "s"}, {"type": "text", "text": "A cat."},
        ]},
        {"role": "user", "content": "Sure?"},
    ]  # fmt: skip
    async with proxied(backend) as scene, client(scene) as agent:
        await agent.messages.create(**{**ASK, "messages": history}, system=[{"type": "text", "text": "Be brief."}])
        assert backend.seen[0].body["messages"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [
                {"type": "text", "text": "See"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}},
            ]},
            {"role": "assistant", "content": "A cat.", "reasoning_content": "a cat"},
            {"role": "user", "content": "Sure?"},
        ]  # fmt: skip


async def test_what_only_the_vendor_has_is_left_out_and_noted() -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene, client(scene) as agent:
        search: Any = {"type": "web_search_20250305", "name": "web_search"}
        await agent.messages.create(**ASK, tools=[search, TOOL], thinking={"type": "enabled", "budget_tokens": 1024})
        assert [tool["function"]["name"] for tool in backend.seen[0].body["tools"]] == ["weather"]
        notes = attribute(await scene.only_span(), Call.NOTES)
        assert len(notes) == 2
        assert "web_search" in " ".join(notes)
        assert "thinking" in " ".join(notes)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, anthropic.BadRequestError),
        (404, anthropic.NotFoundError),
        (429, anthropic.RateLimitError),
        (500, anthropic.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_of_the_backend_have_the_shape_of_the_wire(
    status: int, kind: type[anthropic.APIStatusError], stream: bool
) -> None:
    backend = OpenAIBackend()
    async with proxied(backend, num_retries=0) as scene, client(scene) as agent:
        backend.plan(*[Fail(status)] * 8)
        with pytest.raises(kind) as caught:
            await _ask(agent, stream, **ASK)
        body: Any = caught.value.body
        assert (body["type"], body["error"]["message"]) == ("error", "no luck")


async def test_an_error_under_a_status_of_success_is_an_error_of_the_client() -> None:
    backend = OpenAIBackend()
    async with proxied(backend, num_retries=0, ask_for=[]) as scene, client(scene) as agent:
        backend.plan(Fail(200, {"error": {"message": "out of memory", "type": "oom"}}))
        with pytest.raises(anthropic.InternalServerError, match="out of memory"):
            await agent.messages.create(**ASK)
        span = await scene.only_span()
        assert (span.status.status_code, attribute(span, GenAI.HTTP_STATUS_CODE)) == ("ERROR", 502)


async def test_a_failed_tool_is_told_and_its_mark_noted() -> None:
    backend = OpenAIBackend()
    call = {"type": "tool_use", "id": "a", "name": "weather", "input": {}}
    told = {"type": "tool_result", "tool_use_id": "a", "is_error": True, "content": "no network"}
    messages: Any = [*ASK["messages"], {"role": "assistant", "content": [call]}, {"role": "user", "content": [told]}]
    async with proxied(backend) as scene, client(scene) as agent:
        await agent.messages.create(**{**ASK, "messages": messages})
        assert backend.seen[0].body["messages"][-1] == {"role": "tool", "tool_call_id": "a", "content": "no network"}
        assert attribute(await scene.only_span(), Call.NOTES) == ["tool_result.is_error is left out"]


async def test_a_request_that_cannot_be_translated_says_where() -> None:
    async with proxied(OpenAIBackend()) as scene, client(scene) as agent:
        bad: Any = [{"role": "user", "content": [{"type": "hologram"}]}]
        with pytest.raises(anthropic.BadRequestError, match=r"messages\.0.*hologram"):
            await agent.messages.create(**{**ASK, "messages": bad})


async def test_models_are_listed_in_the_shape_of_the_wire() -> None:
    async with proxied(OpenAIBackend()) as scene, client(scene) as agent:
        assert [model.id async for model in await agent.models.list()] == ["policy"]
        assert (await agent.models.retrieve("policy")).display_name == "policy"
        with pytest.raises(anthropic.NotFoundError, match="does not exist"):
            await agent.messages.create(**{**ASK, "model": "other"})


async def test_an_error_inside_of_a_stream_is_an_error_of_the_client() -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene, client(scene) as agent:
        backend.plan(Say([_chunk({"content": "Half"}), {"error": {"message": "out of memory", "type": "oom"}}]))
        with pytest.raises(anthropic.APIStatusError, match="out of memory"):
            await _ask(agent, True, **ASK)
        assert (await scene.only_span()).status.status_code == "ERROR"


async def test_tokens_are_counted_by_the_backend_and_no_call_is_recorded() -> None:
    backend = OpenAIBackend()
    backend.counts = 7
    async with proxied(backend) as scene, client(scene) as agent:
        count = await agent.messages.count_tokens(model="policy", messages=ASK["messages"], tools=[TOOL])
        assert count.input_tokens == 7
        assert backend.seen[0].body["tools"][0]["function"]["name"] == "weather"
        assert await scene.spans() == []


async def test_what_is_counted_is_bounded_and_held_like_a_call() -> None:
    backend = OpenAIBackend()
    backend.counts = 7
    async with proxied(backend) as scene, client(scene) as agent:
        large: Any = [{"role": "user", "content": "x" * (33 * 1024 * 1024)}]
        with pytest.raises(anthropic.RequestTooLargeError):
            await agent.messages.count_tokens(model="policy", messages=large)
        await scene.proxy.pause(hold_seconds=0)
        with pytest.raises(anthropic.RateLimitError):
            await agent.messages.count_tokens(model="policy", messages=ASK["messages"])
        await scene.proxy.resume()
        assert (await agent.messages.count_tokens(model="policy", messages=ASK["messages"])).input_tokens == 7
        assert [seen.path for seen in backend.seen] == ["/tokenize"]
