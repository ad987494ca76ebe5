"""A wire is one object: one that is new needs nothing but its own class and its place in the list."""

from __future__ import annotations

import json
from collections.abc import Mapping

import aiohttp
import pytest
from typing_extensions import override

from agentlightning.proxy import app
from agentlightning.proxy.dialects import DIALECTS, ChatCompletions
from agentlightning.proxy.dialects.base import CaptureField, ModelRequest, ProxyError, RecordedReply
from agentlightning.semconv import GenAIAttributes as GenAI, LLMCallAttributes as Call
from openai_backend import OpenAIBackend
from proxied import attribute, proxied


class Shout(ChatCompletions):
    """A wire that names the model in its path, has requests and replies of its own, and errors in upper case."""

    name = "shout"
    provider = "shout.example"
    paths = ("/models/(?P<model>[^/]+):shout",)

    @override
    def read_request(self, body: bytes, path_params: Mapping[str, str]) -> ModelRequest:
        text = json.loads(body)["text"]
        return ModelRequest(path_params["model"], False, {"messages": [{"role": "user", "content": text}]})

    @override
    def read_reply(self, body: bytes, hidden: frozenset[CaptureField], request: ModelRequest) -> RecordedReply | None:
        record = super().read_reply(body, hidden, request)
        assert record is not None
        words = json.loads(record.body)["choices"][0]["message"]["content"]
        record.body = json.dumps({"words": words.upper()}).encode()
        return record

    @override
    def error_body(self, error: ProxyError) -> bytes:
        return json.dumps({"PROBLEM": error.code.upper()}).encode()


async def test_a_new_wire_is_served_recorded_and_refused_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "DIALECTS", (*DIALECTS, Shout))
    backend = OpenAIBackend()
    async with proxied(backend) as scene, aiohttp.ClientSession() as agent:
        base = scene.llm.endpoint.removesuffix("/v1")
        async with agent.post(f"{base}/v1beta/models/policy:shout", json={"text": "Say words."}) as response:
            assert await response.json() == {"words": "WORD0 WORD1 WORD2 WORD3 "}
        async with agent.post(f"{base}/v1beta/models/other:shout", json={"text": "Say words."}) as response:
            assert (response.status, await response.json()) == (404, {"PROBLEM": "MODEL_NOT_FOUND"})
        async with agent.post(f"{scene.proxy.url}/v1beta/models/policy:whisper") as response:
            assert "POST /v1/chat/completions" in (await response.json())["error"]["message"]
        answered, refused = await scene.spans()
        assert backend.seen[0].body["messages"] == [{"role": "user", "content": "Say words."}]
        assert backend.seen[0].body["return_token_ids"] is True
        assert attribute(answered, GenAI.PROVIDER_NAME) == "shout.example"
        assert len(attribute(answered, Call.RESPONSE_TOKEN_IDS)) == 4
        assert attribute(answered, Call.RESPONSE) == '{"words": "WORD0 WORD1 WORD2 WORD3 "}'
        assert attribute(refused, Call.RESPONSE) == '{"PROBLEM": "MODEL_NOT_FOUND"}'
