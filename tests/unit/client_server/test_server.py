"""A server: when it is there, for whom, and how it goes away."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import pickle
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import apsw
import pytest

from agentlightning.errors import InvalidValue, NotAuthenticated, StoreUnavailable
from agentlightning.http.client.client import LightningStoreClient
from agentlightning.http.server.direct import DirectExchange
from agentlightning.http.server.limits import ServerLimits
from agentlightning.http.server.server import LightningStoreServer
from agentlightning.store.base import LightningStore
from agentlightning.store.sqlite.store import InMemoryLightningStore, SqliteLightningStore
from asgi_calls import AsgiCalls
from faulty_disk import FaultyDisk
from scenes import enqueued, requests, started

KEY = "a-key-for-tests"


@pytest.fixture(autouse=True)
def _no_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGL_API_KEY", raising=False)


def _get(url: str, context: ssl.SSLContext | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=10, context=context) as reply:
            return reply.status, dict(reply.headers.items()), reply.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers.items()), error.read()


# --- Coming and going --------------------------------------------------------------------------------


async def test_it_answers_when_start_returns_and_not_after_stop() -> None:
    async with InMemoryLightningStore() as store:
        server = LightningStoreServer(store, port=0)
        for _ in range(2):
            await server.start()
            await server.start()
            assert server.port > 0
            assert (await asyncio.to_thread(_get, f"{server.endpoint}/agl/v1/health"))[0] == 200
            await server.stop()
            await server.stop()
            with pytest.raises(urllib.error.URLError):
                await asyncio.to_thread(_get, f"{server.endpoint}/agl/v1/health")
        assert threading.active_count() < 20


async def test_run_forever_ends_with_its_task() -> None:
    async with InMemoryLightningStore() as store:
        server = LightningStoreServer(store, port=0)
        task = asyncio.create_task(server.run_forever())
        while server.app is None:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert server.app is None


async def test_a_connection_is_closed_when_it_was_idle_since_its_last_reply() -> None:
    limits = ServerLimits(idle_seconds=1.0)
    async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0, limits=limits) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for pause in (0.7, 0.0):
            writer.write(b"POST /agl/v1/workers/w-1 HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n{}")
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r")[0]))
            await asyncio.sleep(pause)
        began = time.monotonic()
        assert await asyncio.wait_for(reader.read(), 20) == b""
        assert time.monotonic() - began > 0.5
        writer.close()


async def test_an_answered_request_needs_no_collector() -> None:
    request = b"POST /agl/v1/workers/w-1 HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n{}"
    async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r")[0]))
            left = sum(type(each) is DirectExchange for each in gc.get_objects())
        finally:
            gc.enable()
        assert left <= 2, "the last one, which its connection keeps; its predecessor, whose task may be ending"
        writer.close()


async def test_a_port_that_is_taken_is_said_at_once_and_by_whom() -> None:
    async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0) as server:
        with pytest.raises(StoreUnavailable, match=rf"port {server.port} .* is taken by process {os.getpid()} "):
            await LightningStoreServer(store, port=server.port).start()


async def test_an_address_that_is_none() -> None:
    async with InMemoryLightningStore() as store:
        with pytest.raises(StoreUnavailable, match="not a name or address"):
            await LightningStoreServer(store, "no.such.host.invalid", 0, api_key=KEY).start()
        with pytest.raises(StoreUnavailable, match="cannot listen"):
            await LightningStoreServer(store, "192.0.2.1", 0, api_key=KEY).start()


async def test_others_are_not_let_in_without_a_key() -> None:
    async with InMemoryLightningStore() as store:
        with pytest.raises(InvalidValue, match=r"AGL_API_KEY.*localhost"):
            await LightningStoreServer(store, "0.0.0.0", 0).start()
        async with LightningStoreServer(store, "0.0.0.0", 0, api_key=KEY) as server:
            assert server.endpoint == f"http://127.0.0.1:{server.port}"
        async with LightningStoreServer(store, "localhost", 0) as server:
            assert server.endpoint == f"http://localhost:{server.port}"


def test_arguments_of_0_3() -> None:
    store = InMemoryLightningStore()
    for name, value in (("launch_mode", "asyncio"), ("launcher_args", object()), ("tracker", object())):
        replaced: dict[str, Any] = {name: value}
        with pytest.warns(DeprecationWarning, match=name):
            LightningStoreServer(store, None, None, None, **replaced)
    with pytest.raises(InvalidValue, match="n_workers 2"):
        LightningStoreServer(store, n_workers=2)
    with pytest.raises(TypeError, match="portt"):
        LightningStoreServer(store, portt=1)
    with pytest.raises(InvalidValue, match="both"):
        LightningStoreServer(store, tls_certificate="x.pem")
    with pytest.raises(InvalidValue, match="drain_seconds"):
        ServerLimits(drain_seconds=0)
    server = LightningStoreServer(store)
    assert (server.host, server.port, server.endpoint, server.store) == (
        "127.0.0.1",
        4747,
        "http://127.0.0.1:4747",
        store,
    )


# --- As a store --------------------------------------------------------------------------------------


async def test_it_is_the_store_itself_here_and_a_client_elsewhere() -> None:
    async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0, api_key=KEY) as server:
        assert isinstance(server, LightningStore)
        [rollout_id] = await enqueued(server, "x")
        assert (await store.get_rollout_by_id(rollout_id)) is not None
        copy = pickle.loads(pickle.dumps(server))
        assert copy.store is None
        assert copy.endpoint == server.endpoint
        assert (await copy.get_rollout_by_id(rollout_id)).input == "x"
        assert isinstance(copy._target(), LightningStoreClient)
        with pytest.raises(StoreUnavailable, match="copy"):
            await copy.start()
        await copy.stop()
        assert server.otlp_traces_endpoint() == f"{server.endpoint}/v1/traces"
        assert server.capabilities.get("otlp_traces")


_IN_A_FORK = """
import asyncio, os, sys
from agentlightning import InMemoryLightningStore, LightningStoreServer

async def main():
    store = InMemoryLightningStore()
    server = LightningStoreServer(store, port=0)
    await server.start()
    await server.enqueue_rollout("from the parent", rollout_id="ro-1")
    return store, server

store, server = asyncio.run(main())
child = os.fork()
if child == 0:
    async def in_child():
        assert (await server.get_rollout_by_id("ro-1")).input == "from the parent"
        await server.update_rollout("ro-1", metadata={"by": "child"})
        await server.stop()
    asyncio.run(in_child())
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0

async def end():
    assert (await store.get_rollout_by_id("ro-1")).metadata == {"by": "child"}
    await server.stop()
    await store.close()
asyncio.run(end())
"""


def test_a_forked_child_is_a_client_of_its_parent() -> None:
    done = subprocess.run([sys.executable, "-c", _IN_A_FORK], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


# --- Who may come in ---------------------------------------------------------------------------------


async def test_a_key_is_asked_of_everything_but_probes() -> None:
    async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0, api_key=KEY) as server:
        for path in ("/agl/v1/statistics", "/metrics", "/agl/v1/openapi.json", "/agl/v1/health/detail", "/nothing"):
            status, headers, body = await asyncio.to_thread(_get, server.endpoint + path)
            assert (status, json.loads(body)["code"]) == (401, "not_authenticated")
            assert "Bearer" in {name.lower(): value for name, value in headers.items()}["www-authenticate"]
        for path in ("/agl/v1/health", "/v1/agl/health", "/agl/v1/health/live", "/agl/v1/health/ready"):
            assert (await asyncio.to_thread(_get, server.endpoint + path))[0] == 200
        shown: dict[str, Any] = {"Authorization": f"Bearer {KEY}", "Host": "any.name.example"}
        assert (await asyncio.to_thread(_get, f"{server.endpoint}/agl/v1/statistics", **shown))[0] == 200
        address = server.endpoint.replace("://", f"://agl:{KEY}@")
        async with LightningStoreClient(address, spool_dir=None) as client:
            assert (await client.statistics())["total_rollouts"] == 0
        async with LightningStoreClient(server.endpoint, spool_dir=None, api_key="another-key") as client:
            with pytest.raises(NotAuthenticated):
                await client.enqueue_rollout(1)


async def test_pages_of_other_origins_only_when_asked_for() -> None:
    page = {"origin": "https://lab.example"}
    asked = {**page, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    async with InMemoryLightningStore() as store:
        for server in (AsgiCalls(store), AsgiCalls(store, key=KEY)):
            answer = await server.call("OPTIONS", "/agl/v1/rollouts", headers=asked)
            assert answer.status == 403
            assert b"access-control-allow-origin" not in answer.headers
        listed = AsgiCalls(store, cors_allow_origins="https://lab.example", key=KEY)
        answer = await listed.call("OPTIONS", "/agl/v1/rollouts", headers=asked)
        assert answer.status == 204
        assert answer.headers[b"access-control-allow-origin"] == b"https://lab.example"
        assert b"authorization" in answer.headers[b"access-control-allow-headers"]
        answer = await listed.call("GET", "/agl/v1/statistics", headers={**page, "authorization": f"Bearer {KEY}"})
        assert answer.status == 200
        assert answer.headers[b"access-control-allow-origin"] == b"https://lab.example"
        assert b"access-control-allow-credentials" not in answer.headers
        assert (
            await listed.call("GET", "/agl/v1/statistics", headers={"origin": "https://evil.example"})
        ).status == 403


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
async def test_an_image_on_another_page_starts_nothing(site: str) -> None:
    async with InMemoryLightningStore() as store:
        for server in (AsgiCalls(store), AsgiCalls(store, cors_allow_origins="*")):
            for path in ("/agl/v1/verify", "/v1/agl/verify", "/agl/v1/statistics"):
                answer = await server.call("GET", path, headers={"sec-fetch-site": site, "sec-fetch-mode": "no-cors"})
                assert (answer.status, json.loads(answer.body)["code"]) == (403, "not_allowed")
            for own in ("none", "same-origin"):  # typed into the address bar; a page of the server's own
                assert (await server.call("GET", "/agl/v1/verify", headers={"sec-fetch-site": own})).status == 200
        asked = {"sec-fetch-site": site, "origin": "https://lab.example"}
        assert (await server.call("GET", "/agl/v1/verify", headers=asked)).status == 200


async def test_https(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    trusting = ssl.create_default_context(cafile=str(certificate))
    async with InMemoryLightningStore() as store:
        limits = ServerLimits(header_seconds=2.0)
        server = LightningStoreServer(store, port=0, tls_certificate=certificate, tls_key=key, limits=limits)
        async with server:
            silent, writer = await asyncio.open_connection("127.0.0.1", server.port)
            assert server.endpoint.startswith("https://")
            status, _, body = await asyncio.to_thread(_get, f"{server.endpoint}/agl/v1/health", trusting)
            assert (status, json.loads(body)) == (200, {"status": "ok"})
            async with LightningStoreClient(server.endpoint, spool_dir=None, tls_ca_file=certificate) as client:
                await client.enqueue_rollout(1, rollout_id="ro-1")
            assert await asyncio.wait_for(silent.read(), 20) == b"", "who does not begin with TLS is cut off"
            writer.close()
        assert await store.get_rollout_by_id("ro-1") is not None
        with pytest.raises(InvalidValue, match="TLS"):
            await LightningStoreServer(store, port=0, tls_certificate=key, tls_key=certificate).start()


# --- What it says ------------------------------------------------------------------------------------


async def _json(server: AsgiCalls, method: str, target: str, body: Any = None) -> tuple[int, Any]:
    answer = await server.call(method, target, b"" if body is None else json.dumps(body).encode())
    return answer.status, json.loads(answer.body)


async def _raw(server: LightningStoreServer, target: str, body: bytes, headers: dict[str, str]) -> Any:
    """Status, headers and body of the reply to a POST that arrives in one piece."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    fields = {"host": "localhost", "x-request-id": "mine", "content-length": str(len(body)), **headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    writer.write(f"POST {target} HTTP/1.1\r\n{lines}\r\n".encode() + body)
    status, *found = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
    shown = sorted(line for line in found if not line.startswith(b"date:"))
    [length] = [int(line.partition(b":")[2]) for line in shown if line.startswith(b"content-length:")]
    content = await reader.readexactly(length)
    writer.close()
    return status, shown, content


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/queues/rollouts/enqueue", b'{"rollouts":[{"input":1,"rollout_id":"ro-1"}]}', {}, b"201"),
        ("/queues/rollouts/dequeue", b'{"worker_id":"w-1"}', {}, b"200"),
        ("/queues/rollouts/dequeue", b'{"limit":0}', {"content-type": "application/json; charset=utf-8"}, b"422"),
        ("/queues/rollouts/dequeue", b"{", {}, b"422"),
        ("/queues/rollouts/dequeue", b'{"limit":"x"}', {}, b"422"),
        ("/queues/rollouts/dequeue", b"{}", {"content-type": "text/plain"}, b"415"),
        ("/queues/rollouts/dequeue", b"{}", {"content-encoding": "gzip"}, b"415"),
        ("/rollouts/ro-none/attempts/at-1", b'{"status":"running"}', {}, b"404"),
        ("/rollouts/{}/attempts/latest", b"{}", {}, b"422"),
        ("/workers/w-1", b"{}", {"origin": "https://evil.example"}, b"403"),
        ("/workers/w-1", b"{}", {"host": "evil.example"}, b"403"),
        ("/resources/rs-none/rollback", b'{"version":1}', {}, b"404"),
    ],
)
async def test_a_small_request_gets_the_same_reply_without_asgi(
    path: str, body: bytes, headers: dict[str, str], status: bytes
) -> None:
    async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0) as server:
        direct = await _raw(server, f"/agl/v1{path}", body, headers)
        assert direct[0].split()[1] == status
        assert await _raw(server, f"/agl/v1{path}?", body, headers) == direct  # "?" is one of the things that need ASGI


async def test_unknown_ids_are_null_for_clients_of_0_3() -> None:
    async with InMemoryLightningStore() as store:
        server = AsgiCalls(store)
        for path in ("/rollouts/ro-1", "/resources/rs-1", "/workers/w-1"):
            assert await _json(server, "GET", f"/v1/agl{path}") == (200, None)
            status, problem = await _json(server, "GET", f"/agl/v1{path}")
            assert (status, problem["code"]) == (404, "not_found")
        for prefix in ("/agl/v1", "/v1/agl"):
            assert await _json(server, "GET", f"{prefix}/resources/latest") == (200, None)
            assert await _json(server, "GET", f"{prefix}/rollouts/ro-1/attempts/latest") == (200, None)
            assert (await _json(server, "POST", f"{prefix}/rollouts/ro-1/attempts"))[0] == 404


async def test_claims_of_nothing_for_clients_of_0_3() -> None:
    async with InMemoryLightningStore() as store:
        server = AsgiCalls(store)
        await enqueued(store, 1)
        for limit in (0, -1):
            assert await _json(server, "POST", "/v1/agl/queues/rollouts/dequeue", {"limit": limit}) == (200, [])
            assert (await _json(server, "POST", "/agl/v1/queues/rollouts/dequeue", {"limit": limit}))[0] == 422
        status, claimed = await _json(server, "POST", "/v1/agl/queues/rollouts/dequeue")
        assert (status, len(claimed)) == (200, 1)


async def test_the_reply_to_a_claim_says_what_the_worker_is_asked() -> None:
    async with InMemoryLightningStore() as store:
        server = AsgiCalls(store)
        await store.update_worker("w-1")
        target, body = "/agl/v1/queues/rollouts/dequeue", b'{"worker_id":"w-1"}'
        assert b"agl-directive" not in (await server.call("POST", target, body)).headers
        await store.direct_workers("drain")
        await enqueued(store, 1)
        answer = await server.call("POST", target, body)
        assert (answer.body, answer.headers[b"agl-directive"]) == (b"[]", b"drain")


async def test_an_attempt_is_left_out_where_there_is_none() -> None:
    async with InMemoryLightningStore() as store:
        server = AsgiCalls(store)
        [waiting] = await enqueued(store, 1)
        running = await started(store)
        assert "attempt" not in (await _json(server, "GET", f"/agl/v1/rollouts/{waiting}"))[1]
        found = (await _json(server, "GET", f"/agl/v1/rollouts/{running.rollout_id}"))[1]
        assert found["attempt"]["attempt_id"] == running.attempt.attempt_id


async def test_large_pages_come_in_parts_and_whole() -> None:
    async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0) as server:
        await store.enqueue_many_rollouts(requests(*range(2_000)))
        _, headers, body = await asyncio.to_thread(_get, f"{server.endpoint}/agl/v1/rollouts?limit=-1")
        assert "content-length" not in {name.lower() for name in headers}
        page = json.loads(body)
        assert [each["input"] for each in page["items"]] == list(range(2_000))
        assert (page["limit"], page["offset"], page["total"]) == (-1, 0, 2_000)


async def test_a_page_without_a_limit_is_short_but_for_clients_of_0_3_and_in_python() -> None:
    async with InMemoryLightningStore() as store, LightningStoreServer(store, port=0) as server:
        await store.enqueue_many_rollouts(requests(*range(1_001)))
        calls = AsgiCalls(store)
        for verb, path in (("GET", "/rollouts"), ("POST", "/rollouts/search")):
            for prefix, limit, items in (("/agl/v1", 1_000, 1_000), ("/v1/agl", -1, 1_001)):
                _, page = await _json(calls, verb, prefix + path)
                assert (page["limit"], page["total"], len(page["items"])) == (limit, 1_001, items)
        _, page = await _json(calls, "GET", "/agl/v1/rollouts?limit=-1")
        assert (page["limit"], len(page["items"])) == (-1, 1_001)
        async with LightningStoreClient(server.endpoint) as client:
            for page in (await client.query_rollouts(), await store.query_rollouts()):
                assert (page.limit, len(page)) == (-1, 1_001)


async def test_metrics_tell_of_requests_and_of_the_store() -> None:
    async with InMemoryLightningStore() as store:
        server = AsgiCalls(store)
        await enqueued(store, 1, 2)
        await started(store, worker_id="w-1")
        await server.call("GET", "/agl/v1/rollouts/ro-unknown")
        await server.call("GET", "/made/up/path")
        answer = await server.call("GET", "/metrics")
        assert answer.headers[b"content-type"].startswith(b"text/plain; version=")
        lines = answer.body.decode().splitlines()
        for expected in (
            'agl_http_requests_total{route="GET /agl/v1/rollouts/{rollout_id}",status="404"} 1.0',
            'agl_http_requests_total{route="other",status="404"} 1.0',
            "agl_queue_depth 2.0",
            'agl_rollouts{status="queuing"} 2.0',
            'agl_rollouts{status="preparing"} 1.0',
            'agl_workers{status="busy"} 1.0',
            "agl_spans 0.0",
            "agl_store_up 1.0",
            "agl_store_log_bytes 0.0",
        ):
            assert expected in lines
        assert any(line.startswith("agl_store_committed_operations_total") for line in lines)


async def test_health_says_what_can_be_relied_on() -> None:
    async with InMemoryLightningStore() as store:
        server = AsgiCalls(store)
        assert await _json(server, "GET", "/agl/v1/health/ready") == (200, {"status": "ready", "detail": None})
        detail = (await _json(server, "GET", "/agl/v1/health/detail"))[1]
        assert detail["store"]["total_rollouts"] == 0
        server.app.drain()
        status, readiness = await _json(server, "GET", "/agl/v1/health/ready")
        assert (status, readiness["status"]) == (503, "draining")
        assert (await _json(server, "GET", "/agl/v1/health/live"))[0] == 200
        status, problem = await _json(server, "GET", "/agl/v1/statistics")
        assert (status, problem["code"]) == (503, "store_unavailable")
    closed = AsgiCalls(store)
    status, readiness = await _json(closed, "GET", "/agl/v1/health/ready")
    assert (status, readiness["status"]) == (503, "unavailable")
    assert "agl_store_up 0.0" in (await closed.call("GET", "/metrics")).body.decode()


async def test_a_store_that_takes_no_writes_any_more_is_not_ready(tmp_path: Path) -> None:
    """Reads are still answered."""
    with FaultyDisk() as disk:
        async with SqliteLightningStore(tmp_path / "store.db", vfs=disk.name) as store:
            await store.enqueue_rollout(1, rollout_id="ro-1")
            server = AsgiCalls(store)
            assert (await _json(server, "GET", "/agl/v1/health/ready"))[0] == 200
            disk.break_down("sync", "-wal", apsw.FullError)
            refused = await server.call("POST", "/agl/v1/workers/w-1", b"")
            assert (refused.status, refused.headers[b"retry-after"]) == (507, b"1")
            disk.mend()
            status, readiness = await _json(server, "GET", "/agl/v1/health/ready")
            assert (status, readiness["status"]) == (503, "unavailable")
            assert (await _json(server, "GET", "/agl/v1/rollouts/ro-1"))[0] == 200
            assert "agl_store_stopped 1.0" in (await server.call("GET", "/metrics")).body.decode()


async def test_a_store_of_somebody_else_is_served_as_well() -> None:
    """One that has records only, and no bytes."""
    async with InMemoryLightningStore() as inner:
        server = LightningStoreServer(inner, port=0)  # as a store, it delegates, and is no EngineStore
        calls = AsgiCalls(server)
        claim = await started(inner)
        span = {
            "rollout_id": claim.rollout_id,
            "attempt_id": claim.attempt.attempt_id,
            "sequence_id": 0,
            "trace_id": "t",
            "span_id": "s",
            "parent_id": None,
            "name": "n",
            "status": {"status_code": "OK"},
            "attributes": {},
            "events": [],
            "links": [],
            "start_time": 1,
            "end_time": 2,
            "context": None,
            "parent": None,
            "resource": {"attributes": {}, "schema_url": ""},
        }
        status, stored = await _json(calls, "POST", "/agl/v1/spans", span)
        assert (status, stored["sequence_id"]) == (201, 1)
        assert await _json(calls, "POST", "/agl/v1/spans", span) == (201, None)
        other = {**span, "span_id": "s2"}
        status, ids = await _json(calls, "POST", "/agl/v1/spans/bulk", {"spans": [span, other, other]})
        known, new, again = ids["sequence_ids"]
        assert (status, known, again) == (201, 0, 0)
        page = (await _json(calls, "GET", f"/agl/v1/spans?rollout_id={claim.rollout_id}"))[1]
        assert [(each["span_id"], each["sequence_id"]) for each in page["items"]] == [("s", 1), ("s2", new)]
        assert (await _json(calls, "POST", "/agl/v1/workers/w"))[1]["worker_id"] == "w"


async def test_a_bug_is_500_with_an_id_and_a_log_line_whichever_route_it_is_in(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with InMemoryLightningStore() as store:
        server = AsgiCalls(store)

        async def broken() -> None:
            raise RuntimeError("a secret of the inside")

        monkeypatch.setattr(store, "statistics", broken)
        for path in ("/agl/v1/health/ready", "/metrics"):
            caplog.clear()
            answer = await server.call("GET", path, headers={"x-request-id": "mine"})
            assert (answer.status, answer.headers[b"content-type"]) == (500, b"application/problem+json")
            problem = json.loads(answer.body)
            assert (problem["code"], problem["request_id"]) == ("internal", "mine")
            assert b"secret" not in answer.body
            assert "a secret of the inside" in caplog.text
