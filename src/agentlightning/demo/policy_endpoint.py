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

from agentlightning.demo.policy_replies import PolicyReply, list_models, reply_to_chat, reply_to_completion
from agentlightning.demo.softmax_table import SoftmaxTable
from agentlightning.errors import AgentLightningError, InvalidValue, NotFound
from agentlightning.serving.server import ThreadedServer
from agentlightning.telemetry.context import untraced_app

_GRACE_SECONDS = 5
"""Time that requests in progress get when the endpoint stops."""


class PolicyEndpoint:
    """A language model behind a URL, for agents to call while the policy learns.

    Serves ``/v1/chat/completions``, ``/v1/completions`` (both also streamed) and ``/v1/models`` in its own thread.
    A change of the policy holds from the next request on. If a request has ``return_token_ids`` and ``logprobs``, the
    reply has token ids and log-probabilities in the same places as vLLM's.

    Args:
        policy: samples the replies.
        host: address to listen on.
        port: 0 takes a free one.
        model: name that requests must use.
        seed: of the sampling; requests with their own ``seed`` are repeatable anyway.
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
        """Number of updates behind the weights that answer; every reply has it as ``system_fingerprint``."""
        self._host = host
        self._wanted_port = port
        self._port = port
        self._model = model
        self._rng = random.Random(seed)
        self._server: ThreadedServer | None = None

    @property
    def model(self) -> str:
        """Name that requests must use."""
        return self._model

    @property
    def url(self) -> str:
        """Base URL for OpenAI's clients. Before `start` the port may be 0."""
        return f"http://{self._host}:{self._port}/v1"

    def is_running(self) -> bool:
        """Whether requests are answered."""
        return self._server is not None

    async def start(self) -> None:
        """Listen; requests are answered after it returns. Does nothing if it is running.

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
        """Finish the requests in progress, and free the port. May be called again."""
        server, self._server = self._server, None
        if server is not None:
            await asyncio.to_thread(server.stop)

    def _make_app(self) -> FastAPI:
        # Plain routes, because FastAPI's own parse requests and serialise replies at a higher cost than the answer.
        routes: list[BaseRoute] = [
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/chat/completions", partial(self._answer, reply_to_chat), methods=["POST"]),
            Route("/v1/completions", partial(self._answer, reply_to_completion), methods=["POST"]),
        ]
        return untraced_app(title="Agent Lightning policy", openapi_url=None, routes=routes)

    async def _models(self, _: Request) -> Response:
        return JSONResponse(list_models(self._model))

    async def _answer(self, reply_to: Callable[..., PolicyReply], request: Request) -> Response:
        try:
            fields = _object_of(await request.body())
            reply = reply_to(self.policy, self._model, self.version, fields, self._rng)
        except AgentLightningError as error:
            return _refusal(error)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        if reply.streamed:
            return StreamingResponse(_events(reply), media_type="text/event-stream")
        return JSONResponse(reply.body)


def _object_of(body: bytes) -> dict[str, Any]:
    try:
        fields: Any = json.loads(body)
    except ValueError as error:
        raise InvalidValue(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidValue("the body is not a JSON object")
    return fields  # pyright: ignore[reportUnknownVariableType] - the request models check what is in it


def _refusal(error: AgentLightningError) -> Response:
    """Return an error in the form that OpenAI's clients understand."""
    status = 404 if isinstance(error, NotFound) else 400
    code = "model_not_found" if isinstance(error, NotFound) else error.code
    body = {"message": error.message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": body}, status_code=status)


def _events(reply: PolicyReply) -> Iterator[str]:
    """Yield the chunks as server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html."""
    for chunk in reply.chunks:
        yield f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"
    yield "data: [DONE]\n\n"
