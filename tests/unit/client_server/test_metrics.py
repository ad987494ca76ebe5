"""`GET /metrics`: how rollouts ended, what the server uses, and the hosts of runners."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import apsw
import pytest

from agentlightning.runner.heartbeat import registration, system_statistics
from agentlightning.store.sqlite.store import InMemoryLightningStore, SqliteLightningStore
from asgi_calls import AsgiCalls
from clocks import ManualClock
from faulty_disk import FaultyDisk
from limited import without_descriptors
from scenes import claimed, config, enqueued


def numbers_of(metrics: bytes) -> dict[str, float]:
    """The metrics by their names with labels."""
    told = [line.rpartition(" ") for line in metrics.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in told}


async def metrics_of(calls: AsgiCalls) -> dict[str, float]:
    return numbers_of((await calls.call("GET", "/metrics")).body)


async def test_metrics_tell_how_rollouts_and_attempts_ended() -> None:
    clock = ManualClock()
    async with InMemoryLightningStore(clock=clock) as store:
        server = AsgiCalls(store)
        before = await metrics_of(server)
        assert before['agl_rollouts_ended_total{status="succeeded"}'] == 0
        await enqueued(store, 1, 2, config=config(max_attempts=2, timeout_seconds=500.0))
        for seconds, status in ((0.2, "succeeded"), (20.0, "failed")):
            attempted = await claimed(store, "w-1")
            clock.advance(seconds)
            await store.update_attempt(attempted.rollout_id, attempted.attempt.attempt_id, status)  # type: ignore[arg-type]
        await claimed(store, "w-1")  # the second attempt
        clock.advance(501.0)
        told = await metrics_of(server)
        assert told['agl_rollouts_ended_total{status="succeeded"}'] == 1
        assert told['agl_rollouts_ended_total{status="failed"}'] == 1
        assert told['agl_attempt_seconds_count{status="succeeded"}'] == 1
        assert told['agl_attempt_seconds_bucket{le="0.1",status="succeeded"}'] == 0
        assert told['agl_attempt_seconds_bucket{le="0.3",status="succeeded"}'] == 1
        assert told['agl_attempt_seconds_bucket{le="30.0",status="failed"}'] == 1
        assert told['agl_attempt_seconds_sum{status="failed"}'] == 20.0
        assert told['agl_attempt_seconds_bucket{le="+Inf",status="timeout"}'] == 1
        clock.advance(1.0)
        assert await store.delete_finished_rollouts(older_than_seconds=0) == 2
        assert (await metrics_of(server))['agl_rollouts_ended_total{status="succeeded"}'] == 1, "it never goes down"


async def test_metrics_tell_when_the_store_was_last_verified() -> None:
    clock = ManualClock()
    async with InMemoryLightningStore(clock=clock) as store:
        server = AsgiCalls(store)
        assert "agl_verified_timestamp_seconds" not in await metrics_of(server)
        await server.call("GET", "/agl/v1/verify")
        told = await metrics_of(server)
        assert told["agl_verified_timestamp_seconds"] == clock.wall()
        assert told["agl_violations"] == 0


async def test_availability_is_the_share_of_requests_that_were_answered(tmp_path: Path) -> None:
    with FaultyDisk() as disk:
        async with SqliteLightningStore(tmp_path / "store.db", vfs=disk.name) as store:
            server = AsgiCalls(store)
            assert (await metrics_of(server))["agl_availability_ratio"] == 1.0
            await server.call("GET", "/agl/v1/rollouts/ro-unknown")  # a mistake of the caller
            disk.break_down("sync", "-wal", apsw.FullError)
            assert (await server.call("POST", "/agl/v1/workers/w-1", b"")).status == 507
            disk.mend()
            told = await metrics_of(server)
            assert told["agl_availability_ratio"] == pytest.approx(2 / 3), "a scrape, a mistake, and a full disk"


async def test_metrics_tell_what_the_server_uses() -> None:
    async with InMemoryLightningStore() as store:
        server = AsgiCalls(store)
        before = await metrics_of(server)
        sum(number * number for number in range(2_000_000))
        grown = bytearray(64_000_000)
        grown[::4096] = b"x" * len(grown[::4096])  # each page is used
        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            socket.create_connection(listener.getsockname()) as out,
        ):
            accepted, _ = listener.accept()
            with accepted:
                out.sendall(b"x" * 100_000)
                assert accepted.recv(100_000, socket.MSG_WAITALL)
        after = await metrics_of(server)
        assert after["process_cpu_seconds_total"] > before["process_cpu_seconds_total"]
        assert after["process_resident_memory_bytes"] > before["process_resident_memory_bytes"] + 50_000_000
        sent = 'agl_network_sent_bytes_total{interface="lo"}'
        assert after[sent] >= before[sent] + 100_000
        assert after["agl_process_disk_written_bytes_total"] >= before["agl_process_disk_written_bytes_total"]
        assert after["agl_uptime_seconds"] > before["agl_uptime_seconds"]


async def test_metrics_answer_without_a_free_file_descriptor() -> None:
    async with InMemoryLightningStore() as store:
        server = AsgiCalls(store)
        known = await metrics_of(server)
        with without_descriptors():
            told = await server.call("GET", "/metrics")
        assert told.status == 200
        assert numbers_of(told.body).keys() >= known.keys()


async def test_metrics_tell_of_the_hosts_of_runners() -> None:
    clock = ManualClock()
    async with InMemoryLightningStore(clock=clock) as store:
        server = AsgiCalls(store)
        await store.update_worker("real", system_statistics(), registration=registration())
        for name, percent in (("a", 10.0), ("b", 20.0)):  # the later one counts
            clock.advance(1)
            await store.update_worker(name, {"cpu_percent": percent}, registration={"host": "gpu-1"})
        hostile: list[Any] = [{"cpu_percent": "90"}, {"memory": 5}, {"cpu_percent": True}, {"disk": {"free_bytes": []}}]
        for number, stats in enumerate(hostile):
            await store.update_worker(f"x-{number}", stats, registration={"host": "odd\n}" * 100})
        await store.update_worker("gone", {"cpu_percent": 1.0}, lease_seconds=5, registration={"host": "gone"})
        clock.advance(6)
        told = await metrics_of(server)
        assert told['agl_host_cpu_percent{host="gpu-1"}'] == 20.0
        here = socket.gethostname()[:64]
        for name in ("memory_bytes", "memory_available_bytes", "disk_free_bytes", "network_sent_bytes_total"):
            assert told[f'agl_host_{name}{{host="{here}"}}'] > 0
        assert not [name for name in told if 'host="odd' in name or 'host="gone"' in name]


async def test_only_so_many_hosts_are_shown() -> None:
    async with InMemoryLightningStore() as store:
        for number in range(250):
            await store.update_worker(f"w-{number}", {"cpu_percent": 1.0}, registration={"host": f"host-{number}"})
        told = await metrics_of(AsgiCalls(store))
        assert len([name for name in told if name.startswith("agl_host_cpu_percent{")]) == 100
