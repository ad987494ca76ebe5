"""A small server that speaks OpenAI's protocol as vLLM does, and misbehaves as told.

It answers ``word0 word1 …``; the token id of ``word<n>`` is ``1000 + n`` and its log-probability ``-(n + 1) / 10``;
the prompt has the token ids 1, 2, 3. With tools it calls the first one, until a message has the tool's result.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web

__all__ = ["BreakOff", "Compress", "Fail", "Hold", "OpenAIBackend", "Say", "Seen", "Write"]

WAIT_SECONDS = 20.0
"""The longest that a test waits for something to happen."""
PROMPT_TOKEN_IDS = [1, 2, 3]


@dataclass
class Seen:
    """A request that came."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class Fail:
    """Answer with this status."""

    status: int
    body: object = field(
        default_factory=lambda: {"error": {"message": "no luck", "type": "server_error", "code": None}}
    )
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class BreakOff:
    """Close the connection after so many words; 0: before the head of the reply."""

    words: int


@dataclass
class Hold:
    """Wait after so many words until the test lets go."""

    words: int
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    hung_up: threading.Event = field(default_factory=threading.Event)


@dataclass
class Say:
    """Stream these chunks, with these headers, whatever was asked."""

    chunks: Iterable[dict[str, Any]]
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Write:
    """Answer with this body, whatever was asked."""

    body: bytes
    status: int = 200
    content_type: str = "application/json"


@dataclass
class Compress:
    """Compress the reply, whatever was accepted."""


Step = Fail | BreakOff | Hold | Say | Compress | Write


class OpenAIBackend:
    """One backend on a free port, in a thread. What it does next is told by ``plan``.

    Args:
        words: of each reply.
        takes: fields of vLLM that it knows; others are refused with 400, as OpenAI does.
        key: what it wants as bearer token; None: nothing.
        fingerprint: what it says of its weights.
        fails_for: a field of the request that it fails at.
        fails_with: how.
    """

    def __init__(
        self,
        *,
        words: int = 4,
        takes: frozenset[str] = frozenset({"return_token_ids", "logprobs", "stream_options"}),
        key: str | None = None,
        fingerprint: str | None = "fp-test",
        says: Callable[[Seen], str] | None = None,
        fails_for: str | None = None,
        fails_with: Fail | BreakOff | None = None,
    ) -> None:
        self.words = words
        self.takes = takes
        self.key = key
        self.fingerprint = fingerprint
        self.says = says
        self.fails_for = fails_for
        self.fails_with = fails_with or Fail(500, {"error": {"message": "-inf is not JSON compliant"}})
        self.content_type = "text/event-stream"
        self.counts: int | None = None
        """What it counts at ``/tokenize``; None: it cannot."""
        self.seen: list[Seen] = []
        self._plan: queue.SimpleQueue[Step] = queue.SimpleQueue()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(WAIT_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Nobody listens on the port after. Idempotent."""
        if self._thread.is_alive():
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join(WAIT_SECONDS)

    @property
    def url(self) -> str:
        """The base URL."""
        return f"http://127.0.0.1:{self._port}/v1"

    def plan(self, *steps: Step) -> None:
        """What to do with the next calls, one by one."""
        for step in steps:
            self._plan.put(step)

    def entry(self, model_name: str = "policy", **params: Any) -> dict[str, Any]:
        """This backend in a model list."""
        given = {"model": f"openai/upstream-{model_name}", "api_base": self.url, **params}
        if self.key is not None:
            given.setdefault("api_key", self.key)
        return {"model_name": model_name, "litellm_params": given}

    def _main(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_post("/v1/chat/completions", self._answer)
        app.router.add_post("/v1/completions", self._answer)
        app.router.add_post("/tokenize", self._count)
        app.router.add_post("/v1/responses", self._answer)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self._port = runner.addresses[0][1]
        self._ready.set()
        await self._end.wait()
        await runner.cleanup()

    async def _count(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(Seen(request.path, dict(request.headers), await request.json()))
        return web.json_response({"count": self.counts}, status=200 if self.counts is not None else 404)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        seen = Seen(request.path, dict(request.headers), await request.json())
        self.seen.append(seen)
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": f"wrong key, I want {self.key}"}}, status=401)
        for name in ("return_token_ids", "logprobs", "stream_options"):
            if seen.body.get(name) and name not in self.takes:
                error = {"message": f"Unrecognized request argument supplied: {name}", "type": "invalid_request_error"}
                return web.json_response({"error": error}, status=400)
        try:
            step = self._plan.get_nowait()
        except queue.Empty:
            step = None
        if self.fails_for is not None and seen.body.get(self.fails_for):
            step = self.fails_with
        if isinstance(step, Fail):
            return web.json_response(step.body, status=step.status, headers=step.headers)
        if isinstance(step, Write):
            return web.Response(body=step.body, status=step.status, content_type=step.content_type)
        if isinstance(step, BreakOff) and step.words == 0:
            _hang_up(request)
            return web.Response()
        try:
            if seen.body.get("stream"):
                return await self._stream(request, seen, step)
            if isinstance(step, Hold):
                await self._hold(step)
            response = web.json_response(self._whole(seen))
            if isinstance(step, Compress):
                response.enable_compression(web.ContentCoding.gzip)
            return response
        except (asyncio.CancelledError, ConnectionError):
            if isinstance(step, Hold):
                step.hung_up.set()
            raise

    async def _hold(self, step: Hold) -> None:
        step.reached.set()
        while not step.release.is_set():
            await asyncio.sleep(0.005)

    # --- What it says ----------------------------------------------------------------------------

    def _words_of(self, seen: Seen) -> list[str]:
        if self.says is not None:
            return [self.says(seen)]
        return [f"word{number} " for number in range(self.words)]

    def _head(self, seen: Seen, kind: str) -> dict[str, Any]:
        head = {"id": "cmpl-1", "object": kind, "created": 1_700_000_000, "model": seen.body["model"]}
        return head if self.fingerprint is None else {**head, "system_fingerprint": self.fingerprint}

    def _whole(self, seen: Seen) -> dict[str, Any]:
        is_chat, words = "chat" in seen.path, self._words_of(seen)
        choice: dict[str, Any] = {"index": 0}
        tool = _tool_call(seen.body)
        if is_chat and tool is not None:
            choice |= {"message": {"role": "assistant", "content": None, "tool_calls": [tool]}, "logprobs": None}
            choice["finish_reason"] = "tool_calls"
            words = []
        else:
            text = "".join(words)
            choice |= {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
            choice |= {"logprobs": _logprobs(seen.body, is_chat, words, 0), "finish_reason": "stop"}
        reply = self._head(seen, "chat.completion" if is_chat else "text_completion")
        reply |= {"choices": [choice], "usage": _usage(len(words))}
        if seen.body.get("return_token_ids"):
            (reply if is_chat else choice)["prompt_token_ids"] = PROMPT_TOKEN_IDS
            choice["token_ids"] = [1000 + number for number in range(len(words))]
        return reply

    async def _stream(self, request: web.Request, seen: Seen, step: Step | None) -> web.StreamResponse:
        headers = step.headers if isinstance(step, Say) else {}
        response = web.StreamResponse(headers={"Content-Type": self.content_type, **headers})
        if isinstance(step, Compress):
            response.enable_compression(web.ContentCoding.gzip)
        await response.prepare(request)
        for number, chunk in enumerate(step.chunks if isinstance(step, Say) else self._chunks(seen)):
            if isinstance(step, Hold) and step.words == number:
                await self._hold(step)
            if isinstance(step, BreakOff) and step.words == number:
                _hang_up(request)
                return response
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    def _chunks(self, seen: Seen) -> list[dict[str, Any]]:
        is_chat, words = "chat" in seen.path, self._words_of(seen)
        wants_ids = bool(seen.body.get("return_token_ids"))
        head = self._head(seen, "chat.completion.chunk" if is_chat else "text_completion")
        chunks: list[dict[str, Any]] = []
        tool = _tool_call(seen.body)
        if is_chat and tool is not None:
            words = []
            name = {"name": tool["function"]["name"], "arguments": ""}
            first = {"index": 0, "id": tool["id"], "type": "function", "function": name}
            deltas: list[dict[str, Any]] = [{"role": "assistant", "content": None, "tool_calls": [first]}]
            arguments = tool["function"]["arguments"]
            pieces = (arguments[:5], arguments[5:])
            deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": piece}}]} for piece in pieces]
            choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas]
        else:
            choices = []
            for number, word in enumerate(words):
                choice: dict[str, Any] = {"index": 0, "logprobs": _logprobs(seen.body, is_chat, [word], number)}
                delta = {"content": word} if number else {"role": "assistant", "content": word}
                choice |= {"delta": delta} if is_chat else {"text": word}
                choice["finish_reason"] = None
                if wants_ids:
                    choice["token_ids"] = [1000 + number]
                choices.append(choice)
        last: dict[str, Any] = {"delta": {}} if is_chat else {"text": ""}
        reason = "tool_calls" if is_chat and tool is not None else "stop"
        choices.append({"index": 0, **last, "logprobs": None, "finish_reason": reason})
        chunks = [{**head, "choices": [choice]} for choice in choices]
        if wants_ids:
            (chunks[0] if is_chat else choices[0])["prompt_token_ids"] = PROMPT_TOKEN_IDS
        if (seen.body.get("stream_options") or {}).get("include_usage"):
            for chunk in chunks:
                chunk["usage"] = None
            chunks.append({**head, "choices": [], "usage": _usage(len(words))})
        return chunks


def _hang_up(request: web.Request) -> None:
    assert request.transport is not None
    request.transport.close()


def _usage(words: int) -> dict[str, int]:
    prompt = len(PROMPT_TOKEN_IDS)
    return {"prompt_tokens": prompt, "completion_tokens": words, "total_tokens": prompt + words}


def _logprobs(body: dict[str, Any], is_chat: bool, words: list[str], first: int) -> dict[str, Any] | None:
    asked = body.get("logprobs")
    if asked is None or asked is False:
        return None
    numbers = [-(number + 1) / 10 for number in range(first, first + len(words))]
    if is_chat:
        entries = zip(words, numbers, strict=True)
        return {
            "content": [
                {"token": word, "logprob": number, "bytes": list(word.encode()), "top_logprobs": []}
                for word, number in entries
            ]
        }
    return {"tokens": words, "token_logprobs": numbers, "top_logprobs": None, "text_offset": [0] * len(words)}


def _tool_call(body: dict[str, Any]) -> dict[str, Any] | None:
    if not body.get("tools") or any(message.get("role") == "tool" for message in body["messages"]):
        return None
    name = body["tools"][0]["function"]["name"]
    return {"id": "call-1", "type": "function", "function": {"name": name, "arguments": '{"city": "Paris"}'}}
