"""`agl store`: what it says when it serves, and when it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from agentlightning.http.client.client import LightningStoreClient
from agentlightning.store.sqlite.store import SqliteLightningStore
from agl_store import AglStore

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def _fails(*options: object, **environment: str) -> tuple[int, str]:
    """Exit code and standard error of a server that cannot start."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AGL_")}
    command = [sys.executable, "-m", "agentlightning", "store", *map(str, options)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={**clean, **environment}
    )
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.returncode, done.stderr


async def test_it_serves_a_file_and_keeps_what_it_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with AglStore("--log-level", "debug", database=path) as agl:
        async with LightningStoreClient(agl.endpoint, spool_dir=None) as client:
            await client.enqueue_rollout({"x": 1}, rollout_id="ro-1")
        headers = {"traceparent": TRACEPARENT, "x-request-id": "mine"}
        request = urllib.request.Request(f"{agl.endpoint}/agl/v1/rollouts/ro-1", headers=headers)
        with urllib.request.urlopen(request, timeout=10) as reply:
            assert json.loads(reply.read())["input"] == {"x": 1}
        assert agl.terminate() == 0
        lines = [json.loads(line) for line in agl.log().splitlines()]
    [logged] = [line for line in lines if line.get("request_id") == "mine"]
    assert (logged["rollout_id"], logged["trace_id"]) == ("ro-1", "0af7651916cd43dd8448eb211c80319c")
    assert lines[-1]["event"].startswith("stopped; every acknowledged write is in the store")
    async with SqliteLightningStore(path) as store:
        assert (await store.verify()).ok
        assert await store.get_rollout_by_id("ro-1") is not None


async def test_memory_and_a_key_of_the_environment() -> None:
    with AglStore("--host", "0.0.0.0", database="memory", environment={"AGL_API_KEY": "a-key-for-tests"}) as agl:
        async with LightningStoreClient(agl.endpoint, spool_dir=None, api_key="a-key-for-tests") as client:
            assert (await client.statistics()).get("name") == "memory"
        assert agl.terminate() == 0
        assert "a-key-for-tests" not in agl.log()


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with AglStore(database="memory") as agl:
        code, said = _fails("--port", agl.port, "--db", tmp_path / "other.db")
        assert code == 4
        assert f"taken by process {agl.process.pid}" in said
    assert not list(tmp_path.iterdir()), "a start that fails leaves nothing behind"


def test_a_file_that_somebody_serves_already(tmp_path: Path) -> None:
    with AglStore(database=tmp_path / "store.db") as agl:
        code, said = _fails("--port", 0, "--db", tmp_path / "store.db")
        assert code == 4
        assert str(agl.process.pid) in said


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--host", "0.0.0.0", "--db", "new.db"), "--api-key"),
        (("--db", "postgres://host/name"), "sqlite://PATH"),
        (("--db", "memory", "--tls-cert", "x.pem"), "--tls-key"),
        (("--db", "memory", "--api-key", "short"), "8 to 512"),
        (("--db", "memory", "--cors-origin", "lab"), "not an origin"),
        (("--db", "memory", "--log-file", "/"), "log file"),
    ],
)
def test_options_that_cannot_be(
    options: tuple[str, ...], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = _fails("--port", 0, *options)
    assert code == 2
    assert expected in said
    assert not list(tmp_path.iterdir())
