from __future__ import annotations

import typing

from agentlightning.types.rollouts import (
    Dataset,
    GenericResponse,
    RolloutLegacy,
    RolloutRawResult,
    RolloutRawResultLegacy,
    Task,
    TaskIfAny,
    Triplet,
)
from agentlightning.types.spans import Span, SpanCoreFields


def test_a_triplet_without_reward_has_none_not_zero() -> None:
    triplet = Triplet(prompt="p", response={"r": 1})
    assert triplet.reward is None
    assert triplet.metadata == {}


def test_the_wire_of_the_first_interface() -> None:
    task = Task(rollout_id="r", input={"q": 1})
    assert TaskIfAny(is_available=True, task=task).model_dump() == {
        "is_available": True,
        "task": {
            "rollout_id": "r",
            "input": {"q": 1},
            "mode": None,
            "resources_id": None,
            "create_time": None,
            "last_claim_time": None,
            "num_claims": None,
            "metadata": {},
        },
    }
    assert TaskIfAny(is_available=False).task is None
    assert GenericResponse().model_dump() == {"status": "success", "message": None, "data": None}


def test_a_report_round_trips() -> None:
    report = RolloutLegacy(
        rollout_id="r",
        task=Task(rollout_id="r", input=1),
        final_reward=0.5,
        triplets=[Triplet(prompt="p", response="r", reward=1.0)],
        trace=[{"name": "x"}],
        logs=["line"],
    )
    assert RolloutLegacy.model_validate_json(report.model_dump_json()) == report
    assert RolloutLegacy(rollout_id="r").model_dump(exclude={"rollout_id"}) == {
        "task": None,
        "final_reward": None,
        "triplets": None,
        "trace": None,
        "logs": None,
        "metadata": {},
    }


def test_no_two_records_share_metadata() -> None:
    Triplet(prompt=1, response=1).metadata["x"] = 1
    assert Triplet(prompt=1, response=1).metadata == {}


def test_what_an_agent_may_return() -> None:
    assert {float, type(None), list[Span], list[SpanCoreFields]} <= set(typing.get_args(RolloutRawResult))
    assert {float, type(None), list[Triplet], RolloutLegacy} <= set(typing.get_args(RolloutRawResultLegacy))


def test_a_list_is_a_dataset() -> None:
    dataset: Dataset[str] = ["a", "b"]
    assert [dataset[i] for i in range(len(dataset))] == ["a", "b"]
