"""`PolicyEndpoint`: serves a `SoftmaxTable` as a language model, by the OpenAI protocol.

Sources: https://platform.openai.com/docs/api-reference/chat and ``/completions``; for ``return_token_ids``,
``prompt_token_ids`` and ``token_ids`` https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html.
A reply is always one word, so a stream has one chunk of text for each choice.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple, TypeVar, cast

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Route

from agentlightning.demo.softmax_table import SoftmaxTable, WordChoice
from agentlightning.errors import AgentLightningError, InvalidValue, NotFound
from agentlightning.serving.server import ThreadedServer, untraced_app

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


# --- Replies, as values ----------------------------------------------------------------------------

_NOT_OFFERED: Mapping[str, Any] = {
    "best_of": 1,
    "echo": False,
    "logit_bias": None,
    "response_format": None,
    "suffix": None,
}
"""Fields that would change the reply in an unsupported way, and the value that changes nothing."""

_R = TypeVar("_R", bound="_Request")


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Request(BaseModel):
    """The fields that matter. Penalties and stop words have no effect on a reply of one word."""

    model_config = ConfigDict(extra="allow")

    model: str
    n: Annotated[int, Field(ge=1, le=128)] = 1
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    return_token_ids: bool | None = None


class _Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None


class _ChatRequest(_Request):
    messages: Annotated[list[_Message], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class _CompletionRequest(_Request):
    prompt: str | list[int] | Annotated[list[str], Field(min_length=1, max_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


@dataclass(frozen=True)
class PolicyReply:
    """A reply, in both forms that it can be sent in."""

    body: dict[str, Any]
    chunks: Sequence[dict[str, Any]]
    """The body as the chunks of a stream, without the mark of its end."""
    streamed: bool
    """Whether the request asked for a stream."""


def list_models(model: str) -> dict[str, Any]:
    """Return the reply to ``GET /v1/models``."""
    entry = {"id": model, "object": "model", "created": 0, "owned_by": "agentlightning"}
    return {"object": "list", "data": [entry]}


def reply_to_chat(
    policy: SoftmaxTable, model: str, version: str, fields: Mapping[str, Any], rng: random.Random
) -> PolicyReply:
    """Return the reply to ``POST /v1/chat/completions``. The prompt is the text of all messages, in their order.

    Args:
        policy: samples the word.
        model: its name.
        version: of its weights; becomes ``system_fingerprint``.
        fields: the request.
        rng: source of randomness, unless the request has a seed.

    Raises:
        NotFound: the request is for another model.
        InvalidValue: the request is not valid, or asks for something unsupported.
    """
    request = _read(_ChatRequest, fields, model)
    prompt_ids = policy.encode("\n".join(_text_of(message) for message in request.messages))

    def logprobs(choice: WordChoice) -> dict[str, Any] | None:
        if not request.logprobs:
            return None
        tops = [_logprob_entry(policy, each) for each in _most_probable(policy, prompt_ids, request.top_logprobs or 0)]
        return {"content": [{**_logprob_entry(policy, choice), "top_logprobs": tops}], "refusal": None}

    return _reply(_CHAT, policy, prompt_ids, request, version, rng, logprobs)


def reply_to_completion(
    policy: SoftmaxTable, model: str, version: str, fields: Mapping[str, Any], rng: random.Random
) -> PolicyReply:
    """Return the reply to ``POST /v1/completions``, whose prompt may be text or token ids. See ``reply_to_chat``."""
    request = _read(_CompletionRequest, fields, model)
    prompt = request.prompt
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
        prompt = prompt[0]
    if isinstance(prompt, str):
        prompt_ids = policy.encode(prompt)
    else:
        prompt_ids = cast("list[int]", prompt)
        policy.decode(prompt_ids)  # raises if one is not a token

    def logprobs(choice: WordChoice) -> dict[str, Any] | None:
        if request.logprobs is None:
            return None
        word = policy.decode([choice.token_id])
        likely = _most_probable(policy, prompt_ids, request.logprobs)
        tops = {policy.decode([each.token_id]): each.logprob for each in likely}
        return {
            "tokens": [word],
            "token_logprobs": [choice.logprob],
            "top_logprobs": [{**tops, word: choice.logprob}],
            "text_offset": [0],
        }

    return _reply(_COMPLETION, policy, prompt_ids, request, version, rng, logprobs)


class _Dialect(NamedTuple):
    """How chats and completions differ."""

    kind: str
    chunk_kind: str
    id_prefix: str
    whole_field: str
    """Of a choice in the whole reply: the field with its text."""
    chunk_field: str
    """Of a choice in a chunk: the field with its text."""
    no_text: Any
    """Value of ``chunk_field`` in the last chunk of a choice."""


_CHAT = _Dialect("chat.completion", "chat.completion.chunk", "chatcmpl-", "message", "delta", {})
_COMPLETION = _Dialect("text_completion", "text_completion", "cmpl-", "text", "text", "")


def _reply(
    dialect: _Dialect,
    policy: SoftmaxTable,
    prompt_ids: list[int],
    request: _Request,
    version: str,
    rng: random.Random,
    logprobs: Callable[[WordChoice], dict[str, Any] | None],
) -> PolicyReply:
    own_rng = rng if request.seed is None else random.Random(f"{request.seed} {prompt_ids}")
    temperature = 1.0 if request.temperature is None else request.temperature
    top_p = 1.0 if request.top_p is None else request.top_p
    choices: list[dict[str, Any]] = []
    deltas: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    for index in range(request.n):
        sampled = policy.choose(tuple(prompt_ids), own_rng, temperature, top_p)
        word = policy.decode([sampled.token_id])
        text = {"role": "assistant", "content": word} if dialect is _CHAT else word
        shared: dict[str, Any] = {"index": index, "logprobs": logprobs(sampled)}
        if request.return_token_ids:
            shared["token_ids"] = [sampled.token_id]
            if dialect is _COMPLETION:  # vLLM has the prompt's ids in each choice here, and at the top for chats
                shared["prompt_token_ids"] = prompt_ids
        choices.append({**shared, dialect.whole_field: text, "finish_reason": "stop"})
        deltas.append({**shared, dialect.chunk_field: text, "finish_reason": None})
        ends.append({"index": index, dialect.chunk_field: dialect.no_text, "logprobs": None, "finish_reason": "stop"})
    head: dict[str, Any] = {
        "id": dialect.id_prefix + secrets.token_hex(12),
        "object": dialect.kind,
        "created": int(time.time()),
        "model": request.model,
        "system_fingerprint": version,
    }
    usage = {
        "prompt_tokens": len(prompt_ids),
        "completion_tokens": request.n,
        "total_tokens": len(prompt_ids) + request.n,
    }
    prompt = {"prompt_token_ids": prompt_ids} if request.return_token_ids else {}
    shows_usage = request.stream_options is not None and request.stream_options.include_usage
    # OpenAI's rule: where usage is asked for, every chunk has the field, with null in all but the last one.
    chunk_head = {**head, "object": dialect.chunk_kind, **({"usage": None} if shows_usage else {})}
    chunks = [{**chunk_head, "choices": [each]} for each in (*deltas, *ends)]
    if shows_usage:
        chunks.append({**chunk_head, "choices": [], "usage": usage})
    chunks[0] |= prompt
    return PolicyReply({**head, "choices": choices, "usage": usage, **prompt}, chunks, request.stream)


def _most_probable(policy: SoftmaxTable, prompt_ids: list[int], count: int) -> list[WordChoice]:
    if count == 0:
        return []
    words = map(WordChoice, policy.action_ids, policy.logprobs(tuple(prompt_ids)))
    return sorted(words, key=lambda each: -each.logprob)[:count]


def _logprob_entry(policy: SoftmaxTable, choice: WordChoice) -> dict[str, Any]:
    word = policy.decode([choice.token_id])
    return {"token": word, "logprob": choice.logprob, "bytes": list(word.encode())}


def _text_of(message: _Message) -> str:
    if isinstance(message.content, list):
        return " ".join(str(part.get("text", "")) for part in message.content)
    return message.content or ""


def _read(kind: type[_R], fields: Mapping[str, Any], model: str) -> _R:
    try:
        request = kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidValue(f"{where or 'the request'} is not valid: {first['msg']}") from error
    if request.model != model:
        raise NotFound(f"the model {request.model!r} does not exist; this endpoint serves {model!r}")
    for name, neutral in _NOT_OFFERED.items():
        if fields.get(name) not in (None, neutral, {"type": "text"}):
            raise InvalidValue(f"{name} is not offered by this endpoint; leave it out")
    return request
