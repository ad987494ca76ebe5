"""Cables are pulled and the server is killed while spans flow: every accepted span arrives exactly once (G7).

Server and clients are processes in network namespaces of their own.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

import http_load
from agentlightning.store.sqlite.store import SqliteLightningStore
from command_line import clean_environment
from http_load import Promised, check, read_journals, spans_accepted
from network import Network, network
from store_server_process import StoreServerProcess
from store_state import assert_sound

KEY = "partition"
_KNOCK = "import socket, sys; socket.create_connection((sys.argv[1], 9), 1)"


class Trouble(NamedTuple):
    """What happens to the network."""

    clients: int
    cuts: int
    shortest: float
    longest: float
    kills: int


SHORT = Trouble(clients=2, cuts=2, shortest=0.5, longest=1.0, kills=1)
LONG = Trouble(clients=4, cuts=20, shortest=1.0, longest=10.0, kills=2)


@contextmanager
def _client(net: Network, number: int, url: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [
            *net.inside(number),
            *(sys.executable, http_load.__file__, url, f"worker-{number}", str(folder / f"{number}.journal")),
            str(folder / f"spool-{number}"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=clean_environment(AGL_API_KEY=KEY, PYTHONPATH=str(Path(http_load.__file__).parent)),
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.stdout.close()


def _make_trouble(net: Network, server: StoreServerProcess, trouble: Trouble, folder: Path) -> None:
    """Cut and mend, with time to work in between."""
    chance = random.Random(trouble.cuts)
    kill_at = set(chance.sample(range(trouble.cuts), trouble.kills))
    for number in range(trouble.cuts):
        cut = chance.sample(range(net.clients), chance.randint(1, net.clients))
        for client in cut:
            net.cut(client)
        if number in kill_at:
            server.kill()
        time.sleep(chance.uniform(trouble.shortest, trouble.longest))
        if number in kill_at:
            server.start()
        for client in cut:
            net.mend(client)
        _let_work(folder, chance.randint(5, 20))


def _let_work(folder: Path, spans: int) -> None:
    """Wait until so many more spans were accepted."""
    enough = spans_accepted(folder) + spans
    ends_at = time.monotonic() + 60
    while spans_accepted(folder) < enough:
        assert time.monotonic() < ends_at, "nobody works any more"
        time.sleep(0.02)


def _run(folder: Path, trouble: Trouble) -> tuple[Promised, int]:
    """What the clients were told, and how many spans had to wait on the disk."""
    with network(trouble.clients) as net:
        server = StoreServerProcess(
            folder / "store.db", host=net.server_address, port=4747, api_key=KEY, inside=net.inside(None)
        )
        with server:
            spooled = _work_in(net, server, folder, trouble)
            server.stop()
    return read_journals(folder), spooled


def _work_in(net: Network, server: StoreServerProcess, folder: Path, trouble: Trouble) -> int:
    spooled = 0
    with _clients(net, server.url, folder) as clients:
        for each in clients:
            assert each.stdout is not None
            assert each.stdout.readline() == b"working\n"
        _let_work(folder, 10)
        _make_trouble(net, server, trouble, folder)
        for each in clients:
            assert each.stdin is not None
            each.stdin.close()
        for each in clients:
            assert each.stdout is not None
            word, waited = each.stdout.readline().split()
            assert word == b"done"
            assert each.wait() == 0
            spooled += int(waited)
    return spooled


@contextmanager
def _clients(net: Network, url: str, folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    with ExitStack() as stack:
        yield [stack.enter_context(_client(net, number, url, folder)) for number in range(net.clients)]


@pytest.mark.root
@pytest.mark.parametrize(
    "trouble", [SHORT, pytest.param(LONG, marks=[pytest.mark.slow, pytest.mark.timeout(900)])], ids=["short", "long"]
)
async def test_every_accepted_span_arrives_exactly_once(tmp_path: Path, trouble: Trouble) -> None:
    _require_root()
    promised, spooled = _run(tmp_path, trouble)
    assert len(promised.spans) >= 5 * trouble.cuts
    if trouble is LONG:
        assert spooled > 0, "no cut was long enough for a span to go to the disk"
    async with SqliteLightningStore(tmp_path / "store.db") as store:
        await check(store, promised)
        await assert_sound(store)


@pytest.mark.root
def test_a_cut_cable_lets_nothing_through() -> None:
    """The control: without it, the test above would test an idle network."""
    _require_root()
    with network(2) as net:

        def reaches(client: int) -> bool:
            """Nobody listens there, but a machine that is reached says so."""
            asked = [*net.inside(client), sys.executable, "-c", _KNOCK, net.server_address]
            return b"ConnectionRefusedError" in subprocess.run(asked, capture_output=True, check=False).stderr

        def comes_to_reach(client: int) -> bool:
            """A switch takes a moment to find who is on a cable."""
            return any(reaches(client) for _ in range(10))

        assert comes_to_reach(0)
        assert comes_to_reach(1)
        net.cut(0)
        assert not reaches(0)
        assert reaches(1)
        net.mend(0)
        assert comes_to_reach(0)


def _require_root() -> None:
    if os.geteuid() == 0 and shutil.which("ip"):
        return
    if os.environ.get("CI"):
        pytest.fail("this needs root and iproute2, and must run in CI")
    pytest.skip("needs root and iproute2")
