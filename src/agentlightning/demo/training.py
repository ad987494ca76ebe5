"""The demo, put together: the game's agent, GRPO, a store on SQLite, the LLM proxy, HTTP, and two runner processes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from agentlightning.algorithm.grpo import GRPO
from agentlightning.algorithm.resume import local_pid
from agentlightning.demo import game
from agentlightning.demo.agent import play
from agentlightning.demo.softmax_policy import SoftmaxPolicy
from agentlightning.execution.client_server import ClientServerExecutionStrategy
from agentlightning.lifecycle import reasons
from agentlightning.proxy.llm_proxy import LLMProxy
from agentlightning.runner.agent import LitAgentRunner
from agentlightning.runner.heartbeat import process_space
from agentlightning.store.base import LightningStore, is_finished
from agentlightning.store.sqlite.store import SqliteLightningStore
from agentlightning.trainer.progress import SilentView, Snapshot, TableView, duration, render, workers_line
from agentlightning.trainer.trainer import Trainer
from agentlightning.types import AttemptedRollout, Dataset, Rollout

WIN_RATE_LEARNED = 0.85
"""From this win rate on, with its best guesses over all secrets, the policy counts as having learned the game."""

RUNNERS = 2
CONCURRENCY = 16
"""Games that one runner process plays at a time."""

_SETTLE_SECONDS = 0.05
"""How long requests that a stopped process has sent may still be on their way."""


@dataclass(frozen=True)
class DemoResult:
    """How a demo ended."""

    win_rate_before: float
    win_rate: float
    strategy: str
    audit: StoreAudit
    killed: str | None
    """The worker that was killed on purpose; None if no worker was busy."""
    seconds: float
    database: Path

    @property
    def learned(self) -> bool:
        """Whether the policy plays well."""
        return self.win_rate >= WIN_RATE_LEARNED


def train(run: str, runs_folder: Path, *, seed: int, steps: int, kill: bool, view: DemoTable | DemoLines) -> DemoResult:
    """Train a policy from nothing, and return how it went.

    Args:
        run: name of the run; its database is ``RUNS_FOLDER/RUN/store.db``.
        runs_folder: folder of the runs' folders.
        seed: of everything random in this process.
        steps: number of updates of the policy.
        kill: whether to kill a runner half-way.
        view: shows progress.
    """
    policy = SoftmaxPolicy(game.VOCABULARY)
    before = game.win_rate(policy)
    algorithm = FaultInjectingGRPO(
        kill_at=(steps - 1) // 2 if kill else None, notices=view.notices, policy=policy, n_steps=steps, seed=seed
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
    assert isinstance(trainer.store, SqliteLightningStore)  # the store of a run
    return DemoResult(
        win_rate_before=before,
        win_rate=game.win_rate(policy),
        strategy=game.in_words(policy),
        audit=asyncio.run(audit(trainer.store)),
        killed=algorithm.killed,
        seconds=seconds,
        database=trainer.store.path,
    )


# --- Views -----------------------------------------------------------------------------------------


class DemoTable(TableView):
    """The trainer's table, with notices below it."""

    interval_seconds = 0.25

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.notices: list[str] = []
        """What happened, in order."""

    def draw(self, snapshot: Snapshot) -> RenderableType:
        """Return the table and the notices."""
        return Group(render(snapshot), *(Text(f"  ! {line}", style="yellow") for line in self.notices))


class DemoLines(SilentView):
    """One line every few seconds, for output that is not a terminal."""

    interval_seconds = 3.0

    def __init__(self, console: Console) -> None:
        self._console = console
        self._printed = 0
        self.notices: list[str] = []
        """What happened, in order."""

    def show(self, snapshot: Snapshot) -> None:
        """Print new notices, and one line."""
        for line in self.notices[self._printed :]:
            self._console.print(f"! {line}", highlight=False)
        self._printed = len(self.notices)
        reward = "none yet" if snapshot.reward is None else f"{snapshot.reward:.2f}"
        self._console.print(
            f"{duration(snapshot.elapsed_seconds):>5}  {snapshot.finished} rollouts, {snapshot.rate:.0f}/s, "
            f"reward {reward}, workers: {workers_line(snapshot.workers)}",
            highlight=False,
        )


# --- Fault injection: a runner is killed in the middle of its work, to show that nothing is lost ----


class FaultInjectingGRPO(GRPO[SoftmaxPolicy]):
    """GRPO during which one runner is killed with SIGKILL while it holds a rollout.

    Args:
        kill_at: the step after which to do it; None for never.
        notices: gets a line about it.
        settings: for ``GRPO``.
    """

    def __init__(self, *, kill_at: int | None, notices: list[str], **settings: Any) -> None:
        super().__init__(**settings)
        self._kill_at = kill_at
        self._notices = notices
        self._step_reached = asyncio.Event()
        self.killed: str | None = None
        """The worker that was killed; None so far."""

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
        """Pass the numbers on; their step triggers the fault."""
        super().report(step, **numbers)
        if self._kill_at is not None and step >= self._kill_at:
            self._step_reached.set()

    async def _kill_half_way(self) -> None:
        await self._step_reached.wait()
        while not await self._kill_one():  # noqa: ASYNC110 - no store tells when a worker becomes busy
            await asyncio.sleep(0.01)

    async def _kill_one(self) -> bool:
        """Kill a busy worker on this machine, and return whether there was one.

        The process is stopped first (SIGSTOP), so that it cannot finish what it holds between the check and SIGKILL.
        """
        store = self.get_store()
        for worker in await store.query_workers(status_in=["busy"]):
            pid = local_pid(worker, process_space())
            if pid is None:
                continue
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                await asyncio.sleep(_SETTLE_SECONDS)
                rollout_id = await _rollout_in_progress(store, worker.worker_id)
                if rollout_id is None:
                    os.kill(pid, signal.SIGCONT)
                    continue
                os.kill(pid, signal.SIGKILL)
                self.killed = worker.worker_id
                self._notices.append(f"killed runner {worker.worker_id} (SIGKILL), which was playing {rollout_id}")
                return True
        return False


async def _rollout_in_progress(store: LightningStore, worker_id: str) -> str | None:
    """Return a rollout that the worker has begun and not ended."""
    worker = await store.get_worker_by_id(worker_id)
    if worker is None or worker.current_rollout_id is None:
        return None
    attempt = await store.get_latest_attempt(worker.current_rollout_id)
    is_begun = attempt is not None and attempt.worker_id == worker_id and attempt.status == "running"
    return worker.current_rollout_id if is_begun else None


# --- Audit: whether anything was lost or counted twice ----------------------------------------------


@dataclass(frozen=True)
class StoreAudit:
    """What became of all rollouts in a store."""

    rollouts: int
    rescued: tuple[Rollout, ...]
    """Rollouts with an attempt that ended because its worker died, before or after the agent began."""

    lost: int
    """Rollouts without an end."""

    counted_twice: int
    """Rollouts with more than one attempt that succeeded."""

    violations: int
    """Records that break an invariant of the store, as ``agl verify`` counts them."""

    @property
    def clean(self) -> bool:
        """Whether nothing was lost, counted twice or inconsistent."""
        return not (self.lost or self.counted_twice or self.violations)


async def audit(store: SqliteLightningStore) -> StoreAudit:
    """Read all rollouts, verify the store, and close it."""
    rescued: list[Rollout] = []
    counted_twice = 0
    async with store:
        rollouts = await store.query_rollouts()
        for rollout in rollouts:
            if isinstance(rollout, AttemptedRollout) and rollout.attempt.sequence_id > 1:
                attempts = await store.query_attempts(rollout.rollout_id)
                counted_twice += sum(each.status == "succeeded" for each in attempts) > 1
                if any(each.reason_code in (reasons.WORKER_LOST, reasons.UNCONFIRMED) for each in attempts):
                    rescued.append(rollout)
        report = await store.verify()
    lost = sum(not is_finished(each) for each in rollouts)
    return StoreAudit(len(rollouts), tuple(rescued), lost, counted_twice, len(report.violations))
