"""Runners of the guessing game in the test's own loop: they claim, play, record and report as real ones do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal, TypeAlias

import aiohttp

from agentlightning.demo import game
from agentlightning.demo.agent import ask
from agentlightning.semconv import AGL_ANNOTATION
from agentlightning.store.base import LightningStore
from agentlightning.types import LLM, AttemptedRollout, ProxyLLM, Span

__all__ = ["SECRETS", "Fault", "GameRunners"]

SECRETS = [{"secret": secret} for secret in range(game.LOWEST, game.HIGHEST + 1)]

Fault: TypeAlias = Literal["fail", "no_reward", "no_call", "lose_worker"]
"""What goes wrong with an attempt: it fails; gets no reward; never calls the model; its worker is gone at once."""


class GameRunners:
    """Plays whatever is in the queue until the block ends.

    Calls of a `ProxyLLM` are recorded by its proxy. Those of a plain `LLM` are recorded here, as texts by
    OpenTelemetry's conventions: no token ids.

    Args:
        store: where the rollouts are.
        fault: what goes wrong with an attempt, if anything.
        count: how many runners, each with one game at a time.
        sends: sampling parameters that the agent sends instead of those that it is told.
    """

    def __init__(
        self,
        store: LightningStore,
        fault: Callable[[AttemptedRollout], Fault | None] | None = None,
        count: int = 16,
        sends: dict[str, Any] | None = None,
    ) -> None:
        self._store = store
        self._fault = fault or (lambda _: None)
        self._count = count
        self._sends = sends
        self._tasks: list[asyncio.Task[None]] = []
        self.played: list[str] = []
        """Ids of the rollouts that were claimed, once for each attempt."""
        self.modes: dict[str, str | None] = {}
        self.sampling: dict[str, dict[str, Any]] = {}
        """The sampling parameters that each rollout was told."""

    async def __aenter__(self) -> GameRunners:
        self._tasks = [asyncio.create_task(self._work(f"runner-{index}")) for index in range(self._count)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with suppress(asyncio.CancelledError):
                await task

    async def _work(self, worker_id: str) -> None:
        while True:
            claimed = await self._store.dequeue_rollout(worker_id, wait_seconds=20)
            if claimed is not None:
                await self._attempt(claimed)

    async def _attempt(self, claimed: AttemptedRollout) -> None:
        self.played.append(claimed.rollout_id)
        self.modes[claimed.rollout_id] = claimed.mode
        rollout_id, attempt_id = claimed.rollout_id, claimed.attempt.attempt_id
        fault = self._fault(claimed)
        if fault == "lose_worker":
            assert claimed.attempt.worker_id is not None
            await self._store.update_attempt(rollout_id, attempt_id, "running")
            await self._store.report_worker_lost(claimed.attempt.worker_id, message="the test took it away")
            return
        if fault == "fail":
            await self._store.update_attempt(
                rollout_id, attempt_id, "failed", reason_code="agent_error", reason_message="the test said so"
            )
            return
        try:
            reward = 0.0 if fault == "no_call" else await self._play(claimed)
        except Exception as error:  # noqa: BLE001 - an agent may raise anything, and its attempt fails of it
            await self._store.update_attempt(
                rollout_id, attempt_id, "failed", reason_code="agent_error", reason_message=repr(error)
            )
            return
        if fault != "no_reward":
            emitted = {"agentlightning.reward.0.name": "primary", "agentlightning.reward.0.value": reward}
            await self._store.add_span(_span(claimed, AGL_ANNOTATION, emitted))
        await self._store.update_attempt(rollout_id, attempt_id, "succeeded")

    async def _play(self, claimed: AttemptedRollout) -> float:
        assert claimed.resources_id is not None
        resources = await self._store.get_resources_by_id(claimed.resources_id, version=claimed.resources_version)
        assert resources is not None
        llm = resources.resources["llm"]
        assert isinstance(llm, LLM)
        self.sampling[claimed.rollout_id] = llm.sampling_parameters
        recorded_elsewhere = isinstance(llm, ProxyLLM)
        if isinstance(llm, ProxyLLM):
            llm = llm.with_attempted_rollout(claimed)
        if self._sends is not None:
            llm = llm.model_copy(update={"sampling_parameters": self._sends})
        now = game.start(claimed.input["secret"])
        async with aiohttp.ClientSession() as session:
            while now.outcome == "playing":
                question = game.prompt(now)
                reply = await ask(session, llm, question)
                if not recorded_elsewhere:
                    await self._store.add_span(_span(claimed, f"chat {llm.model}", _said(question, reply)))
                now = game.step(now, game.parse(now, reply))
        return now.reward


def _span(claimed: AttemptedRollout, name: str, attributes: dict[str, Any]) -> Span:
    return Span.from_attributes(
        attributes=attributes, rollout_id=claimed.rollout_id, attempt_id=claimed.attempt.attempt_id, name=name
    )


def _said(question: str, reply: str) -> dict[str, Any]:
    def message(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "parts": [{"type": "text", "content": text}]}

    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "policy",
        "gen_ai.input.messages": json.dumps([message("user", question)]),
        "gen_ai.output.messages": json.dumps([{**message("assistant", reply), "finish_reason": "stop"}]),
    }
