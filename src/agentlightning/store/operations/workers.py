"""Hear from workers, and learn that one is gone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import msgspec

from agentlightning.errors import NotFound
from agentlightning.lifecycle import attempts, reasons, workers
from agentlightning.lifecycle.attempts import standing
from agentlightning.lifecycle.records import AttemptRow, Holder, Pair, Reason, RolloutRow, WorkerRow
from agentlightning.lifecycle.rollouts import Change
from agentlightning.store.backend import Directed, PageQuery, ReadTransaction, Transaction
from agentlightning.store.operations.attempts import lose_attempts
from agentlightning.store.operations.rows import save, save_worker, worker_of
from agentlightning.store.slices import IDS
from agentlightning.types import WorkerDirective


class Beat(NamedTuple):
    """What a worker says in a heartbeat; None leaves what is known as it is."""

    stats: bytes | None = None
    attempt_ids: Sequence[str] = ()
    held_ids: Collection[str] = ()
    """All that it lists, of which ``attempt_ids`` may be some."""
    lease_seconds: float | None = None
    registration: bytes | None = None
    """As canonical JSON."""


async def beat(tx: Transaction, worker_id: str, said: Beat) -> tuple[WorkerRow, list[str], bool]:
    """A heartbeat of a worker and of the attempts that it lists: (worker, attempts that it has lost, whether it is to
    be repeated, because there is more to do than fits into a slice).

    A worker that registers as another process than before has lost what that one held and it does not list: the lease
    that it renews is not that of the dead process.
    """
    stale = [each for each in said.attempt_ids if not await _beat_attempt(tx, worker_id, each)]
    worker = await worker_of(tx, worker_id)
    known, told = worker.registration, said.registration
    if told is not None and known is not None and _is_outdated(known, told):
        told = None
    if told is not None and known not in (None, told):
        why = Reason(reasons.WORKER_LOST, f"another process has registered as worker {worker_id!r}")
        _, more = await lose_attempts(tx, worker_id, why, Holder(died=True), but=said.held_ids)
        worker = await worker_of(tx, worker_id)
        if more:
            return worker, [], True
    heard = workers.beat(worker, said.lease_seconds, said.stats, tx.now())
    if told is not None:
        heard = workers.register(heard, told)
    return await save_worker(tx, worker, heard), stale, False


class _Process(msgspec.Struct):
    """What interests here of a registration."""

    process_space: str | None = None
    start_time: float | None = None


def _is_outdated(known: bytes, told: bytes) -> bool:
    """Whether a registration comes from a process that began before the known one: its beat was long on the way."""
    try:
        now, then = (msgspec.json.decode(each, type=_Process) for each in (known, told))
    except msgspec.ValidationError:  # a worker may say anything
        return False
    if now.process_space is None or now.process_space != then.process_space:
        return False  # of different machines, whose clocks may differ
    return now.start_time is not None and then.start_time is not None and then.start_time < now.start_time


async def lose(
    tx: Transaction, worker_id: str, reason: Reason, at_work: Collection[str] | None
) -> tuple[list[AttemptRow], bool]:
    """End the live attempts of a worker that is known to be dead: (a slice of them, whether there are more). For
    ``at_work`` see ``Holder``.

    Raises:
        NotFound: the worker is unknown.
    """
    await _known(tx, worker_id)
    of_attempts = Reason(reasons.WORKER_LOST, reason.message) if reason.code == reasons.WORKER_LEFT else reason
    lost, more = await lose_attempts(tx, worker_id, of_attempts, Holder(died=True, at_work=at_work))
    if not more:
        worker = await worker_of(tx, worker_id)
        await save_worker(tx, worker, workers.lose(worker, reason))
    return lost, more


async def delete(tx: Transaction, worker_ids: Sequence[str]) -> list[str]:
    """Forget those of the workers that are gone: their ids."""
    deleted: list[str] = []
    for worker_id in dict.fromkeys(worker_ids):
        worker = await tx.get(WorkerRow, worker_id)
        if worker is not None and workers.may_be_deleted(worker):
            await tx.delete_worker(worker)
            tx.count({"workers": -1})
            deleted.append(worker_id)
    return deleted


async def check(tx: ReadTransaction, worker_ids: Sequence[str]) -> None:
    """Raise as ``direct``."""
    for each in worker_ids:
        await _known(tx, each)


async def direct(tx: Transaction, directive: WorkerDirective | None, worker_ids: Sequence[str]) -> list[WorkerRow]:
    """Ask workers to drain or to stop, or take that back.

    Raises:
        NotFound: one of them is unknown.
    """
    return await _direct(tx, directive, [await _known(tx, each) for each in worker_ids])


async def direct_few(tx: Transaction, directive: WorkerDirective | None) -> list[WorkerRow] | None:
    """``direct`` all workers, at one moment; None, and nothing is done, if they are too many for that."""
    rows: list[WorkerRow] = (await tx.page(PageQuery("workers", limit=IDS + 1, with_total=False))).rows
    return None if len(rows) > IDS else await _direct(tx, directive, rows)


async def direct_known(
    tx: Transaction, directive: WorkerDirective | None, worker_ids: Sequence[str]
) -> list[WorkerRow]:
    """``direct`` those that were known a moment ago: one that was deleted since is left out."""
    found = [await tx.get(WorkerRow, each) for each in worker_ids]
    return await _direct(tx, directive, [each for each in found if each is not None])


async def _direct(tx: Transaction, directive: WorkerDirective | None, rows: Sequence[WorkerRow]) -> list[WorkerRow]:
    directed: list[WorkerRow] = []
    for row in rows:
        after = workers.direct(row, directive)
        directed.append(row if after is row else await save_worker(tx, row, after))
    if directive is not None:
        tx.publish(Directed(frozenset(row.worker_id for row in directed)))
    return directed


async def _known(tx: ReadTransaction, worker_id: str) -> WorkerRow:
    worker = await tx.get(WorkerRow, worker_id)
    if worker is None:
        raise NotFound(f"there is no worker {worker_id!r} in this store")
    return worker


async def _beat_attempt(tx: Transaction, worker_id: str, attempt_id: str) -> bool:
    attempt = await tx.get(AttemptRow, attempt_id)
    if attempt is None or attempt.worker_id not in (None, worker_id):
        return False
    rollout = await tx.get(RolloutRow, attempt.rollout_id)
    if rollout is None or standing(Pair(rollout, attempt)) == "stale":
        return False
    before = Pair(rollout, attempt)
    await save(tx, Change(*before), Change(*attempts.beat(before, tx.now())))
    return True
