"""What a ``Trainer`` is made of, before it runs anything."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import agentlightning as agl
from agentlightning.errors import InvalidValue
from agentlightning.trainer.roles import DEFAULT_ROLLOUT_CONFIG, RunnerFactory, RunnerRole
from scenes import llm


def test_what_a_trainer_is_made_of_by_default() -> None:
    trainer = agl.Trainer()
    assert isinstance(trainer.store, agl.InMemoryLightningStore)
    assert isinstance(trainer.strategy, agl.ClientServerExecutionStrategy)
    assert isinstance(trainer.runner, agl.LitAgentRunner)
    assert isinstance(trainer.tracer, agl.OtelTracer)
    assert isinstance(trainer.adapter, agl.TracerTraceToTriplet)
    assert (trainer.algorithm, trainer.llm_proxy, trainer.initial_resources) == (None, None, None)
    assert (trainer.n_runners, trainer.max_rollouts, trainer.hooks) == (1, None, ())
    assert trainer.rollout_config == DEFAULT_ROLLOUT_CONFIG


@pytest.mark.parametrize("spec", ["cs", {"type": "cs"}, {"name": "cs"}, agl.ClientServerExecutionStrategy])
def test_the_strategy_gets_what_the_trainer_was_given(spec: Any) -> None:
    strategy = agl.Trainer(strategy=spec, n_runners=3, port=4848).strategy
    assert isinstance(strategy, agl.ClientServerExecutionStrategy)
    assert (strategy.n_runners, strategy.server_port) == (3, 4848)


def test_what_a_dict_says_goes_before_what_the_trainer_says() -> None:
    strategy = agl.Trainer(strategy={"type": "cs", "n_runners": 2, "server_port": 1}, n_runners=3, port=4848).strategy
    assert isinstance(strategy, agl.ClientServerExecutionStrategy)
    assert (strategy.n_runners, strategy.server_port) == (2, 1)


def test_many_runners_in_threads() -> None:
    strategy = agl.Trainer(strategy="shm", n_runners=3).strategy
    assert isinstance(strategy, agl.SharedMemoryExecutionStrategy)


def test_components_by_name() -> None:
    trainer = agl.Trainer(
        tracer="dummy", store={"type": "sqlite", "path": "x.db"}, algorithm="baseline", llm_proxy={"port": 4000}
    )
    assert isinstance(trainer.tracer, agl.DummyTracer)
    assert isinstance(trainer.store, agl.SqliteLightningStore)
    assert isinstance(trainer.algorithm, agl.Baseline)
    assert trainer.llm_proxy is not None
    assert trainer.llm_proxy.get_store() is trainer.store


def test_a_hook_or_several() -> None:
    one, other = agl.Hook(), agl.Hook()
    assert agl.Trainer(hooks=one).hooks == (one,)
    assert agl.Trainer(hooks=[one, other]).hooks == (one, other)


def test_a_name_implies_a_file_and_a_folder_and_makes_neither_yet(tmp_path: Path) -> None:
    trainer = agl.Trainer(run="tuesday", runs_folder=tmp_path)
    assert isinstance(trainer.store, agl.SqliteLightningStore)
    assert trainer.store.path == tmp_path / "tuesday" / "store.db"
    assert trainer.run is not None
    assert trainer.run.checkpoint_path.parent == tmp_path / "tuesday"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spec", ["x.db", "sqlite://x.db", "./x.db", Path("x.db")])
def test_a_file_is_a_store(spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    @agl.algo
    async def enqueue(store: agl.LightningStore) -> None:
        await store.enqueue_rollout("task")

    for total in (1, 2):  # the file is free again after the first
        trainer = agl.Trainer(store=spec, algorithm=enqueue, strategy="shm", progress="off")
        trainer.fit(agl.rollout(lambda task: 1.0))

        async def count(store: Any) -> int:
            async with store:
                return (await store.statistics())["total_rollouts"]

        assert asyncio.run(count(agl.SqliteLightningStore("x.db"))) == total


@pytest.mark.parametrize("spec", ["http://h:4747", "postgresql://h/db"])
def test_a_url_that_is_no_store_says_how_one_is_given(spec: str) -> None:
    with pytest.raises(InvalidValue, match=r"give (store=agl\.LightningStoreClient|the path of a file)"):
        agl.Trainer(store=spec)


def test_a_run_on_this_machine_alone_takes_any_port() -> None:
    def port(**options: Any) -> int:
        return agl.ClientServerExecutionStrategy(**options).server_port

    assert agl.Trainer().strategy.server_port == 0  # type: ignore[attr-defined]
    assert agl.Trainer(port=4747).strategy.server_port == 4747  # type: ignore[attr-defined]
    assert port(server_host="0.0.0.0", api_key="long-enough") == port(role="algorithm") == port(role="runner") == 4747


def test_a_store_of_ones_own_goes_before_the_file(tmp_path: Path) -> None:
    store = agl.InMemoryLightningStore()
    trainer = agl.Trainer(run="tuesday", runs_folder=tmp_path, store=store)
    assert trainer.store is store
    assert trainer.run is not None


def test_old_names_are_understood() -> None:
    with pytest.warns(DeprecationWarning, match="now called|no effect") as told:
        trainer = agl.Trainer(
            n_workers=2, max_tasks=5, triplet_exporter=agl.TracerTraceToTriplet, dev=True, daemon=False
        )
    assert (trainer.n_runners, trainer.n_workers, trainer.max_rollouts, trainer.max_tasks) == (2, 2, 5, 5)
    assert trainer.triplet_exporter is trainer.adapter
    assert len(told) == 5


@pytest.mark.parametrize(
    "arguments",
    [
        {"n_runners": 1, "n_workers": 2},
        {"strategy": "css"},
        {"algorithm": agl.InMemoryLightningStore},
        {"run": "../elsewhere"},
        {"progress": "loud"},
        {"llm_proxy": "nothing"},
        {"n_runners": 0},
        {"n_runners": "2"},
        {"max_rollouts": -1},
        {"hooks": 7},
        {"hooks": [agl.Hook(), "other"]},
        {"rollout_config": {"max_attempts": 2}},
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue, match=next(iter(arguments))):
        agl.Trainer(**arguments)


def test_what_a_ready_made_component_does_not_take_any_more_is_told() -> None:
    strategy = agl.ClientServerExecutionStrategy(n_runners=2, server_port=4848)
    runner = agl.LitAgentRunner(agl.OtelTracer())
    with pytest.warns(UserWarning, match="has no effect") as told:
        agl.Trainer(
            strategy=strategy,
            n_runners=3,
            port=1,
            runner=runner,
            tracer="dummy",
            max_rollouts=5,
            default_resources={"llm": llm()},
        )
    ignored = ["tracer", "max_rollouts", "default_resources", "n_runners", "server_port"]
    assert [str(each.message).split()[0] for each in told] == ignored
    assert {each.filename for each in told} == {__file__}
    agl.Trainer(strategy=strategy, n_runners=2, port=4848, runner=runner, tracer=runner.tracer)


@pytest.mark.parametrize("spec", [None, agl.LitAgentRunner, {"poll_interval": 1.0}])
def test_runners_get_the_default_resources(spec: Any) -> None:
    defaults = {"llm": llm()}
    runner: Any = agl.Trainer(runner=spec, default_resources=defaults).runner
    assert runner.default_resources == defaults
    assert agl.Trainer(runner=spec).runner.default_resources is None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(InvalidValue, match=r"default_resources has \{'llm': 'gpt'\}; give resources by name"):
        agl.Trainer(runner=spec, default_resources={"llm": "gpt"})  # pyright: ignore[reportArgumentType]


def test_every_worker_gets_a_runner_and_a_tracer_of_its_own() -> None:
    factory = RunnerFactory({"concurrency": 4}, None, 7)
    first, second = factory(0), factory(1)
    assert isinstance(first, agl.LitAgentRunner)
    assert isinstance(second, agl.LitAgentRunner)
    assert first is not second
    assert first.tracer is not second.tracer


def test_objects_are_the_first_workers_and_others_get_copies() -> None:
    runner = agl.LitAgentRunner(agl.OtelTracer())
    factory = RunnerFactory(runner, None, None)
    assert factory(0) is runner
    assert factory(1) is not runner
    tracer = agl.DummyTracer()
    factory = RunnerFactory(None, tracer, None)
    assert factory.tracer(0) is tracer
    assert factory.tracer(1) is not tracer


def test_a_role_can_be_sent_to_another_process() -> None:
    @agl.rollout
    def agent(task: int) -> float:
        return float(task)

    role = RunnerRole(RunnerFactory({"concurrency": 2}, None, None), agent, (agl.Hook(),))
    again = pickle.loads(cloudpickle.dumps(role))
    assert again.agent(3) == 3.0
    assert isinstance(again.make_runner(0), agl.LitAgentRunner)
