"""A server without a free file descriptor: it answers on open connections, metrics too, and neither spins nor ends."""

from __future__ import annotations

import os
import resource
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from agl_store import AglStore

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of another process are set by prlimit")
PATIENCE = 60.0


def ask(connection: socket.socket, path: str) -> tuple[int, bytes]:
    """Status and body of a GET; (0, nothing) if the connection ends."""
    connection.sendall(f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode())
    said, length = b"", None
    while length is None or len(said.partition(b"\r\n\r\n")[2]) < length:
        part = connection.recv(65536)
        if not part:
            return 0, b""
        said += part
        if length is None and b"\r\n\r\n" in said:
            length = int(said.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return int(said.split(b" ")[1]), said.partition(b"\r\n\r\n")[2]


def test_open_connections_are_answered_and_new_ones_again_later(tmp_path: Path) -> None:
    with AglStore(database=tmp_path / "store.db") as agl:
        address, server = ("127.0.0.1", int(agl.endpoint.rsplit(":", 1)[1])), agl.process.pid
        with socket.create_connection(address, PATIENCE) as connection:
            assert ask(connection, "/agl/v1/health/live")[0] == 200
            used = {int(each) for each in os.listdir(f"/proc/{server}/fd")}
            before = resource.prlimit(server, resource.RLIMIT_NOFILE)
            free = next(each for each in range(before[0]) if each not in used)
            resource.prlimit(server, resource.RLIMIT_NOFILE, (free, before[1]))

            status, metrics = ask(connection, "/metrics")  # for the first time
            assert status == 200
            assert b"\nagl_store_up 1.0\n" in metrics

            refused = [socket.create_connection(address, PATIENCE) for _ in range(3)]
            began, spent = time.monotonic(), sum(psutil.Process(server).cpu_times()[:2])
            for each in refused:
                each.settimeout(1.0)
                with suppress(TimeoutError):
                    assert each.recv(1) == b"", "it was sent away, or waits"
                each.close()
            time.sleep(1.0)  # in which a server that spins would use a second of a processor
            spent = sum(psutil.Process(server).cpu_times()[:2]) - spent
            assert spent < 0.5 * (time.monotonic() - began)
            assert ask(connection, "/agl/v1/health/live")[0] == 200

            resource.prlimit(server, resource.RLIMIT_NOFILE, before)
            with socket.create_connection(address, PATIENCE) as again:
                assert ask(again, "/agl/v1/health/live")[0] == 200
        assert agl.process.poll() is None
