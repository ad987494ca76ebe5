"""How failures of agents are logged: folded by kind."""

from __future__ import annotations

import logging
from typing import Any

import pytest

import agentlightning as agl


@agl.rollout
def fails(task: int) -> float:
    if task % 2:
        raise ValueError(f"wrong number {task}")
    raise LookupError(f"nothing for {task}")


async def log_of(number: int, caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What is logged while an agent fails on so many inputs."""
    caplog.set_level(logging.INFO)
    async with agl.InMemoryLightningStore() as store:
        for each in range(number):
            await store.enqueue_rollout(each)
        runner = agl.LitAgentRunner[Any](agl.OtelTracer(), max_rollouts=number)
        with runner.run_context(agent=fails, store=store, worker_id=0):
            await runner.iter()
        assert (await store.statistics()).get("rollouts_by_status", {}).get("failed") == number
        reasons = {each.reason_message for each in await store.query_rollouts(limit=-1)}
        assert len(reasons) == number  # nothing of it is lost there
    return [each for each in caplog.records if "agent" in each.getMessage() and "fail" in each.getMessage()]


async def test_the_first_of_a_kind_has_its_traceback_and_the_others_are_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    records = await log_of(42, caplog)
    shown = [each for each in records if each.exc_info]
    assert [each.exc_info[0] for each in shown if each.exc_info] == [LookupError, ValueError]
    warnings = [each.getMessage() for each in records if each.levelno >= logging.WARNING and not each.exc_info]
    assert len(warnings) == 2
    assert all("has failed 10 times" in each for each in warnings)
    lines = [each.getMessage() for each in records if each.levelno == logging.INFO]
    assert len(lines) == 40  # each in one line
    assert sum("wrong number" in each for each in lines) == 20
