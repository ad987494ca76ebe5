"""Virtual runners that load a store server: as many requests as one core can send, and what became of them.

Run by ``bench/server.py`` as a process of its own, on a core of its own. It speaks HTTP/1.1 by itself, because any
client library would be slower than the server. It sends what clients of agentlightning 0.3 send, so
that the same load can be put on other servers of that protocol.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop

SPANS = 6
SPAN_BYTES = 1_500


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, host: str) -> None:
        self._head = f"HTTP/1.1\r\nhost: {host}\r\ncontent-type: ".encode()
        self._buffer = b""
        self._reply: asyncio.Future[tuple[int, bytes]] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(ConnectionError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._buffer[:end].lower()
        at = head.find(b"content-length:")
        if at < 0:
            raise RuntimeError(f"a reply without a length: {head[:200]!r}")
        length = int(head[at + 15 :].split(b"\r\n", 1)[0])
        if len(self._buffer) < end + 4 + length:
            return
        body = self._buffer[end + 4 : end + 4 + length]
        self._buffer = b""
        reply, self._reply = self._reply, None
        if reply is not None and not reply.done():
            reply.set_result((int(head[9:12]), body))

    def post(self, path: bytes, body: bytes, media: bytes = b"application/json") -> asyncio.Future[tuple[int, bytes]]:
        self._reply = asyncio.get_running_loop().create_future()
        assert self._transport is not None
        self._transport.write(
            b"POST %b %b%b\r\ncontent-length: %d\r\n\r\n%b" % (path, self._head, media, len(body), body)
        )
        return self._reply

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def span_parts() -> tuple[bytes, bytes]:
    """A span as JSON, cut where the ids of its attempt and its own id go: ``%b`` four times in the first part."""
    attributes: dict[str, object] = {"gen_ai.request.model": "demo", "gen_ai.usage.output_tokens": 64}
    for index in range(12):
        attributes[f"gen_ai.prompt.{index}.content"] = "the quick brown fox jumps over the lazy dog; 0123456789"
    rest = {
        "parent_id": None,
        "name": "openai.chat.completion",
        "status": {"status_code": "OK", "description": None},
        "attributes": attributes,
        "events": [],
        "links": [],
        "start_time": 1_700_000_000.5,
        "end_time": 1_700_000_001.5,
        "context": None,
        "parent": None,
        "resource": {"attributes": {"service.name": "agent"}, "schema_url": ""},
    }
    head = b'{"rollout_id":"%b","attempt_id":"%b","sequence_id":%d,"trace_id":"%032x","span_id":"%016x",'
    return head, json.dumps(rest, separators=(",", ":")).encode()[1:]


HEAD, REST = span_parts()


def span(rollout_id: str, attempt_id: str, number: int, counter: int) -> bytes:
    return HEAD % (rollout_id.encode(), attempt_id.encode(), number, counter, counter) + REST


def otlp(rollout_id: str, attempt_id: str, counters: list[int]) -> bytes:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    request = ExportTraceServiceRequest()
    group = request.resource_spans.add()
    for name, value in (("agentlightning.rollout_id", rollout_id), ("agentlightning.attempt_id", attempt_id)):
        group.resource.attributes.add(key=name).value.string_value = value
    scope = group.scope_spans.add()
    attributes = json.loads(b"{" + REST)["attributes"]
    for counter in counters:
        each = scope.spans.add(
            trace_id=counter.to_bytes(16, "big"), span_id=counter.to_bytes(8, "big"), name="openai.chat.completion"
        )
        each.start_time_unix_nano, each.end_time_unix_nano = 1_700_000_000 * 10**9, 1_700_000_001 * 10**9
        for name, value in attributes.items():
            target = each.attributes.add(key=name).value
            if isinstance(value, str):
                target.string_value = value
            else:
                target.int_value = value
    return request.SerializeToString()


class Runner:
    """One virtual runner: enqueues a rollout, claims one, traces it, finishes it, again and again."""

    def __init__(self, connection: Connection, prefix: str, number: int, spans: str, times: dict[str, list[float]]):
        self._connection = connection
        self._prefix = prefix
        self._worker = f"bench-worker-{number}"
        self._spans = spans
        self._times = times
        self._counter = (number + 1) << 32
        self._dequeue = json.dumps({"limit": 1, "worker_id": self._worker}).encode()
        self._held: dict[str, Any] | None = None

    async def rollout(self) -> None:
        await self.enqueue()
        reply = await self._send("claim", "/queues/rollouts/dequeue", self._dequeue)
        [claimed] = json.loads(reply)
        rollout_id, attempt_id = claimed["rollout_id"], claimed["attempt"]["attempt_id"]
        counters = self._next_counters()
        if self._spans == "single":
            for number, counter in enumerate(counters):
                await self._send("add_span", "/spans", span(rollout_id, attempt_id, number + 1, counter))
        elif self._spans == "bulk":
            body = b",".join(span(rollout_id, attempt_id, 0, counter) for counter in counters)
            await self._send("add_spans", "/spans/bulk", b'{"spans":[' + body + b"]}")
        else:
            began = time.perf_counter()
            status, _ = await self._connection.post(
                b"/v1/traces", otlp(rollout_id, attempt_id, counters), b"application/x-protobuf"
            )
            if status != 200:
                raise RuntimeError(f"OTLP was answered by {status}")
            self._times["add_spans"].append(time.perf_counter() - began)
        await self._send("finish", f"/rollouts/{rollout_id}/attempts/{attempt_id}", b'{"status":"succeeded"}')

    async def enqueue(self, number: int = 1) -> None:
        rollouts = b",".join([b'{"input":{"task":"bench"}}'] * number)
        await self._send("enqueue", "/queues/rollouts/enqueue", b'{"rollouts":[' + rollouts + b"]}")

    async def fused(self) -> None:
        """The same as our runner does it: spans, end and next claim in one call, an enqueue in the other."""
        await self.enqueue()
        if self._held is None:
            [self._held] = json.loads(await self._send("claim", "/queues/rollouts/dequeue", self._dequeue))
        rollout_id, attempt_id = self._held["rollout_id"], self._held["attempt"]["attempt_id"]
        counters = self._next_counters()
        spans = b",".join(span(rollout_id, attempt_id, 0, counter) for counter in counters)
        claim = b'"claim_limit":1,"worker_id":"%b","request_id":"rq-%d"' % (self._worker.encode(), counters[0])
        body = b'{"status":"succeeded","spans":[' + spans + b"]," + claim + b"}"
        reply = await self._send("finish", f"/rollouts/{rollout_id}/attempts/{attempt_id}/finish", body)
        claimed = json.loads(reply)["claimed"]
        self._held = claimed[0] if claimed else None

    def _next_counters(self) -> list[int]:
        counters = list(range(self._counter, self._counter + SPANS))
        self._counter += SPANS
        return counters

    async def _send(self, kind: str, path: str, body: bytes) -> bytes:
        began = time.perf_counter()
        status, reply = await self._connection.post((self._prefix + path).encode(), body)
        if status not in (200, 201):
            raise RuntimeError(f"{kind} was answered by {status}: {reply[:300]!r}")
        self._times[kind].append(time.perf_counter() - began)
        return reply


async def connect(port: int) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(
        lambda: Connection(f"127.0.0.1:{port}"), "127.0.0.1", port
    )
    return connection


async def for_a_while(seconds: float, work: list[Callable[[], Awaitable[object]]]) -> tuple[int, float]:
    """Repeat each piece of work side by side until the time is up; how often all were done, and the seconds."""
    began = time.perf_counter()
    done = 0

    async def repeat(each: Callable[[], Awaitable[object]]) -> None:
        nonlocal done
        while time.perf_counter() - began < seconds:
            await each()
            done += 1

    await asyncio.gather(*(repeat(each) for each in work))
    return done, time.perf_counter() - began


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def rollouts(arguments: argparse.Namespace) -> dict[str, object]:
    """Rollouts per second, and the latencies of each kind of request in milliseconds."""
    times: dict[str, list[float]] = defaultdict(list)
    connections = [await connect(arguments.port) for _ in range(arguments.runners)]
    runners = [Runner(each, arguments.prefix, n, arguments.spans, times) for n, each in enumerate(connections)]
    work = [each.fused if arguments.spans == "fused" else each.rollout for each in runners]
    if arguments.spans == "fused":  # so that a claim finds work: each runner enqueues after it has claimed another's
        for each in runners:
            await each.enqueue(2)
    await for_a_while(min(0.5, arguments.seconds), work)
    times.clear()
    done, seconds = await for_a_while(arguments.seconds, work)
    for each in connections:
        each.close()
    return {
        "rollouts_per_s": done / seconds,
        "requests_per_s": sum(map(len, times.values())) / seconds,
        "p50_ms": {kind: statistics.median(values) * 1e3 for kind, values in times.items()},
        "p99_ms": {kind: quantile(values, 0.99) * 1e3 for kind, values in times.items()},
    }


async def floor(arguments: argparse.Namespace) -> dict[str, object]:
    """Requests per second that go all the way through the server but not to the store: claims of nothing."""
    connections = [await connect(arguments.port) for _ in range(arguments.runners)]
    work = [lambda each=each: each.post(b"/v1/agl/queues/rollouts/dequeue", b'{"limit":0}') for each in connections]
    done, seconds = await for_a_while(arguments.seconds, work)
    return {"requests_per_s": done / seconds}


async def idle(arguments: argparse.Namespace) -> dict[str, object]:
    """Long-polls of 20 s that find nothing, each sent again when it is answered; the caller measures the server."""
    connections = [await connect(arguments.port) for _ in range(arguments.runners)]
    path = f"{arguments.prefix}/queues/rollouts/dequeue".encode()
    answered = 0

    async def poll(number: int, connection: Connection) -> None:
        nonlocal answered
        await asyncio.sleep(2.0 * number / arguments.runners)
        for claim in range(10**6):
            body = {"worker_id": f"idle-{number}", "request_id": f"idle-{number}-{claim}", "wait_seconds": 20.0}
            await connection.post(path, json.dumps(body).encode())
            answered += 1

    waiting = [asyncio.ensure_future(poll(number, each)) for number, each in enumerate(connections)]
    await asyncio.sleep(4.0)  # the arrival of all is not what is measured
    sys.stdout.write("waiting\n")
    sys.stdout.flush()
    await asyncio.sleep(arguments.seconds)
    for task in waiting:
        task.cancel()
    for each in connections:
        each.close()
    return {"answered": answered}


async def many_spans(arguments: argparse.Namespace) -> dict[str, object]:
    """Store as many spans as asked, 100 in a request, under attempts of 1,000."""
    connections = [await connect(arguments.port) for _ in range(8)]
    left = iter(range(arguments.number // 1_000))

    async def trace(connection: Connection) -> None:
        for batch in left:
            _, reply = await connection.post(f"{arguments.prefix}/rollouts".encode(), b'{"input":1}')
            made = json.loads(reply)
            for part in range(10):
                first = (batch * 10 + part + 1) * 100
                spans = (span(made["rollout_id"], made["attempt"]["attempt_id"], 0, first + n) for n in range(100))
                path = f"{arguments.prefix}/spans/bulk".encode()
                status, reply = await connection.post(path, b'{"spans":[' + b",".join(spans) + b"]}")
                if status != 201:
                    raise RuntimeError(f"spans were answered by {status}: {reply[:300]!r}")

    began = time.perf_counter()
    await asyncio.gather(*map(trace, connections))
    return {"spans_per_s": arguments.number / (time.perf_counter() - began)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=["rollouts", "floor", "idle", "many_spans"])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--prefix", default="/agl/v1")
    parser.add_argument("--runners", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--spans", choices=["single", "bulk", "otlp", "fused"], default="single")
    parser.add_argument("--number", type=int, default=500_000)
    arguments = parser.parse_args()
    scenario = {"rollouts": rollouts, "floor": floor, "idle": idle, "many_spans": many_spans}[arguments.scenario]
    sys.stdout.write(json.dumps(uvloop.run(scenario(arguments))) + "\n")


if __name__ == "__main__":
    main()
