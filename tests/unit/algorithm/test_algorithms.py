"""What every algorithm has: what it works with, functions as algorithms, decorators, runs, batches."""

from __future__ import annotations

import inspect
import logging
import os
from pathlib import Path
from typing import Any

import pytest

import agentlightning as agl
from agentlightning.adapter.adapters import TraceToMessages
from agentlightning.algorithm.batches import enqueue_inputs, wait_for_ends
from agentlightning.algorithm.resume import reassign_unfinished
from agentlightning.errors import IdReused, InvalidValue, StaleAttempt
from agentlightning.proxy.llm_proxy import LLMProxy
from agentlightning.store.sqlite.store import InMemoryLightningStore
from agentlightning.types import AttemptStatus, RolloutConfig
from scenes import claimed, finish, llm, span_of

# --- The base --------------------------------------------------------------------------------------


def test_what_was_not_given_is_an_error_that_says_so() -> None:
    algorithm = agl.Algorithm()
    for name in ("trainer", "adapter", "store", "client"):
        with pytest.raises(ValueError, match=f"no {name}.*set_{name}"):
            getattr(algorithm, f"get_{name}")()
    for name in ("llm_proxy", "initial_resources", "rollout_config", "run"):
        assert getattr(algorithm, f"get_{name}")() is None
    with pytest.raises(NotImplementedError, match="no run method"):
        algorithm()


def test_what_is_given_is_there() -> None:
    algorithm = agl.Algorithm()
    for name in ("trainer", "llm_proxy", "adapter", "store", "initial_resources", "rollout_config", "run", "client"):
        value: Any = object()
        getattr(algorithm, f"set_{name}")(value)
        assert getattr(algorithm, f"get_{name}")() is value


def test_reports_go_to_the_reporter_or_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    algorithm = agl.Algorithm()
    with caplog.at_level(logging.INFO):
        algorithm.report(3, reward_mean=0.25)
    assert "Algorithm, step 3: reward_mean 0.25" in caplog.text
    seen: list[Any] = []
    algorithm.set_reporter(lambda *told: seen.append(told))
    algorithm.report(4, loss=1.0)
    assert seen == [(4, {"loss": 1.0})]


# --- Functions as algorithms -----------------------------------------------------------------------


def test_a_function_gets_what_it_names(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    @agl.algo
    def algorithm(
        *,
        store: Any,
        train_dataset: Any,
        val_dataset: Any,
        llm_proxy: Any,
        adapter: Any,
        initial_resources: Any,
        run: Any,
    ) -> None:
        """What it does."""
        seen.update(locals())

    values = {"store": object(), "llm_proxy": object(), "adapter": object(), "initial_resources": {"x": llm()}}
    for name, value in values.items():
        getattr(algorithm, f"set_{name}")(value)
    run = agl.Run("r", tmp_path)
    algorithm.set_run(run)
    assert not algorithm.is_async()
    assert algorithm.run([1], [2]) is None
    del seen["seen"]
    assert seen == {**values, "train_dataset": [1], "val_dataset": [2], "run": run}
    assert algorithm.__doc__ == "What it does."


async def test_a_coroutine_function_is_awaited_and_reports() -> None:
    told: list[Any] = []

    @agl.algo
    async def algorithm(train_dataset: list[int], report: Any, extra: int = 5) -> None:
        report(0, total=float(sum(train_dataset) + extra))

    algorithm.set_reporter(lambda step, numbers: told.append((step, numbers)))
    assert algorithm.is_async()
    result = algorithm.run([1, 2])
    assert inspect.isawaitable(result)
    await result
    assert told == [(0, {"total": 8.0})]


def test_names_and_datasets_that_mean_nothing_are_refused() -> None:
    def typo(stor: Any) -> None: ...
    def no_validation(train_dataset: Any) -> None: ...

    with pytest.raises(TypeError, match=r"'stor'.*llm_proxy"):
        agl.algo(typo)
    with pytest.raises(TypeError, match="takes no val_dataset"):
        agl.algo(no_validation).run([1], [2])


def test_called_itself_it_is_the_function() -> None:
    assert agl.algo(lambda store: store)("anything") == "anything"


# --- Decorators of methods -------------------------------------------------------------------------


class Decorated(agl.Algorithm):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    @agl.with_llm_proxy()
    @agl.with_store
    async def run(self, store: Any, llm_proxy: Any, train_dataset: Any = None, val_dataset: Any = None) -> None:
        self.seen.append((store, llm_proxy, llm_proxy is not None and llm_proxy.is_running(), train_dataset))

    @agl.with_store
    @agl.with_llm_proxy(required=True, auto_start=False)
    async def other_order(self, store: Any, llm_proxy: Any) -> None:
        self.seen.append((store, llm_proxy, llm_proxy.is_running()))


async def test_store_and_proxy_are_handed_in() -> None:
    algorithm, store, proxy = Decorated(), object(), LLMProxy()
    with pytest.raises(InvalidValue, match="no store"):
        await algorithm.run()
    algorithm.set_store(store)  # pyright: ignore[reportArgumentType]
    await algorithm.run(train_dataset=[1])
    with pytest.raises(InvalidValue, match="needs an LLM proxy"):
        await algorithm.other_order()
    algorithm.set_llm_proxy(proxy)
    await algorithm.run(train_dataset=[2])
    await algorithm.other_order()
    assert algorithm.seen == [(store, None, False, [1]), (store, proxy, True, [2]), (store, proxy, False)]
    assert not proxy.is_running(), "what was started for the method is stopped after it"


# --- Runs ------------------------------------------------------------------------------------------


def test_a_checkpoint_is_what_was_saved_last(tmp_path: Path) -> None:
    run = agl.Run("night-1", tmp_path / "runs")
    assert run.load_checkpoint() is None
    run.save_checkpoint({"step": 1, "weights": [0.1 + 0.2]})
    run.save_checkpoint({"step": 2, "weights": [0.1 + 0.2]})
    assert agl.Run("night-1", tmp_path / "runs").load_checkpoint() == {"step": 2, "weights": [0.1 + 0.2]}
    assert agl.Run("other", tmp_path / "runs").load_checkpoint() is None
    assert list(run.checkpoint_path.parent.iterdir()) == [run.checkpoint_path]


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = agl.Run("r", tmp_path)
    run.save_checkpoint({"step": 1})
    with pytest.raises(InvalidValue, match="not JSON"):
        run.save_checkpoint({"step": float("nan")})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            run.save_checkpoint({"step": 2})
    assert run.load_checkpoint() == {"step": 1}
    assert list(tmp_path.iterdir()) == [run.checkpoint_path]


def test_a_file_that_is_no_checkpoint_is_not_taken_for_none(tmp_path: Path) -> None:
    run = agl.Run("r", tmp_path)
    for broken in ("{", "[]"):
        run.checkpoint_path.write_text(broken)
        with pytest.raises(InvalidValue, match="move it away"):
            run.load_checkpoint()


def test_ids_follow_from_the_place(tmp_path: Path) -> None:
    run = agl.Run("r", tmp_path)
    assert run.rollout_id(3, 7) == agl.Run("r", tmp_path).rollout_id(3, 7)
    assert len({run.rollout_id(1, 11), run.rollout_id(11, 1), run.rollout_id(1, 1), run.rollout_id(1, 1, "val")}) == 4
    for name in ("", "a b", "a/b", "x" * 81, "-a", ".."):
        with pytest.raises(InvalidValue, match="run name"):
            agl.Run(name, tmp_path)


# --- Batches ---------------------------------------------------------------------------------------


def test_batches_cover_everything_in_order() -> None:
    assert list(agl.batch_iter_over_dataset(range(5), 2)) == [[0, 1], [2, 3], [4]]  # pyright: ignore[reportArgumentType]
    assert list(agl.batch_iter_over_dataset([], 2)) == []
    with pytest.raises(ValueError, match="batch_size"):
        next(agl.batch_iter_over_dataset([1], 0))


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (agl.Baseline, {"n_epochs": "2"}),
        (agl.Baseline, {"max_queue_length": 0}),
        (agl.Baseline, {"polling_interval": "soon"}),
        (agl.Baseline, {"train_split": 2}),
        (agl.GRPO, {"policy": 3}),
        (agl.GRPO, {"policy": agl.SoftmaxPolicy(["a"]), "n_steps": 1.5}),
        (agl.GRPO, {"policy": agl.SoftmaxPolicy(["a"]), "endpoint_port": -1}),
        (agl.APO, {"beam_width": 0}),
        (agl.APO, {"rollout_batch_timeout": float("inf")}),
    ],
)
def test_a_wrong_argument_is_named(make: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue, match=f"{list(arguments)[-1]} is"):
        make(**arguments)


@pytest.mark.parametrize("dataset", [7, "tasks.jsonl", {"a": 1}, iter([1])], ids=["int", "str", "dict", "iterator"])
async def test_what_has_no_inputs_by_position_is_refused_by_name(dataset: Any) -> None:
    policy = agl.SoftmaxPolicy(["a", "b"])
    for algorithm in (agl.Baseline(), agl.GRPO(policy), agl.APO(object())):
        with pytest.raises(InvalidValue, match=f"val_dataset is a {type(dataset).__name__}"):
            await algorithm.run([1], dataset)


async def test_what_exists_is_enqueued_once() -> None:
    async with InMemoryLightningStore() as store:
        algorithm = agl.Algorithm()
        algorithm.set_store(store)

        async def enqueue(*inputs: Any) -> list[str]:
            return await enqueue_inputs(algorithm, inputs, mode="train", resources_id=None, step=0)

        algorithm.set_run(agl.Run("r", "."))
        await enqueue(0, 1)
        await finish(store, await claimed(store))
        assert await enqueue(0, 1, 2) == ["r:0:0", "r:0:1", "r:0:2"]
        assert (await store.query_rollouts()).total == 3
        with pytest.raises(IdReused, match="other tasks"):
            await enqueue("else")
        algorithm.set_run(None)
        assert len({*await enqueue("0", "1"), *await enqueue("0", "1")}) == 4


# --- Leftovers -------------------------------------------------------------------------------------


async def test_what_a_run_left_unfinished_gets_the_resources_of_its_new_start() -> None:
    def model(port: int) -> agl.LLM:
        return agl.LLM(endpoint=f"http://127.0.0.1:{port}/v1", model="m")

    async with InMemoryLightningStore() as store:
        old = await store.add_resources({"llm": model(1)})
        same = await store.add_resources({"llm": model(2)})
        new = await store.add_resources({"llm": model(2)})
        for name in ("r:ended", "r:running", "r:waiting", "other:r:waiting"):
            await store.enqueue_rollout(name, rollout_id=name, resources_id=old.resources_id)
        await store.enqueue_rollout("same", rollout_id="r:same", resources_id=same.resources_id, priority=9)
        kept, ended, running = [await claimed(store) for _ in range(3)]
        await finish(store, ended)

        await reassign_unfinished(store, agl.Run("r", "."), lambda _: new)

        now = {each.rollout_id: (each.status, each.resources_id) for each in await store.query_rollouts()}
        assert now == {
            "r:ended": ("succeeded", old.resources_id),
            "r:running": ("requeuing", new.resources_id),
            "r:waiting": ("queuing", new.resources_id),
            "other:r:waiting": ("queuing", old.resources_id),
            "r:same": ("preparing", same.resources_id),
        }
        with pytest.raises(StaleAttempt):
            await store.update_attempt(running.rollout_id, running.attempt.attempt_id, "succeeded")
        await finish(store, kept)


async def test_spans_of_failed_rollouts_are_read_if_they_are_wanted() -> None:
    async with InMemoryLightningStore() as store:
        statuses: tuple[AttemptStatus, ...] = ("succeeded", "failed")
        for status in statuses:
            rollout = await store.start_rollout({}, rollout_id=status)
            await store.add_span(span_of(rollout))
            await store.update_attempt(status, rollout.attempt.attempt_id, status)
        for wanted, counts in ((True, [1, 1]), (False, [1, 0])):
            ended = await wait_for_ends(store, ["succeeded", "failed"], reads_failed=wanted)
            assert [each and len(each.spans) for each in ended] == counts


def test_names_of_the_old_interface_are_where_they_were() -> None:
    from agentlightning.adapter import TraceToMessages as FromPackage, __all__ as adapters
    from agentlightning.algorithm import Algorithm, Baseline, FastAlgorithm, algo

    assert (FromPackage, Algorithm, Baseline, FastAlgorithm, algo) == (
        TraceToMessages,
        agl.Algorithm,
        agl.Baseline,
        agl.FastAlgorithm,
        agl.algo,
    )
    assert RolloutConfig() == agl.RolloutConfig()
    old = "Adapted Adapter LlmProxyTraceToTriplet OpenAIMessages OtelTraceAdapter RewardMatchPolicy TraceAdapter"
    old += " TraceToMessages TraceToTripletBase TraceTree TracerTraceToTriplet UnusableSpan"
    assert set(old.split()) <= set(adapters)
