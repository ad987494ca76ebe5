"""Agents on real runners, for the tests of execution: importable, so that they can be sent to any process."""

from __future__ import annotations

import asyncio
from typing import Any

from agentlightning import LitAgent, LitAgentRunner, OtelTracer
from agentlightning.store.base import LightningStore
from execution_programs import folder, note

__all__ = ["AgentRunner", "HeldAgent", "HoardingAgent", "ShortAgent"]


class ShortAgent(LitAgent[Any]):
    """Its rollouts take some milliseconds.

    Args:
        seconds: how long each takes.
    """

    def __init__(self, seconds: float = 0.005) -> None:
        super().__init__()
        self.seconds = seconds

    async def rollout_async(self, task: Any, resources: Any, rollout: Any) -> float:
        await asyncio.sleep(self.seconds)
        return float(task)


class HeldAgent(LitAgent[Any]):
    """It works until there is a file with the name of its input; others it does at once."""

    async def rollout_async(self, task: Any, resources: Any, rollout: Any) -> float:
        if isinstance(task, str):
            attempt = rollout.attempt.attempt_id
            note(f"held-{task}")
            try:
                while not (folder() / f"go-{task}").exists():
                    await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                (folder() / f"aborted-{attempt}").touch()
                raise
            (folder() / f"finished-{attempt}").touch()
        return 0.25


class HoardingAgent(LitAgent[Any]):
    """It wants as many blocks of 64 MB as its input says."""

    def rollout(self, task: Any, resources: Any, rollout: Any) -> float:
        return float(len([bytes(64 * 1024 * 1024) for _ in range(task)]))


class AgentRunner:
    """A runner's side with a real runner.

    Args:
        agent: what it runs.
        arguments: of the runner.
    """

    def __init__(self, agent: LitAgent[Any], **arguments: Any) -> None:
        self.agent = agent
        self.arguments = arguments

    async def __call__(self, store: LightningStore, worker_id: int, event: Any) -> None:
        runner: LitAgentRunner[Any] = LitAgentRunner(OtelTracer(), **self.arguments)
        with runner.run_context(agent=self.agent, store=store, worker_id=worker_id):
            note(f"runner-{worker_id}")
            await runner.iter(event=event)
