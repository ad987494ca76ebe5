"""How long one client's requests hold up another client, and how much memory they take.

    scripts/bench stall [--only NAME ...] [--rounds 3] [--json FILE]

Two servers run, each with a database file of its own. The scenarios are for the first one; the second one is the
control, which nobody uses. A process of its own asks both every few milliseconds for little: ``read`` is the health of
the server, ``write`` is a heartbeat, which waits for its commit. So the difference between the two servers is what the
load did, and what both show is the machine. Memory is the resident memory of the server and of its processes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from serving import answers, free_port

_MIB = 1024 * 1024
_PROBE_SECONDS = 0.005
_SETTLE_SECONDS = 0.5
_TIMEOUT_SECONDS = 180.0
_SAMPLE_SECONDS = 0.01
_WAITING = 38
_DEAF = 40

ENQUEUE, DEQUEUE = "/queues/rollouts/enqueue", "/queues/rollouts/dequeue"


# --- The probe: its own process, this file with the ports as arguments ------------------------------


async def _probe(port: int, method: str, path: str, body: bytes, taken: list[float]) -> None:
    request = _request(method, path, body)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        while True:
            began = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"{method} {path} is answered by {head[:60]!r}")
            await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]))
            taken.append(time.perf_counter() - began)
            await asyncio.sleep(_PROBE_SECONDS)
    finally:
        writer.close()


async def _probes(ports: Sequence[int]) -> None:
    taken: dict[str, list[float]] = {}
    tasks: list[asyncio.Task[None]] = []
    for name, port in zip(("load", "control"), ports, strict=True):
        for kind, asked in (
            ("read", ("GET", "/health", b"")),
            ("write", ("POST", "/workers/probe", b'{"heartbeat_stats":{"n":1}}')),
        ):
            found = taken[f"{name}.{kind}"] = []
            tasks.append(asyncio.create_task(_probe(port, *asked, found)))
    print("ready", flush=True)
    ended = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await asyncio.wait([ended, *tasks], return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        if task.done():
            task.result()
        task.cancel()
    print(json.dumps(taken))


@contextmanager
def probing(ports: Sequence[int]) -> Iterator[dict[str, list[float]]]:
    """Measure while the block runs; the seconds that each request took are there after it."""
    command = [sys.executable, __file__, "--probe", *map(str, ports)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    found: dict[str, list[float]] = {}
    time.sleep(_SETTLE_SECONDS)
    yield found
    time.sleep(_SETTLE_SECONDS)
    output, _ = process.communicate("")
    found.update(json.loads(output))


# --- The load ----------------------------------------------------------------------------------------


class Server(NamedTuple):
    """One of the two."""

    process: subprocess.Popen[bytes]
    port: int

    def send(self, method: str, path: str, body: bytes = b"") -> int:
        """Send a request and read the whole reply; returns its status."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=_TIMEOUT_SECONDS) as connection:
            connection.sendall(_request(method, path, body, close=True))
            status = int(connection.recv(65536)[9:12])
            while connection.recv(1 << 20):
                pass
        return status

    def resident(self) -> int:
        """Bytes of the server and of its processes."""
        found = psutil.Process(self.process.pid)
        total = 0
        for each in (found, *found.children(recursive=True)):
            try:
                total += each.memory_info().rss
            except psutil.Error:
                continue
        return total


def _request(method: str, path: str, body: bytes = b"", *, close: bool = False) -> bytes:
    prefix = "" if path.startswith("/v1/") else "/agl/v1"
    head = f"{method} {prefix}{path} HTTP/1.1\r\nhost: 127.0.0.1\r\n"
    head += "connection: close\r\n" if close else ""
    if body:
        media = "application/x-protobuf\r\ncontent-encoding: gzip" if path.startswith("/v1/") else "application/json"
        head += f"content-type: {media}\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


@contextmanager
def peak_of(server: Server) -> Iterator[dict[str, int]]:
    """The most resident bytes while the block runs."""
    found = {"peak": 0}
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_SAMPLE_SECONDS):
            found["peak"] = max(found["peak"], server.resident())

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield found
    finally:
        ended.set()
        looking.join()


def _span(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "rollout_id": "ro-a",
        "attempt_id": "at-a",
        "sequence_id": 0,
        "trace_id": "0" * 31 + "1",
        "span_id": f"{number:016x}",
        "parent_id": None,
        "name": "n",
        "status": {"status_code": "OK", "description": None},
        "attributes": {},
        "events": [],
        "links": [],
        "start_time": 1.0,
        "end_time": 2.0,
        "context": None,
        "parent": None,
        "resource": {"attributes": {}, "schema_url": ""},
    } | fields


def _spans(first: int, count: int, **fields: Any) -> bytes:
    return json.dumps({"spans": [_span(first + number, **fields) for number in range(count)]}).encode()


def _rollouts(item: bytes, count: int = 10_000) -> bytes:
    return b'{"rollouts":[' + b",".join([item] * count) + b"]}"


def _junk(value: bytes) -> bytes:
    return b'{"worker_id":"w","junk":' + value + b"}"


def _otlp(count: int) -> bytes:
    import gzip

    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    request = ExportTraceServiceRequest()
    group = request.resource_spans.add()
    for name, value in (("agentlightning.rollout_id", "ro-a"), ("agentlightning.attempt_id", "at-a")):
        pair = group.resource.attributes.add()
        pair.key, pair.value.string_value = name, value
    spans = group.scope_spans.add().spans
    for number in range(count):
        span = spans.add(name="n", trace_id=b"\1" * 16, span_id=(1_000_000 + number).to_bytes(8, "big"))
        span.start_time_unix_nano = span.end_time_unix_nano = 10**18
        for key in range(8):
            pair = span.attributes.add()
            pair.key, pair.value.string_value = f"k{key}", "v" * 40
    return gzip.compress(request.SerializeToString(), 1)


Scenario = Callable[[Server, int], str]
"""Loads a server in some round; returns what it answered."""


def once(method: str, path: str, body: Callable[[int], bytes] = lambda _: b"") -> Scenario:
    """One request. ``body``: by the number of the round."""

    def run(server: Server, number: int) -> str:
        return str(server.send(method, path, body(number)))

    return run


def waiting(server: Server, number: int) -> str:
    """Claims that wait, each with a large field that no server knows."""
    body = b'{"worker_id":"w%04d","request_id":"rq-%d-%04d","wait_seconds":60.0,"junk":"' + b"x" * (56 * _MIB) + b'"}'
    connections: list[socket.socket] = []
    try:
        for each in range(_WAITING):
            connection = socket.create_connection(("127.0.0.1", server.port), timeout=_TIMEOUT_SECONDS)
            connections.append(connection)
            connection.sendall(_request("POST", DEQUEUE, body % (each, number, each)))
        time.sleep(2)
        answered = select.select(connections, [], [], 0)[0]
        return f"{len(connections) - len(answered)} wait"
    finally:
        for connection in connections:
            connection.close()


def deaf(server: Server, _: int) -> str:
    """Clients that ask for all rollouts and do not read them."""
    connections: list[socket.socket] = []
    try:
        for _ in range(_DEAF):
            connection = socket.socket()
            connections.append(connection)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(_request("GET", "/rollouts?limit=-1"))
        time.sleep(5)
        return f"{_DEAF} do not read"
    finally:
        for connection in connections:
            connection.close()


SCENARIOS: dict[str, Scenario] = {
    "nothing": lambda *_: time.sleep(3) or "",
    "enqueue 10,000 of 20 B": once("POST", ENQUEUE, lambda _: _rollouts(b'{"input":12345}')),
    "enqueue 5,000 in 64 KiB": once("POST", ENQUEUE, lambda _: _rollouts(b'{"input":1}', 5_000)),
    "enqueue 10,000 of 6 KiB": once("POST", ENQUEUE, lambda _: _rollouts(b'{"input":"%b"}' % (b"x" * 6000))),
    "one input of 160,000 objects": once(
        "POST", ENQUEUE, lambda _: _rollouts(b'{"input":[' + b",".join([b'{"a":1,"b":2}'] * 160_000) + b"]}", 1)
    ),
    "60 MiB in an unknown field": once("POST", DEQUEUE, lambda _: _junk(b'"' + b"x" * (60 * _MIB) + b'"')),
    "60 MiB of backslashes": once("POST", DEQUEUE, lambda _: _junk(b'"' + rb"\\" * (30 * _MIB) + rb'\\u0000"')),
    "490,000 spaced keys": once(
        "POST", DEQUEUE, lambda _: _junk(b"{" + b",".join([b'"k%d" :1' % n for n in range(490_000)]) + b"}")
    ),
    "60 MiB of brackets in a text": once("POST", DEQUEUE, lambda _: _junk(b'"' + b",:[{" * (15 * _MIB) + b'"')),
    "8,000 spans with events": once(
        "POST",
        "/spans/bulk",
        lambda n: _spans(n * 10_000, 8_000, events=[{"name": "e", "attributes": {"a": 1}, "timestamp": 1.0}] * 8),
    ),
    "8,000 spans through pydantic": once(
        "POST", "/spans/bulk", lambda n: _spans(10**7 + n * 10_000, 8_000, extra=[{"name": "e", "value": 1}] * 8)
    ),
    "10,000 spans by OTLP, gzip": once("POST", "/v1/traces", lambda _: _otlp(10_000)),
    "500,000 ids": once(
        "POST", "/waits/rollouts", lambda _: json.dumps({"rollout_ids": [f"ro-{n}" for n in range(500_000)]}).encode()
    ),
    "a heartbeat with 10,000 attempts": once(
        "POST", "/workers/w", lambda _: json.dumps({"attempt_ids": [f"at-{n}" for n in range(10_000)]}).encode()
    ),
    "10,000 sequence ids": once(
        "POST", "/spans/next/bulk", lambda _: json.dumps({"rollout_attempt_ids": [["ro-a", "at-a"]] * 10_000}).encode()
    ),
    "claim 1,000": once("POST", DEQUEUE, lambda _: b'{"worker_id":"w-many","limit":1000}'),
    "all rollouts": once("GET", "/rollouts?limit=-1"),
    "all spans": once("GET", "/spans?rollout_id=ro-a&limit=-1"),
    "a search in all spans": once("GET", "/spans?rollout_id=ro-a&limit=1&name_contains=zzz"),
    "a page far behind, sorted": once("GET", "/rollouts?limit=1&sort_by=status&offset=20000"),
    "verify": once("GET", "/verify"),
    "38 waiting claims of 56 MiB": waiting,
    "40 clients that do not read": deaf,
}


# --- Figures -----------------------------------------------------------------------------------------


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    port = free_port()
    agl = Path(sys.executable).with_name("agl")
    command = [agl, "store", "--port", str(port), "--db", folder / f"{port}.db", "--log-level", "warning"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not answers(port, "/agl/v1/health"):
            if process.poll() is not None:
                raise RuntimeError("the server does not start")
            time.sleep(0.05)
        yield Server(process, port)
    finally:
        process.terminate()
        process.wait(60)


def milliseconds(taken: Sequence[float]) -> dict[str, float]:
    """Percentiles of what many requests took, in milliseconds."""
    ordered = sorted(taken)
    places = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
    return {name: round(1000 * ordered[int(place * (len(ordered) - 1))], 1) for name, place in places.items()}


def measured(name: str, server: Server, control: Server, rounds: int) -> dict[str, Any]:
    """The figures of one scenario."""
    taken: dict[str, list[float]] = {}
    peak = 0
    answered: list[str] = []
    for number in range(rounds):
        with probing([server.port, control.port]) as found, peak_of(server) as memory:
            answered.append(SCENARIOS[name](server, number))
        peak = max(peak, memory["peak"])
        for stream, values in found.items():
            taken.setdefault(stream, []).extend(values)
    streams = {stream: milliseconds(values) for stream, values in taken.items()}
    return {"streams": streams, "peak_mb": peak / 1e6, "after_mb": server.resident() / 1e6, "answers": answered}


def line_of(name: str, figures: dict[str, Any]) -> str:
    """p99.9 and the longest, in milliseconds, and memory."""
    shown = "  ".join(
        f"{stream} {each['p99.9']:6.1f} {each['max']:6.1f}" for stream, each in figures["streams"].items()
    )
    memory = f"peak {figures['peak_mb']:5.0f} MB, after {figures['after_mb']:5.0f} MB"
    return f"{name:34} {shown}  {memory}  {figures['answers'][-1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=[*SCENARIOS], default=[*SCENARIOS])
    parser.add_argument("--json", type=Path, help="write the figures into this file, too")
    parser.add_argument("--probe", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe is not None:
        asyncio.run(_probes(options.probe))
        return
    print(f"{platform.platform()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-", dir=Path.cwd()) as folder:
        served_here = served(Path(folder)), served(Path(folder))
        with served_here[0] as server, served_here[1] as control:
            server.send("POST", "/rollouts", b'{"input":1,"rollout_id":"ro-a","attempt_id":"at-a"}')
            for name in options.only:
                report[name] = measured(name, server, control, options.rounds)
                print(line_of(name, report[name]), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
