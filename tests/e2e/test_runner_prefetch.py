"""A runner claims one rollout ahead while its agents are short, and nothing waits behind a slow agent for that."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import agentlightning as agl
from agentlightning.errors import StoreUnavailable
from agentlightning.http.client.client import LightningStoreClient
from agentlightning.http.client.retry import Resilience
from agentlightning.http.server.server import LightningStoreServer
from agentlightning.runner import worker_loop
from agentlightning.store.sqlite.store import InMemoryLightningStore, SqliteLightningStore
from agentlightning.types import RolloutConfig
from command_line import clean_environment
from scenes import attempts_of, enqueued, requests, rollout_now, span_of, statuses
from store_state import assert_sound

PROGRAM = Path(__file__).parent.parent / "support" / "runner_program.py"
SHORT = ["short"] * (worker_loop.SHORT_RUNS + 2)
ONCE = RolloutConfig(max_attempts=1)


class CountingStore(InMemoryLightningStore):
    """Counts the calls by which a runner works on rollouts."""

    def __init__(self) -> None:
        super().__init__()
        self.claims = self.reports = self.span_calls = self.releases = 0

    async def dequeue_many_rollouts(self, **arguments: Any) -> Any:
        self.claims += 1
        return await super().dequeue_many_rollouts(**arguments)

    async def finish_attempt(self, *arguments: Any, **named: Any) -> Any:
        self.reports += 1
        return await super().finish_attempt(*arguments, **named)

    async def add_many_spans(self, spans: Any) -> Any:
        self.span_calls += 1
        return await super().add_many_spans(spans)

    async def release_attempt(self, *arguments: Any) -> Any:
        self.releases += 1
        return await super().release_attempt(*arguments)


class Sluggish(agl.LitAgent[Any]):
    """It is short, except for tasks called ``slow``, which last until told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[Any] = []
        self.go = asyncio.Event()

    async def rollout_async(self, task: Any, resources: Any, rollout: Any) -> float:
        self.begun.append(task)
        if task == "slow":
            await self.go.wait()
        return 1.0


async def until(condition: Any, seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not (found := condition()) or (asyncio.iscoroutine(found) and not await found):
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def running(
    store: Any, agent: Any, index: int = 0, event: threading.Event | None = None, **options: Any
) -> AsyncIterator[asyncio.Task[None]]:
    """A runner at work on a store, stopped at the end."""
    runner = agl.LitAgentRunner[Any](
        agl.OtelTracer(interval_seconds=60), heartbeat_interval=0.1, interval_jitter=0.0, **options
    )
    with runner.run_context(agent=agent, store=store, worker_id=index):
        task = asyncio.create_task(runner.iter(event=event))
        try:
            yield task
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def queue_with_a_slow_one(store: Any) -> tuple[str, str]:
    """Short ones, a slow one, and one more behind it; the ids of the last two."""
    rollouts = await store.enqueue_many_rollouts(requests(*SHORT, "slow", "next", config=ONCE))
    return rollouts[-2].rollout_id, rollouts[-1].rollout_id


# --- One call for each rollout -----------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_spans_report_and_next_claim_are_one_call(concurrency: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_loop, "PREFETCH_HOLD_SECONDS", 60)  # also on a machine that is slow today
    async with CountingStore() as store:
        ids = await enqueued(store, *range(60))
        async with running(store, Sluggish(), max_rollouts=60, concurrency=concurrency) as task:
            await task
        assert store.reports == 60
        assert store.claims <= 20
        assert store.span_calls == store.releases == 0
        for each in ids:
            assert await statuses(store, each) == ("succeeded", ["succeeded"])
            assert agl.find_final_reward(await store.query_spans(each)) == 1.0
        await assert_sound(store)


async def test_with_hooks_spans_are_in_the_store_before_the_hook() -> None:
    seen: list[int] = []

    class Looking(agl.Hook):
        async def on_rollout_end(self, *, rollout: Any, runner: Any, **arguments: Any) -> None:
            seen.append(len(await runner.get_store().query_spans(rollout.rollout_id)))

    async with CountingStore() as store:
        await enqueued(store, *range(5))
        runner = agl.LitAgentRunner[Any](agl.OtelTracer(), max_rollouts=5)
        with runner.run_context(agent=Sluggish(), store=store, hooks=[Looking()]):
            await runner.iter()
        assert seen == [1] * 5


async def test_a_report_whose_reply_is_lost_is_repeated_and_changes_nothing() -> None:
    class Lossy(CountingStore):
        """Loses the first reply to each report."""

        def __init__(self) -> None:
            super().__init__()
            self.request_ids: dict[str, list[Any]] = {}

        async def finish_attempt(self, rollout_id: str, *arguments: Any, **named: Any) -> Any:
            finished = await super().finish_attempt(rollout_id, *arguments, **named)
            used = self.request_ids.setdefault(rollout_id, [])
            used.append(named["request_id"])
            if len(used) == 1:
                raise StoreUnavailable("the reply is lost")
            return finished

    async with Lossy() as store:
        ids = await enqueued(store, *range(20))
        async with running(store, Sluggish(), max_rollouts=20) as task:
            await task
        assert store.reports == 40
        for each in ids:
            first, second = store.request_ids[each]
            assert first == second
            assert await statuses(store, each) == ("succeeded", ["succeeded"])
            assert len(await store.query_spans(each)) == 1
        await assert_sound(store)


async def test_a_refused_span_is_replaced_and_the_attempt_succeeds() -> None:
    @agl.rollout
    def agent(task: int) -> float:
        agl.emit_message("fine")
        agl.emit_annotation({f"key.{number}": number for number in range(3000)})  # more than a store takes
        return 0.5

    async with CountingStore() as store:
        ids = await enqueued(store, *range(3))
        async with running(store, agent, max_rollouts=3) as task:
            await task
        for each in ids:
            assert await statuses(store, each) == ("succeeded", ["succeeded"])
            assert agl.find_final_reward(await store.query_spans(each)) == 0.5
            assert len(await store.query_spans(each)) == 3


async def test_spans_of_a_report_are_on_the_disk_while_the_server_is_away(tmp_path: Path) -> None:
    """A report that is tried again and again holds no span in memory only, and the end comes after its spans."""
    async with SqliteLightningStore(tmp_path / "store.db") as sqlite:
        server = LightningStoreServer(sqlite, port=0)
        await server.start()
        port = int(server.endpoint.rpartition(":")[2])
        resilience = Resilience(spool_after_seconds=0.2)
        async with LightningStoreClient(server.endpoint, spool_dir=tmp_path, resilience=resilience) as client:
            rollout = await client.start_rollout("task")
            ids = (rollout.rollout_id, rollout.attempt.attempt_id)
            await server.stop()
            spans = [span_of(rollout, name=f"{number}") for number in range(3)]
            finishing = asyncio.create_task(client.finish_attempt(*ids, "succeeded", spans))
            await until(lambda: client.health.spool is not None and client.health.spool.waiting_spans == 3)
            assert not finishing.done()
            again = LightningStoreServer(sqlite, port=port)
            await again.start()
            try:
                async with asyncio.timeout(60):
                    finished = await finishing
                assert finished.attempt.status == "succeeded"
                assert [span.name for span in await client.query_spans(*ids)] == ["0", "1", "2"]
                await assert_sound(sqlite)
            finally:
                await again.stop()


# --- Nothing waits behind a slow agent ---------------------------------------------------------------


async def handed_on(store: Any, agent: Sluggish, seconds: float) -> bool:
    """Whether a second, idle runner gets what the first has prefetched behind its slow agent."""
    async with running(store, agent):
        await until(lambda: "slow" in agent.begun)
        idle = Sluggish()
        async with running(store, idle, 1):
            try:
                await until(lambda: idle.begun == ["next"], seconds)
            except TimeoutError:
                return False
            finally:
                agent.go.set()
            return True


async def test_an_idle_runner_gets_what_another_holds_behind_a_slow_agent() -> None:
    async with CountingStore() as store:
        _, behind = await queue_with_a_slow_one(store)
        agent = Sluggish()
        began = time.monotonic()
        assert await handed_on(store, agent, 10)
        assert time.monotonic() - began < 3
        assert store.releases == 1
        await until(lambda: _succeeded(store, behind))
        given_back, done = await attempts_of(store, behind)
        assert (given_back.reason_code, done.status) == ("released", "succeeded")
        await assert_sound(store)


async def test_without_the_limit_it_waits_behind_the_slow_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the rollout was prefetched, and only the limit frees it."""
    monkeypatch.setattr(worker_loop, "PREFETCH_HOLD_SECONDS", 60)
    async with CountingStore() as store:
        await queue_with_a_slow_one(store)
        assert not await handed_on(store, Sluggish(), 1.0)


async def test_after_a_slow_agent_nothing_is_prefetched_for_a_while() -> None:
    async with CountingStore() as store:
        _, behind = await queue_with_a_slow_one(store)
        agent = Sluggish()
        async with running(store, agent):
            await until(lambda: store.releases)
            await asyncio.sleep(3 * worker_loop.PREFETCH_HOLD_SECONDS)
            assert store.releases == 1
            assert len(await attempts_of(store, behind)) == 1
            agent.go.set()
            await until(lambda: _succeeded(store, behind))


# --- Given back at the end ---------------------------------------------------------------------------


async def end_by_event(store: Any, event: threading.Event, task: asyncio.Task[None]) -> None:
    event.set()


async def end_by_drain(store: Any, event: threading.Event, task: asyncio.Task[None]) -> None:
    await store.direct_workers("drain")


async def end_by_stop(store: Any, event: threading.Event, task: asyncio.Task[None]) -> None:
    await store.direct_workers("stop")


async def end_by_cancel(store: Any, event: threading.Event, task: asyncio.Task[None]) -> None:
    task.cancel()


@pytest.mark.parametrize("end", [end_by_event, end_by_drain, end_by_stop, end_by_cancel])
async def test_what_was_prefetched_is_given_back_at_once(end: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_loop, "PREFETCH_HOLD_SECONDS", 60)
    async with CountingStore() as store:
        _, behind = await queue_with_a_slow_one(store)
        agent, event = Sluggish(), threading.Event()
        async with running(store, agent, event=event) as task:
            await until(lambda: "slow" in agent.begun)
            await until(lambda: _has_status(store, behind, "preparing"))
            began = time.monotonic()
            await end(store, event, task)
            await until(lambda: _has_status(store, behind, "requeuing"))
            assert time.monotonic() - began < 2
            agent.go.set()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        assert "next" not in agent.begun
        (given_back,) = await attempts_of(store, behind)
        assert given_back.reason_code == "released"
        await assert_sound(store)


async def test_without_giving_back_it_would_be_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: nobody else frees it for as long as the claim's lease lasts."""
    monkeypatch.setattr(worker_loop, "PREFETCH_HOLD_SECONDS", 60)
    monkeypatch.setattr(worker_loop.WorkerLoop, "_release", lambda *_: None)
    async with CountingStore() as store:
        _, behind = await queue_with_a_slow_one(store)
        agent, event = Sluggish(), threading.Event()
        async with running(store, agent, event=event) as task:
            await until(lambda: "slow" in agent.begun)
            await until(lambda: _has_status(store, behind, "preparing"))
            event.set()
            await asyncio.sleep(0.5)
            agent.go.set()
            await task
        assert await statuses(store, behind) == ("preparing", ["preparing"])


# --- A runner that is killed -------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def killed_while_prefetching(folder: Path, **variables: str) -> AsyncIterator[tuple[Any, str, list[str]]]:
    """A store, a rollout that a killed runner had prefetched, and what its successor says; the successor is at work."""
    async with SqliteLightningStore(folder / "store.db") as sqlite:
        server = LightningStoreServer(sqlite, port=0)
        await server.start()
        runners: list[subprocess.Popen[str]] = []

        def start(name: str) -> subprocess.Popen[str]:
            environment = clean_environment(AGL_SPOOL_DIR=str(folder / "spool"), CONCURRENCY="1", **variables)
            command = [sys.executable, PROGRAM, server.endpoint, name]
            runners.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
            return runners[-1]

        try:
            async with LightningStoreClient(server.endpoint, spool_dir=None) as store:
                tasks = [{"hang": False}] * len(SHORT) + [{"hang": True}, {"hang": False}]
                rollouts = await store.enqueue_many_rollouts(requests(*tasks, config=ONCE))
                hanging, behind = (each.rollout_id for each in rollouts[-2:])
                first = start("first")
                assert first.stdout is not None
                while f"begun {hanging}" not in await asyncio.to_thread(first.stdout.readline):
                    pass
                await until(lambda: _has_status(store, hanging, "running"))
                assert await statuses(store, behind) in [("preparing", ["preparing"]), ("running", ["running"])]
                await asyncio.sleep(0.5)  # some heartbeats, which must not confirm it
                first.send_signal(signal.SIGKILL)
                await asyncio.to_thread(first.wait)
                said = first.stdout.read().splitlines()
                assert not any(behind in line for line in said), "it was never begun"
                second = start("second")
                await until(lambda: _is_over(store, behind))
                assert second.stdout is not None
                second.kill()
                said = second.stdout.read().splitlines()
                yield store, behind, said
                await assert_sound(sqlite)
        finally:
            for each in runners:
                each.kill()
                each.wait()
                assert each.stdout is not None
                each.stdout.close()
            await server.stop()


async def test_what_a_killed_runner_had_prefetched_is_handed_on_and_costs_no_attempt(tmp_path: Path) -> None:
    async with killed_while_prefetching(tmp_path, HOLD_SECONDS="60") as (store, behind, said):
        assert await statuses(store, behind) == ("succeeded", ["unresponsive", "succeeded"])
        lost, done = await attempts_of(store, behind)
        assert (lost.reason_code, lost.worker_id, done.worker_id) == ("unconfirmed", "first", "second")
        assert [line for line in said if behind in line] == [f"begun {behind} 2"]


async def test_if_heartbeats_confirmed_it_the_attempt_would_be_used_up(tmp_path: Path) -> None:
    """Negative control: a confirmed claim counts, and this rollout has one attempt."""
    variables = {"HOLD_SECONDS": "60", "CONFIRM_PREFETCHED": "1"}
    async with killed_while_prefetching(tmp_path, **variables) as (store, behind, _):
        assert await statuses(store, behind) == ("failed", ["unresponsive"])


async def _has_status(store: Any, rollout_id: str, status: str) -> bool:
    return (await rollout_now(store, rollout_id)).status == status


async def _succeeded(store: Any, rollout_id: str) -> bool:
    return await _has_status(store, rollout_id, "succeeded")


async def _is_over(store: Any, rollout_id: str) -> bool:
    return (await rollout_now(store, rollout_id)).status in ("succeeded", "failed")
