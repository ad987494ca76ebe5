"""What the LLM proxy costs: added latency, added time to the first byte, and memory of a thousand open streams.

    scripts/bench proxy [--calls 300] [--streams 1000] [--chunks 50] [--store own|server] [--json FILE]

Three processes: a local backend that answers at once, the proxy with a durable SQLite store (or a fourth one that
serves the store over HTTP), and this one, which calls both through the same client. Direct and proxied calls take
turns in one run, so that whatever else the machine does falls on both; the tenth percentile (p10) is what is least
disturbed by it. Every proxied call is recorded: its span is synced to the disk before the reply has ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import resource
import socket
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import psutil

WORDS = 20
WARM_UP = 20
QUESTION = {"model": "policy", "messages": [{"role": "user", "content": "a question of a few words, " * 20}]}
LOGPROB = {"token": "word ", "logprob": -0.5, "bytes": None, "top_logprobs": []}


# --- The backend -----------------------------------------------------------------------------------------


class Backend:
    """An ASGI application that speaks OpenAI's protocol as vLLM does, and answers at once.

    A request with ``hold`` stops after so many words, until somebody asks for ``/release``.
    """

    def __init__(self) -> None:
        self._released = asyncio.Event()
        self._holding = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if scope["path"] == "/release":
            self._released.set()
            return await _send(send, b"{}")
        if scope["path"] == "/holding":
            return await _send(send, json.dumps(self._holding).encode())
        question = json.loads(body)
        if question.get("stream"):
            return await self._stream(question, send)
        choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": "word " * WORDS}}
        choice |= {"finish_reason": "stop", "logprobs": {"content": [LOGPROB] * WORDS}, "token_ids": [7] * WORDS}
        reply = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
        reply |= {"usage": {"prompt_tokens": 140, "completion_tokens": WORDS}, "prompt_token_ids": [7] * 140}
        return await _send(send, json.dumps(reply).encode())

    async def _stream(self, question: dict[str, Any], send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        choice = {"index": 0, "delta": {"content": "word "}, "finish_reason": None}
        choice |= {"logprobs": {"content": [LOGPROB]}, "token_ids": [7]}
        head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        event = b"data: " + json.dumps({**head, "choices": [choice]}).encode() + b"\n\n"
        for number in range(question.get("words", WORDS)):
            if number == question.get("hold"):
                self._holding += 1
                await self._released.wait()
            await send({"type": "http.response.body", "body": event, "more_body": True})
        last = {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        ending = b"data: " + json.dumps(last).encode() + b"\n\ndata: [DONE]\n\n"
        await send({"type": "http.response.body", "body": ending})


async def _send(send: Any, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def run_backend(pipe: Connection) -> None:
    """The process of the backend; tells its URL, and ends when the pipe does."""
    import uvicorn

    async def main() -> None:
        config = uvicorn.Config(
            Backend(), port=0, lifespan="off", log_level="error", access_log=False, backlog=4096, ws="none"
        )
        server = uvicorn.Server(config)
        listener = config.bind_socket()
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else replies wait for acknowledgements
        pipe.send(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await asyncio.to_thread(_wait_for_end, pipe)
        server.should_exit = True
        server.force_exit = True
        await serving

    asyncio.run(main())


def run_store(pipe: Connection, folder: str) -> None:
    """The process of a store behind HTTP; tells its URL, and ends when the pipe does."""
    from agentlightning import LightningStoreServer, SqliteLightningStore

    async def main() -> None:
        async with SqliteLightningStore(Path(folder) / "bench.db") as store:
            server = LightningStoreServer(store, port=0)
            await server.start()
            pipe.send(server.endpoint)
            await asyncio.to_thread(_wait_for_end, pipe)
            await server.stop()

    asyncio.run(main())


def run_proxy(pipe: Connection, backend_url: str, folder: str, store_url: str | None) -> None:
    """The process of the proxy; tells its base URL for one attempt, and ends when the pipe does.

    Args:
        store_url: where the store is served; None: it is in this process.
    """
    from agentlightning import LightningStoreClient, LLMProxy, SqliteLightningStore

    async def main() -> None:
        if store_url is None:
            async with SqliteLightningStore(Path(folder) / "bench.db") as own:
                await use(own)
        else:
            client = LightningStoreClient(store_url)
            await use(client)
            await client.close()

    async def use(store: Any) -> None:
        rollout = await store.start_rollout({"bench": True})
        params = {"model": "openai/m", "api_base": backend_url}
        proxy = LLMProxy(model_list=[{"model_name": "policy", "litellm_params": params}], store=store)
        await proxy.start()
        pipe.send(proxy.as_resource(rollout.rollout_id, rollout.attempt.attempt_id).endpoint)
        await asyncio.to_thread(_wait_for_end, pipe)
        await proxy.stop()
        pipe.send((await store.query_spans(rollout.rollout_id, limit=1)).total)

    asyncio.run(main())


def _wait_for_end(pipe: Connection) -> None:
    pipe.recv()


@asynccontextmanager
async def process(target: Callable[..., None], *arguments: Any) -> AsyncIterator[tuple[int, str, Connection]]:
    """A process of ours: its pid, what it said first, and the pipe to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    child.start()
    try:
        assert child.pid is not None
        yield child.pid, await asyncio.to_thread(ours.recv), ours
    finally:
        if child.is_alive():
            ours.send(None)
        child.join(30)
        if child.is_alive():
            child.kill()


# --- The measurements --------------------------------------------------------------------------------------


async def whole_call(session: aiohttp.ClientSession, url: str) -> float:
    """Seconds from sending a question to having the whole reply."""
    before = time.perf_counter()
    async with session.post(f"{url}/chat/completions", json=QUESTION) as response:
        await response.read()
        assert response.status == 200
    return time.perf_counter() - before


async def first_byte(session: aiohttp.ClientSession, url: str) -> float:
    """Seconds from sending a question to the first byte of its streamed reply."""
    before = time.perf_counter()
    async with session.post(f"{url}/chat/completions", json={**QUESTION, "stream": True}) as response:
        await response.content.readany()
        seconds = time.perf_counter() - before
        await response.read()
    return seconds


async def compare(
    measure: Any, session: aiohttp.ClientSession, direct: str, proxied: str, pid: int, calls: int
) -> dict[str, Any]:
    """Milliseconds of direct and proxied calls that take turns, what the proxy adds, and its CPU time per call.

    On a busy machine the times say more of the others than of the proxy; its CPU time does not.
    """
    before = sum(psutil.Process(pid).cpu_times()[:2])
    times: dict[str, list[float]] = {direct: [], proxied: []}
    for number in range(calls + WARM_UP):
        for url in (direct, proxied) if number % 2 else (proxied, direct):
            seconds = await measure(session, url)
            if number >= WARM_UP:
                times[url].append(seconds * 1000)
    used = sum(psutil.Process(pid).cpu_times()[:2]) - before
    result: dict[str, Any] = {"calls": calls, "proxy_cpu_per_call": used * 1000 / (calls + WARM_UP)}
    for name, url in (("direct", direct), ("proxied", proxied)):
        quantiles = statistics.quantiles(times[url], n=100)
        result[name] = {"p10": quantiles[9], "p50": quantiles[49], "p95": quantiles[94], "p99": quantiles[98]}
    for name in ("p10", "p50"):
        result[f"added_{name}"] = result["proxied"][name] - result["direct"][name]
    return result


async def concurrent_calls(session: aiohttp.ClientSession, url: str, calls: int, tasks: int) -> float:
    """Calls per second with so many at once."""
    numbers = iter(range(calls))

    async def worker() -> None:
        for _ in numbers:
            await whole_call(session, url)

    before = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(tasks)))
    return calls / (time.perf_counter() - before)


async def open_streams(
    session: aiohttp.ClientSession, direct: str, proxied: str, pid: int, streams: int, chunks: int
) -> dict[str, Any]:
    """Hold so many streams open at once, look at the proxy's memory, then let all end."""
    proxy = psutil.Process(pid)
    before = proxy.memory_info().rss
    question = {**QUESTION, "stream": True, "words": 2 * chunks, "hold": chunks}

    async def stream() -> int:
        async with session.post(f"{proxied}/chat/completions", json=question) as response:
            return (await response.read()).count(b"\n\n")

    calls = [asyncio.create_task(stream()) for _ in range(streams)]
    root = direct.removesuffix("/v1")
    while True:
        async with session.get(f"{root}/holding") as response:
            if await response.json() >= streams:
                break
        await asyncio.sleep(0.05)
    await asyncio.sleep(1.0)  # what was sent has passed the proxy
    held = proxy.memory_info().rss
    async with session.get(f"{root}/release") as response:
        await response.read()
    events = await asyncio.gather(*calls)
    assert set(events) == {2 * chunks + 2}, "every stream came whole"
    return {
        "streams": streams,
        "chunks_each_when_held": chunks,
        "rss_before_mb": before / 1e6,
        "rss_held_mb": held / 1e6,
        "rss_after_mb": proxy.memory_info().rss / 1e6,
    }


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All measurements, in one set of processes."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        _, direct, _ = await stack.enter_async_context(process(run_backend))
        store_url = None
        if arguments.store == "server":
            _, store_url, _ = await stack.enter_async_context(process(run_store, folder))
        pid, proxied, pipe = await stack.enter_async_context(process(run_proxy, direct, folder, store_url))
        connector = aiohttp.TCPConnector(limit=0)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        results: dict[str, Any] = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "whole_reply_ms": await compare(whole_call, session, direct, proxied, pid, arguments.calls),
            "first_byte_ms": await compare(first_byte, session, direct, proxied, pid, arguments.calls),
            "calls_per_second_32_at_once": await concurrent_calls(session, proxied, arguments.calls * 4, 32),
            "open_streams": await open_streams(session, direct, proxied, pid, arguments.streams, arguments.chunks),
        }
        pipe.send(None)
        stored = await asyncio.to_thread(pipe.recv)
        expected = 2 * (arguments.calls + WARM_UP) + arguments.calls * 4 + arguments.streams
        results["spans_stored"] = {"expected": expected, "found": stored}
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--chunks", type=int, default=50)
    parser.add_argument("--store", choices=["own", "server"], default="own", help="where the store is")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    results = asyncio.run(run(arguments))
    print(json.dumps(results, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
