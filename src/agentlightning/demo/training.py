"""The demo, put together: the game's agent, GRPO, a store on SQLite, the LLM proxy, HTTP, and two runner processes."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentlightning.algorithm.grpo import GRPO
from agentlightning.algorithm.softmax_policy import SoftmaxPolicy
from agentlightning.demo import game
from agentlightning.demo.accounting import Account, take_account
from agentlightning.demo.agent import play
from agentlightning.demo.sabotage import Sabotage
from agentlightning.demo.show import Notices
from agentlightning.demo.strategy import in_words, win_rate
from agentlightning.execution.client_server import ClientServerExecutionStrategy
from agentlightning.proxy.llm_proxy import LLMProxy
from agentlightning.runner.agent import LitAgentRunner
from agentlightning.store.sqlite.store import SqliteLightningStore
from agentlightning.trainer.progress import ProgressView
from agentlightning.trainer.trainer import Trainer
from agentlightning.types import Dataset

__all__ = ["LEARNED", "Outcome", "train"]

LEARNED = 0.85
"""From this win rate on, of the best guesses over all secrets, the policy counts as having learned the game."""

RUNNERS = 2
CONCURRENCY = 16
"""Games that one runner process plays at a time."""


@dataclass(frozen=True)
class Outcome:
    """How a demo ended."""

    win_rate_before: float
    win_rate: float
    strategy: str
    account: Account
    killed: str | None
    """The worker that was killed on purpose; None if there was none to be killed."""
    seconds: float
    database: Path

    @property
    def learned(self) -> bool:
        """Whether the policy plays well."""
        return self.win_rate >= LEARNED


class SabotagedGRPO(GRPO):
    """GRPO; half-way, one runner is killed.

    Args:
        kill_at: the step after which to do it; None for never.
        notices: where to say so.
        settings: for ``GRPO``.
    """

    def __init__(self, *, kill_at: int | None, notices: Notices, **settings: Any) -> None:
        super().__init__(**settings)
        self._kill_at = kill_at
        self._notices = notices
        self._now = asyncio.Event()
        self.killed: str | None = None

    async def run(self, train_dataset: Dataset[Any] | None = None, val_dataset: Dataset[Any] | None = None) -> None:
        """Train, and kill a runner meanwhile."""
        killing = asyncio.create_task(self._kill_half_way())
        try:
            await super().run(train_dataset, val_dataset)
        finally:
            killing.cancel()
            with suppress(asyncio.CancelledError):
                await killing

    def report(self, step: int, **numbers: float) -> None:
        """Pass the numbers on; the step decides when the time has come."""
        super().report(step, **numbers)
        if self._kill_at is not None and step >= self._kill_at:
            self._now.set()

    async def _kill_half_way(self) -> None:
        await self._now.wait()
        sabotage = Sabotage(self.get_store())
        while not await sabotage.strike():  # noqa: ASYNC110 - workers are busy most of the time; nobody tells when
            await asyncio.sleep(0.01)
        self.killed = sabotage.worker_id
        self._notices.add(f"killed runner {sabotage.worker_id} (SIGKILL), which was playing {sabotage.rollout_id}")


def train(
    run: str, runs_folder: Path, *, seed: int, steps: int, kill: bool, view: ProgressView, notices: Notices
) -> Outcome:
    """Train a policy from nothing, and say how it went.

    Args:
        run: name of the run; its database is ``RUNS_FOLDER/RUN/store.db``.
        runs_folder: where it goes.
        seed: of everything that is left to chance in this process.
        steps: how many times the policy learns.
        kill: whether to kill a runner half-way.
        view: where progress is shown.
        notices: where it is said what happens.
    """
    policy = SoftmaxPolicy(game.VOCABULARY)
    before = win_rate(policy)
    algorithm = SabotagedGRPO(
        kill_at=(steps - 1) // 2 if kill else None, notices=notices, policy=policy, n_steps=steps, seed=seed
    )
    trainer = Trainer(
        algorithm=algorithm,
        llm_proxy=LLMProxy(),
        strategy=ClientServerExecutionStrategy(
            role="both", server_host="127.0.0.1", server_port=0, n_runners=RUNNERS, main_process="algorithm"
        ),
        runner={"type": LitAgentRunner, "concurrency": CONCURRENCY},
        run=run,
        runs_folder=runs_folder,
        progress=view,
    )
    started = time.monotonic()
    trainer.fit(play, [{"secret": secret} for secret in range(game.LOWEST, game.HIGHEST + 1)])
    seconds = time.monotonic() - started
    assert isinstance(trainer.store, SqliteLightningStore)  # a run has one
    return Outcome(
        win_rate_before=before,
        win_rate=win_rate(policy),
        strategy=in_words(policy),
        account=asyncio.run(_account_and_close(trainer.store)),
        killed=algorithm.killed,
        seconds=seconds,
        database=trainer.store.path,
    )


async def _account_and_close(store: SqliteLightningStore) -> Account:
    try:
        return await take_account(store)
    finally:
        await store.close()
