"""SIGHUP to `agl store`: the certificate and the key are read again, and nothing ends."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path

from agl_store import AglStore
from certificates import self_signed

PATIENCE = 60.0


def until(met: Callable[[], bool]) -> None:
    """Return when it is met."""
    end = time.monotonic() + PATIENCE
    while not met():
        assert time.monotonic() < end, "it never was"
        time.sleep(0.02)


def shown(port: int) -> str:
    """The certificate that a new connection gets, in PEM."""
    return ssl.get_server_certificate(("127.0.0.1", port), timeout=PATIENCE)


def ask(connection: ssl.SSLSocket) -> bytes:
    connection.sendall(b"GET /agl/v1/health/live HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
    said = b""
    while not said.endswith(b"}"):
        part = connection.recv(4096)
        assert part, "the connection has ended"
        said += part
    return said


def pair(folder: Path) -> tuple[Path, Path]:
    folder.mkdir()
    return self_signed(folder)


def test_new_connections_get_the_new_certificate_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    certificate, key = pair(tmp_path / "used")
    first = certificate.read_text()
    new_certificate, new_key = pair(tmp_path / "new")
    with AglStore("--tls-cert", certificate, "--tls-key", key, database=tmp_path / "store.db") as agl:
        port = int(agl.endpoint.rsplit(":", 1)[1])
        assert shown(port) == first
        unchecked = ssl.create_default_context()
        unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
        with (
            socket.create_connection(("127.0.0.1", port), PATIENCE) as plain,
            unchecked.wrap_socket(plain) as open_before,
        ):
            assert ask(open_before).startswith(b"HTTP/1.1 200")

            certificate.write_text("no certificate")
            os.kill(agl.process.pid, signal.SIGHUP)
            until(lambda: any("stays in use" in line for line in agl._errors))
            assert shown(port) == first

            shutil.copy(new_certificate, certificate)  # with the key of the old one
            os.kill(agl.process.pid, signal.SIGHUP)
            until(lambda: sum("stays in use" in line for line in agl._errors) == 2)
            assert shown(port) == first

            shutil.copy(new_key, key)
            os.kill(agl.process.pid, signal.SIGHUP)
            until(lambda: shown(port) == new_certificate.read_text())
            assert ask(open_before).startswith(b"HTTP/1.1 200")
        assert agl.process.poll() is None


def test_without_tls_it_ends_nothing_either(tmp_path: Path) -> None:
    with AglStore("--log-level", "info", database=tmp_path / "store.db") as agl:
        os.kill(agl.process.pid, signal.SIGHUP)
        until(lambda: any("no TLS" in line for line in agl._errors))
        port = int(agl.endpoint.rsplit(":", 1)[1])
        socket.create_connection(("127.0.0.1", port), PATIENCE).close()
        assert agl.process.poll() is None
