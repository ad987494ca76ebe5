"""Large bodies, which another process reads: with the same outcome, without holding up anybody, and without remains."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from agentlightning.errors import StoreUnavailable
from agentlightning.http.server import app
from agentlightning.http.server.decoder import Decoder
from agentlightning.http.server.endpoints import Endpoints
from agentlightning.http.server.intake import in_parts
from agentlightning.http.server.server import LightningStoreServer
from agentlightning.store.operations.spans import SpanDraft
from agentlightning.store.sqlite.store import InMemoryLightningStore, SqliteLightningStore
from asgi_calls import Answer, AsgiCalls
from clocks import ManualClock
from slow_reads import fail, length, process, wait_for

PADDING = "x" * 70_000
_HUGE = 2 * 1024 * 1024


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes find the functions of the tests."""
    support = Path(__file__).parents[2] / "support"
    monkeypatch.setenv("PYTHONPATH", str(support), prepend=os.pathsep)


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    made = Decoder()
    yield made
    made.close()


# --- The same outcome ---------------------------------------------------------------------------------


class _Counted:
    """Ids that are the same in every run."""

    def __init__(self) -> None:
        self._last = 0

    def mint(self, prefix: str) -> str:
        self._last += 1
        return f"{prefix}n{self._last}"


def _span(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "rollout_id": "ro-1",
        "attempt_id": "at-1",
        "sequence_id": 0,
        "trace_id": "0" * 32,
        "span_id": f"{number:016x}",
        "parent_id": None,
        "name": "call",
        "status": {"status_code": "OK", "description": None},
        "attributes": {"text": PADDING},
        "events": [],
        "links": [],
        "start_time": 1.5,
        "end_time": 2.5,
        "context": None,
        "parent": None,
        "resource": {"attributes": {}, "schema_url": ""},
    } | fields


def _prompt(template: str) -> dict[str, Any]:
    return {"p": {"resource_type": "prompt_template", "template": template, "engine": "jinja"}}


CALLS: list[tuple[str, Any]] = [
    ("/resources?resources_id=rs-1", _prompt(PADDING)),
    ("/resources/rs-1", _prompt(PADDING[1:])),
    ("/resources?resources_id=rs-1", _prompt(PADDING)),
    ("/resources/rs-1/rollback", {"version": 1}),
    ("/rollouts", {"input": {"b": PADDING, "a": 1}, "metadata": {"z": 1}, "rollout_id": "ro-1", "attempt_id": "at-1"}),
    ("/rollouts", {"input": {"a": 1, "b": PADDING}, "metadata": {"z": 1}, "rollout_id": "ro-1", "attempt_id": "at-1"}),
    ("/rollouts", {"input": 2, "rollout_id": "ro-1", "attempt_id": "at-1"}),
    ("/queues/rollouts/enqueue", {"rollouts": [{"input": n, "metadata": {"n": n}} for n in range(5_000)]}),
    ("/queues/rollouts/enqueue", {"rollouts": [{"input": PADDING, "rollout_id": "ro-2", "priority": 3}]}),
    ("/queues/rollouts/enqueue", {"rollouts": [{"input": PADDING[1:], "rollout_id": "ro-2"}]}),
    ("/queues/rollouts/enqueue", {"rollouts": [{"input": 1}, {"input": 1, "resources_id": "rs-unknown"}]}),
    ("/queues/rollouts/enqueue", {"rollouts": [{"input": 1}, {"metadata": 1}, {"metadata": 2}]}),
    ("/queues/rollouts/enqueue", {"rollouts": []}),
    ("/queues/rollouts/dequeue", {"worker_id": "w-1", "request_id": "rq-1", "limit": 2}),
    ("/workers/w-1", {"heartbeat_stats": {"b": 1, "a": PADDING}, "attempt_ids": ["at-1"], "registration": {"r": 1}}),
    ("/spans", _span(1)),
    ("/spans", _span(1)),
    ("/spans", _span(1, name="other")),
    ("/spans/bulk", {"spans": [_span(n) for n in range(2, 400)]}),
    ("/spans/bulk", {"spans": [_span(n, extra={"n": n}) for n in range(400, 404)]}),
    ("/spans/bulk", {"spans": [_span(5), _span(404, rollout_id="ro-none")]}),
    ("/spans/bulk", {"spans": [_span(405), {}]}),
    ("/spans/next/bulk", {"rollout_attempt_ids": [["ro-1", "at-1"]] * 5_000}),
    ("/rollouts/ro-1", {"input": [PADDING], "metadata": None}),
    ("/rollouts/ro-1/attempts/at-1", {"metadata": {"m": PADDING}, "status": "running"}),
    ("/rollouts/ro-1/attempts/at-1/finish", {"status": "failed", "spans": [_span(n) for n in range(500, 503)]}),
    ("/rollouts/ro-1/attempts/at-1/finish", {"status": "failed", "spans": [_span(503, extra=1)]}),
    ("/rollouts/ro-1/attempts/at-1/finish", {"status": "failed", "spans": [_span(504, attempt_id="at-2")]}),
    ("/rollouts/search", {"rollout_id_in": [f"ro-{n}" for n in range(5_000)]}),
    ("/waits/rollouts", {"rollout_ids": [f"ro-{n}" for n in range(5_000)], "timeout": 0}),
    ("/rollouts/ro-2/cancel", {"message": PADDING}),
    ("/rollouts", {"input": 1, "config": {"max_attempts": "many"}, "priority": None}),
    ("/rollouts", {"input": 1, "metadata": [1]}),
    ("/rollouts", b'{"input":1,"input":2'),
    ("/rollouts", b'{"input":NaN'),
    ("/rollouts", b'{"input":"\\u0000"'),
    ("/rollouts", b'{"input":' + b"[" * 100 + b"]" * 100),
    ("/rollouts", b'{"input":9223372036854775808'),
    ("/rollouts", b'{"input":"' + b"x" * 5_000_000 + b'"'),
    ("/rollouts/ro-2/cancel", b'{"message":"' + b"x" * 5_000_000 + b'"'),
]


def _body(content: Any) -> bytes:
    """The JSON with so much more in it that no event loop reads it; resources and spans are as large by themselves."""
    if isinstance(content, bytes):
        return content + b',"padding":"' + PADDING.encode() + b'"}'
    padded = content if "p" in content or "span_id" in content else content | {"padding": PADDING}
    return json.dumps(padded).encode()


def _shown(answer: Answer) -> Any:
    told = json.loads(answer.body)
    if isinstance(told, dict):
        told.pop("request_id", None)
    return answer.status, told


async def test_whichever_process_reads_a_body_the_outcome_is_the_same(decoder: Decoder) -> None:
    async with (
        InMemoryLightningStore(clock=ManualClock(), ids=_Counted()) as one,
        InMemoryLightningStore(clock=ManualClock(), ids=_Counted()) as other,
    ):
        here, elsewhere = AsgiCalls(one), AsgiCalls(other, decoder=decoder)
        seen: set[int] = set()
        for path, content in CALLS:
            body = _body(content)
            assert len(body) > 64 * 1024
            expected = _shown(await here.call("POST", f"/agl/v1{path}", body))
            assert _shown(await elsewhere.call("POST", f"/agl/v1{path}", body)) == expected, (path, body[:100])
            seen.add(expected[0])
        assert {200, 201, 404, 409, 413, 422} <= seen
        assert [each.model_dump() for each in await one.query_rollouts()] == [
            each.model_dump() for each in await other.query_rollouts()
        ]


def test_what_the_loop_may_read_is_small_or_has_few_values() -> None:
    find = Endpoints(InMemoryLightningStore()).find
    for path, most in (("/workers/w", 2_000), ("/queues/rollouts/enqueue", 250)):
        match = find("POST", f"/agl/v1{path}")
        assert match is not None
        is_light = match.endpoint.intake.is_light
        assert is_light([b'{"worker_id":"w"}'])
        assert is_light([b"x" * 60_000])
        assert is_light([b"x" * 30_000] * 2)
        assert not is_light([b"x" * 33_000] * 2)
        assert is_light([b"x" * 40_000, b"[]," * most])
        assert not is_light([b"x" * 40_000, b"[]," * (most + 1)])


def test_parts_are_moderate_in_number_and_in_bytes() -> None:
    def parts(sizes: list[int]) -> list[int]:
        return [len(part) for part in in_parts(SpanDraft("ro", "at", 0, "s", b"x" * size) for size in sizes)]

    assert parts([]) == []
    assert parts([1] * 600) == [256, 256, 88]
    assert parts([30_000] * 7) == [3, 3, 1]
    assert parts([5_000_000, 1]) == [1, 1]


# --- Whose time it takes --------------------------------------------------------------------------------


async def test_the_loop_decodes_no_large_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the body is; a small one shows that it would be noticed."""

    def refuse(*_: object) -> None:
        raise AssertionError("decoded in the process of the server")

    monkeypatch.setattr("agentlightning.http.server.intake.decode_strict", refuse)
    monkeypatch.setattr("agentlightning.http.server.intake.drafts_of", refuse)
    monkeypatch.setattr("agentlightning.http.server.intake.plain_report", refuse)
    monkeypatch.setattr("agentlightning.http.server.otlp.read_request", refuse)
    async with InMemoryLightningStore() as store, _calls(store) as server:
        for path, content in CALLS:
            assert (await server.call("POST", f"/agl/v1{path}", _body(content))).status < 500
        otlp = {"content-type": "application/json"}
        body = json.dumps({"resourceSpans": [], "padding": PADDING}).encode()
        assert (await server.call("POST", "/v1/traces", body, otlp)).status == 200
        assert (await server.call("POST", "/agl/v1/rollouts", b'{"input":1}')).status == 500
        assert (await server.call("POST", "/agl/v1/spans", json.dumps(_span(1, attributes={})).encode())).status == 500
        assert (await server.call("POST", "/v1/traces", b'{"resourceSpans":[]}', otlp)).status == 500


@asynccontextmanager
async def _calls(store: InMemoryLightningStore) -> AsyncIterator[AsgiCalls]:
    decoder = Decoder()
    try:
        yield AsgiCalls(store, decoder=decoder)
    finally:
        decoder.close()


async def _until(file: Path) -> None:
    async with asyncio.timeout(60):
        while not file.exists():
            await asyncio.sleep(0.01)


async def test_a_body_of_a_usual_size_does_not_wait_for_a_huge_one(decoder: Decoder, tmp_path: Path) -> None:
    go, begun = tmp_path / "go", tmp_path / "begun"
    huge = asyncio.create_task(decoder.read(partial(wait_for, go, begun), [b"x" * _HUGE]))
    await _until(begun)  # so the loop is free meanwhile, too
    next_huge = asyncio.create_task(decoder.read(length, [b"x" * _HUGE, b"y"]))
    assert await decoder.read(length, [b"x" * 100_000]) == [100_000]
    assert not huge.done()
    assert not next_huge.done()
    go.touch()
    assert (await huge, await next_huge) == ([_HUGE], [_HUGE + 1])


async def test_a_body_is_let_go_as_it_is_sent(decoder: Decoder) -> None:
    parts = [b"x" * 60_000] * 100
    assert await decoder.read(length, parts) == [6_000_000]
    assert parts == []


# --- What may happen to the process -----------------------------------------------------------------------


async def test_a_process_that_dies_costs_one_body_and_is_replaced(decoder: Decoder, tmp_path: Path) -> None:
    [pid] = await decoder.read(process, [b""])
    begun = tmp_path / "begun"
    reading = asyncio.create_task(decoder.read(partial(wait_for, tmp_path / "never", begun), [b"x"]))
    await _until(begun)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(StoreUnavailable, match="has ended"):
        await reading
    [second] = await decoder.read(process, [b""])
    os.kill(second, signal.SIGKILL)  # while it has nothing to do
    while psutil.Process(second).status() != psutil.STATUS_ZOMBIE:
        await asyncio.sleep(0.01)
    assert await decoder.read(length, [b"abc"]) == [3]


async def test_a_bug_is_raised_with_its_traceback_and_the_process_goes_on(decoder: Decoder) -> None:
    before = await decoder.read(process, [b""])
    with pytest.raises(RuntimeError, match="ZeroDivisionError: secret detail"):
        await decoder.read(fail, [b""])
    assert await decoder.read(process, [b""]) == before


async def test_signals_to_the_whole_group_do_not_end_what_it_reads(decoder: Decoder, tmp_path: Path) -> None:
    [pid] = await decoder.read(process, [b""])
    go, begun = tmp_path / "go", tmp_path / "begun"
    reading = asyncio.create_task(decoder.read(partial(wait_for, go, begun), [b"x"]))
    await _until(begun)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    go.touch()
    assert await reading == [1]


async def test_a_process_without_a_body_ends_after_a_while() -> None:
    decoder = Decoder(idle_seconds=0.2)
    try:
        [pid] = await decoder.read(process, [b""])
        while psutil.pid_exists(pid):  # it is collected, too
            await asyncio.sleep(0.01)
        assert await decoder.read(length, [b"abc"]) == [3]
    finally:
        decoder.close()


async def test_who_is_reading_when_it_closes_is_told(tmp_path: Path) -> None:
    decoder = Decoder()
    begun = tmp_path / "begun"
    reading = asyncio.create_task(decoder.read(partial(wait_for, tmp_path / "never", begun), [b"x"]))
    await _until(begun)
    waiting = asyncio.create_task(decoder.read(length, [b"x"]))
    await asyncio.sleep(0)
    await asyncio.to_thread(decoder.close)
    for each in (reading, waiting):
        with pytest.raises(StoreUnavailable):
            await each
    with pytest.raises(StoreUnavailable):
        await decoder.read(length, [b"x"])
    decoder.close()


async def test_a_server_that_stops_finishes_the_bodies_that_came(tmp_path: Path) -> None:
    async with SqliteLightningStore(tmp_path / "s.db", "none") as store:
        server = LightningStoreServer(store, port=0)
        await server.start()
        body = _body({"rollouts": [{"input": PADDING}] * 30})
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        head = (
            f"POST /agl/v1/queues/rollouts/enqueue HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
        assert server.app is not None
        while not server.app.load.requests:
            await asyncio.sleep(0.001)
        children = psutil.Process().children()
        await server.stop()
        assert (await reader.readline()).split()[1] == b"201"
        writer.close()
        assert (await store.statistics())["total_rollouts"] == 30
        assert not [each for each in psutil.Process().children() if each not in children]


_A_SERVER_WITH_A_FORK = """
import asyncio, os, sys, time
from slow_reads import process
from agentlightning.http.server.decoder import Decoder

async def main():
    decoder = Decoder()
    [pid] = await decoder.read(process, [b""])
    print(pid, flush=True)
    if os.fork() == 0:  # this copy has the connection as well
        time.sleep(60)
        os._exit(0)
    os.kill(os.getpid(), 9)

asyncio.run(main())
"""


def test_a_server_that_is_killed_leaves_no_process_even_if_a_fork_of_it_lives() -> None:
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _A_SERVER_WITH_A_FORK],
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as server:
        assert server.stdout is not None
        found = psutil.Process(int(server.stdout.readline()))
        try:
            server.wait(30)
            psutil.wait_procs([found], timeout=30)
            assert not found.is_running()
        finally:
            os.killpg(server.pid, signal.SIGKILL)


def test_the_application_has_no_decoder_unless_it_is_given_one() -> None:
    """Simulations own every process: there, the loop reads all bodies."""
    assert AsgiCalls(InMemoryLightningStore()).app.decoder is None
    assert app.StoreApp.__init__.__defaults__ == (None,)
