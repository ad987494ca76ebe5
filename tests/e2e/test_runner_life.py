"""A runner says that it lives, hears when it has lost a rollout or shall end, and is noticed when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import agentlightning as agl
from agentlightning.errors import NotAuthenticated, StoreUnavailable, StoreUnreachable
from agentlightning.http.client.client import LightningStoreClient
from agentlightning.http.server.server import LightningStoreServer
from agentlightning.runner import worker_loop
from agentlightning.store.base import LightningStore
from agentlightning.store.sqlite.store import InMemoryLightningStore, SqliteLightningStore
from agentlightning.types import AttemptedRollout, RolloutConfig
from command_line import clean_environment
from scenes import attempts_of, enqueued, rollout_now, statuses
from store_state import assert_sound

SUPPORT = Path(__file__).parent.parent / "support"


async def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    """Wait for something that happens elsewhere."""
    async with asyncio.timeout(seconds):
        while True:
            found = condition()
            if asyncio.iscoroutine(found):
                found = await found
            if found:
                return
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def running(
    store: LightningStore, agent: Any, *, event: threading.Event | None = None, **options: Any
) -> AsyncIterator[tuple[agl.LitAgentRunner[Any], asyncio.Task[None]]]:
    """A runner at work on a store, with a quick heart; stopped at the end."""
    options = {"heartbeat_interval": 0.1, "interval_jitter": 0.0} | options
    runner = agl.LitAgentRunner[Any](agl.OtelTracer(interval_seconds=0.05), **options)
    with runner.run_context(agent=agent, store=store):
        task = asyncio.create_task(runner.iter(event=event))
        try:
            yield runner, task
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


class Waiting(agl.LitAgent[Any]):
    """Waits in each rollout until told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[str] = []
        self.cancelled: list[str] = []
        self.go = asyncio.Event()

    async def rollout_async(self, task: Any, resources: Any, rollout: Any) -> float:
        self.begun.append(rollout.rollout_id)
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.append(rollout.rollout_id)
            raise
        return 1.0


# --- Signs of life ---------------------------------------------------------------------------------


@agl.rollout
async def busy(task: float) -> float:
    """Keeps the runner's loop from doing anything else."""
    time.sleep(task)
    return 1.0


@contextlib.contextmanager
def watched(store: LightningStore, rollout_id: str) -> Iterator[set[str]]:
    """The states in which somebody who reads all the time sees the attempts of a rollout."""
    done = threading.Event()
    seen: set[str] = set()

    def look() -> None:
        while not done.wait(0.05):
            seen.update(attempt.status for attempt in asyncio.run(attempts_of(store, rollout_id)))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


async def test_a_busy_agent_is_not_declared_dead() -> None:
    async with InMemoryLightningStore() as store:
        config = RolloutConfig(unresponsive_seconds=0.5)
        rollout_id = (await store.enqueue_rollout(1.5, config=config)).rollout_id
        async with running(store, busy, lease_seconds=0.5, max_rollouts=1) as (_, task):
            with watched(store, rollout_id) as seen:
                await task
        assert seen <= {"preparing", "running", "succeeded"}
        assert await statuses(store, rollout_id) == ("succeeded", ["succeeded"])


async def test_a_heart_in_the_busy_loop_would_be() -> None:
    async with InMemoryLightningStore() as store:
        rollout_id = (await store.enqueue_rollout(1.5)).rollout_id
        options = {"lease_seconds": 0.5, "max_rollouts": 1, "heartbeat_launch_mode": "asyncio"}
        async with running(store, busy, **options) as (_, task):
            with watched(store, rollout_id) as seen:
                await task
        assert "unresponsive" in seen


async def test_a_claim_is_confirmed_while_the_agent_is_busy() -> None:
    async with InMemoryLightningStore() as store:
        await enqueued(store, "task")
        agent = Waiting()
        async with running(store, agent, heartbeat_interval=60):
            await until(lambda: agent.begun)

            async def runs() -> bool:
                return (await rollout_now(store, agent.begun[0])).status == "running"

            await until(runs)


async def test_an_attempt_is_heard_of_as_often_as_it_asks_for() -> None:
    class Counting(InMemoryLightningStore):
        listed = 0

        async def update_worker(self, *args: Any, **more: Any) -> Any:
            self.listed += bool(more["attempt_ids"])
            return await super().update_worker(*args, **more)

    async with Counting() as store:
        rollout = await store.enqueue_rollout("task", config=RolloutConfig(unresponsive_seconds=3.0))
        agent = Waiting()
        async with running(store, agent, heartbeat_interval=600, max_rollouts=1) as (_, task):
            await until(lambda: store.listed > 2)  # one a second
            agent.go.set()
            await task
        assert await statuses(store, rollout.rollout_id) == ("succeeded", ["succeeded"])


async def test_what_the_store_knows_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGL_WORKER_NAME", "slot-7")
    options = {"labels": {"gpu": "no"}, "heartbeat_include_gpu": True}
    async with InMemoryLightningStore() as store, running(store, Waiting(), **options) as (runner, _):
        assert runner.get_worker_id() == "slot-7"
        await until(lambda: store.get_worker_by_id("slot-7"))
        worker = await store.get_worker_by_id("slot-7")
        assert worker is not None
        assert worker.registration is not None
        assert (worker.registration["pid"], worker.registration["labels"]) == (os.getpid(), {"gpu": "no"})
        assert worker.heartbeat_stats is not None
        assert worker.heartbeat_stats["process"]["rss_bytes"] > 0
        assert isinstance(worker.heartbeat_stats["gpus"], list)


# --- Losing a rollout ------------------------------------------------------------------------------


async def test_a_stale_attempt_is_given_up_and_no_other() -> None:
    async with InMemoryLightningStore() as store:
        ids = await enqueued(store, "a", "b")
        agent = Waiting()
        async with running(store, agent, concurrency=2, max_rollouts=2) as (_, task):
            await until(lambda: len(agent.begun) == 2)
            successor = await store.start_attempt(ids[0], "another")
            await until(lambda: agent.cancelled)
            agent.go.set()
            await task
        assert agent.cancelled == [ids[0]]
        assert await statuses(store, ids[0]) == ("preparing", ["failed", "preparing"])
        assert (await attempts_of(store, ids[0]))[-1].attempt_id == successor.attempt.attempt_id
        assert await statuses(store, ids[1]) == ("succeeded", ["succeeded"])


@pytest.mark.parametrize("plain", [False, True])
async def test_a_rollout_that_takes_too_long_is_given_up(plain: bool) -> None:
    release = threading.Event()

    def hanging(task: Any) -> None:
        release.wait(60)

    async def sleeping(task: Any) -> None:
        await asyncio.sleep(60)

    async with InMemoryLightningStore() as store:
        config = RolloutConfig(timeout_seconds=0.3)
        rollout_id = (await store.enqueue_rollout("task", config=config)).rollout_id
        next_id = (await store.enqueue_rollout("task", config=config)).rollout_id
        async with running(store, agl.rollout(hanging if plain else sleeping), max_rollouts=2) as (_, task):
            await task
        release.set()
        for each in (rollout_id, next_id):
            assert await statuses(store, each) == ("failed", ["timeout"])
            assert (await attempts_of(store, each))[0].reason_code == "timeout"


# --- Ending ----------------------------------------------------------------------------------------


async def test_the_event_ends_an_idle_runner_at_once() -> None:
    async with InMemoryLightningStore() as store:
        event = threading.Event()
        async with running(store, Waiting(), event=event) as (runner, task):
            await until(lambda: store.get_worker_by_id(runner.get_worker_id()))
            await asyncio.sleep(0.1)  # it is in its long poll by now, or about to begin it: both must end
            began = time.monotonic()
            event.set()
            await task
            assert time.monotonic() - began < 1.0


async def test_the_event_lets_a_runner_finish_what_it_holds() -> None:
    async with InMemoryLightningStore() as store:
        ids = await enqueued(store, "held", "waiting")
        agent, event = Waiting(), threading.Event()
        async with running(store, agent, event=event) as (_, task):
            await until(lambda: agent.begun)
            event.set()
            await asyncio.sleep(0.2)
            assert not task.done()
            agent.go.set()
            await task
        assert await statuses(store, ids[0]) == ("succeeded", ["succeeded"])
        assert await statuses(store, ids[1]) == ("queuing", [])


async def test_a_claim_that_was_left_is_handed_out_again_at_once() -> None:
    """The reply to a runner's last claim was on the way when it ended: its rollout does not wait for a lease."""

    class Late(InMemoryLightningStore):
        claimed = threading.Event()

        async def dequeue_many_rollouts(self, **arguments: Any) -> Any:
            rollouts = await super().dequeue_many_rollouts(**arguments)
            self.claimed.set()
            await asyncio.sleep(60)  # the reply never comes
            return rollouts

    async with Late() as store:
        (rollout_id,) = await enqueued(store, "task")
        event = threading.Event()
        async with running(store, Waiting(), event=event) as (_, task):
            await until(store.claimed.is_set)
            event.set()
            await task
        assert await statuses(store, rollout_id) == ("requeuing", ["unresponsive"])
        assert (await attempts_of(store, rollout_id))[0].reason_code == "unconfirmed"


async def test_draining_finishes_what_is_held_and_takes_nothing_new() -> None:
    async with InMemoryLightningStore() as store:
        ids = await enqueued(store, "held", "waiting")
        agent = Waiting()
        async with running(store, agent) as (runner, task):
            await until(lambda: agent.begun)
            await store.direct_workers("drain", worker_ids=[runner.get_worker_id()])
            await asyncio.sleep(0.3)
            assert not task.done()
            agent.go.set()
            await task
        assert await statuses(store, ids[0]) == ("succeeded", ["succeeded"])
        assert await statuses(store, ids[1]) == ("queuing", [])


@pytest.mark.parametrize("idle", [True, False])
async def test_stopping_gives_up_what_is_held(idle: bool) -> None:
    async with InMemoryLightningStore() as store:
        ids = [] if idle else await enqueued(store, "held")
        agent = Waiting()
        async with running(store, agent, heartbeat_interval=60 if idle else 0.1) as (runner, task):
            await until(lambda: idle or agent.begun)
            await until(lambda: store.get_worker_by_id(runner.get_worker_id()))
            await store.direct_workers("stop")
            async with asyncio.timeout(5):
                await task
        for each in ids:
            assert await statuses(store, each) == ("failed", ["failed"])
            assert (await attempts_of(store, each))[0].reason_code == "aborted"


async def test_an_agent_that_will_not_stop_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_loop, "GRACE_SECONDS", 0.3)
    done = asyncio.Event()

    @agl.rollout
    async def stubborn(task: Any) -> None:
        while not done.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await done.wait()

    async with InMemoryLightningStore() as store:
        await enqueued(store, "task")
        async with running(store, stubborn) as (_, task):
            await until(lambda: store.query_rollouts(status_in=["running"], limit=1))
            await store.direct_workers("stop")
            async with asyncio.timeout(5):
                await task
            done.set()


async def test_an_interrupted_runner_reports_what_it_gave_up() -> None:
    async with InMemoryLightningStore() as store:
        (rollout_id,) = await enqueued(store, "task")
        agent = Waiting()
        async with running(store, agent) as (_, task):
            await until(lambda: agent.begun)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert (await attempts_of(store, rollout_id))[0].reason_code == "aborted"


# --- A store that cannot be asked ------------------------------------------------------------------


class Refusing(InMemoryLightningStore):
    """Answers claims with an error, as often as told."""

    def __init__(self, errors: list[Exception]) -> None:
        super().__init__()
        self.errors = errors
        self.request_ids: list[str] = []

    async def dequeue_many_rollouts(self, **arguments: Any) -> Any:
        self.request_ids.append(arguments["request_id"])
        if self.errors:
            raise self.errors.pop(0)
        return await super().dequeue_many_rollouts(**arguments)


async def test_a_claim_is_repeated_under_the_same_name() -> None:
    async with Refusing([StoreUnavailable("away"), OSError("reset"), TimeoutError()]) as store:
        (rollout_id,) = await enqueued(store, "task")
        async with running(store, agl.rollout(lambda task: 1), max_rollouts=1, poll_interval=0.01) as (_, task):
            await task
        assert await statuses(store, rollout_id) == ("succeeded", ["succeeded"])
        assert len(store.request_ids) == 4
        assert len(set(store.request_ids)) == 1


async def test_a_runner_does_not_wait_for_ever() -> None:
    async with Refusing([StoreUnavailable("away")] * 1000) as store:
        options: dict[str, Any] = {"poll_interval": 0.01, "unreachable_seconds": 0.2}
        async with running(store, Waiting(), **options) as (_, task):
            with pytest.raises(StoreUnreachable, match="away"):
                await task


async def test_a_refusal_for_good_ends_it_at_once() -> None:
    async with Refusing([NotAuthenticated("no key")]) as store, running(store, Waiting()) as (_, task):
        with pytest.raises(NotAuthenticated):
            await task


# --- Real processes --------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving(database: Path) -> AsyncIterator[LightningStoreServer]:
    """A served store on a file."""
    async with SqliteLightningStore(database) as store:
        server = LightningStoreServer(store, port=0)
        await server.start()
        try:
            yield server
        finally:
            await server.stop()


@contextlib.asynccontextmanager
async def reached(server: LightningStoreServer) -> AsyncIterator[LightningStoreClient]:
    """The store as another process sees it."""
    async with LightningStoreClient(server.endpoint, spool_dir=None) as client:
        yield client


def start_runner(url: str, name: str, spool: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, SUPPORT / "runner_program.py", url, name],
        env=clean_environment(AGL_SPOOL_DIR=str(spool)),
        stdout=subprocess.PIPE,
        text=True,
    )


async def test_a_runner_killed_in_the_middle_is_noticed_and_its_rollout_tried_again(tmp_path: Path) -> None:
    async with serving(tmp_path / "store.db") as server, reached(server) as store:
        config = RolloutConfig(max_attempts=3, retry_condition=["unresponsive"])
        hanging = (await store.enqueue_rollout({"hang": True}, config=config)).rollout_id
        first = start_runner(server.endpoint, "first", tmp_path / "spool")
        second = None
        try:
            assert first.stdout is not None
            assert await asyncio.to_thread(first.stdout.readline) == f"begun {hanging} 1\n"

            async def confirmed() -> bool:
                return (await rollout_now(store, hanging)).status == "running"

            await until(confirmed)
            first.send_signal(signal.SIGKILL)
            await asyncio.to_thread(first.wait)
            killed = time.monotonic()

            async def noticed() -> bool:
                return (await statuses(store, hanging))[1] == ["unresponsive"]

            await until(noticed)
            assert time.monotonic() - killed < 1.0 + 1.0 + 0.5  # its lease, a second, and our looking
            second = start_runner(server.endpoint, "second", tmp_path / "spool")
            (rollout,) = await store.wait_for_rollouts(rollout_ids=[hanging], timeout=30)
            assert rollout.status == "succeeded"
            lost, tried_again = await attempts_of(store, hanging)
            assert (lost.reason_code, tried_again.worker_id) == ("worker_lost", "second")
            spans = await store.query_spans(hanging, tried_again.attempt_id)
            assert agl.find_final_reward(spans) == 1.0
            assert server.store is not None
            await assert_sound(server.store)
        finally:
            for process in (first, second):
                if process is not None:
                    process.kill()
                    process.wait()
                    assert process.stdout is not None
                    process.stdout.close()


@agl.rollout
async def talkative(task: int, rollout: AttemptedRollout) -> float:
    """Emits a span now and then, for a while."""
    for number in range(20):
        agl.emit_message(f"{task}.{number}")
        await asyncio.sleep(0.05)
    return float(task)


async def test_nothing_is_lost_while_the_server_is_away(tmp_path: Path) -> None:
    database, spool = tmp_path / "store.db", tmp_path / "spool"
    async with serving(database) as server:
        port, url = int(server.endpoint.rpartition(":")[2]), server.endpoint
        store = LightningStoreClient(url, spool_dir=spool)
        async with store:
            ids = await enqueued(store, *range(8))
            runner = agl.LitAgentRunner[Any](agl.OtelTracer(interval_seconds=0.05), concurrency=8, max_rollouts=8)
            with runner.run_context(agent=talkative, store=store):
                task = asyncio.create_task(runner.iter())
                await until(lambda: store.query_rollouts(status_in=["running"], limit=1))
                assert server.store is not None
                await server.stop()
                await asyncio.sleep(1.5)  # the agents talk on, and are done before anybody listens again
                again = LightningStoreServer(server.store, port=port)
                await again.start()
                try:
                    async with asyncio.timeout(60):
                        await task
                    for number, each in enumerate(ids):
                        assert (await rollout_now(store, each)).status == "succeeded"
                        spans = await store.query_spans(each)
                        said = [agl.get_message_value(span) for span in spans if span.name == agl.AGL_MESSAGE]
                        assert said == [f"{number}.{each}" for each in range(20)]
                        assert agl.find_final_reward(spans) == float(number)
                finally:
                    await again.stop()
