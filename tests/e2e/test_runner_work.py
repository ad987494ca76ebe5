"""What a runner makes of what its agent does: results, rewards, exceptions, hooks, resources, many at once."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import pytest

import agentlightning as agl
from agentlightning.store.base import LightningStore
from agentlightning.store.sqlite.store import InMemoryLightningStore
from agentlightning.types import Attempt, AttemptedRollout, PromptTemplate, Rollout, RolloutConfig, Span, SpanCoreFields
from scenes import attempts_of, enqueued
from store_state import assert_sound


class Ended(NamedTuple):
    """A rollout after its end, with all there is about it."""

    rollout: Rollout
    attempt: Attempt
    spans: Sequence[Span]

    @property
    def reward(self) -> float | None:
        return agl.find_final_reward(self.spans)


async def ended(store: LightningStore, rollout_id: str) -> Ended:
    rollout = await store.get_rollout_by_id(rollout_id)
    assert rollout is not None
    return Ended(rollout, (await attempts_of(store, rollout_id))[-1], await store.query_spans(rollout_id))


async def work(store: LightningStore, agent: Any, number: int, **options: Any) -> None:
    """Let a runner do so many rollouts."""
    hooks = options.pop("hooks", None)
    runner = agl.LitAgentRunner[Any](options.pop("tracer", None) or agl.OtelTracer(), max_rollouts=number, **options)
    with runner.run_context(agent=agent, store=store, hooks=hooks):
        async with asyncio.timeout(60):
            await runner.iter()


async def one(function: Any, task: Any = "task", **options: Any) -> Ended:
    """What becomes of one rollout of an agent."""
    async with InMemoryLightningStore() as store:
        (rollout_id,) = await enqueued(store, task, mode=options.pop("mode", None))
        await work(store, function if isinstance(function, agl.LitAgent) else agl.rollout(function), 1, **options)
        await assert_sound(store)
        return await ended(store, rollout_id)


@pytest.mark.parametrize(
    ("wish", "condition", "tries"), [(None, "failed", 2), (True, "timeout", 2), (False, "failed", 1)]
)
async def test_an_agent_fails_with_a_reason_of_its_own_and_a_wish(wish: Any, condition: Any, tries: int) -> None:
    def agent(task: Any) -> None:
        raise agl.AttemptFailed("site_down", "the shop did not answer", retry=wish)

    async with InMemoryLightningStore() as store:
        config = RolloutConfig(max_attempts=2, retry_condition=[condition])
        (rollout_id,) = await enqueued(store, 1, config=config)
        await work(store, agl.rollout(agent), tries)
        attempts = await attempts_of(store, rollout_id)
        assert [(each.reason_code, each.reason_message) for each in attempts] == [
            ("site_down", "the shop did not answer")
        ] * tries
        done = await ended(store, rollout_id)
        assert (done.rollout.status, done.rollout.reason_code) == ("failed", "site_down")
        assert done.reward is None
        await assert_sound(store)


# --- Results ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "reward"), [(0.5, 0.5), (1, 1.0), (True, 1.0), (0, 0.0), (Fraction(1, 4), 0.25), (None, None)]
)
async def test_numbers_are_rewards(result: Any, reward: float | None) -> None:
    done = await one(lambda task: result)
    assert (done.rollout.status, done.reward) == ("succeeded", reward)


async def test_a_returned_number_is_the_last_reward() -> None:
    def agent(task: Any) -> float:
        agl.emit_reward(0.1)
        return 0.9

    done = await one(agent)
    assert [agl.get_reward_value(span) for span in done.spans] == [0.1, 0.9]


async def test_without_a_tracer_that_records_the_reward_is_kept_all_the_same() -> None:
    done = await one(lambda task: 0.5, tracer=agl.DummyTracer())
    assert (done.rollout.status, done.reward) == ("succeeded", 0.5)


async def test_spans_are_kept_as_those_of_the_attempt() -> None:
    foreign = Span.from_attributes(name="mine", attributes={}, rollout_id="ro-other", attempt_id="at-other")
    done = await one(lambda task: [foreign])
    assert [(span.name, span.attempt_id) for span in done.spans] == [("mine", done.attempt.attempt_id)]
    core = agl.emit_reward(0.3, propagate=False)
    assert (await one(lambda task: [core])).reward == 0.3


async def test_spans_that_the_tracer_has_seen_are_kept_once() -> None:
    class Recorded(agl.LitAgent[Any]):
        def rollout(self, task: Any, resources: Any, rollout: Any) -> Any:
            agl.emit_message("a")
            return self.tracer.get_last_trace()

    assert [span.name for span in (await one(Recorded())).spans] == [agl.AGL_MESSAGE]


async def test_a_span_whose_id_was_taken_arrives() -> None:
    """It is one that waits for the next batch; a reward is sent at once, so nobody could take its id before."""

    class Clashing(agl.LitAgent[Any]):
        async def rollout_async(self, task: Any, resources: Any, rollout: Any) -> float:
            agl.emit_message("kept")
            (span,) = self.tracer.get_last_trace()
            other = span.model_copy(update={"name": "other", "attributes": dict[str, Any]()})
            await self.runner.get_store().add_span(other)
            return 0.75

    done = await one(Clashing(), tracer=agl.OtelTracer(interval_seconds=600))
    assert (done.rollout.status, done.reward) == ("succeeded", 0.75)
    assert sorted(span.name for span in done.spans) == [agl.AGL_ANNOTATION, agl.AGL_MESSAGE, "other"]


async def test_an_empty_list_is_worth_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert (await one(lambda task: [])).rollout.status == "succeeded"
    assert "empty list" in caplog.text


SPAN = Span.from_attributes(name="a", attributes={})


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


CORE = SpanCoreFields(name="a", status=SPAN.status, attributes={}, start_time=1.0, end_time=1.0)


@pytest.mark.parametrize(
    ("result", "named"),
    [
        ("yes", "'yes', a str"),
        ({"reward": 1}, "a dict"),
        ((1, 2), "a tuple"),
        ([1, 2], "list of int"),
        ([SPAN, CORE], "Span and SpanCoreFields"),
        (float("nan"), "nan"),
        (10**400, "too large"),
        (Unspeakable(), "a Unspeakable"),
    ],
    ids=["str", "dict", "tuple", "ints", "mixed", "nan", "huge", "unspeakable"],
)
async def test_a_wrong_result_fails_the_attempt_and_is_named(result: Any, named: str) -> None:
    done = await one(lambda task: result)
    assert (done.rollout.status, done.attempt.reason_code) == ("failed", "bad_result")
    assert named in (done.attempt.reason_message or "")
    assert done.reward is None


# --- Exceptions ------------------------------------------------------------------------------------


def raising(task: Any) -> None:
    agl.emit_message("before")
    raise KeyError("gone \0 \ud800")


async def raising_later(task: Any) -> None:
    agl.emit_message("before")
    await asyncio.sleep(0)
    raise KeyError("gone \0 \ud800")


@pytest.mark.parametrize("agent", [raising, raising_later])
async def test_an_exception_fails_the_attempt_with_all_that_is_known(agent: Any) -> None:
    done = await one(agent)
    assert (done.rollout.status, done.attempt.status, done.attempt.reason_code) == ("failed", "failed", "agent_error")
    assert (done.attempt.reason_message or "").startswith("KeyError: ")
    before, exception = done.spans
    assert agl.get_message_value(before) == "before"
    assert exception.attributes["exception.type"] == "KeyError"
    assert agent.__name__ in str(exception.attributes["exception.stacktrace"])
    assert exception.status.status_code == "ERROR"


@pytest.mark.parametrize("agent", [lambda task: sys.exit(3), raising_later], ids=["exit", "raise"])
async def test_a_failing_agent_fails_nothing_else(agent: Any) -> None:
    async with InMemoryLightningStore() as store:
        ids = await enqueued(store, *range(3))

        @agl.rollout
        async def mixed(task: int) -> float:
            if task == 1:
                result = agent(task)
                if result is not None:
                    await result
            return 1.0

        await work(store, mixed, 3)
        assert [(await ended(store, each)).rollout.status for each in ids] == ["succeeded", "failed", "succeeded"]


async def test_an_agent_that_cancels_something_of_its_own_has_failed() -> None:
    async def agent(task: Any) -> None:
        raise asyncio.CancelledError

    assert (await one(agent)).attempt.reason_code == "agent_error"


async def test_a_fault_of_the_runner_itself_leaves_no_rollout_hanging(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(agl.OtelTracer):
        def trace_context(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("the tracer is broken")

    done = await one(lambda task: 1.0, tracer=Broken())
    assert (done.rollout.status, done.attempt.reason_code) == ("failed", "runner_error")
    assert "the tracer is broken" in (done.attempt.reason_message or "")
    assert "could not be carried out" in caplog.text


async def test_whether_there_is_another_attempt_the_store_decides() -> None:
    async with InMemoryLightningStore() as store:
        config = RolloutConfig(max_attempts=3, retry_condition=["failed"])
        rollout_id = (await store.enqueue_rollout("task", config=config)).rollout_id

        @agl.rollout
        def third_time(task: Any, rollout: AttemptedRollout) -> float:
            if rollout.attempt.sequence_id < 3:
                raise ValueError("not yet")
            return 1.0

        await work(store, third_time, 3)
        attempts = await attempts_of(store, rollout_id)
        assert [each.status for each in attempts] == ["failed", "failed", "succeeded"]


# --- Resources -------------------------------------------------------------------------------------


async def test_each_rollout_gets_the_version_it_was_enqueued_with() -> None:
    async with InMemoryLightningStore() as store:
        ids: list[str] = []
        for text in ("one", "two"):
            await store.update_resources("rs-1", {"p": PromptTemplate(template=text, engine="f-string")})
            ids += await enqueued(store, "task", "task")

        @agl.rollout
        def agent(task: Any, prompt_template: PromptTemplate) -> None:
            agl.emit_message(prompt_template.template)

        await work(store, agent, 4)
        said = [agl.get_message_value((await ended(store, each)).spans[0]) for each in ids]
        assert said == ["one", "one", "two", "two"]


async def test_resources_that_are_gone_fail_the_attempt_with_the_reason() -> None:
    class Forgetful(InMemoryLightningStore):
        async def get_resources_by_id(self, resources_id: str, *, version: int | None = None) -> None:
            return None

    async with Forgetful() as store:
        await store.add_resources({"p": PromptTemplate(template="x", engine="f-string")}, resources_id="rs-1")
        (rollout_id,) = await enqueued(store, "task")
        await work(store, agl.rollout(lambda task: 1), 1)
        done = await ended(store, rollout_id)
        assert (done.rollout.status, done.attempt.reason_code) == ("failed", "missing_resources")
        assert "'rs-1' version 1" in (done.attempt.reason_message or "")


async def test_an_agent_that_needs_none_runs_without_resources() -> None:
    assert (await one(lambda task, resources: len(resources))).reward == 0.0


async def test_a_missing_kind_of_resource_is_an_error_of_the_agent() -> None:
    done = await one(lambda task, llm: 1)
    assert (done.rollout.status, "asks for a resource" in (done.attempt.reason_message or "")) == ("failed", True)


# --- Modes, many at once ---------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "reward"), [("train", 1.0), ("val", 2.0), ("test", 2.0), (None, 2.0)])
async def test_the_method_for_the_mode_is_called(mode: Any, reward: float) -> None:
    class Plain(agl.LitAgent[Any]):
        def training_rollout(self, task: Any, resources: Any, rollout: Any) -> float:
            return 1.0

        def validation_rollout(self, task: Any, resources: Any, rollout: Any) -> float:
            return 2.0

    class Coroutine(agl.LitAgent[Any]):
        async def training_rollout_async(self, task: Any, resources: Any, rollout: Any) -> float:
            return 1.0

        async def validation_rollout_async(self, task: Any, resources: Any, rollout: Any) -> float:
            return 2.0

    assert (await one(Plain(), mode=mode)).reward == reward
    assert (await one(Coroutine(), mode=mode)).reward == reward


async def test_an_agent_of_v0_1_gets_its_arguments_in_its_order() -> None:
    class Old(agl.LitAgent[Any]):
        def rollout(self, task: Any, rollout_id: str, resources: Any) -> float:  # pyright: ignore[reportIncompatibleMethodOverride]
            assert (rollout_id.startswith("ro-"), resources) == (True, {})
            return 0.5

    assert (await one(Old())).reward == 0.5


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_as_many_at_once_as_allowed_in_one_loop(concurrency: int) -> None:
    now = most = 0

    @agl.rollout
    async def agent(task: int) -> float:
        nonlocal now, most
        now += 1
        most = max(most, now)
        for _ in range(20):
            await asyncio.sleep(0)
        now -= 1
        return float(task)

    async with InMemoryLightningStore() as store:
        ids = await enqueued(store, *range(30))
        await work(store, agent, 30, concurrency=concurrency)
        assert [(await ended(store, each)).reward for each in ids] == [float(number) for number in range(30)]
        assert most == concurrency


async def test_plain_agents_run_at_once_in_threads() -> None:
    together = threading.Barrier(4, timeout=20)

    @agl.rollout
    def agent(task: int) -> float:
        together.wait()  # passes only if four are in here
        agl.emit_message(f"{task}")
        return float(task)

    async with InMemoryLightningStore() as store:
        ids = await enqueued(store, *range(8))
        await work(store, agent, 8, concurrency=4)
        for number, each in enumerate(ids):
            done = await ended(store, each)
            assert (done.reward, agl.get_message_value(done.spans[0])) == (float(number), f"{number}")


# --- Hooks -----------------------------------------------------------------------------------------


class Witness(agl.Hook):
    """Notes what is called, in which state of the store."""

    def __init__(self, store: LightningStore, log: list[Any]) -> None:
        super().__init__()
        self._store, self._log = store, log

    async def _note(self, what: str, rollout: Rollout, more: Any = None) -> None:
        now = await self._store.get_rollout_by_id(rollout.rollout_id)
        self._log.append((what, None if now is None else now.status in ("succeeded", "failed"), more))

    async def on_rollout_start(self, *, agent: Any, runner: Any, rollout: Rollout) -> None:
        await self._note("rollout start", rollout)

    async def on_trace_start(self, *, agent: Any, runner: Any, tracer: Any, rollout: Rollout) -> None:
        agl.emit_message("start")
        await self._note("trace start", rollout)

    async def on_trace_end(self, *, agent: Any, runner: Any, tracer: Any, rollout: Rollout) -> None:
        agl.emit_reward(0.5)
        await self._note("trace end", rollout)

    async def on_rollout_end(self, *, agent: Any, runner: Any, rollout: Rollout, spans: Any) -> None:
        await self._note("rollout end", rollout, [span.name for span in spans])


@pytest.mark.parametrize("fails", [False, True])
async def test_hooks_are_called_in_order(fails: bool) -> None:
    async with InMemoryLightningStore() as store:
        (rollout_id,) = await enqueued(store, "task")
        log: list[Any] = []

        @agl.rollout
        def agent(task: Any) -> None:
            log.append("agent")
            if fails:
                raise ValueError("no")

        await work(store, agent, 1, hooks=[Witness(store, log)])
        before = [("rollout start", False, None), ("trace start", False, None), "agent"]
        if fails:
            assert log == [*before, ("rollout end", False, [])]
        else:
            names = [agl.AGL_MESSAGE, agl.AGL_ANNOTATION]
            assert log == [*before, ("trace end", False, None), ("rollout end", False, names)]
            assert (await ended(store, rollout_id)).reward == 0.5


async def test_a_failing_hook_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(agl.Hook):
        async def on_rollout_start(self, **arguments: Any) -> None:
            raise ValueError("a")

        async def on_trace_start(self, **arguments: Any) -> None:
            raise ValueError("b")

        async def on_trace_end(self, **arguments: Any) -> None:
            raise ValueError("c")

        async def on_rollout_end(self, **arguments: Any) -> None:
            raise ValueError("d")

    with caplog.at_level(logging.ERROR):
        assert (await one(lambda task: 1, hooks=[Broken()])).reward == 1.0
    assert [record.getMessage().split()[0] for record in caplog.records] == [
        "on_rollout_start",
        "on_trace_start",
        "on_trace_end",
        "on_rollout_end",
    ]


async def test_the_agents_own_hooks_are_called() -> None:
    calls: list[str] = []

    class Agent(agl.LitAgent[Any]):
        def on_rollout_start(self, task: Any, runner: Any, tracer: Any) -> None:
            calls.append(f"start {task.input}")

        def on_rollout_end(self, task: Any, rollout: Any, runner: Any, tracer: Any) -> None:
            calls.append("end")

        def rollout(self, task: Any, resources: Any, rollout: Any) -> float:
            return 1.0

    await one(Agent())
    assert calls == ["start task", "end"]


# --- step ------------------------------------------------------------------------------------------


async def test_a_step_runs_past_the_queue() -> None:
    async with InMemoryLightningStore() as store:
        await enqueued(store, "waiting")
        runner = agl.LitAgentRunner[Any](agl.OtelTracer())
        agent = agl.rollout(lambda task, prompt_template: len(prompt_template.template))
        resources: Any = {"p": PromptTemplate(template="four", engine="f-string")}
        with runner.run_context(agent=agent, store=store):
            rollout = await runner.step("mine", resources=resources, mode="val")
            assert (rollout.status, rollout.input, rollout.mode) == ("succeeded", "mine", "val")
            assert (await ended(store, rollout.rollout_id)).reward == 4.0
            assert (await store.statistics())["rollouts_by_status"]["queuing"] == 1


async def test_a_step_raises_what_the_agent_raises() -> None:
    async with InMemoryLightningStore() as store:
        runner = agl.LitAgentRunner[Any](agl.OtelTracer())
        with runner.run_context(agent=agl.rollout(raising), store=store):
            with pytest.raises(KeyError):
                await runner.step("mine")
            (rollout,) = await store.query_rollouts()
            assert rollout.status == "failed"


async def test_a_step_can_be_given_up() -> None:
    async with InMemoryLightningStore() as store:
        runner = agl.LitAgentRunner[Any](agl.OtelTracer())
        event = threading.Event()

        @agl.rollout
        async def agent(task: Any) -> None:
            event.set()
            await asyncio.sleep(60)

        with runner.run_context(agent=agent, store=store):
            rollout = await runner.step("mine", event=event)
            assert rollout.status == "failed"
            assert (await attempts_of(store, rollout.rollout_id))[0].reason_code == "aborted"


# --- Life ------------------------------------------------------------------------------------------


async def test_a_runner_used_wrongly_says_so() -> None:
    runner = agl.LitAgentRunner[Any](agl.OtelTracer())
    for call in (runner.get_agent, runner.get_store, runner.get_worker_id, runner.run):
        with pytest.raises(RuntimeError):
            call()
    with pytest.raises(RuntimeError, match="init_worker"):
        await runner.iter()
    refused: list[dict[str, Any]] = [
        {"concurrency": 0},
        {"max_rollouts": -1},
        {"heartbeat_interval": 0},
        {"poll_interval": -1},
    ]
    for arguments in refused:
        with pytest.raises(ValueError):
            agl.LitAgentRunner[Any](agl.OtelTracer(), **arguments)
    with pytest.raises(ValueError, match="launch_mode"):
        agl.LitAgentRunner[Any](agl.OtelTracer(), heartbeat_launch_mode="fiber")  # pyright: ignore[reportArgumentType]


async def test_a_runner_leaves_nothing_behind() -> None:
    before = {thread.ident for thread in threading.enumerate()}
    async with InMemoryLightningStore() as store:
        await enqueued(store, *range(4))
        await work(store, agl.rollout(lambda task: 1), 4, concurrency=4)
    deadline = asyncio.get_running_loop().time() + 10
    while left := [
        each.name for each in threading.enumerate() if each.ident not in before and not each.name.startswith("asyncio")
    ]:
        assert asyncio.get_running_loop().time() < deadline, left
        await asyncio.sleep(0.01)
