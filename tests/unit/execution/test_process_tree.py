"""Finding the processes of a run, wherever they have gone; and signalling nobody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from agentlightning.execution.process_tree import (
    MARK,
    ProcessInfo,
    ProcessTree,
    descendants,
    make_cgroup,
    send_signal,
    snapshot,
)

NOBODY = 2**30
"""No process has this number."""
_WAIT = "print(flush=True); import time; time.sleep(60)"
_LEAVE = f"""
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {_WAIT!r}], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
"""


@contextmanager
def running(program: str, **environment: str) -> Iterator[tuple[int, str]]:
    """A new interpreter that has said something: its number and what it said."""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    with process:
        assert process.stdout is not None
        try:
            yield process.pid, process.stdout.readline()
        finally:
            process.kill()


def found(tree: ProcessTree) -> set[int]:
    return {each.pid for each in tree.living()}


def test_what_descends_from_the_launcher_is_found() -> None:
    with running(f"{_LEAVE}\n{_WAIT}") as (launcher, grandchild):
        tree = ProcessTree("no-such-mark", launcher)
        assert found(tree) == {int(grandchild)}
        os.kill(int(grandchild), signal.SIGKILL)


def test_what_has_lost_its_parent_is_found_by_its_mark() -> None:
    with running(_LEAVE, **{MARK: "mark-of-this-test"}) as (parent, left):
        os.waitid(os.P_PID, parent, os.WEXITED | os.WNOWAIT)
        try:
            assert found(ProcessTree("mark-of-this-test", NOBODY)) == {int(left)}
            assert found(ProcessTree("mark-of-this", NOBODY)) == set()
        finally:
            os.kill(int(left), signal.SIGKILL)


def test_who_has_ended_and_was_not_collected_does_not_count() -> None:
    with running("print()", **{MARK: "another-mark"}) as (pid, _):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # a zombie now
        assert pid not in snapshot()
        assert found(ProcessTree("another-mark", NOBODY)) == set()


def test_a_session_is_found_when_its_leader_is_gone() -> None:
    with running(_LEAVE) as (_, left):
        tree = ProcessTree("no-such-mark", NOBODY)
        assert found(tree) == set()
        tree.add_session(int(left))
        assert found(tree) == {int(left)}
        os.kill(int(left), signal.SIGKILL)


def test_a_cgroup_finds_those_in_it_and_below() -> None:
    cgroup = make_cgroup(f"agl-test-{os.getpid()}")
    if cgroup is None:
        pytest.skip("no cgroup2 file system in which this user may make directories")
    try:
        with running(_WAIT) as (pid, _):
            (cgroup.child("below").path / "cgroup.procs").write_text(str(pid))
            assert cgroup.processes() == {pid}
            assert found(ProcessTree("no-such-mark", NOBODY, cgroup)) == {pid}
            assert cgroup.memory_kills() == 0
            cgroup.remove()  # someone is left in it
            assert cgroup.path.is_dir()
    finally:
        cgroup.remove()
        cgroup.remove()
    assert not cgroup.path.exists()


@pytest.mark.parametrize("pid", [-1, 0, 1])
def test_the_whole_machine_is_never_a_run(pid: int) -> None:
    with pytest.raises(ValueError, match="every process descends"):
        ProcessTree("no-such-mark", pid)


def test_descendants_of_a_table() -> None:
    table = {pid: ProcessInfo(pid, parent, 0, 0.0, "") for pid, parent in ((2, 1), (3, 2), (4, 3), (5, 1), (6, 9))}
    assert descendants(table, 2) == {3, 4}
    assert descendants(table, 1) == {2, 3, 4, 5}
    assert descendants(table, 7) == set()


def test_a_signal_never_goes_to_another_process_that_has_the_number() -> None:
    with running(_WAIT) as (pid, _):
        now = snapshot()[pid]
        send_signal(now._replace(started=now.started - 1), signal.SIGKILL)  # it was another one, and is gone
        assert pid in snapshot()
        send_signal(now, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        send_signal(now, signal.SIGKILL)  # it has ended
