"""The demo, put together: the game's agent, GRPO, a store on SQLite, the LLM proxy, HTTP, and two runner processes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentlightning.algorithm.grpo import GRPO
from agentlightning.demo import game
from agentlightning.demo.agent import play
from agentlightning.demo.game import in_words, win_rate
from agentlightning.demo.show import Notices
from agentlightning.demo.softmax_policy import SoftmaxPolicy
from agentlightning.execution.client_server import ClientServerExecutionStrategy
from agentlightning.lifecycle import reasons
from agentlightning.proxy.llm_proxy import LLMProxy
from agentlightning.runner.agent import LitAgentRunner
from agentlightning.runner.identity import process_space
from agentlightning.store.base import LightningStore, is_finished
from agentlightning.store.sqlite.store import SqliteLightningStore
from agentlightning.trainer.progress import ProgressView
from agentlightning.trainer.trainer import Trainer
from agentlightning.types import Attempt, AttemptedRollout, Dataset, Worker

# --- What the store says after a run: whether anything was lost, and whether anything was count ---


@dataclass(frozen=True)
class Retried:
    """A rollout that needed more than one attempt."""

    rollout_id: str
    status: str
    attempts: tuple[Attempt, ...]

    @property
    def lost_its_worker(self) -> bool:
        """Whether an attempt ended because its worker died, after it had begun or before."""
        return any(attempt.reason_code in (reasons.WORKER_LOST, reasons.UNCONFIRMED) for attempt in self.attempts)


@dataclass(frozen=True)
class Account:
    """Every rollout of a store, accounted for."""

    rollouts: int
    succeeded: int
    retried: tuple[Retried, ...]

    lost: int
    """Rollouts that never came to an end."""

    counted_twice: int
    """Rollouts with more than one attempt that succeeded."""

    violations: int
    """Records that break a rule of the store, as ``agl verify`` counts them."""

    @property
    def clean(self) -> bool:
        """Whether all is as promised."""
        return not (self.lost or self.counted_twice or self.violations)


async def take_account(store: LightningStore) -> Account:
    """Go through everything stored."""
    rollouts = await store.query_rollouts()
    retried: list[Retried] = []
    for rollout in rollouts:
        if isinstance(rollout, AttemptedRollout) and rollout.attempt.sequence_id > 1:
            attempts = await store.query_attempts(rollout.rollout_id)
            retried.append(Retried(rollout.rollout_id, rollout.status, tuple(attempts)))
    report = await store.verify()
    return Account(
        rollouts=len(rollouts),
        succeeded=sum(rollout.status == "succeeded" for rollout in rollouts),
        retried=tuple(retried),
        lost=sum(not is_finished(rollout) for rollout in rollouts),
        counted_twice=sum(sum(attempt.status == "succeeded" for attempt in each.attempts) > 1 for each in retried),
        violations=len(report.violations),
    )


# --- A runner process is killed on purpose, in the middle of its work, to show that nothing is  ---

_SETTLE_SECONDS = 0.05
"""How long requests that a stopped process has sent may still be on their way."""


class Sabotage:
    """Kills one runner process with SIGKILL while it holds a rollout.

    Args:
        store: where workers and their attempts are seen.
    """

    def __init__(self, store: LightningStore) -> None:
        self._store = store
        self.worker_id: str | None = None
        """Whom it hit; None so far."""
        self.rollout_id: str | None = None
        """A rollout that the worker held when it died."""

    async def strike(self) -> bool:
        """Kill a worker of this machine that is at work; whether there was one.

        The process is halted first (SIGSTOP), so that what it holds cannot be finished between looking and killing.
        """
        for worker in _local(await self._store.query_workers(status_in=["busy"])):
            assert worker.registration is not None  # it has told its process
            pid: int = worker.registration["pid"]
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                await asyncio.sleep(_SETTLE_SECONDS)
                rollout_id = await self._working_on(worker.worker_id)
                if rollout_id is None:
                    os.kill(pid, signal.SIGCONT)
                    continue
                os.kill(pid, signal.SIGKILL)
                self.worker_id, self.rollout_id = worker.worker_id, rollout_id
                return True
        return False

    async def _working_on(self, worker_id: str) -> str | None:
        """A rollout that the worker has begun and not ended."""
        worker = await self._store.get_worker_by_id(worker_id)
        if worker is None or worker.current_rollout_id is None:
            return None
        attempt = await self._store.get_latest_attempt(worker.current_rollout_id)
        is_begun = attempt is not None and attempt.worker_id == worker_id and attempt.status == "running"
        return worker.current_rollout_id if is_begun else None


def _local(workers: Sequence[Worker]) -> list[Worker]:
    """Those whose process id means something here."""
    here = process_space()
    return [
        worker
        for worker in workers
        if worker.registration is not None
        and here is not None
        and worker.registration.get("process_space") == here
        and type(worker.registration.get("pid")) is int
    ]


# ---

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


class SabotagedGRPO(GRPO[SoftmaxPolicy]):
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
