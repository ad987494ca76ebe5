"""Machines, each a network namespace: the algorithm on one, runners on others.

    runner host 1 (10.87.1.2) ──┐
                                ├── algorithm (10.87.1.1, 10.87.2.1)
    runner host 2 (10.87.2.2) ──┘

Started in any order, started late, cut off, and stopped by the end of the algorithm.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import execution_programs as programs

pytestmark = pytest.mark.root

_RUN = """
import asyncio, logging, sys
import execution_programs as programs
from agentlightning import (
    ClientServerExecutionStrategy, InMemoryLightningStore, RolloutConfig, SqliteLightningStore,
)
from execution_agents import AgentRunner, ShortAgent

logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
role, host = sys.argv[1:3]


class Algorithm:
    async def __call__(self, store, event):
        programs.note("algorithm")
        ids = []
        while not (programs.folder() / "enough").exists():
            ids.append((await store.enqueue_rollout(len(ids))).rollout_id)
            await asyncio.sleep(0.02)
        done = await store.wait_for_rollouts(rollout_ids=ids, timeout=60)
        statuses = {each.status for each in done}
        assert len(done) == len(ids) and statuses == {"succeeded"}, (len(done), len(ids), statuses)
        retried = [each.rollout_id for each in done if each.attempt.sequence_id > 1]
        print(len(ids), "rollouts,", len(retried), "of them retried", flush=True)


database = programs.folder() / "store.db"
store = InMemoryLightningStore() if role == "runner" else SqliteLightningStore(database, "process")
ClientServerExecutionStrategy(
    role=role,
    server_host=host,
    server_port=4747,
    n_runners=2,
    connect_timeout=30,
    graceful_timeout=5,
    terminate_timeout=2,
    run_id="run-of-the-test",
).execute(Algorithm(), AgentRunner(ShortAgent(), heartbeat_interval=1.0, poll_interval=0.1), store)
"""


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Network:
    """A namespace for the algorithm, and two for runner hosts, each with a cable of its own."""

    def __init__(self) -> None:
        self.tag = f"agl{os.getpid()}"
        self.center = f"{self.tag}-c"
        self.hosts = {number: f"{self.tag}-{number}" for number in (1, 2)}

    def build(self) -> None:
        _ip("netns", "add", self.center)
        for number, host in self.hosts.items():
            _ip("netns", "add", host)
            _ip(
                "link",
                "add",
                f"{self.tag}c{number}",
                "netns",
                self.center,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                host,
            )
            _ip("-n", self.center, "addr", "add", f"10.87.{number}.1/24", "dev", f"{self.tag}c{number}")
            _ip("-n", host, "addr", "add", f"10.87.{number}.2/24", "dev", "eth0")
            _ip("-n", self.center, "link", "set", f"{self.tag}c{number}", "up")
            _ip("-n", host, "link", "set", "eth0", "up")
            _ip("-n", host, "link", "set", "lo", "up")
        _ip("-n", self.center, "link", "set", "lo", "up")

    def cut(self, number: int, state: str) -> None:
        """Pull the cable of a host (``down``), or plug it in (``up``)."""
        _ip("-n", self.center, "link", "set", f"{self.tag}c{number}", state)

    def remove(self) -> None:
        for name in (self.center, *self.hosts.values()):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture
def network() -> Iterator[Network]:
    built = Network()
    try:
        built.build()
        yield built
    finally:
        built.remove()


class Machine:
    """One role on one machine.

    Args:
        namespace: where.
        role: which.
        host: address of the algorithm's machine.
        folder: for notes, shared; and for a spool, its own.
    """

    def __init__(self, namespace: str, role: str, host: str, folder: Path) -> None:
        self.log = folder / f"{namespace}.log"
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(programs.__file__).parent),
            "AGL_TEST_FOLDER": str(folder),
            "AGL_SPOOL_DIR": str(folder / f"{namespace}-spool"),
            "AGL_API_KEY": "the-key-of-the-test",
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", namespace, sys.executable, "-c", _RUN, role, host],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def end(self, seconds: float) -> str:
        """Wait until it has ended, well; what it wrote."""
        try:
            code = self.process.wait(seconds)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
        text = self.log.read_text()
        assert code == 0, text
        return text


@pytest.mark.parametrize(
    ("first", "cut_seconds"),
    [
        ("runners", 1.0),
        pytest.param("runners", 10.0, marks=pytest.mark.slow),
        pytest.param("algorithm", 10.0, marks=pytest.mark.slow),
    ],
)
def test_runners_on_other_machines(
    first: str, cut_seconds: float, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGL_TEST_FOLDER", str(tmp_path))
    machines: dict[str, Machine] = {}

    def start(*names: str) -> None:
        for name in names:
            where: dict[str, tuple[str, str, str]] = {
                "algorithm": (network.center, "algorithm", "0.0.0.0"),
                "host 1": (network.hosts[1], "runner", "10.87.1.1"),
                "host 2": (network.hosts[2], "runner", "10.87.2.1"),
            }
            machines[name] = Machine(*where[name], tmp_path)

    if first == "runners":
        start("host 1")
        waiting = "waiting for http://10.87.1.1:4747"
        programs.wait_until(lambda: waiting in machines["host 1"].log.read_text(), "it counts down")
        start("algorithm")
    else:
        start("algorithm", "host 1")
    programs.wait_until(lambda: len(programs.noted(tmp_path, "runner")) == 2, "the first host is at work")
    start("host 2")  # late
    programs.wait_until(lambda: len(programs.noted(tmp_path, "runner")) == 4, "the second host is at work")
    network.cut(1, "down")
    time.sleep(cut_seconds)  # the cut is the fault that is injected; nothing is waited for here
    network.cut(1, "up")
    time.sleep(1.0)  # some work after it
    (tmp_path / "enough").touch()
    told = machines["algorithm"].end(60)
    assert "rollouts," in told
    for name in ("host 1", "host 2"):
        log = machines[name].end(15)  # the end of the algorithm is theirs
        assert "started again" not in log  # being cut off is no crash
    assert programs.alive(tmp_path) == []
