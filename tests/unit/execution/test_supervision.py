"""Runners that crash: started again, and told to the store at once; the others and the algorithm go on."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import execution_programs as programs
from agentlightning import (
    ClientServerExecutionStrategy,
    InMemoryLightningStore,
    Quotas,
    RestartPolicy,
    Rollout,
    RolloutConfig,
)
from agentlightning.errors import ExecutionFailed
from execution_agents import AgentRunner, HoardingAgent

RETRIES = RolloutConfig(max_attempts=3, retry_condition=["unresponsive", "failed"])
SOON = RestartPolicy(first_delay=0.02, longest_delay=0.1, most_per_minute=5)
IN_TIME: dict[str, Any] = {"server_port": 0, "graceful_timeout": 5.0, "terminate_timeout": 2.0, "restarts": SOON}
QUICK: dict[str, Any] = IN_TIME | {"start_method": "fork"}
"""A fork has the package imported already; what depends on how processes are started says so."""


class Inputs:
    """An algorithm that has these inputs run, and keeps what became of them.

    Args:
        inputs: of its rollouts.
        config: of all of them.
    """

    def __init__(self, *inputs: Any, config: RolloutConfig | None = None) -> None:
        self.inputs = inputs
        self.config = config
        self.ended: list[Rollout] = []
        self.attempts: list[list[Any]] = []
        self.seconds = 0.0

    async def __call__(self, store: Any, event: Any) -> None:
        began = time.monotonic()
        ids = [(await store.enqueue_rollout(each, config=self.config)).rollout_id for each in self.inputs]
        self.ended = await store.wait_for_rollouts(rollout_ids=ids, timeout=20)
        self.seconds = time.monotonic() - began
        self.attempts = [list(await store.query_attempts(each)) for each in ids]
        assert len(self.ended) == len(ids)


def test_a_default_timeout_of_sockets_ends_no_runner(folder: Path) -> None:
    inputs = Inputs(1)

    async def algorithm(store: Any, event: Any) -> None:
        await programs.until(lambda: len(programs.noted(folder, "runner")) == 1)
        await asyncio.sleep(0.6)  # three times as long as the runner's own sockets would wait
        await inputs(store, event)

    socket.setdefaulttimeout(0.2)
    try:
        ClientServerExecutionStrategy(n_runners=1, **QUICK).execute(algorithm, programs.works, InMemoryLightningStore())
    finally:
        socket.setdefaulttimeout(None)
    assert [each.status for each in inputs.ended] == ["succeeded"]
    assert len(programs.noted(folder, "runner")) == 1


@pytest.mark.parametrize("end_by", ["kill", "exit", "raise"])
def test_a_crash_is_told_at_once_and_the_runner_is_back(end_by: str, folder: Path) -> None:
    """The attempt has no time-out of its own, and the lease of the worker is far from its end."""
    algorithm = Inputs({"end_by": end_by}, 1, 2, config=RETRIES)
    ClientServerExecutionStrategy(n_runners=1, **QUICK).execute(algorithm, programs.works, InMemoryLightningStore())
    assert [each.status for each in algorithm.ended] == ["succeeded"] * 3
    first, second = algorithm.attempts[0]
    assert (first.status, first.reason_code) == ("unresponsive", "worker_lost")
    told = {"kill": "killed by SIGKILL", "exit": "exit code 3", "raise": "ValueError: the agent broke the runner"}
    assert told[end_by] in first.reason_message
    assert second.status == "succeeded"
    assert first.worker_id == second.worker_id  # a slot keeps its name
    lives = programs.noted(folder, "runner-0")
    assert len(lives) == len({pid for _, pid, _ in lives}) == 2
    assert algorithm.seconds < 5


def test_a_rollout_without_retries_fails_with_the_reason(folder: Path) -> None:
    algorithm = Inputs({"end_by": "kill"}, 1)
    ClientServerExecutionStrategy(n_runners=2, **QUICK).execute(algorithm, programs.works, InMemoryLightningStore())
    assert [(each.status, each.reason_code) for each in algorithm.ended] == [
        ("failed", "worker_lost"),
        ("succeeded", "completed"),
    ]


def test_other_runners_do_not_notice(folder: Path) -> None:
    inputs = Inputs({"end_by": "kill"}, *range(30), config=RETRIES)

    async def algorithm(store: Any, event: Any) -> None:
        await inputs(store, event)
        await programs.until(lambda: len(programs.noted(folder, "runner")) == 4)  # the new one, if late

    ClientServerExecutionStrategy(n_runners=3, **QUICK).execute(algorithm, programs.works, InMemoryLightningStore())
    assert {each.status for each in inputs.ended} == {"succeeded"}
    lives = [who for who, _, _ in programs.noted(folder, "runner")]
    assert sorted(map(lives.count, set(lives))) == [1, 1, 2]


def test_a_run_that_no_runner_can_serve_fails_with_the_childs_traceback(folder: Path) -> None:
    strategy = ClientServerExecutionStrategy(n_runners=2, **QUICK)
    began = time.monotonic()
    with pytest.raises(
        ExecutionFailed, match=r"no runner can be kept alive.*ValueError: this side cannot work"
    ) as told:
        strategy.execute(programs.waits_for_ever, programs.Fails(), InMemoryLightningStore())
    assert isinstance(told.value, RuntimeError)
    assert 'raise ValueError("this side cannot work")' in told.value.child_traceback
    assert "execution_programs.py" in "\n".join(told.value.__notes__)
    assert time.monotonic() - began < 10


def test_what_the_algorithm_raises_comes_out_and_stops_the_runners(folder: Path) -> None:
    with pytest.raises(ValueError, match="this side cannot work"):
        ClientServerExecutionStrategy(n_runners=2, **QUICK).execute(
            programs.Fails(), programs.works, InMemoryLightningStore()
        )
    assert programs.alive(folder) == []


def test_an_algorithm_in_its_own_process_that_fails_is_not_started_again(folder: Path) -> None:
    with pytest.raises(ExecutionFailed, match=r"algorithm \(pid \d+\) failed: ValueError") as told:
        ClientServerExecutionStrategy(main_process="runner", **QUICK).execute(
            programs.Fails(), programs.works, InMemoryLightningStore()
        )
    assert "this side cannot work" in told.value.child_traceback


def test_runners_that_have_done_their_share_are_not_replaced(folder: Path) -> None:
    """As those with max_rollouts; the algorithm may need a while yet."""

    async def algorithm(store: Any, event: Any) -> None:
        await programs.until(lambda: len(programs.noted(folder)) == 2)
        await asyncio.sleep(0.3)

    ClientServerExecutionStrategy(n_runners=2, **QUICK).execute(
        algorithm, programs.ends_at_once, InMemoryLightningStore()
    )
    assert len(programs.noted(folder)) == 2


def test_rollouts_that_nobody_will_run_end_the_run(folder: Path) -> None:
    with pytest.raises(ExecutionFailed, match="have ended, and 1 rollouts wait"):
        ClientServerExecutionStrategy(n_runners=2, **QUICK).execute(
            Inputs("never run"), programs.ends_at_once, InMemoryLightningStore()
        )


def test_an_exit_code_that_is_allowed_is_no_crash(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    algorithm = Inputs({"end_by": "exit"}, 1, 2)

    async def waits_for_two(store: Any, event: Any) -> None:
        ids = [(await store.enqueue_rollout(each)).rollout_id for each in algorithm.inputs[1:]]
        await store.wait_for_rollouts(rollout_ids=ids, timeout=20)
        await store.enqueue_rollout(algorithm.inputs[0])
        while "has ended" not in caplog.text:
            await asyncio.sleep(0.01)

    ClientServerExecutionStrategy(n_runners=2, allowed_exit_codes=(0, 3), **QUICK).execute(
        waits_for_two, programs.works, InMemoryLightningStore()
    )
    assert "started again" not in caplog.text


def test_the_death_of_the_launcher_ends_the_run(folder: Path) -> None:
    async def algorithm(store: Any, event: Any) -> None:
        await programs.until(lambda: len(programs.noted(folder, "runner")) == 2)
        pid = programs.noted(folder, "runner")[0][1]
        os.kill(psutil.Process(pid).ppid(), signal.SIGKILL)
        await asyncio.Event().wait()

    with pytest.raises(ExecutionFailed, match="the launcher"):
        ClientServerExecutionStrategy(n_runners=2, start_method="forkserver", **IN_TIME).execute(
            algorithm, programs.works, InMemoryLightningStore()
        )
    programs.wait_until(lambda: not programs.alive(folder), "the runners have ended")


# --- Quotas ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end_by", "quotas"),
    [
        ("memory", Quotas(memory_bytes=600 * 1024 * 1024)),
        ("cpu", Quotas(cpu_seconds=1)),
    ],
)
def test_a_runner_that_has_used_up_its_quota_is_reported_as_that(end_by: str, quotas: Quotas, folder: Path) -> None:
    algorithm = Inputs({"end_by": end_by}, config=RETRIES)
    ClientServerExecutionStrategy(n_runners=1, start_method="forkserver", quotas=quotas, **IN_TIME).execute(
        algorithm, programs.works, InMemoryLightningStore()
    )
    [attempts] = algorithm.attempts
    assert [(each.status, each.reason_code) for each in attempts] == [
        ("unresponsive", "resource_exhausted"),
        ("succeeded", "completed"),
    ]
    assert {"memory": "MemoryError", "cpu": "having used up 1 s of CPU time"}[end_by] in attempts[0].reason_message


def test_an_agent_that_gets_no_more_memory_is_reported_as_that(folder: Path) -> None:
    """Whether the kernel kills its runner for it, or Python tells the agent; rollouts after it are run."""
    algorithm = Inputs(64, 1)
    quotas = Quotas(memory_bytes=600 * 1024 * 1024)
    ClientServerExecutionStrategy(n_runners=1, start_method="forkserver", quotas=quotas, **IN_TIME).execute(
        algorithm, AgentRunner(HoardingAgent()), InMemoryLightningStore()
    )
    (greedy,), (modest,) = algorithm.attempts
    assert (greedy.status in ("failed", "unresponsive"), greedy.reason_code) == (True, "resource_exhausted")
    assert modest.status == "succeeded"
