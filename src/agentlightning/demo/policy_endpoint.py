"""`PolicyEndpoint`: serves a `SoftmaxTable` as a language model, by the OpenAI protocol."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Route

from agentlightning.demo.policy_replies import Answer, answer_chat, answer_completion, list_models
from agentlightning.demo.softmax_table import SoftmaxTable
from agentlightning.errors import AgentLightningError, InvalidValue, NotFound
from agentlightning.serving.server import ThreadedServer
from agentlightning.telemetry.context import untraced_app

_GRACE_SECONDS = 5
"""How long requests that are under way may take when the endpoint stops."""


class PolicyEndpoint:
    """A language model behind a URL, for agents to call while the policy learns.

    Answers ``/v1/chat/completions``, ``/v1/completions`` (both also streamed) and ``/v1/models``. It runs in
    a thread of its own, and sees every change of the policy with the next request. With ``return_token_ids``
    and ``logprobs`` in a request, token ids and log-probabilities stand in the reply as vLLM puts them.

    Args:
        policy: says what is answered.
        host: the address to listen on.
        port: 0 takes a free one.
        model: the name that requests must use.
        seed: makes the order of chance repeatable; requests with a ``seed`` of their own are repeatable anyway.
    """

    def __init__(
        self,
        policy: SoftmaxTable,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        model: str = "policy",
        seed: int | None = None,
    ) -> None:
        self.policy = policy
        self.version = "0"
        """Which weights answer; stands in every reply as ``system_fingerprint``."""
        self._host = host
        self._wanted_port = port
        self._port = port
        self._model = model
        self._rng = random.Random(seed)
        self._server: ThreadedServer | None = None

    @property
    def model(self) -> str:
        """The name that requests must use."""
        return self._model

    @property
    def url(self) -> str:
        """The base URL for OpenAI's clients. Before `start` the port may be 0."""
        return f"http://{self._host}:{self._port}/v1"

    def is_running(self) -> bool:
        """Whether it answers."""
        return self._server is not None

    async def start(self) -> None:
        """Listen; requests are answered after. Does nothing when it runs.

        Raises:
            OSError: the address cannot be listened on.
        """
        if self._server is not None:
            return
        server = ThreadedServer(
            partial(nullcontext, self._make_app()),
            self._host,
            self._wanted_port,
            name="agentlightning-policy",
            drain_seconds=_GRACE_SECONDS,
        )
        await asyncio.to_thread(server.start)
        self._port, self._server = server.port, server

    async def stop(self) -> None:
        """End, and free the port. Requests under way are finished first. May be called again."""
        server, self._server = self._server, None
        if server is not None:
            await asyncio.to_thread(server.stop)

    def _make_app(self) -> FastAPI:
        # Plain routes: FastAPI's own take requests apart and put replies together, which costs more than the answer.
        routes: list[BaseRoute] = [
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completion, methods=["POST"]),
        ]
        return untraced_app(title="Agent Lightning policy", openapi_url=None, routes=routes)

    async def _models(self, _: Request) -> Response:
        return JSONResponse(list_models(self._model))

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, answer_chat)

    async def _completion(self, request: Request) -> Response:
        return await self._answer(request, answer_completion)

    async def _answer(self, request: Request, make: Callable[..., Answer]) -> Response:
        try:
            fields = _object_of(await request.body())
            answer = make(self.policy, self._model, self.version, fields, self._rng)
        except AgentLightningError as error:
            return _refusal(error)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        if answer.streamed:
            return StreamingResponse(_events(answer), media_type="text/event-stream")
        return JSONResponse(answer.body)


def _object_of(body: bytes) -> dict[str, Any]:
    try:
        fields: Any = json.loads(body)
    except ValueError as error:
        raise InvalidValue(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidValue("the body is not a JSON object")
    return fields  # pyright: ignore[reportUnknownVariableType] - of what, the request models say


def _refusal(error: AgentLightningError) -> Response:
    """An error in the shape that OpenAI's clients understand."""
    status = 404 if isinstance(error, NotFound) else 400
    code = "model_not_found" if isinstance(error, NotFound) else error.code
    body = {"message": error.message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": body}, status_code=status)


def _events(answer: Answer) -> Iterator[str]:
    """Server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html."""
    for chunk in answer.chunks():
        yield f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"
    yield "data: [DONE]\n\n"
