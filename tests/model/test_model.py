"""A store and a small reference model, side by side: the same steps must have the same effects.

What the steps are is in ``model_rules``, what should come of them in ``reference_model``. The default run is
the same each time; the long form takes other steps each time, and names the seed of those that failed.
"""

from __future__ import annotations

import itertools
import math
import secrets
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from agentlightning.errors import AgentLightningError
from agentlightning.lifecycle import attempts, deadlines, workers
from agentlightning.lifecycle.deadlines import Due
from agentlightning.lifecycle.records import AttemptRow, Holder, Moment, Pair, RolloutPolicy, RolloutRow, WorkerRow
from agentlightning.store import core
from agentlightning.store.operations import attempts as attempt_ops, spans as span_ops, workers as worker_ops
from agentlightning.store.sqlite.row_cache import RowCache
from agentlightning.store.sqlite.transaction import SqliteTransaction
from model_compare import Divergence
from model_machine import ComparingMachine
from model_rules import StoreMachine

RUN = settings(
    max_examples=40,
    stateful_step_count=80,
    deadline=None,
    database=None,
    suppress_health_check=cast("list[HealthCheck]", list(HealthCheck)),  # its metaclass hides the members' type
    phases=[Phase.generate, Phase.shrink],  # to explain takes minutes, and says little of a machine
    report_multiple_bugs=False,
)


def _numbered_file(folder: Path, numbers: Iterator[int]) -> Path:
    return folder / f"store-{next(numbers)}.db"


def machine_on(folder: Path | None) -> type[ComparingMachine]:
    """A machine of its own, with its own count; on files in ``folder``, or in memory."""
    numbers = itertools.count()

    class Machine(StoreMachine):
        steps_run = 0
        new_file = None if folder is None else staticmethod(partial(_numbered_file, folder, numbers))

    return Machine


def run_steps(machine: type[ComparingMachine], target: int, seeds: Iterable[int], how: settings = RUN) -> None:
    """Run machines, seed after seed, until at least ``target`` steps have been done and compared."""
    for each in seeds:
        seed(each)(machine)
        try:
            run_state_machine_as_test(machine, settings=how)
        except Exception as error:
            error.add_note(f"after {machine.steps_run:,} steps, with seed {each}")
            raise
        if machine.steps_run >= target:
            break
    print(f"{machine.steps_run:,} steps without divergence")
    assert machine.steps_run >= target


def random_seeds() -> Iterable[int]:
    """Other seeds each time."""
    return itertools.count(secrets.randbits(48))


@pytest.mark.timeout(600)
def test_a_store_in_memory(record_property: Callable[[str, Any], None]) -> None:
    machine = machine_on(None)
    run_steps(machine, 5_000, itertools.count())
    record_property("steps", machine.steps_run)


@pytest.mark.timeout(600)
def test_a_store_on_a_file(tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    machine = machine_on(tmp_path)
    run_steps(machine, 500, itertools.count(), settings(RUN, max_examples=10))
    record_property("steps", machine.steps_run)


@pytest.mark.slow
@pytest.mark.timeout(7_200)
def test_a_store_in_memory_for_long(record_property: Callable[[str, Any], None]) -> None:
    machine = machine_on(None)
    run_steps(machine, 200_000, random_seeds())
    record_property("steps", machine.steps_run)


@pytest.mark.slow
@pytest.mark.timeout(7_200)
def test_a_store_on_a_file_for_long(tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    machine = machine_on(tmp_path)
    run_steps(machine, 50_000, random_seeds())
    record_property("steps", machine.steps_run)


# --- Negative controls: a store that breaks one rule must be seen to diverge -----------------------


def nobody_is_stale(patch: pytest.MonkeyPatch) -> None:
    standing = attempts.standing

    def lenient(pair: Any) -> str:
        found = standing(pair)
        return "revivable" if found == "stale" and pair.rollout.status == "requeuing" else found

    for module in (attempts, attempt_ops, worker_ops):
        patch.setattr(module, "standing", lenient)


def a_heartbeat_renews_no_lease(patch: pytest.MonkeyPatch) -> None:
    def touch(attempt: AttemptRow, now: Moment, span_sequence: int | None = None) -> AttemptRow:
        counter = attempt.span_sequence if span_sequence is None else span_sequence
        return attempts.replace(attempt, last_heartbeat_time=now.wall, span_sequence=counter)

    patch.setattr(attempts, "touch", touch)


def throttled_heartbeats_are_dropped(patch: pytest.MonkeyPatch) -> None:
    """A sign of life that need not be durable is not kept in memory either."""
    touch = SqliteTransaction.touch

    async def forget(self: SqliteTransaction, old: Any, new: Any, write_after: float) -> Any:
        heard = new.beaten_lease - old.beaten_lease >= write_after
        return await touch(self, old, new, write_after) if heard else old

    patch.setattr(SqliteTransaction, "touch", forget)


def nothing_times_out(patch: pytest.MonkeyPatch) -> None:
    due = deadlines.attempt_due

    def patient(policy: RolloutPolicy, attempt: AttemptRow) -> Due | None:
        return due(attempts.replace(policy, timeout_seconds=None), attempt)

    patch.setattr(deadlines, "attempt_due", patient)
    patch.setattr(attempts, "attempt_due", patient)


def lost_workers_are_not_noticed(patch: pytest.MonkeyPatch) -> None:
    def expire(worker: WorkerRow, now: Moment) -> tuple[WorkerRow, bool]:
        return attempts.replace(worker, deadline=None), False

    patch.setattr(core.workers, "expire", expire)


def poison_is_found_too_soon(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attempts, "POISON_SUSPECTS", 3)


def what_is_handed_to_vanished_workers_is_poison(patch: pytest.MonkeyPatch) -> None:
    async def heard_just_now(*_: Any) -> Holder:
        return Holder(last_heard=math.inf)

    for module in (attempt_ops, core):
        patch.setattr(module, "holder_of", heard_just_now)


def one_worker_alone_proves_poison(patch: pytest.MonkeyPatch) -> None:
    suspects = attempts._suspects

    def forgetful(pair: Pair, holder: Holder) -> list[str]:
        fresh = pair._replace(rollout=attempts.replace(pair.rollout, suspects=""))
        return [*pair.rollout.suspects.split(), *suspects(fresh, holder)]

    patch.setattr(attempts, "_suspects", forgetful)


def what_nobody_confirms_is_handed_out_for_ever(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attempts, "MAX_REDELIVERIES", 1_000_000)


def repeated_claims_get_more(patch: pytest.MonkeyPatch) -> None:
    async def not_asked_before(*_: Any) -> None:
        return None

    patch.setattr(attempt_ops, "_held_by_request", not_asked_before)


def priority_is_overlooked(patch: pytest.MonkeyPatch) -> None:
    claimable = SqliteTransaction.next_claimable

    async def first_come(self: SqliteTransaction, limit: int) -> list[RolloutRow]:
        return sorted(await claimable(self, 1_000), key=lambda row: row.seq)[:limit]

    patch.setattr(SqliteTransaction, "next_claimable", first_come)


def spans_are_not_counted(patch: pytest.MonkeyPatch) -> None:
    count = SqliteTransaction.count

    def forgetful(self: SqliteTransaction, changes: Any) -> None:
        count(self, {name: change for name, change in changes.items() if name != "spans"})

    patch.setattr(SqliteTransaction, "count", forgetful)


def undone_writes_are_remembered(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RowCache, "restore", lambda *_: None)
    patch.setattr(SqliteTransaction, "_forget_operation", lambda _: None)


def a_worker_stays_busy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(workers, "released", lambda worker, *_: worker)


def a_repeated_finish_claims_nothing(patch: pytest.MonkeyPatch) -> None:
    finish = attempt_ops.finish

    async def forgetful(tx: Any, rollout_id: str, attempt_id: str, *arguments: Any) -> Any:
        before = await tx.get(AttemptRow, attempt_id)
        done = await finish(tx, rollout_id, attempt_id, *arguments)
        return done if before is not None and before.live else done._replace(claimed=[])

    patch.setattr(attempt_ops, "finish", forgetful)


def a_stale_finish_loses_its_spans(patch: pytest.MonkeyPatch) -> None:
    finish = attempt_ops.finish

    async def all_or_nothing(*arguments: Any) -> Any:
        done = await finish(*arguments)
        if done.refused is not None:
            raise done.refused
        return done

    patch.setattr(attempt_ops, "finish", all_or_nothing)


def a_finish_stores_no_spans(patch: pytest.MonkeyPatch) -> None:
    async def forgetful(_tx: Any, attempt: AttemptRow, drafts: Any) -> tuple[list[int], int]:
        return [attempt.span_sequence + 1 + number for number in range(len(drafts))], attempt.span_sequence

    patch.setattr(attempt_ops, "insert_spans", forgetful)


def another_span_is_taken_for_a_repeat(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(span_ops, "same_body", lambda *_: True)


def a_release_uses_up_an_attempt(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RolloutRow, "counted_attempts", property(lambda self: self.attempts - self.redeliveries))


def a_released_attempt_comes_back(patch: pytest.MonkeyPatch) -> None:
    standing = attempts.standing

    def lenient(pair: Any) -> str:
        return standing(pair._replace(attempt=attempts.replace(pair.attempt, reason_code=None)))

    for module in (attempts, attempt_ops, worker_ops):
        patch.setattr(module, "standing", lenient)


FIRST_SEEDS: dict[Callable[[pytest.MonkeyPatch], None], int] = {
    poison_is_found_too_soon: 1,
    a_release_uses_up_an_attempt: 2,
    a_released_attempt_comes_back: 2,
}
"""Where to begin instead of at 0, from where it would take thousands of steps."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "break_a_rule",
    [
        nobody_is_stale,
        a_heartbeat_renews_no_lease,
        throttled_heartbeats_are_dropped,
        nothing_times_out,
        lost_workers_are_not_noticed,
        poison_is_found_too_soon,
        what_is_handed_to_vanished_workers_is_poison,
        one_worker_alone_proves_poison,
        what_nobody_confirms_is_handed_out_for_ever,
        repeated_claims_get_more,
        priority_is_overlooked,
        spans_are_not_counted,
        undone_writes_are_remembered,
        a_worker_stays_busy,
        a_repeated_finish_claims_nothing,
        a_stale_finish_loses_its_spans,
        a_finish_stores_no_spans,
        another_span_is_taken_for_a_repeat,
        a_release_uses_up_an_attempt,
        a_released_attempt_comes_back,
    ],
)
def test_a_broken_store_is_found_out(
    break_a_rule: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_a_rule(monkeypatch)
    machine = machine_on(None)
    seeds = itertools.count(FIRST_SEEDS.get(break_a_rule, 0))
    # A store that is broken may also refuse what it must take.
    with pytest.raises((Divergence, AgentLightningError)) as caught:
        run_steps(machine, 30_000, seeds, settings(RUN, phases=[Phase.generate]))  # most need a few hundred
    print(f"{machine.steps_run:,} steps until: {caught.value}")
