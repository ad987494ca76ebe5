"""The published package agentlightning 0.3.0, as a client of our server.

It is installed in a virtual environment of its own, or found in the one that ``AGL_PEER_VENV`` names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from command_line import clean_environment
from store_server_process import StoreServerProcess

PROGRAM = Path(__file__).parents[1] / "support" / "client_of_0_3.py"

EXPECTED: dict[str, Any] = {
    "resources": [1, 2, True],
    "enqueued": ["queuing", {"task": 1}, {"k": "v"}, True],
    "claimed": [True, "preparing", 1],
    "claimed more": True,
    "nothing left": True,
    "spans": [1, 1, True, 3],
    "found": [1, 2, 3, 4],
    "worker": ["busy", {"load": 0.5}, None],
    "finished": "succeeded",
    "waited": True,
    "others": ["cancelled", "failed"],
    "attempts": ["failed", 2, 2],
    "queried": ["succeeded", "failed"],
    "workers": ["worker-0.3"],
    "statistics": 4,
    "unknown": [None, None, None],
}
"""What a program of 0.3 sees. (That worker holds the attempt which it claimed last.)"""


@pytest.fixture(scope="module")
def old_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has agentlightning 0.3.0."""
    given = os.environ.get("AGL_PEER_VENV")
    if given:
        return Path(given) / "bin" / "python"
    folder = tmp_path_factory.mktemp("agl-0.3")
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", "agentlightning==0.3.0"], check=True)
    return python


def _seen_by(python: Path, url: str) -> dict[str, Any]:
    done = subprocess.run(
        [str(python), str(PROGRAM), url],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("SEEN ")]
    return json.loads(line.removeprefix("SEEN "))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_works_on_our_server(old_python: Path, tmp_path: Path) -> None:
    with StoreServerProcess(tmp_path / "store.db") as server:
        assert _seen_by(old_python, server.url) == EXPECTED
        server.stop()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_with_a_key_in_its_address(old_python: Path, tmp_path: Path) -> None:
    with StoreServerProcess(tmp_path / "store.db", api_key="a-secret-of-ours") as server:
        assert _seen_by(old_python, server.url.replace("http://", "http://agl:a-secret-of-ours@")) == EXPECTED
        with pytest.raises(AssertionError, match="401"):
            _seen_by(old_python, server.url)
        server.stop()


def test_our_client_sees_the_same(tmp_path: Path) -> None:
    """The control: the program says what it says about agentlightning 1.0 just as well."""
    with StoreServerProcess(tmp_path / "store.db") as server:
        assert _seen_by(Path(sys.executable), server.url) == EXPECTED
        server.stop()
