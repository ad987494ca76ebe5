"""Quotas, as a process feels them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentlightning.execution.process_tree import Cgroup
from agentlightning.execution.quotas import Quotas, exhausted

_FEEL = """
import json, os, resource
from agentlightning.execution.quotas import Quotas
{quotas}.apply()
print(json.dumps({{
    "files": resource.getrlimit(resource.RLIMIT_NOFILE),
    "processes": resource.getrlimit(resource.RLIMIT_NPROC),
    "cpu": resource.getrlimit(resource.RLIMIT_CPU),
    "memory": resource.getrlimit(resource.RLIMIT_DATA),
    "nice": os.nice(0),
    "cpus": sorted(os.sched_getaffinity(0)),
}}))
"""


def feel(quotas: Quotas) -> dict[str, Any]:
    """What limits a process has that has applied these."""
    program = _FEEL.format(quotas=repr(quotas))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_each_quota_is_a_limit_of_the_process() -> None:
    cpu = min(os.sched_getaffinity(0))
    felt = feel(Quotas(2**30, 7, 64, 5000, 3, frozenset({cpu})))
    assert felt == {
        "files": [64, 64],
        "processes": [5000, 5000],
        "cpu": [7, 12],
        "memory": [2**30, 2**30],
        "nice": os.nice(0) + 3,
        "cpus": [cpu],
    }


def test_without_quotas_nothing_changes() -> None:
    felt = feel(Quotas())
    assert felt["nice"] == os.nice(0)
    assert felt["cpus"] == sorted(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("quotas", "code", "kills", "told"),
    [
        (None, -9, 0, None),
        (None, -9, 1, "its memory"),
        (Quotas(memory_bytes=1000), -9, 1, "1,000 bytes of memory"),
        (Quotas(memory_bytes=1000), -9, 0, None),
        (Quotas(cpu_seconds=3), -signal.SIGXCPU, 0, "3 s of CPU time"),
        (None, -signal.SIGXCPU, 0, None),
        (Quotas(cpu_seconds=3), 1, 0, None),
    ],
)
def test_what_was_used_up_is_told_by_how_it_ended(
    quotas: Quotas | None, code: int, kills: int, told: str | None
) -> None:
    assert exhausted(quotas, code, memory_kills=kills) == told


def test_a_cgroup_with_a_memory_controller(tmp_path: Path) -> None:
    """As the kernel shows it (cgroup-v2.rst, memory.events and memory.max)."""
    cgroup = Cgroup(tmp_path)
    assert cgroup.memory_kills() == 0
    assert cgroup.limit_memory(4096)
    assert (tmp_path / "memory.max").read_text() == "4096"
    assert (tmp_path / "memory.oom.group").read_text() == "1"
    (tmp_path / "memory.events").write_text("low 0\nhigh 0\nmax 12\noom 2\noom_kill 3\noom_group_kill 1\n")
    assert cgroup.memory_kills() == 3


def test_a_cgroup_without_one(tmp_path: Path) -> None:
    assert Cgroup(tmp_path / "missing").limit_memory(4096) is False
