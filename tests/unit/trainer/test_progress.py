"""Progress is measured from a real store, and shown as a table or as log lines."""

from __future__ import annotations

import asyncio
import io
import logging

import pytest
from rich.console import Console

import agentlightning as agl
from agentlightning.errors import InvalidValue
from agentlightning.trainer.progress import LogView, Progress, SilentView, Snapshot, TableView, duration, make_view


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Recorder:
    """A view that remembers, and tells when it was shown something."""

    interval_seconds = 0.01

    def __init__(self) -> None:
        self.shown: list[Snapshot] = []
        self.events: list[str] = []
        self.twice = asyncio.Event()

    def open(self) -> None:
        self.events.append("open")

    def show(self, snapshot: Snapshot) -> None:
        self.shown.append(snapshot)
        if len(self.shown) == 2:
            self.twice.set()

    def close(self) -> None:
        self.events.append("close")


async def end_one(store: agl.LightningStore) -> None:
    claimed = await store.dequeue_rollout(worker_id="w-1")
    assert claimed is not None
    await store.update_attempt(claimed.rollout_id, claimed.attempt.attempt_id, status="succeeded")


async def test_a_snapshot_says_how_far_how_fast_and_who() -> None:
    clock = Clock()
    async with agl.InMemoryLightningStore() as store:
        progress = Progress(store, SilentView(), clock)
        for number in range(6):
            await store.enqueue_rollout(number)
        first = await progress.snapshot()
        assert (first.total, first.finished, first.rate, first.eta_seconds, first.reward) == (6, 0, 0.0, None, None)
        for _ in range(4):
            await end_one(store)
        clock.now += 2.0
        second = await progress.snapshot()
        assert (second.finished, second.rate, second.eta_seconds) == (4, 2.0, 1.0)
        assert [worker.worker_id for worker in second.workers] == ["w-1"]


async def test_rewards_count_once_and_reports_take_over() -> None:
    clock = Clock()
    async with agl.InMemoryLightningStore() as store:
        progress = Progress(store, SilentView(), clock)
        progress.observe("ro-1", 1.0)
        progress.observe("ro-1", 1.0)
        progress.observe("ro-2", 0.0)
        assert (await progress.snapshot()).reward == 0.5
        progress.report(0, {"reward_mean": 0.25, "entropy": 2.0, "total_steps": 11})
        clock.now += 3.0
        progress.report(1, {"reward_mean": 0.75})
        snapshot = await progress.snapshot()
        assert (snapshot.reward, list(snapshot.curve), snapshot.step) == (0.75, [0.25, 0.75], 1)
        assert snapshot.numbers["entropy"] == 2.0
        assert snapshot.eta_seconds == pytest.approx(27.0)


async def test_the_view_is_fed_while_it_is_entered_and_once_more_at_the_end() -> None:
    view = Recorder()
    async with agl.InMemoryLightningStore() as store:
        async with Progress(store, view):
            await asyncio.wait_for(view.twice.wait(), 10)
            await store.enqueue_rollout("late")
        assert view.shown[-1].total == 1
        assert view.events == ["open", "close"]


async def test_a_store_that_does_not_answer_costs_a_frame_and_not_the_run() -> None:
    view = Recorder()
    store = agl.InMemoryLightningStore()
    async with Progress(store, view):
        await asyncio.wait_for(view.twice.wait(), 10)
        await store.close()
    assert view.events == ["open", "close"]


def a_snapshot() -> Snapshot:
    return Snapshot(
        elapsed_seconds=75,
        by_status={"succeeded": 9, "running": 2, "failed": 1},
        rate=3.5,
        reward=0.625,
        curve=[0.1, 0.4, 0.9],
        workers=[agl.Worker(worker_id="a", status="busy"), agl.Worker(worker_id="b", status="unknown")],
        step=3,
        numbers={"total_steps": 8, "loss": 0.5, "reward_mean": 0.6},
        eta_seconds=30,
        url="http://127.0.0.1:40123",
    )


def test_the_table_shows_it_all() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    view = TableView(console)
    view.open()
    view.show(a_snapshot())
    view.close()
    view.close()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for words in (
        "step 4 of 8 done",
        "1:15 gone",
        "ETA 30 s",
        "10 ended of 12, 3.5/s",
        "9 succeeded, 1 failed, 2 running",
    ):
        assert words in text
    for words in ("1 busy, 1 silent", "0.625  ▁▄█", "loss 0.5", "agl status --url http://127.0.0.1:40123"):
        assert words in text


def test_a_log_line_says_the_same(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="agentlightning.trainer"):
        LogView().show(a_snapshot())
    assert "10 rollouts ended of 12" in caplog.text
    assert "reward 0.625" in caplog.text


def test_without_any_logging_the_lines_go_to_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("agentlightning.trainer", "agentlightning", None):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    LogView().show(Snapshot(0.1, {}, 0.0, None, (), (), None, {}, None))
    view, line = (
        LogView(),
        "10 rollouts ended of 12 (9 succeeded, 1 failed, 2 running), 3.5/s, reward 0.625, 1 busy, 1 silent, ETA 30 s",
    )
    view.show(a_snapshot())
    view.show(a_snapshot())
    first, second = capsys.readouterr().err.splitlines()
    assert (first, second) == (f"{line}; look on with `agl status --url http://127.0.0.1:40123`", line)


def test_auto_is_log_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert isinstance(make_view("auto"), LogView)
    assert isinstance(make_view("table"), TableView)
    view = Recorder
    assert make_view(view) is view  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match="progress='loud'"):
        make_view("loud")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "?"), (0.4, "0 s"), (59.4, "59 s"), (200, "3:20"), (3725, "1:02:05"), (90_000, "25:00:00")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
