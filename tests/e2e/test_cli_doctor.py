"""`agl doctor`, given every illness that it knows, and nothing but health."""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agentlightning.cli import target as probe
from agentlightning.cli.doctor import check_server
from agentlightning.cli.target import Server, ask
from agentlightning.cli.terminal import ExitCode
from agentlightning.http.client.client import LightningStoreClient
from agentlightning.http.client.retry import Resilience
from agentlightning.store.base import LightningStore
from agentlightning.store.sources import SystemClock
from agentlightning.types import LLM, AttemptedRollout, ProxyLLM, RolloutConfig
from certificates import self_signed
from command_line import Done, agl, agl_process, clean_environment
from scenes import claimed, enqueued, finish, span_of
from served_store import closed_port, served, served_elsewhere
from worked_store import spans_of_a_turn

NO_SPOOL = {"AGL_SPOOL_DIR": "/nonexistent"}
"""What lies in the spool of whoever runs the tests is not the matter here."""
KEY = "a-key-that-is-long-enough-for-a-server"


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


def examine(url: object, *words: str, env: dict[str, str] | None = None) -> dict[str, dict[str, str]]:
    """What the doctor found, by code; checked: its exit code, and that the text says the same."""
    done = agl("doctor", "--url", url, *words, "-o", "json", env=NO_SPOOL | (env or {}))
    found = {each["code"]: each for each in done.json["findings"]}
    problems = [each for each in found.values() if each["level"] == "problem"]
    assert done.code == (ExitCode.FAILED if problems else ExitCode.OK)
    assert done.json["ok"] is (not problems)
    return found


def sick(found: dict[str, dict[str, str]]) -> set[str]:
    return {code for code, each in found.items() if each["level"] != "note"}


async def healthy(store: LightningStore) -> None:
    """A worker that has worked, and works."""
    await store.update_worker("w-1", lease_seconds=600.0)
    await enqueued(store, *range(4))
    for number in range(3):
        attempted = await claimed(store, "w-1")
        await store.add_many_spans(spans_of_a_turn(attempted, number))
        await finish(store, attempted)
    await claimed(store, "w-1")


def test_in_a_healthy_store_nothing_is_found(database: Path) -> None:
    """The negative control of all that follow."""
    with served(database, healthy) as server:
        found = examine(server.endpoint)
        assert sick(found) == set()
        assert {"server_answers", "same_version", "clocks_agree", "disk_has_room", "spans_arrive", "working"} <= set(
            found
        )
        text = agl("doctor", "--url", server.endpoint, env=NO_SPOOL).ok().out
        assert "0 problems, 0 warnings" in text


def test_a_server_that_is_not_there_is_found() -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    found = examine(url)
    assert set(found) == {"server_unreachable"}
    assert "agl store" in found["server_unreachable"]["text"]
    text = agl("doctor", "--url", url, env=NO_SPOOL).out
    assert text.startswith("✗ Nothing listens at")
    assert "1 problem, 0 warnings" in text


def test_a_host_that_nobody_knows_is_found() -> None:
    found = examine("http://no-such-host.invalid:4747")
    assert "is not known here" in found["server_unreachable"]["text"]
    found = examine("http://gpu..lab:4747")
    assert "a name that no host can have" in found["server_unreachable"]["text"]


def test_a_server_that_is_stuck_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as stuck:  # takes connections, and never says a word
        found = examine(f"http://127.0.0.1:{stuck.getsockname()[1]}")
    assert "nothing answers at" in found["server_unreachable"]["text"].lower()


@contextmanager
def web_server(answers: dict[str, bytes], delay_seconds: float = 0.0) -> Iterator[str]:
    """Some other web server, which has these pages, and takes its time."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(delay_seconds)  # the delay itself
            body = answers.get(self.path)
            self.send_response(404 if body is None else 200)
            self.end_headers()
            self.wfile.write(body or b"not found")

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_a_server_that_is_slow_is_found(database: Path) -> None:
    """What a real server says, said slowly."""
    with served(database) as server:
        statistics = json.dumps(ask(Server(server.endpoint, None)).statistics).encode()
    with web_server({"/agl/v1/statistics": statistics}, delay_seconds=0.6) as url:
        findings = list(check_server(Server(url, None)))
    assert ("server_slow", "warning") in {(each.code, each.level) for each in findings}


def test_another_program_on_the_port_is_found() -> None:
    with web_server({"/": b"<html>"}) as url:
        found = examine(url)
    assert "not the server of a store" in found["not_our_server"]["text"]
    with web_server({"/agl/v1/statistics": b'{"some": "thing"}'}) as url:
        assert set(examine(url)) == {"not_our_server"}


def test_a_server_of_agentlightning_0_3_is_found() -> None:
    with web_server({"/v1/agl/health": b'{"status": "ok"}'}) as url:
        found = examine(url)
    assert "of another version" in found["not_our_server"]["text"]


def test_a_wrong_key_and_a_missing_one_are_found(database: Path) -> None:
    with served(database, healthy, api_key=KEY) as server:
        assert "asks for an API key" in examine(server.endpoint)["wrong_key"]["text"]
        assert "does not take this API key" in examine(server.endpoint, "--api-key", "wrong")["wrong_key"]["text"]
        assert sick(examine(server.endpoint, env={"AGL_API_KEY": KEY})) == set()
        assert sick(examine(server.endpoint.replace("://", f"://agl:{KEY}@"))) == set()
        done = agl("status", "--url", server.endpoint)
        assert done.code == ExitCode.FAILED
        assert "set AGL_API_KEY" in done.err


class ShiftedClock(SystemClock):
    """A machine whose clock was set wrong."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def wall(self) -> float:
        return super().wall() + self._seconds


@pytest.mark.parametrize(
    ("seconds", "level", "words"),
    [(90.0, "problem", "ahead of"), (-3_600.0, "problem", "behind"), (3.0, "warning", "ahead of")],
)
def test_a_clock_that_is_wrong_is_found(database: Path, seconds: float, level: str, words: str) -> None:
    with served(database, clock=ShiftedClock(seconds)) as server:
        found = examine(server.endpoint)["clock_skew"]
    assert found["level"] == level
    assert words in found["text"]


def test_another_version_on_the_other_side_is_found(database: Path, tmp_path: Path) -> None:
    """The server's process finds the metadata of another release first, as if that were installed there."""
    metadata = tmp_path / "other" / "agentlightning-0.9.1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: agentlightning\nVersion: 0.9.1\n")
    with served_elsewhere(database, PYTHONPATH=str(metadata.parent)) as (url, _):
        found = examine(url)["version_mismatch"]
    assert found["level"] == "problem"
    assert "runs agentlightning 0.9.1" in found["text"]
    assert "pip install agentlightning==" in found["fix"]


def test_that_no_runner_is_there_is_found(database: Path) -> None:
    with served(database, lambda store: enqueued(store, 1, 2, 3)) as server:
        found = examine(server.endpoint)["no_runner"]
    assert "3 rollouts in the queue, and no runner has ever connected" in found["text"]
    assert "agl runner" in found["fix"]


def test_that_no_spans_are_captured_is_found(database: Path) -> None:
    async def untraced(store: LightningStore) -> None:
        await store.update_worker("w-1", lease_seconds=600.0)
        await enqueued(store, *range(4), config=RolloutConfig())
        for _ in range(4):
            await finish(store, await claimed(store, "w-1"))

    with served(database, untraced) as server:
        found = examine(server.endpoint)["no_spans"]
    assert found["level"] == "problem"
    assert "tracer" in found["fix"]


def test_a_model_that_nobody_serves_is_found(database: Path) -> None:
    async def with_models(store: LightningStore) -> None:
        await healthy(store)
        for number, model in enumerate((LLM(endpoint=dead, model="m"), ProxyLLM(endpoint=alive, model="m"))):
            await store.add_resources({"llm": model}, resources_id=f"rs-{number}")

    dead = f"http://127.0.0.1:{closed_port()}/v1"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        alive = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        with served(database, with_models) as server:
            assert sick(examine(server.endpoint)) == set()
            agl("resources", "rollback", "rs-0", "1", "--url", server.endpoint).ok()
            found = examine(server.endpoint)["model_unreachable"]
    assert found["level"] == "warning"
    assert f"Nobody answers at {dead}, where the resource 'llm'" in found["text"]
    assert "refused" in found["text"]


def test_spans_that_wait_or_were_refused_on_this_machine_are_found(database: Path, tmp_path: Path) -> None:
    """Made by a real client, whose server goes away between the claim and the spans."""
    spool = tmp_path / "spool"

    async def begin(url: str) -> AttemptedRollout:
        async with LightningStoreClient(url, spool_dir=None) as client:
            return await client.start_rollout("x")

    async def go_on(url: str, attempted: AttemptedRollout) -> None:
        client = LightningStoreClient(url, spool_dir=spool, resilience=Resilience(spool_after_seconds=0.1))
        await client.add_many_spans([span_of(attempted)])
        await client.close(grace_seconds=0.0)

    with served(database, healthy) as server:
        attempted = asyncio.run(begin(server.endpoint))
    asyncio.run(go_on(server.endpoint, attempted))
    [folder] = spool.iterdir()
    (folder / "quarantine.jsonl").write_text('{"code": "not_json"}\n')
    with served(database) as server:
        found = examine(server.endpoint, env={"AGL_SPOOL_DIR": str(spool)})
    assert "of spans wait on this machine" in found["spans_wait"]["text"]
    assert "(1)" in found["spans_refused"]["text"]


def test_a_file_that_others_can_read_is_found(database: Path) -> None:
    with served(database, healthy) as server:
        assert sick(examine(database)) == set()
        owner = examine(database)["owned"]["text"]
        assert f"Process {os.getpid()} " in owner
        assert server.endpoint in owner
        database.chmod(0o644)
        assert sick(examine(database)) == {"readable_by_others"}
    assert "not_served" in examine(database)
    assert sick(examine(database.with_name("none.db"))) == {"no_database"}


def test_a_damaged_file_is_a_finding_and_no_traceback(database: Path) -> None:
    database.write_text("not a database" * 1000)
    database.chmod(0o600)
    assert sick(examine(database)) == {"foreign_file"}


# --- TLS, and what needs root -----------------------------------------------------------------


def test_the_wrong_scheme_and_a_certificate_that_is_not_trusted_are_found(database: Path, tmp_path: Path) -> None:
    cert, key = self_signed(tmp_path)
    with served(database, healthy, tls_certificate=cert, tls_key=key) as server:
        assert server.endpoint.startswith("https://")
        untrusted = examine(server.endpoint)["server_unreachable"]["text"]
        assert "is not trusted here" in untrusted
        plain = examine(server.endpoint.replace("https://", "http://"))["server_unreachable"]["text"]
        assert "try https:// instead of http://" in plain
        trusting = agl_process("doctor", "--url", server.endpoint, env=NO_SPOOL | {"SSL_CERT_FILE": str(cert)}).ok()
        assert "0 problems, 0 warnings" in trusting.out
    with served(database) as server:
        secure = examine(server.endpoint.replace("http://", "https://"))["server_unreachable"]["text"]
        assert "try http:// instead of https://" in secure


def run_apart(script: str, *namespaces: str, **environment: str) -> Done:
    """A shell script in namespaces of its own, which go away with it."""
    if os.geteuid() != 0:
        assert "CI" not in os.environ, "CI has to run these tests"
        pytest.skip("needs root, to make namespaces")
    done = subprocess.run(
        ["unshare", *namespaces, "sh", "-euc", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=clean_environment(**NO_SPOOL, PYTHON=sys.executable, **environment),
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.root
def test_a_disk_that_is_almost_full_is_found(database: Path, tmp_path: Path) -> None:
    """A disk of 64 MB, which is mounted for this test only."""
    with served(database, healthy):
        pass
    script = """
        mount -t tmpfs -o size=64m none "$DISK"
        cp "$DATABASE" "$DISK/store.db"
        "$PYTHON" -m agentlightning doctor --url "$DISK/store.db" -o json
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    done = run_apart(script, "--mount", DISK=str(disk), DATABASE=str(database))
    assert done.code == ExitCode.FAILED, done
    [problem] = [each for each in done.json["findings"] if each["level"] == "problem" and each["code"] != "no_owner"]
    assert problem["code"] == "disk_almost_full"
    assert "64.0 MB free" in problem["text"] or "MB of 67.1 MB free" in problem["text"]
    assert not any(disk.iterdir())


@pytest.mark.root
def test_a_server_beyond_this_machine_without_tls_is_found(database: Path) -> None:
    """A network of its own, in which an address counts as that of another machine."""
    script = """
        ip link set lo up
        ip addr add 10.86.0.1/32 dev lo
        mkfifo "$FIFO"
        "$PYTHON" -m agentlightning store --db "$DATABASE" --host 10.86.0.1 --port 0 > "$FIFO" 2>/dev/null &
        read -r LINE < "$FIFO"
        "$PYTHON" -m agentlightning doctor --url "${LINE##* }" -o json
        kill $!
        wait
    """
    assert shutil.which("ip"), "iproute2 is needed"
    done = run_apart(script, "--net", DATABASE=str(database), FIFO=str(database.with_name("fifo")), AGL_API_KEY=KEY)
    assert done.code == ExitCode.OK, done
    warnings = {each["code"] for each in done.json["findings"] if each["level"] == "warning"}
    assert warnings == {"no_tls"}
