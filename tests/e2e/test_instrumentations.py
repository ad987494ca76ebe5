"""The real tracing libraries, each in a process of its own, because they patch the SDK that they trace.

The packages of the dependency groups ``instrumentations`` and ``instrumentations-strands``, and those of
``instrumented_programs.PACKAGES``, are installed into environments of their own, because their pins do not fit
together; the tests are skipped where they cannot be installed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentlightning import TracerTraceToTriplet, TraceToMessages
from instrumented_calls import INSTRUMENTATIONS
from instrumented_programs import PACKAGES, PROGRAMS, packages_of
from recorded_spans import read, recorded

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
SCENES = [(name, scene) for name, library in INSTRUMENTATIONS.items() for scene in library.scenes]
Install = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture
def installed(tmp_path_factory: pytest.TempPathFactory) -> Install:
    """Installs something into a folder by its name, once for all tests; skips where that fails."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def install(name: str, into: Callable[[Path], None]) -> Path:
        folder, done = shared / f"packages-{name}", shared / f"packages-{name}.done"
        with (shared / f"packages-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                folder.mkdir()
                try:
                    into(folder)
                    done.write_text("")
                except (OSError, subprocess.CalledProcessError) as error:
                    done.write_text(f"cannot be installed: {error}")
        why = done.read_text()
        if why:
            pytest.skip(f"{name} {why}")
        return folder

    return install


def _run(*command: str | Path, timeout: float = 900, **options: Any) -> str:
    ran = subprocess.run(
        [*map(str, command)], stdout=subprocess.PIPE, text=True, timeout=timeout, check=True, **options
    )
    return ran.stdout


def _python(group: str) -> Callable[[Path], None]:
    def install(folder: Path) -> None:
        groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
        _run(sys.executable, "-m", "venv", folder)
        _run(folder / "bin" / "python", "-m", "pip", "install", "-qq", "-e", ROOT, *groups[group])

    return install


def _node(name: str) -> Callable[[Path], None]:
    def install(folder: Path) -> None:
        if shutil.which("npm") is None:
            raise FileNotFoundError("there is no npm")
        packages = [f"{package}@{version}" for package, version in PACKAGES[name].items()]
        (folder / "package.json").write_text("{}", encoding="utf-8")
        _run("npm", "install", "--silent", "--ignore-scripts", "--no-audit", "--no-fund", *packages, cwd=folder)

    return install


def _is_as_recorded(content: dict[str, Any], name: str, scene: str) -> None:
    """What was written now is read as what was written when it was recorded."""
    assert content["versions"] == recorded(name, scene).versions
    now, before = [
        (TraceToMessages(call_filter=None).examine(spans), TracerTraceToTriplet(call_filter=None).examine(spans))
        for spans in (read(content).spans, recorded(name, scene).spans)
    ]
    assert now[0].made
    for of_now, of_before in zip(now, before, strict=True):
        assert [each.reason for each in of_now.unusable] == [each.reason for each in of_before.unusable]
    assert [_plain(each) for each in now[0].made] == [_plain(each) for each in before[0].made]
    reasons = [[each.metadata["finish_reason"] for each in triplets.made] for _, triplets in (now, before)]
    assert reasons[0] == reasons[1]


def _plain(conversation: Any) -> Any:
    """Without ids of tool calls: Gemini CLI makes them of the time."""
    text = json.loads(json.dumps(conversation))
    for message in text["messages"]:
        message.pop("tool_call_id", None)
        for call in message.get("tool_calls", []):
            call.pop("id")
    return text


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("name", "scene"), SCENES)
def test_what_the_library_writes_is_what_the_recorded_spans_say(name: str, scene: str, installed: Install) -> None:
    group = "instrumentations-strands" if name.startswith("strands") else "instrumentations"
    folder = installed(group, _python(group))
    command = (folder / "bin" / "python", SUPPORT / "instrumented_calls.py", name, scene)
    written = _run(*command, timeout=240, env=os.environ | {"PYTHONPATH": str(SUPPORT)}, cwd=SUPPORT)
    _is_as_recorded(json.loads(written), name, scene)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", PROGRAMS)
def test_what_the_program_writes_is_what_the_recorded_spans_say(name: str, installed: Install) -> None:
    folder = installed(packages_of(name), _node(packages_of(name)))
    command = (sys.executable, SUPPORT / "instrumented_programs.py", name, folder)
    written = _run(*command, timeout=400, env=os.environ | {"PYTHONPATH": str(SUPPORT)})
    _is_as_recorded(json.loads(written), name, "talk")
