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
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Annotated, Any, cast

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Route

from agentlightning.demo.softmax_table import SoftmaxTable, WordChoice
from agentlightning.errors import AgentLightningError, InvalidValue, NotFound
from agentlightning.security.hosts import EVERY_ADDRESS, outward_address, require_key, url_of
from agentlightning.security.keys import ApiKey, new_key
from agentlightning.security.tls import AnyPath, tls_files
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
        api_key: what requests must show. Default: a new one. An empty text: nothing, which only loopback may ask for.
        tls_certificate, tls_key: files in PEM, for HTTPS.

    Raises:
        InvalidValue: an argument is not valid.
    """

    def __init__(
        self,
        policy: SoftmaxTable,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        model: str = "policy",
        seed: int | None = None,
        api_key: str | None = None,
        tls_certificate: AnyPath | None = None,
        tls_key: AnyPath | None = None,
    ) -> None:
        self.policy = policy
        self.version = "0"
        """Number of updates behind the weights that answer; every reply has it as ``system_fingerprint``."""
        self._host = host
        self._wanted_port = port
        self._port = port
        self._model = model
        self._key_text = new_key() if api_key is None else api_key
        self._key = ApiKey(self._key_text) if self._key_text else None
        self._tls = tls_files(tls_certificate, tls_key)
        self._rng = random.Random(seed)
        self._server: ThreadedServer | None = None

    @property
    def model(self) -> str:
        """Name that requests must use."""
        return self._model

    @property
    def api_key(self) -> str | None:
        """What requests must show; None: nothing."""
        return self._key_text or None

    @property
    def url(self) -> str:
        """Base URL for OpenAI's clients. Before `start` the port may be 0."""
        host = (outward_address() or "127.0.0.1") if self._host in EVERY_ADDRESS else self._host
        return f"{url_of(host, self._port, 'http' if self._tls is None else 'https')}/v1"

    def is_running(self) -> bool:
        """Whether requests are answered."""
        return self._server is not None

    async def start(self) -> None:
        """Listen; requests are answered after it returns. Does nothing if it is running.

        Raises:
            OSError: the address cannot be listened on.
            InvalidValue: others could reach it without a key, or the files for TLS cannot be used.
        """
        if self._server is not None:
            return
        require_key(self._host, self._key is not None, "Leave out api_key=''")
        server = ThreadedServer(
            partial(nullcontext, self._make_app()),
            self._host,
            self._wanted_port,
            name="agentlightning-policy",
            drain_seconds=_GRACE_SECONDS,
            tls=self._tls,
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
            Route("/v1/models", partial(self._let_in, self._models), methods=["GET"]),
            *(
                Route(path, partial(self._let_in, partial(self._answer, kind)), methods=["POST"])
                for path, kind in (("/v1/chat/completions", _ChatRequest), ("/v1/completions", _CompletionRequest))
            ),
        ]
        return untraced_app(title="Agent Lightning policy", openapi_url=None, routes=routes)

    async def _let_in(self, answer: Callable[[Request], Awaitable[Response]], request: Request) -> Response:
        """Answer a request that shows the key."""
        shown = request.headers.get("authorization")
        if self._key is None or (shown is not None and self._key.opens(shown.encode("latin-1"))):
            return await answer(request)
        why = "The policy's API key is missing or wrong; use the api_key of the LLM resource."
        return _refusal(why, "invalid_api_key", 401)

    async def _models(self, _: Request) -> Response:
        entry = {"id": self._model, "object": "model", "created": 0, "owned_by": "agentlightning"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def _answer(self, kind: type[_CallRequest], request: Request) -> Response:
        try:
            asked = _read(kind, await request.body(), self._model)
            reply, chunks = _reply(asked, self.policy, self.version, self._rng)
        except AgentLightningError as error:
            unknown = isinstance(error, NotFound)
            code = "model_not_found" if unknown else error.code
            return _refusal(error.message, code, 404 if unknown else 400)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        if asked.stream:
            return StreamingResponse(_events(chunks), media_type="text/event-stream")
        return JSONResponse(reply)


def _refusal(message: str, code: str, status: int) -> Response:
    """A refusal in the form that OpenAI's clients understand."""
    told = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": told}, status_code=status)


def _events(chunks: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the chunks as server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html."""
    for chunk in chunks:
        yield f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"
    yield "data: [DONE]\n\n"


# --- Requests and replies, as values ---------------------------------------------------------------

_NOT_OFFERED = {"best_of": 1, "echo": False, "logit_bias": None, "response_format": None, "suffix": None}
"""Fields that would change the reply in an unsupported way, and the value that changes nothing."""


_CHAT: tuple[str, str, str, Any] = ("chat.completion", "message", "delta", {})
_COMPLETION: tuple[str, str, str, Any] = ("text_completion", "text", "text", "")
"""What the reply is called; the fields of a choice with its text, in a reply and in a chunk; no text, in the last chunk
of a choice."""


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _CallRequest(BaseModel):
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


class _ChatRequest(_CallRequest):
    messages: Annotated[list[_Message], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class _CompletionRequest(_CallRequest):
    prompt: str | list[int] | Annotated[list[str], Field(min_length=1, max_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


def _read(kind: type[_CallRequest], body: bytes, model: str) -> _CallRequest:
    try:
        fields: Any = json.loads(body)
    except (ValueError, RecursionError) as error:  # the first also for integers of thousands of digits
        raise InvalidValue(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidValue("the body is not a JSON object")
    try:
        request = kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidValue(f"{where or 'the request'} is not valid: {first['msg']}") from error
    if request.model != model:
        raise NotFound(f"the model {request.model!r} does not exist; this endpoint serves {model!r}")
    for name, neutral in _NOT_OFFERED.items():
        if cast("dict[str, Any]", fields).get(name) not in (None, neutral, {"type": "text"}):
            raise InvalidValue(f"{name} is not offered by this endpoint; leave it out")
    return request


def _prompt_ids(request: _CallRequest, policy: SoftmaxTable) -> list[int]:
    """The tokens of the prompt: of a chat, of the text of all messages, in their order; else of text, or given."""
    if isinstance(request, _ChatRequest):
        return policy.encode("\n".join(_text_of(message) for message in request.messages))
    assert isinstance(request, _CompletionRequest)
    words = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    if words and isinstance(words[0], str):
        return policy.encode(words[0])
    token_ids = cast("list[int]", words)
    policy.decode(token_ids)  # raises if one is not a token
    return token_ids


def _text_of(message: _Message) -> str:
    if isinstance(message.content, list):
        return " ".join(str(part.get("text", "")) for part in message.content)
    return message.content or ""


def _reply(
    request: _CallRequest, policy: SoftmaxTable, version: str, rng: random.Random
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The reply, and the same as the chunks of a stream, without the mark of its end."""
    is_chat = isinstance(request, _ChatRequest)
    kind, whole, part, nothing = _CHAT if is_chat else _COMPLETION
    prompt_ids = _prompt_ids(request, policy)
    own_rng = rng if request.seed is None else random.Random(f"{request.seed} {prompt_ids}")
    temperature = 1.0 if request.temperature is None else request.temperature
    choices: list[dict[str, Any]] = []
    deltas: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    for index in range(request.n):
        sampled = policy.choose(tuple(prompt_ids), own_rng, temperature, request.top_p or 1.0)
        word = policy.decode([sampled.token_id])
        text = {"role": "assistant", "content": word} if is_chat else word
        shared: dict[str, Any] = {"index": index, "logprobs": _logprobs(request, policy, prompt_ids, sampled)}
        if request.return_token_ids:
            shared["token_ids"] = [sampled.token_id]
            if not is_chat:  # vLLM has the prompt's ids in each choice here, and at the top for chats
                shared["prompt_token_ids"] = prompt_ids
        choices.append({**shared, whole: text, "finish_reason": "stop"})
        deltas.append({**shared, part: text, "finish_reason": None})
        ends.append({"index": index, part: nothing, "logprobs": None, "finish_reason": "stop"})
    head: dict[str, Any] = {
        "id": ("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(12),
        "object": kind,
        "created": int(time.time()),
        "model": request.model,
        "system_fingerprint": version,
    }
    asked, made = len(prompt_ids), request.n
    usage = {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}
    prompt = {"prompt_token_ids": prompt_ids} if request.return_token_ids else {}
    shows_usage = request.stream_options is not None and request.stream_options.include_usage
    # OpenAI's rule: where usage is asked for, every chunk has the field, with null in all but the last one.
    chunk_head = {**head, "object": f"{kind}.chunk" if is_chat else kind, **({"usage": None} if shows_usage else {})}
    chunks = [{**chunk_head, "choices": [each]} for each in (*deltas, *ends)]
    if shows_usage:
        chunks.append({**chunk_head, "choices": [], "usage": usage})
    chunks[0] |= prompt
    return {**head, "choices": choices, "usage": usage, **prompt}, chunks


def _logprobs(
    request: _CallRequest, policy: SoftmaxTable, prompt_ids: list[int], choice: WordChoice
) -> dict[str, Any] | None:
    def likely(number: int) -> list[WordChoice]:
        words = map(WordChoice, policy.action_ids, policy.logprobs(tuple(prompt_ids)))
        return sorted(words, key=lambda each: -each.logprob)[:number]

    def entry(each: WordChoice) -> dict[str, Any]:
        word = policy.decode([each.token_id])
        return {"token": word, "logprob": each.logprob, "bytes": list(word.encode())}

    if isinstance(request, _ChatRequest) and request.logprobs:
        tops = [entry(each) for each in likely(request.top_logprobs or 0)]
        return {"content": [{**entry(choice), "top_logprobs": tops}], "refusal": None}
    if isinstance(request, _CompletionRequest) and request.logprobs is not None:
        word = policy.decode([choice.token_id])
        tops = {policy.decode([each.token_id]): each.logprob for each in likely(request.logprobs)}
        return {
            "tokens": [word],
            "token_logprobs": [choice.logprob],
            "top_logprobs": [{**tops, word: choice.logprob}],
            "text_offset": [0],
        }
    return None
