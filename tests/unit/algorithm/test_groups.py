"""Groups: which attempts are compared, and what is said when no comparison is possible."""

from __future__ import annotations

import re
from typing import Any

import pytest

from agentlightning.adapter.adapters import TracerTraceToTriplet
from agentlightning.algorithm.batches import EndedRollout
from agentlightning.algorithm.groups import GroupReader, OnFailure, StepGroups, reward_of
from agentlightning.demo.softmax_policy import SoftmaxPolicy
from agentlightning.lifecycle import reasons
from agentlightning.types import Attributes, Rollout, Span

WORDS = ["red", "blue"]


def ended(
    reward: float | None, word: str = "red", status: Any = "succeeded", reason: str | None = None
) -> EndedRollout:
    """A rollout that asked the model once, got this word, and then this reward."""
    call: Attributes = {"gen_ai.prompt.0.content": "which?", "gen_ai.completion.0.content": word}
    spans = [Span.from_attributes(name="openai.chat.completion", attributes=call, start_time=1.0, end_time=2.0)]
    if reward is not None:
        given: Attributes = {"agentlightning.reward.0.value": reward}
        spans.append(Span.from_attributes(name="agentlightning.annotation", attributes=given))
    rollout = Rollout(rollout_id="ro-1", input=None, start_time=0.0, status=status, reason_code=reason)
    return EndedRollout(rollout, spans)


def failed(reason: str = "agent_error") -> EndedRollout:
    """One that asked the model, and then failed."""
    return ended(None, "blue", "failed", reason)


def read(*group: EndedRollout, on_failure: OnFailure = "drop_member") -> StepGroups:
    """What one group gives."""
    policy = SoftmaxPolicy(WORDS)
    return GroupReader(policy, "policy", TracerTraceToTriplet(), len(group), False, on_failure).read(group)


def advantages(step: StepGroups) -> list[list[float]]:
    return [[member.advantage for member in group] for group in step.groups]


def test_a_failed_attempt_is_left_out_and_the_others_are_compared() -> None:
    step = read(ended(1.0), failed(), ended(0.0))
    assert advantages(step) == [[0.5, -0.5]]
    assert step.numbers()["failures"] == step.numbers()["rollouts_failed"] == 1
    assert step.numbers()["reward_mean"] == 0.5, "a failure is no reward of 0"


def test_one_attempt_that_is_left_has_nothing_to_be_compared_with() -> None:
    assert read(ended(1.0), failed(), failed()).numbers()["groups_dropped"] == 1


def test_an_attempt_without_a_recorded_call_is_counted() -> None:
    silent = ended(1.0)
    step = read(EndedRollout(silent.rollout, silent.spans[1:]), ended(1.0), ended(0.0))
    assert (step.numbers()["no_model_calls"], step.numbers()["rollouts_unusable"]) == (1, 1)
    assert "1× no model call was recorded" in step.describe_dropped()
    assert read(ended(1.0), ended(0.0)).numbers()["no_model_calls"] == 0


def test_a_second_record_of_a_call_is_counted() -> None:
    """The adapter uses one record of each call, and says how many others there were."""
    once = ended(1.0)
    outer = once.spans[0].model_copy(update={"span_id": "outer"})
    inner = once.spans[0].model_copy(update={"parent_id": "outer"})
    step = read(EndedRollout(once.rollout, [outer, inner, *once.spans[1:]]), ended(0.0))
    assert step.numbers()["calls_set_aside"] == 1
    assert step.attempts == 2


@pytest.mark.parametrize("on_failure", ["drop_member", -1.0])
@pytest.mark.parametrize("status", ["succeeded", "failed"])
def test_an_attempt_with_default_resources_is_left_out_and_counted(on_failure: OnFailure, status: Any) -> None:
    """Its reward is one of other resources; also its failure is."""
    usual = ended(1.0, status=status)
    mark = Span.from_attributes(attributes={"agentlightning.default_resources": "the server was away"})
    step = read(EndedRollout(usual.rollout, [mark, *usual.spans]), ended(1.0), ended(0.0), on_failure=on_failure)
    assert advantages(step) == [[0.5, -0.5]]
    assert (step.numbers()["rollouts_on_defaults"], step.numbers()["reward_mean"]) == (1, 0.5)
    assert "rollouts that ran with the default resources of their runner: 1" in step.describe_dropped()
    if status == "succeeded":
        assert len(advantages(read(usual, ended(1.0), ended(0.0)))[0]) == 3, "without the mark it counts"


def test_a_group_can_count_as_a_whole_or_not_at_all() -> None:
    assert advantages(read(ended(1.0), failed(), ended(0.0), on_failure="drop_group")) == []


def test_a_number_is_the_reward_of_an_attempt_that_failed() -> None:
    step = read(ended(1.0), failed(), ended(0.5), on_failure=0.0)
    assert advantages(step) == [[0.5, -0.5, 0.0]]
    assert (step.numbers()["failures"], step.numbers()["reward_mean"]) == (1, 0.5)


@pytest.mark.parametrize("reason", [reasons.TIMEOUT, reasons.RESOURCE_EXHAUSTED, reasons.REPORTED, "agent_error"])
def test_what_the_agent_did_is_its_failure(reason: str) -> None:
    assert reward_of(failed(reason), -1) == -1


@pytest.mark.parametrize(
    "lost",
    [
        failed(reasons.WORKER_LOST),
        failed(reasons.POISON),
        failed(reasons.UNRESPONSIVE),
        ended(1.0, status="cancelled", reason=reasons.CANCELLED),
        None,
    ],
)
def test_a_lost_worker_is_nobodys_failure(lost: EndedRollout | None) -> None:
    assert reward_of(lost, -1) is None


def test_what_succeeded_without_a_reward_did_not_fail() -> None:
    assert reward_of(ended(None), -1) is None
    assert reward_of(ended(0.25), -1) == 0.25


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ([ended(0.0), ended(0.0)], "exactly the same replies. Does the agent pin temperature 0 or a seed"),
        ([ended(0.5, "red"), ended(0.5, "blue")], r"every reward is 0\.5\. .* vocabulary"),
    ],
)
def test_equal_rewards_are_counted_and_explained(group: list[EndedRollout], words: str) -> None:
    step = read(*group)
    assert (step.has_spread, step.numbers()["frac_reward_zero_std"]) == (False, 1.0)
    assert re.search(words, step.describe_equal())


def test_rewards_that_depend_on_the_task_alone_are_explained() -> None:
    policy, attempts = SoftmaxPolicy(WORDS), [ended(0.0, "red"), ended(0.0, "blue"), ended(1.0, "red"), ended(1.0)]
    step = GroupReader(policy, "policy", TracerTraceToTriplet(), 2, False).read(attempts)
    assert not step.has_spread
    assert "go from 0 to 1, but only between tasks" in step.describe_equal()


def test_groups_with_spread_are_not_counted_as_equal() -> None:
    step = read(ended(1.0), ended(0.0))
    assert (step.has_spread, step.numbers()["frac_reward_zero_std"]) == (True, 0.0)
