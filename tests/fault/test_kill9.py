"""kill -9: whatever a store process has acknowledged is there after it died, and there once.

Eight writers work on a store process, which is killed with SIGKILL at random moments, while it opens, migrates,
recovers, writes, copies its log or closes. After each kill everything acknowledged is looked up and `verify` is run;
the next process goes on with the same file and repeats the calls that were in flight.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentlightning import SqliteLightningStore
from kill_nine import Campaign, Contents, Ledger, Nursery, Outcome
from store_process import Life

KILLS = 200 if os.environ.get("CI") else 20


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.mark.timeout(900)
def test_nothing_is_lost_or_doubled(nursery: Nursery, tmp_path: Path) -> None:
    check(Campaign(nursery, tmp_path, seed=9).run(KILLS), KILLS)


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
def test_nothing_is_lost_or_doubled_in_two_thousand_kills(nursery: Nursery, tmp_path: Path) -> None:
    check(Campaign(nursery, tmp_path, seed=99).run(2_000), 2_000)


def check(outcome: Outcome, kills: int) -> None:
    print(
        f"{outcome.kills} kills, {outcome.closed} processes were done before, {outcome.promises:,} acknowledgements "
        f"looked up in {outcome.checks} checks, {outcome.repeated} calls repeated after they were cut off"
    )
    assert outcome.findings.lost == []
    assert outcome.findings.doubled == []
    assert outcome.findings.broken == []
    assert outcome.kills == kills
    assert outcome.promises > 10 * kills
    assert outcome.repeated > kills // 2


# Negative controls: a harness that finds nothing proves nothing.


def test_an_acknowledgement_before_the_write_is_seen_to_be_lost(nursery: Nursery, tmp_path: Path) -> None:
    outcome = Campaign(nursery, tmp_path, seed=9, acknowledge="before").run(20)
    assert outcome.findings.lost != []
    assert outcome.findings.broken == []


def test_a_repeat_without_ids_is_seen_to_be_doubled(nursery: Nursery, tmp_path: Path) -> None:
    outcome = Campaign(nursery, tmp_path, seed=9, repeat_with="no ids").run(20)
    assert outcome.findings.doubled != []
    assert outcome.findings.broken == []


def test_a_finish_that_is_repeated_without_the_id_of_its_claim_is_seen_to_claim_twice(
    nursery: Nursery, tmp_path: Path
) -> None:
    outcome = Campaign(nursery, tmp_path, seed=9, repeat_with="no claim ids").run(20)
    assert any(each.startswith("attempt ") for each in outcome.findings.doubled)
    assert outcome.findings.broken == []


@pytest.mark.timeout(300)
def test_a_finish_in_several_calls_is_seen_to_be_half_done(nursery: Nursery, tmp_path: Path) -> None:
    outcome = Campaign(nursery, tmp_path, seed=9, finish="in parts").run(200)
    assert any(each.startswith("finish of ") for each in outcome.findings.broken)


def test_an_early_acknowledgement_is_true_as_long_as_nobody_is_killed(nursery: Nursery, tmp_path: Path) -> None:
    """It is the kill that the first control notices, not another way of keeping the journal."""
    life = Life(str(tmp_path / "store.db"), str(tmp_path / "journal"), 9, close_after_calls=300, acknowledge="before")
    assert nursery.wait(nursery.begin(life)) == 0
    ledger = Ledger(leases_end=False)
    ledger.read(Path(life.journal))

    async def contents() -> Contents:
        async with SqliteLightningStore(life.database) as store:
            return await Contents.of(store)

    assert ledger.promises > 300
    assert not ledger.compare(asyncio.run(contents()))
