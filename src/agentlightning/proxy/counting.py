"""Answers how many tokens a request has, which some wires can ask for without calling the model."""

from __future__ import annotations

import math
from typing import Any

import aiohttp
from starlette.requests import Request

from agentlightning.proxy.calls import AgentGone, ids_of, read_body, read_origin
from agentlightning.proxy.dialects.base import ModelRequest, ProxyError, WireDialect
from agentlightning.proxy.dialects.lenient import write_json
from agentlightning.proxy.dialects.replies import object_of
from agentlightning.proxy.models import ModelBackend
from agentlightning.proxy.session import ProxySession

_BYTES_PER_TOKEN = 4
"""Of English text in most vocabularies; what is counted where a backend does not count."""
_SECONDS = 10.0


async def count_tokens(session: ProxySession, dialect: WireDialect, request: Request) -> dict[str, Any]:
    """Return the tokens of a request's prompt: those that the backend counts (vLLM's ``/tokenize``), or else an
    estimate from its size.

    Raises:
        ProxyError: the request is not valid (400) or too large (413), there is no such model (404), or it is not
            admitted, as a call would not be (429, 503).
    """
    params = {**request.query_params, **request.path_params, **ids_of(read_origin(request))}
    async with (
        session.admission.place() as place
    ):  # its body takes memory, and its backend may be paused, as for a call
        try:
            body = await read_body(request, place.grow)
        except AgentGone:
            raise ProxyError(400, "incomplete_body", "The connection was closed before the end of the body.") from None
        await place.admitted()
        asked = dialect.read_request(body, params)
        backend = session.upstream.routing.order(asked.model, params.get("rollout_id"))[0]
        count = await _ask(session.upstream.client, backend, asked)
        if count is None:
            prompt: dict[str, Any] = {"messages": asked.body.get("messages"), "tools": asked.body.get("tools") or []}
            count = math.ceil(len(write_json(prompt)) / _BYTES_PER_TOKEN)
        return dialect.count_reply(count)


async def _ask(client: aiohttp.ClientSession, backend: ModelBackend, asked: ModelRequest) -> int | None:
    """Ask a backend (https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html#tokenizer-api)."""
    body = {"model": backend.upstream_model, "messages": asked.body.get("messages"), "add_generation_prompt": True}
    if asked.body.get("tools"):
        body["tools"] = asked.body["tools"]
    headers = {**backend.headers} | ({"Authorization": f"Bearer {backend.api_key}"} if backend.api_key else {})
    try:
        async with client.post(
            f"{backend.base_url.removesuffix('/v1')}/tokenize",
            json=body,
            headers=headers,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=_SECONDS),
        ) as response:
            count = object_of(await response.json()).get("count") if response.status == 200 else None
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return None
    return count if type(count) is int else None
