"""GRPO against a real store, its endpoint, and the LLM proxy: it learns, and counts what it cannot use."""

from __future__ import annotations

import itertools
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from agentlightning.algorithm.grpo import GRPO
from agentlightning.algorithm.policy import PolicyUpdate
from agentlightning.algorithm.run import Run
from agentlightning.demo import game
from agentlightning.demo.game import win_rate
from agentlightning.demo.softmax_policy import SoftmaxPolicy
from agentlightning.errors import InvalidValue, NothingToLearn
from agentlightning.proxy.llm_proxy import LLMProxy
from agentlightning.store.base import LightningStore
from agentlightning.store.sqlite.store import InMemoryLightningStore
from agentlightning.types import AttemptedRollout, RolloutConfig, Span
from game_runners import SECRETS, Fault, GameRunners


class Reports:
    """Takes what an algorithm reports."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, dict[str, float]]] = []

    def __call__(self, step: int, numbers: dict[str, float]) -> None:
        self.steps.append((step, numbers))

    def total(self, name: str) -> float:
        return sum(numbers[name] for _, numbers in self.steps)


class WatchedStore(InMemoryLightningStore):
    """A store that knows whose spans were read."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []

    async def query_spans(self, rollout_id: str, *others: Any, **more: Any) -> Any:
        self.read.append(rollout_id)
        return await super().query_spans(rollout_id, *others, **more)


@asynccontextmanager
async def ready(
    algorithm: GRPO,
    fault: Callable[[AttemptedRollout], Fault | None] | None = None,
    proxy: LLMProxy | None = None,
) -> AsyncIterator[tuple[WatchedStore, GameRunners, Reports]]:
    """The algorithm with everything it needs but the call of ``run``."""
    reports = Reports()
    async with WatchedStore() as store, GameRunners(store, fault) as runners:
        algorithm.set_store(store)
        algorithm.set_llm_proxy(proxy)
        algorithm.set_reporter(reports)
        yield store, runners, reports


async def calls_of(store: LightningStore, rollout_id: str) -> list[Span]:
    return [span for span in await store.query_spans(rollout_id) if span.name.startswith("chat")]


@pytest.mark.parametrize("with_proxy", [True, False], ids=["through the proxy", "traced by the agent"])
async def test_a_few_steps_make_the_policy_better(with_proxy: bool) -> None:
    policy = SoftmaxPolicy(game.VOCABULARY)
    # Rollouts run at once, so chance decides which of them gets which answer of the model: the groups are so large,
    # and the steps so many, that the outcome does not depend on it.
    algorithm = GRPO(policy, group_size=32, n_steps=10, seed=1)
    async with ready(algorithm, proxy=LLMProxy() if with_proxy else None) as (_, _, reports):
        await algorithm.run([{"secret": 8}])  # always the same one: quickly learned
    rewards = [numbers["reward_mean"] for _, numbers in reports.steps]
    assert [step for step, _ in reports.steps] == list(range(10))
    assert rewards[-1] > rewards[0]
    assert reports.total("groups_used") == 10
    for dropped in ("groups_dropped", "rollouts_failed", "calls_unusable"):
        assert reports.total(dropped) == 0, dropped
    played = game.start(8)
    while played.outcome == "playing":
        played = game.step(played, game.best_guess(policy, played))
    assert played.reward == 1.0, "its best guesses win the game that it was trained on; which ones, chance decides"


async def test_the_proxy_says_which_weights_answered_and_is_left_as_it_was() -> None:
    other = {"model_name": "judge", "litellm_params": {"model": "openai/judge", "api_base": "http://127.0.0.1:9/v1"}}
    proxy = LLMProxy(model_list=[other])
    algorithm = GRPO(SoftmaxPolicy(game.VOCABULARY), group_size=2, batch_size=2, n_steps=2)
    async with ready(algorithm, proxy=proxy) as (store, runners, _):
        await algorithm.run(SECRETS)
        versions = [
            {span.attributes["agentlightning.llm.model_version"] for span in await calls_of(store, rollout_id)}
            for rollout_id in runners.played
        ]
    assert versions == [{"0"}] * 4 + [{"1"}] * 4
    assert list(proxy.model_list) == [other]
    assert not proxy.is_running()


async def test_a_group_with_failed_rollouts_is_dropped_whole_and_counted() -> None:
    def secret_three_fails(claimed: AttemptedRollout) -> Fault | None:
        return "fail" if claimed.input["secret"] == 3 else None

    policy = SoftmaxPolicy(game.VOCABULARY)
    algorithm = GRPO(policy, group_size=2, n_steps=1)
    async with ready(algorithm, secret_three_fails) as (store, runners, reports):
        await algorithm.run(SECRETS[:4])
        failed = {each.rollout_id for each in await store.query_rollouts(status_in=["failed"])}
    assert len(failed) == 2
    assert set(store.read) == {*runners.played} - failed, "what failed is not learned from, so it is not read"
    numbers = reports.steps[0][1]
    assert len(runners.played) == 2 * 4
    assert (numbers["groups_used"], numbers["groups_dropped"]) == (3, 1)
    assert numbers["rollouts_failed"] == 2


def only_the_first(fault: Fault) -> Callable[[AttemptedRollout], Fault | None]:
    """The first rollout that is claimed has this fault, also when it is retried, and no other."""
    bad: list[str] = []

    def fault_of(claimed: AttemptedRollout) -> Fault | None:
        if not bad:
            bad.append(claimed.rollout_id)
        return fault if claimed.rollout_id in bad else None

    return fault_of


@pytest.mark.parametrize(
    ("fault", "counted"),
    [("fail", "rollouts_failed"), ("no_reward", "rollouts_unrewarded"), ("no_call", "rollouts_unusable")],
)
async def test_one_bad_rollout_is_left_out_of_its_group(
    fault: Fault, counted: str, caplog: pytest.LogCaptureFixture
) -> None:
    policy = SoftmaxPolicy(game.VOCABULARY)
    algorithm = GRPO(policy, group_size=16, batch_size=1, n_steps=1)
    async with ready(algorithm, only_the_first(fault)) as (_, _, reports):
        await algorithm.run([{"secret": 8}])
    numbers = reports.steps[0][1]
    assert (numbers["groups_used"], numbers["groups_dropped"], numbers[counted]) == (1, 0, 1)
    assert numbers["failures"] == (fault == "fail")
    assert list(policy.contexts()) != []
    assert ("retry_condition" in caplog.text) == (fault == "fail")


TASKS_OF_32 = [*SECRETS, *SECRETS, *SECRETS[:2]]


def one_in(count: int) -> Callable[[AttemptedRollout], Fault | None]:
    """One in so many rollouts fails, in the order of their claims."""
    numbers = itertools.count()
    return lambda _: None if next(numbers) % count else "fail"


@pytest.mark.parametrize(
    ("count", "failures"),
    [pytest.param(10, 52, marks=pytest.mark.slow, id="a tenth"), pytest.param(4, 128, id="a quarter")],
)
async def test_of_32_groups_of_16_with_failures_every_group_is_used(count: int, failures: int) -> None:
    algorithm = GRPO(SoftmaxPolicy(game.VOCABULARY), group_size=16, batch_size=32, n_steps=1)
    async with ready(algorithm, one_in(count)) as (_, _, reports):
        await algorithm.run(TASKS_OF_32)
    numbers = reports.steps[0][1]
    assert (numbers["groups_used"], numbers["groups_dropped"]) == (32, 0)
    assert (numbers["failures"], numbers["rollouts_failed"]) == (failures, failures)


@pytest.mark.slow
async def test_with_drop_group_the_same_failures_leave_nothing_to_learn() -> None:
    """The negative control of the test above."""
    settings: dict[str, Any] = {"group_size": 16, "batch_size": 32, "n_steps": 1, "on_failure": "drop_group"}
    algorithm = GRPO(SoftmaxPolicy(game.VOCABULARY), **settings)
    async with ready(algorithm, one_in(4)) as (_, _, reports):
        with pytest.raises(NothingToLearn, match=r"dropped 32 groups \("):
            await algorithm.run(TASKS_OF_32)
    assert (reports.total("groups_used"), reports.total("groups_dropped")) == (0, 32)


# --- Nothing to compare -----------------------------------------------------------------------------------


@pytest.mark.parametrize("imposes", [True, False])
async def test_an_agent_that_pins_its_sampling_is_sampled_anyway_or_it_is_said(
    imposes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {} if imposes else {"imposed_sampling": None}
    algorithm = GRPO(SoftmaxPolicy(game.VOCABULARY), group_size=16, batch_size=4, n_steps=2, **settings)
    reports, proxy = Reports(), LLMProxy()
    async with InMemoryLightningStore() as store, GameRunners(store, sends={"temperature": 0, "seed": 1}):
        algorithm.set_store(store)
        algorithm.set_llm_proxy(proxy)
        algorithm.set_reporter(reports)
        if imposes:
            await algorithm.run(SECRETS, SECRETS[:2])
        else:
            with pytest.raises(NothingToLearn, match=r"^nothing was learned: .*exactly the same replies.* pin temp"):
                await algorithm.run(SECRETS, SECRETS[:2])
        spans = {each.mode: await calls_of(store, each.rollout_id) for each in await store.query_rollouts()}
    shares = [numbers["frac_reward_zero_std"] for _, numbers in reports.steps]
    assert min(shares) < 1 if imposes else shares == [1, 1]
    assert caplog.text.count("has taught nothing") == (not imposes), "once, after the first such step"
    sent = {mode: {span.attributes["gen_ai.request.temperature"] for span in calls} for mode, calls in spans.items()}
    assert sent == {"train": {1.0 if imposes else 0}, "val": {0}}


async def test_a_run_without_spread_says_so_again_when_it_is_repeated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run_of(group_size: int) -> GRPO:
        settings: dict[str, Any] = {"batch_size": 2, "n_steps": 1, "imposed_sampling": None}
        algorithm = GRPO(SoftmaxPolicy(game.VOCABULARY), group_size=group_size, **settings)
        algorithm.set_run(Run(f"run-{group_size}", tmp_path))
        return algorithm

    async with InMemoryLightningStore() as store, GameRunners(store, sends={"temperature": 0}):
        for _ in range(2):
            algorithm = run_of(16)
            algorithm.set_store(store)
            with pytest.raises(NothingToLearn, match="nothing was learned"):
                await algorithm.run(SECRETS)
        caplog.clear()
        algorithm = run_of(2)
        algorithm.set_store(store)
        await algorithm.run(SECRETS)
        assert "nothing was learned" in caplog.text, "so few attempts may be equal by chance: a warning, no error"


@pytest.mark.parametrize(
    ("fault", "counted"),
    [("fail", "rollouts_failed"), ("no_reward", "rollouts_unrewarded"), ("no_call", "rollouts_unusable")],
)
async def test_with_drop_group_one_bad_rollout_teaches_nothing(fault: Fault, counted: str) -> None:
    policy = SoftmaxPolicy(game.VOCABULARY)
    algorithm = GRPO(policy, group_size=8, batch_size=1, n_steps=1, on_failure="drop_group")
    async with ready(algorithm, only_the_first(fault)) as (_, _, reports):
        with pytest.raises(NothingToLearn, match=r"dropped 1 group \("):
            await algorithm.run([{"secret": 8}])
    numbers = reports.steps[0][1]
    assert (numbers["groups_used"], numbers["groups_dropped"], numbers[counted]) == (0, 1, 1)
    assert list(policy.contexts()) == [], "the only group was dropped, so nothing may have been learned"


async def test_without_the_bad_rollout_the_same_group_teaches() -> None:
    """The negative control of the test above: it is the fault that kept the policy from learning."""
    policy = SoftmaxPolicy(game.VOCABULARY)
    algorithm = GRPO(policy, group_size=8, batch_size=1, n_steps=1)
    async with ready(algorithm) as (_, _, reports):
        await algorithm.run([{"secret": 8}])
    assert reports.steps[0][1]["groups_used"] == 1
    assert list(policy.contexts()) != []


async def test_a_lost_worker_is_retried_and_its_group_is_used() -> None:
    lost: list[str] = []

    def one_is_lost(claimed: AttemptedRollout) -> Fault | None:
        if not lost:
            lost.append(claimed.rollout_id)
            return "lose_worker"
        return None

    algorithm = GRPO(SoftmaxPolicy(game.VOCABULARY), group_size=4, batch_size=2, n_steps=1)
    algorithm.set_rollout_config(RolloutConfig(max_attempts=3, retry_condition=["unresponsive"]))
    async with ready(algorithm, one_is_lost) as (_, runners, reports):
        await algorithm.run(SECRETS)
    numbers = reports.steps[0][1]
    assert runners.played.count(lost[0]) == 2
    assert (numbers["groups_used"], numbers["groups_dropped"], numbers["attempts_retried"]) == (2, 0, 1)


@pytest.mark.parametrize(("n_steps", "tried"), [(20, 3), (1, 1)])
async def test_when_nothing_ever_succeeds_the_run_fails_and_says_why(n_steps: int, tried: int) -> None:
    algorithm = GRPO(SoftmaxPolicy(game.VOCABULARY), group_size=2, batch_size=2, n_steps=n_steps)
    async with ready(algorithm, lambda _: "fail") as (_, runners, _):
        with pytest.raises(
            NothingToLearn, match=r"dropped 2 groups \(failed rollouts: 4; .* agent_error: .* the test said so"
        ):
            await algorithm.run(SECRETS)
    assert len(runners.played) == tried * 2 * 2


async def test_validation_takes_the_most_probable_words_and_changes_nothing() -> None:
    algorithm = GRPO(SoftmaxPolicy(game.VOCABULARY), group_size=4, batch_size=4, n_steps=2, validate_every=1, seed=3)
    async with ready(algorithm) as (_, runners, reports):
        await algorithm.run(SECRETS, SECRETS)
    for mode, temperature in (("train", 1.0), ("val", 0.0)):
        told = [runners.sampling[rollout_id] for rollout_id, each in runners.modes.items() if each == mode]
        assert told == [{"temperature": temperature}] * len(told)
        assert told
    assert ["val_reward_mean" in numbers for _, numbers in reports.steps] == [True, True]
    last = reports.steps[-1][1]
    assert last["val_rollouts"] == len(SECRETS)
    assert last["val_unrewarded"] == 0
    assert last["val_reward_mean"] == pytest.approx(win_rate(algorithm.policy)), "so the endpoint was greedy"


async def test_every_task_comes_up_once_before_any_comes_twice() -> None:
    algorithm = GRPO(SoftmaxPolicy(game.VOCABULARY), group_size=2, batch_size=4, n_steps=4, seed=5)
    async with ready(algorithm) as (store, _, _):
        await algorithm.run(SECRETS)
        rollouts = await store.query_rollouts()
    secrets = [rollout.input["secret"] for rollout in rollouts]
    groups = secrets[::2]
    assert groups == secrets[1::2], "a group is one task"
    assert sorted(groups[:15]) == list(range(1, 16))
    assert groups[:4] != [1, 2, 3, 4]


async def test_no_tasks_and_bad_numbers_are_refused() -> None:
    policy = SoftmaxPolicy(game.VOCABULARY)
    refused: list[dict[str, Any]] = [{"group_size": 1}, {"batch_size": 0}, {"n_steps": 0}, {"validate_every": -1}]
    refused += [{"on_failure": "drop"}, {"on_failure": math.nan}, {"on_failure": True}]
    for wrong in refused:
        with pytest.raises(InvalidValue, match=next(iter(wrong))):
            GRPO(policy, **wrong)
    with pytest.raises(InvalidValue, match="out of range"):
        PolicyUpdate(clip=0)
    algorithm = GRPO(policy)
    with pytest.raises(InvalidValue, match="no tasks"):
        await algorithm.run([])
