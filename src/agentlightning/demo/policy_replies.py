"""What a `SoftmaxTable` answers to requests of the OpenAI protocol, as values: nothing here serves anything.

Sources: https://platform.openai.com/docs/api-reference/chat and ``/completions``; for ``return_token_ids``,
``prompt_token_ids`` and ``token_ids`` https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html.
A reply is always one word, so that a stream has one chunk with text.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agentlightning.demo.softmax_table import SoftmaxTable, WordChoice
from agentlightning.errors import InvalidValue, NotFound

_NOT_OFFERED: Mapping[str, Any] = {
    "best_of": 1,
    "echo": False,
    "logit_bias": None,
    "response_format": None,
    "suffix": None,
}
"""Fields that would change the reply in a way that is not offered here, and the value that changes nothing."""


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
class Answer:
    """A reply, whole and in chunks. Which of the two is sent is up to ``streamed``."""

    body: dict[str, Any]
    streamed: bool
    shows_usage: bool
    """Whether a stream ends with a chunk about usage."""
    _chunk_choices: Sequence[dict[str, Any]]
    _last_choices: Sequence[dict[str, Any]]

    def chunks(self) -> Iterator[dict[str, Any]]:
        """The reply as the chunks of a stream, without the mark of its end."""
        kind = "chat.completion.chunk" if self.body["object"] == "chat.completion" else "text_completion"
        head = {**self.body, "object": kind}
        usage = head.pop("usage")
        prompt_token_ids = head.pop("prompt_token_ids", None)
        # Where usage is asked for every chunk has the field, with null in all but the last: OpenAI's rule.
        no_usage = {"usage": None} if self.shows_usage else {}
        for number, choice in enumerate(self._chunk_choices):
            first = {} if prompt_token_ids is None or number else {"prompt_token_ids": prompt_token_ids}
            yield {**head, **first, **no_usage, "choices": [choice]}
        for choice in self._last_choices:
            yield {**head, **no_usage, "choices": [choice]}
        if self.shows_usage:
            yield {**head, "choices": [], "usage": usage}


class _Written(NamedTuple):
    """The choices of a reply, whole and as a stream has them: the word, then the end."""

    choices: list[dict[str, Any]]
    chunks: list[dict[str, Any]]
    lasts: list[dict[str, Any]]


def list_models(model: str) -> dict[str, Any]:
    """The reply to ``GET /v1/models``."""
    entry = {"id": model, "object": "model", "created": 0, "owned_by": "agentlightning"}
    return {"object": "list", "data": [entry]}


def answer_chat(
    policy: SoftmaxTable, model: str, version: str, fields: Mapping[str, Any], rng: random.Random
) -> Answer:
    """The reply to ``POST /v1/chat/completions``.

    The prompt is the text of all messages, in their order.

    Args:
        policy: says the word.
        model: its name.
        version: of its weights; becomes ``system_fingerprint``.
        fields: the request.
        rng: where chance comes from, unless the request has a seed.

    Raises:
        NotFound: the request is for another model.
        InvalidValue: the request is not valid, or asks for what is not offered.
    """
    request = _read(_ChatRequest, fields, model)
    text = "\n".join(_text_of(message) for message in request.messages)
    spoken = _Spoken.by(policy, policy.encode(text), request, rng)
    written = _Written([], [], [])
    for index, choice in enumerate(spoken.choices):
        word = policy.decode([choice.token_id])
        shared = {"index": index, "logprobs": spoken.chat_logprobs(choice, request), **spoken.token_ids(choice)}
        written.choices.append({**shared, "message": {"role": "assistant", "content": word}, "finish_reason": "stop"})
        written.chunks.append({**shared, "delta": {"role": "assistant", "content": word}, "finish_reason": None})
        written.lasts.append({"index": index, "delta": {}, "logprobs": None, "finish_reason": "stop"})
    body = spoken.body("chat.completion", "chatcmpl-", model, version, written.choices)
    return Answer(body, request.stream, _wants_usage(request), written.chunks, written.lasts)


def answer_completion(
    policy: SoftmaxTable, model: str, version: str, fields: Mapping[str, Any], rng: random.Random
) -> Answer:
    """The reply to ``POST /v1/completions``, whose prompt may be text or token ids. See ``answer_chat``."""
    request = _read(_CompletionRequest, fields, model)
    prompt = request.prompt
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
        prompt = prompt[0]
    if isinstance(prompt, str):
        prompt_ids = policy.encode(prompt)
    else:
        prompt_ids = cast("list[int]", prompt)
        policy.decode(prompt_ids)  # refuses ids that are no tokens
    spoken = _Spoken.by(policy, prompt_ids, request, rng)
    written = _Written([], [], [])
    for index, choice in enumerate(spoken.choices):
        ids = spoken.token_ids(choice)
        if ids:  # vLLM has the prompt's ids in each choice here, and at the top for chats
            ids["prompt_token_ids"] = prompt_ids
        shared = {"index": index, "logprobs": spoken.text_logprobs(choice, request), **ids}
        text = policy.decode([choice.token_id])
        written.choices.append({**shared, "text": text, "finish_reason": "stop"})
        written.chunks.append({**shared, "text": text, "finish_reason": None})
        written.lasts.append({"index": index, "text": "", "logprobs": None, "finish_reason": "stop"})
    body = spoken.body("text_completion", "cmpl-", model, version, written.choices)
    return Answer(body, request.stream, _wants_usage(request), written.chunks, written.lasts)


@dataclass(frozen=True)
class _Spoken:
    """The words that were chosen for a prompt, and how to write them down."""

    policy: SoftmaxTable
    prompt_ids: list[int]
    choices: list[WordChoice]
    shows_ids: bool

    @classmethod
    def by(cls, policy: SoftmaxTable, prompt_ids: list[int], request: _Request, rng: random.Random) -> _Spoken:
        own = rng if request.seed is None else random.Random(f"{request.seed} {prompt_ids}")
        temperature = 1.0 if request.temperature is None else request.temperature
        top_p = 1.0 if request.top_p is None else request.top_p
        choices = [policy.choose(tuple(prompt_ids), own, temperature, top_p) for _ in range(request.n)]
        return cls(policy, prompt_ids, choices, bool(request.return_token_ids))

    def token_ids(self, choice: WordChoice) -> dict[str, Any]:
        return {"token_ids": [choice.token_id]} if self.shows_ids else {}

    def body(self, kind: str, prefix: str, model: str, version: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        said = len(self.choices)
        usage = {
            "prompt_tokens": len(self.prompt_ids),
            "completion_tokens": said,
            "total_tokens": len(self.prompt_ids) + said,
        }
        body = {
            "id": prefix + secrets.token_hex(12),
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": version,
            "choices": choices,
            "usage": usage,
        }
        return {**body, "prompt_token_ids": self.prompt_ids} if self.shows_ids else body

    def chat_logprobs(self, choice: WordChoice, request: _ChatRequest) -> dict[str, Any] | None:
        if not request.logprobs:
            return None
        tops = [self._entry(*each) for each in self._most_probable(request.top_logprobs or 0)]
        return {"content": [{**self._entry(*choice), "top_logprobs": tops}], "refusal": None}

    def text_logprobs(self, choice: WordChoice, request: _CompletionRequest) -> dict[str, Any] | None:
        if request.logprobs is None:
            return None
        word = self.policy.decode([choice.token_id])
        tops = {self.policy.decode([token_id]): logprob for token_id, logprob in self._most_probable(request.logprobs)}
        return {
            "tokens": [word],
            "token_logprobs": [choice.logprob],
            "top_logprobs": [{**tops, word: choice.logprob}],
            "text_offset": [0],
        }

    def _most_probable(self, count: int) -> list[WordChoice]:
        if count == 0:
            return []
        logprobs = self.policy.logprobs(tuple(self.prompt_ids))
        said = map(WordChoice, self.policy.action_ids, logprobs)
        return sorted(said, key=lambda each: -each.logprob)[:count]

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        word = self.policy.decode([token_id])
        return {"token": word, "logprob": logprob, "bytes": list(word.encode())}


def _wants_usage(request: _Request) -> bool:
    return request.stream_options is not None and request.stream_options.include_usage


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
