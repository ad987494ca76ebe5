"""`verify` names every record that breaks a rule: each rule is broken by hand, in the file, and must be named."""

from __future__ import annotations

import asyncio
import inspect
import re
import shutil
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import apsw
import pytest

from agentlightning import SqliteLightningStore
from agentlightning.lifecycle.records import Moment
from agentlightning.store import verify as verify_module
from agentlightning.store.sqlite.connections import open_reader
from agentlightning.store.sqlite.group_commit import run_to_end
from agentlightning.store.sqlite.transaction import SqliteReads
from agentlightning.store.verify import verify
from agentlightning.types import VerificationReport
from scenes import config, finish, prompt, span_of


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound database with a record in every state that the rules speak of."""
    database = tmp_path_factory.mktemp("original") / "original.db"

    async def fill() -> None:
        async with SqliteLightningStore(database) as store:
            await store.update_resources("rs-1", {"main": prompt("one")})
            await store.update_resources("rs-1", {"main": prompt("two")})
            await store.update_worker("worker-1", {"cpu": 1})
            silent = config(unresponsive_seconds=3600.0)
            for name in ("done", "retry", "running"):
                attempted = await store.start_rollout(
                    "input", config=silent, worker_id="worker-1", rollout_id=f"ro-{name}", attempt_id=f"at-{name}-1"
                )
                for number in range(3):
                    await store.add_span(span_of(attempted, span_id=f"{name}-{number}"))
                await store.update_attempt(f"ro-{name}", f"at-{name}-1", metadata={"k": "v"})
                await store.update_rollout(f"ro-{name}", metadata={"k": "v"})
                if name != "running":
                    await finish(store, attempted, "succeeded" if name == "done" else "failed")
            await store.start_attempt("ro-retry", attempt_id="at-retry-2")
            await store.update_attempt("ro-retry", "at-retry-2", "failed")
            await store.enqueue_rollout("input", rollout_id="ro-queue")

    asyncio.run(fill())
    return database


@pytest.fixture
def database(original: Path, tmp_path: Path) -> Path:
    """A copy of it, to be broken."""
    return Path(shutil.copy(original, tmp_path / "store.db"))


class Broken(NamedTuple):
    """What is done to the file, and what `verify` must say."""

    rule: str
    record: str
    sql: str
    also: tuple[str, ...] = ()
    """Rules that are broken with it."""


SPANS = "(SELECT seq FROM attempts WHERE attempt_id = 'at-done-1')"

BROKEN = [
    Broken(
        "database_intact",
        "database",
        "CREATE TABLE news (a, b); PRAGMA writable_schema = 1; "
        "UPDATE sqlite_schema SET sql = 'CREATE TABLE news (a, b NOT NULL)' WHERE name = 'news'; "
        "INSERT INTO news VALUES (1, NULL)",
    ),
    Broken("row_readable", "rollouts row 1", "UPDATE rollouts SET policy = x'ff' WHERE seq = 1", ("counters_true",)),
    Broken("row_readable", "rollouts row 4", "UPDATE rollouts SET claimable = 0 WHERE rollout_id = 'ro-queue'"),
    Broken("row_readable", "rollouts row 1", "UPDATE rollouts SET claimable = 1 WHERE rollout_id = 'ro-done'"),
    Broken("row_readable", "attempts row 3", "UPDATE attempts SET live = 0 WHERE attempt_id = 'at-running-1'"),
    # Spans
    Broken("span_sequence_increases", "span row 2", f"UPDATE spans SET sequence_id = 1 WHERE seq = 2 AND {SPANS}"),
    Broken("span_sequence_increases", "span row 3", f"UPDATE spans SET sequence_id = 2 WHERE seq = 3 AND {SPANS}"),
    Broken(
        "span_sequence_increases",
        "attempt at-done-1",
        "UPDATE attempts SET span_sequence = 2 WHERE attempt_id = 'at-done-1'",
    ),
    Broken(
        "span_has_attempt",
        "attempt row 77",
        "INSERT INTO spans (attempt_seq, sequence_id, issued, span_id, body) "
        "SELECT 77, 1, 1, span_id, body FROM spans WHERE seq = 1; "
        "UPDATE counters SET value = value + 1 WHERE name = 'spans'; "
        "UPDATE counters SET value = value + (SELECT length(body) FROM spans WHERE seq = 1) "
        "WHERE name = 'span_bytes'",
    ),
    Broken("span_readable", "span row 1", "UPDATE spans SET body = zeroblob(length(body)) WHERE seq = 1"),
    Broken("span_readable", "span row 1", "UPDATE spans SET span_id = 'another' WHERE seq = 1"),
    # Resources
    Broken(
        "versions_dense",
        "resources rs-1 version 3",
        "UPDATE resources SET version = 3 WHERE version = 2; UPDATE rollouts SET resources_version = 3",
    ),
    Broken("resources_exist", "rollout ro-queue", "UPDATE rollouts SET resources_version = 3 WHERE seq = 4"),
    Broken("resources_exist", "rollout ro-queue", "UPDATE rollouts SET resources_id = 'rs-0' WHERE seq = 4"),
    Broken("resources_exist", "rollout ro-queue", "UPDATE rollouts SET resources_version = NULL WHERE seq = 4"),
    # States
    Broken(
        "known_state",
        "rollout ro-queue",
        "UPDATE rollouts SET status = 'dreaming', claimable = 0 WHERE rollout_id = 'ro-queue'",
        ("counters_true",),
    ),
    Broken("known_state", "attempt at-done-1", "UPDATE attempts SET status = 'won' WHERE attempt_id = 'at-done-1'"),
    Broken("known_state", "worker worker-1", "UPDATE workers SET status = 'tired'"),
    Broken("known_state", "worker worker-1", "UPDATE workers SET directive = 'sleep'"),
    # Attempts of a rollout
    Broken(
        "attempts_numbered", "rollout ro-retry", "UPDATE attempts SET sequence_id = 3 WHERE attempt_id = 'at-retry-2'"
    ),
    Broken("attempts_numbered", "rollout ro-queue", "UPDATE rollouts SET attempts = 1 WHERE rollout_id = 'ro-queue'"),
    Broken(
        "attempts_numbered",
        "rollout ro-retry",
        "DELETE FROM attempts WHERE attempt_id = 'at-retry-1'; DELETE FROM spans WHERE attempt_seq = 2",
        ("counters_true",),
    ),
    Broken(
        "latest_attempt",
        "rollout ro-retry",
        "UPDATE rollouts SET latest_attempt_id = 'at-retry-1' WHERE rollout_id = 'ro-retry'",
    ),
    Broken(
        "latest_attempt", "rollout ro-done", "UPDATE rollouts SET latest_attempt_id = NULL WHERE rollout_id = 'ro-done'"
    ),
    Broken("redeliveries_counted", "rollout ro-done", "UPDATE rollouts SET redeliveries = 2 WHERE seq = 1"),
    Broken("redeliveries_counted", "rollout ro-done", "UPDATE rollouts SET redeliveries = -1 WHERE seq = 1"),
    Broken(
        "one_live_attempt",
        "rollout ro-retry",
        "DROP INDEX attempts_one_live; UPDATE attempts SET status = 'running', live = 1, end_time = NULL, "
        "reason_code = NULL, deadline = 0 WHERE rollout_id = 'ro-retry'; UPDATE rollouts SET status = 'running', "
        "claimable = 0 WHERE rollout_id = 'ro-retry'; UPDATE counters SET value = value - 1 "
        "WHERE name = 'rollouts.requeuing'; UPDATE counters SET value = value + 1 WHERE name = 'rollouts.running'",
    ),
    Broken(
        "live_is_latest",
        "rollout ro-retry",
        "UPDATE attempts SET status = 'running', live = 1, end_time = NULL, reason_code = NULL, deadline = 0 "
        "WHERE attempt_id = 'at-retry-1'; UPDATE rollouts SET status = 'running', claimable = 0 "
        "WHERE rollout_id = 'ro-retry'; UPDATE counters SET value = value - 1 WHERE name = 'rollouts.requeuing'; "
        "UPDATE counters SET value = value + 1 WHERE name = 'rollouts.running'",
    ),
    Broken(
        "status_agrees",
        "rollout ro-running",
        "UPDATE attempts SET status = 'preparing' WHERE attempt_id = 'at-running-1'",
    ),
    Broken(
        "status_agrees",
        "rollout ro-done",
        "UPDATE attempts SET status = 'running', live = 1, end_time = NULL, reason_code = NULL, deadline = 0 "
        "WHERE attempt_id = 'at-done-1'",
    ),
    Broken(
        "status_agrees",
        "rollout ro-retry",
        "UPDATE rollouts SET status = 'queuing' WHERE rollout_id = 'ro-retry'; UPDATE counters SET value = value - 1 "
        "WHERE name = 'rollouts.requeuing'; UPDATE counters SET value = value + 1 WHERE name = 'rollouts.queuing'",
    ),
    Broken(
        "status_agrees",
        "rollout ro-queue",
        "UPDATE rollouts SET status = 'requeuing' WHERE rollout_id = 'ro-queue'; UPDATE counters SET value = value + 1 "
        "WHERE name = 'rollouts.requeuing'; UPDATE counters SET value = value - 1 WHERE name = 'rollouts.queuing'",
    ),
    Broken(
        "status_agrees",
        "rollout ro-queue",
        "UPDATE rollouts SET status = 'running', claimable = 0 WHERE rollout_id = 'ro-queue'; UPDATE counters "
        "SET value = value + 1 WHERE name = 'rollouts.running'; UPDATE counters SET value = value - 1 "
        "WHERE name = 'rollouts.queuing'",
    ),
    Broken(
        "attempt_has_rollout",
        "attempt at-stray",
        "UPDATE attempts SET attempt_id = 'at-stray', rollout_id = 'ro-0' WHERE attempt_id = 'at-done-1'",
        ("attempts_numbered", "latest_attempt"),
    ),
    # Ends
    Broken("end_is_told", "rollout ro-done", "UPDATE rollouts SET end_time = NULL WHERE rollout_id = 'ro-done'"),
    Broken("end_is_told", "rollout ro-done", "UPDATE rollouts SET reason_code = NULL WHERE rollout_id = 'ro-done'"),
    Broken("end_is_told", "rollout ro-queue", "UPDATE rollouts SET end_time = 1.0 WHERE rollout_id = 'ro-queue'"),
    Broken("end_is_told", "attempt at-done-1", "UPDATE attempts SET end_time = NULL WHERE attempt_id = 'at-done-1'"),
    Broken("end_is_told", "attempt at-done-1", "UPDATE attempts SET reason_code = NULL WHERE attempt_id = 'at-done-1'"),
    Broken(
        "end_is_told", "attempt at-running-1", "UPDATE attempts SET reason_code = 'x' WHERE attempt_id = 'at-running-1'"
    ),
    # Deadlines
    Broken(
        "deadline_known",
        "attempt at-running-1",
        "UPDATE attempts SET deadline = NULL WHERE attempt_id = 'at-running-1'",
    ),
    Broken(
        "deadline_known",
        "attempt at-running-1",
        "UPDATE attempts SET deadline = beaten_lease + 3601 WHERE attempt_id = 'at-running-1'",
    ),
    Broken("deadline_known", "attempt at-done-1", "UPDATE attempts SET deadline = 1 WHERE attempt_id = 'at-done-1'"),
    Broken(
        "deadline_known", "attempt at-done-1", "UPDATE attempts SET confirm_seconds = 10 WHERE attempt_id = 'at-done-1'"
    ),
    # JSON
    Broken("json_valid", "rollout ro-done", "UPDATE rollouts SET input = x'7b' WHERE rollout_id = 'ro-done'"),
    Broken("json_valid", "rollout ro-done", "UPDATE rollouts SET metadata = x'7b' WHERE rollout_id = 'ro-done'"),
    Broken("json_valid", "attempt at-done-1", "UPDATE attempts SET metadata = x'7b' WHERE attempt_id = 'at-done-1'"),
    Broken(
        "resources_readable", "resources rs-1 version 2", "UPDATE resources SET resources = x'7b' WHERE version = 2"
    ),
    Broken("json_valid", "worker worker-1", "UPDATE workers SET heartbeat_stats = x'7b'"),
    Broken("json_valid", "worker worker-1", "UPDATE workers SET registration = x'7b'"),
    # Workers
    # Counters
    Broken("counters_true", "counter spans", "UPDATE counters SET value = value + 1 WHERE name = 'spans'"),
    Broken("counters_true", "counter span_bytes", "UPDATE counters SET value = 0 WHERE name = 'span_bytes'"),
    Broken("counters_true", "counter workers", "DELETE FROM counters WHERE name = 'workers'"),
    Broken("counters_true", "counter rollouts.failed", "INSERT INTO counters VALUES ('rollouts.failed', 1)"),
    Broken("counters_true", "counter resources_versions", "UPDATE counters SET value = 1 WHERE name LIKE '%versions'"),
]


def report_on(database: Path) -> VerificationReport:  # pyright: ignore[reportReturnType] - no block ends early
    """The check of a file as it is: opening it as a store would give every lease a new term first."""
    with closing(open_reader(str(database), vfs=None)) as connection, connection:
        return run_to_end(verify(SqliteReads(connection, Moment(0.0, 0.0))))


def damage(database: Path, sql: str) -> None:
    with closing(apsw.Connection(str(database))) as connection:
        connection.config(apsw.SQLITE_DBCONFIG_DEFENSIVE, 0)
        before = connection.total_changes()
        connection.execute(sql)
        assert connection.total_changes() > before


def test_a_sound_database_breaks_no_rule(database: Path) -> None:
    report = report_on(database)
    assert report.violations == []
    assert report.checked == {"rollouts": 4, "attempts": 4, "spans": 9, "resources": 1, "workers": 1}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: f"{broken.rule}-{broken.record}")
def test_a_broken_rule_is_named_with_its_record(database: Path, broken: Broken) -> None:
    damage(database, broken.sql)
    found = report_on(database).violations
    assert (broken.rule, broken.record) in {(each.rule, each.record) for each in found}
    assert {each.rule for each in found} <= {broken.rule, *broken.also}
    assert all(each.detail for each in found)


def test_every_rule_is_broken_once() -> None:
    source = inspect.getsource(verify_module)
    assert {broken.rule for broken in BROKEN} == set(re.findall(r'(?:yield |[\[(]\()"(\w+)", ', source))


async def test_every_broken_row_is_named(database: Path) -> None:
    damage(database, "UPDATE attempts SET reason_code = NULL; UPDATE workers SET status = 'tired'")
    store = SqliteLightningStore(database)
    named = {each.record for each in (await store.verify()).violations}
    await store.close()
    assert named == {"attempt at-done-1", "attempt at-retry-1", "attempt at-retry-2", "worker worker-1"}
