"""The Responses wire against OpenAI's own client: items, events and kept replies, and the span of each call."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI

from agentlightning.semconv import LLMCallAttributes as Call
from openai_backend import PROMPT_TOKEN_IDS, Fail, OpenAIBackend, Say
from proxied import attribute, body_of, proxied

ASK: Any = {"model": "policy", "input": "Say words."}
TOOL: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
SAID = "word0 word1 word2 word3 "


async def ask(agent: AsyncOpenAI, stream: bool, **question: Any) -> Any:
    if not stream:
        return await agent.responses.create(**question)
    async with agent.responses.stream(**question) as events:
        async for _ in events:
            pass
        return await events.get_final_response()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_is_answered_and_recorded_as_a_chat_completion(stream: bool) -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene, scene.client() as agent:
        response = await ask(agent, stream, **ASK, instructions="Be brief.", max_output_tokens=64, temperature=0.5)
        assert (response.output_text, response.status, response.model) == (SAID, "completed", "policy")
        assert (response.usage.input_tokens, response.usage.output_tokens) == (3, 4)
        sent = backend.seen[0].body
        assert sent["messages"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Say words."},
        ]
        assert (sent["max_tokens"], sent["temperature"]) == (64, 0.5)
        span = await scene.only_span()
        assert attribute(span, Call.WIRE) == "responses"
        assert attribute(span, Call.PROMPT_TOKEN_IDS) == PROMPT_TOKEN_IDS
        assert attribute(span, Call.RESPONSE_TOKEN_IDS) == [1000, 1001, 1002, 1003]
        assert body_of(span, Call.RESPONSE)["choices"][0]["message"]["content"] == SAID


async def test_a_stream_has_the_events_of_the_wire_in_their_order() -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene, scene.client() as agent:
        stream: Any = await agent.responses.create(**ASK, stream=True)
        events = [event async for event in stream]
    assert [event.type for event in events] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        *["response.output_text.delta"] * 4, "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output[0].id == events[2].item.id


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("way", ["whole", "previous", "previous of a reply that is not kept"])
async def test_two_turns_with_a_tool(stream: bool, way: str) -> None:
    """The second turn says everything again, or only the tool's output and what it follows."""
    backend = OpenAIBackend()
    async with proxied(backend) as scene, scene.client() as agent:
        keeps = way != "previous of a reply that is not kept"
        first = await ask(agent, stream, **ASK, tools=[TOOL], store=keeps)
        (call,) = first.output
        assert (call.type, call.name) == ("function_call", "weather")
        told = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        if way == "whole":
            question: Any = {"input": [{"role": "user", "content": "Say words."}, call.model_dump(), told]}
        else:
            question = {"input": [told], "previous_response_id": first.id}
        if not keeps:
            with pytest.raises(openai.BadRequestError, match="store: false"):
                await ask(agent, stream, model="policy", tools=[TOOL], **question)
            return
        second = await ask(agent, stream, model="policy", tools=[TOOL], **question)
        assert second.output_text
        assert backend.seen[1].body["messages"] == [
            {"role": "user", "content": "Say words."},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": call.call_id, "type": "function",
                 "function": {"name": "weather", "arguments": call.arguments}},
            ]},
            {"role": "tool", "tool_call_id": call.call_id, "content": "sunny"},
        ]  # fmt: skip
        assert len(await scene.spans()) == 2


async def test_replies_are_kept_for_their_attempt_alone() -> None:
    async with proxied(OpenAIBackend()) as scene, scene.client() as agent:
        first = await agent.responses.create(**ASK)
        second = await agent.responses.create(model="policy", input="More.", previous_response_id=first.id)
        assert (await agent.responses.retrieve(first.id)).output_text == SAID
        items: list[Any] = [item async for item in agent.responses.input_items.list(second.id)]
        assert [item.role for item in items] == ["user", "assistant", "user"]
        key = scene.proxy.api_key
        async with AsyncOpenAI(base_url=f"{scene.proxy.url}/v1", api_key=key, max_retries=0) as stranger:
            with pytest.raises(openai.NotFoundError):
                await stranger.responses.retrieve(first.id)
        await agent.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            await agent.responses.retrieve(first.id)
        with pytest.raises(openai.BadRequestError, match="no reply"):
            await agent.responses.create(model="policy", input="More.", previous_response_id=second.id)


async def test_items_of_all_kinds_reach_the_backend_as_messages() -> None:
    backend = OpenAIBackend()
    items: Any = [
        {"role": "developer", "content": "Rule 1."},
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Rule 2."}]},
        {"role": "user", "content": [
            {"type": "input_text", "text": "See"}, {"type": "input_image", "image_url": "data:image/png;base64,aGk="},
        ]},
        {"type": "reasoning", "id": "rs1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "id": "m1", "status": "completed",
         "content": [{"type": "output_text", "text": "Looking.", "annotations": []}]},
        {"type": "custom_tool_call", "call_id": "c1", "name": "patch", "input": "*** Begin"},
        {"type": "custom_tool_call_output", "call_id": "c1", "output": "done"},
        {"type": "reasoning", "id": "rs2", "summary": [], "encrypted_content": "xyz"},
    ]  # fmt: skip
    async with proxied(backend) as scene, scene.client() as agent:
        await agent.responses.create(model="policy", input=items)
        assert backend.seen[0].body["messages"] == [
            {"role": "system", "content": "Rule 1.\n\nRule 2."},
            {"role": "user", "content": [
                {"type": "text", "text": "See"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}},
            ]},
            {"role": "assistant", "content": "Looking.", "reasoning_content": "hm", "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "patch", "arguments": '{"input":"*** Begin"}'}},
            ]},
            {"role": "tool", "tool_call_id": "c1", "content": "done"},
        ]  # fmt: skip
        assert "reasoning" in attribute(await scene.only_span(), Call.NOTES)[0]


def _chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c1", "object": "chat.completion.chunk", "model": "m", "choices": [choice]}


def _call(index: int, call_id: str | None, name: str | None, arguments: str) -> dict[str, Any]:
    function = {"arguments": arguments} | ({} if name is None else {"name": name})
    return {"index": index, "function": function} | ({} if call_id is None else {"id": call_id, "type": "function"})


@pytest.mark.parametrize("stream", [False, True])
async def test_custom_tools_and_namespaces_have_their_own_names_and_forms(stream: bool) -> None:
    backend = OpenAIBackend()
    tools: Any = [
        {"type": "custom", "name": "patch", "description": "Apply a patch."},
        {"type": "namespace", "name": "files", "description": "Files.", "tools": [{**TOOL, "name": "read"}]},
        {"type": "web_search"},
    ]
    calls = [_call(0, "a", "patch", '{"input":"*** Begin"}'), _call(1, "b", "files__read", '{"city":"Rome"}')]
    whole = {"id": "c1", "object": "chat.completion", "created": 1, "model": "m", "choices": [
        {"index": 0, "finish_reason": "tool_calls", "message": {"role": "assistant", "content": None,
         "tool_calls": [{key: value for key, value in call.items() if key != "index"} for call in calls]}},
    ]}  # fmt: skip
    async with proxied(backend) as scene, scene.client() as agent:
        if stream:
            chunks = [
                _chunk({"reasoning_content": "hm"}), _chunk({"tool_calls": [calls[0]]}),
                _chunk({"tool_calls": [calls[1]]}), _chunk({}, "tool_calls"),
            ]  # fmt: skip
            backend.plan(Say(chunks))
        else:
            backend.plan(Fail(200, whole))
        response = await ask(agent, stream, **ASK, tools=tools)
        patch, read = response.output[-2:]
        assert (patch.type, patch.name, patch.input, patch.call_id) == ("custom_tool_call", "patch", "*** Begin", "a")
        assert (read.type, read.name, read.namespace) == ("function_call", "read", "files")
        assert json.loads(read.arguments) == {"city": "Rome"}
        if stream:
            assert response.output[0].content[0].text == "hm"
        assert [tool["function"]["name"] for tool in backend.seen[0].body["tools"]] == ["patch", "files__read"]
        assert "web_search" in attribute(await scene.only_span(), Call.NOTES)[0]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_reply_that_was_cut_is_incomplete(stream: bool) -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene, scene.client() as agent:
        if stream:
            backend.plan(Say([_chunk({"content": "Half"}), _chunk({}, "length")]))
        else:
            message = {"role": "assistant", "content": "Half"}
            choice = {"index": 0, "finish_reason": "length", "message": message}
            backend.plan(Fail(200, {"id": "c1", "object": "chat.completion", "choices": [choice]}))
        if stream:  # the client's own helper knows no other end than ``response.completed``
            events: Any = await agent.responses.create(**ASK, stream=True)
            response = [event async for event in events][-1].response
        else:
            response = await agent.responses.create(**ASK)
        assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert response.output_text == "Half"


@pytest.mark.parametrize("stream", [False, True])
async def test_errors_have_the_shape_that_the_client_parses(stream: bool) -> None:
    backend = OpenAIBackend()
    async with proxied(backend, num_retries=0) as scene, scene.client() as agent:
        backend.plan(Fail(429))
        with pytest.raises(openai.RateLimitError, match="no luck"):
            await ask(agent, stream, **ASK)
        with pytest.raises(openai.BadRequestError, match="vendor's servers"):
            await ask(agent, stream, **ASK, extra_body={"background": True})
        with pytest.raises(openai.BadRequestError, match=r"computer_call_output"):
            await ask(agent, stream, model="policy", input=[{"type": "computer_call_output", "call_id": "a"}])


async def test_an_error_inside_of_a_stream_is_an_event_of_the_wire() -> None:
    backend = OpenAIBackend()
    async with proxied(backend) as scene, scene.client() as agent:
        backend.plan(Say([_chunk({"content": "Half"}), {"error": {"message": "out of memory", "type": "oom"}}]))
        with pytest.raises(openai.APIError, match="out of memory"):
            async for _ in await agent.responses.create(**ASK, stream=True):
                pass
        assert (await scene.only_span()).status.status_code == "ERROR"


async def test_websockets_are_refused_so_that_clients_post_at_once() -> None:
    async with proxied(OpenAIBackend()) as scene, aiohttp.ClientSession() as agent:
        headers = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
                   "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}  # fmt: skip
        async with agent.get(f"{scene.llm.endpoint}/responses", headers=headers) as response:
            assert response.status == 426
        assert await scene.spans() == []
