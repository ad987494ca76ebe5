"""What a run says before it begins, of rows that no store takes, and at its end, when every rollout failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

import agentlightning as agl
from agentlightning.algorithm.run import Run
from agentlightning.errors import InvalidValue, NothingToLearn, NotJson, TooLarge
from agentlightning.execution.base import ThreadingEvent
from agentlightning.trainer.rows import check_rows
from agentlightning.types import AttemptEnd
from algorithm_roles import algorithm_role

LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("row", "place", "value"),
    [
        ({"q": 1, "hint": float("nan")}, "['hint']", "nan"),
        ({"a": [1, {"b": {1, 2}}]}, "['a'][1]['b']", "set"),
        ({"a": {1: 2}}, "['a'] has the key 1", "a int"),
        ({"a": [0, 2**70]}, "['a'][1]", "integer"),
        ({"text": "a\0b"}, "['text']", "NUL"),
        ({"text": "\ud83d"}, "['text']", "surrogate"),
        (b"bytes", "", "bytes"),
    ],
)
def test_a_row_that_is_not_json_is_named_with_its_field(row: Any, place: str, value: str) -> None:
    with pytest.raises(NotJson) as told:
        check_rows("train_dataset", [{"fine": 1}, row, {"fine": 2}])
    assert told.value.message.startswith(f"train_dataset[1]{place}")
    assert value in told.value.message


def test_a_row_that_contains_itself_is_named() -> None:
    with pytest.raises(TooLarge, match=r"^val_dataset\[0\]"):
        check_rows("val_dataset", [LOOP])


@pytest.mark.parametrize("dataset", [None, [], [1, ("a", None)], {"a": {1}}, "text", iter([{1}])])
def test_what_can_be_a_row_or_is_not_read_by_position_passes(dataset: Any) -> None:
    check_rows("train_dataset", dataset)


@pytest.mark.parametrize("which", ["train_dataset", "val_dataset"])
def test_nothing_runs_before_a_bad_row_is_named(which: str, tmp_path: Path) -> None:
    began: list[int] = []

    @agl.algo
    def algorithm(train_dataset: Any, val_dataset: Any) -> None:
        began.append(1)

    trainer = agl.Trainer(algorithm=algorithm, strategy="shm", run="r", runs_folder=tmp_path, progress="off")
    data: dict[str, Any] = {"train_dataset": [1], "val_dataset": [2], which: [1, 2, {"x": float("nan")}]}
    with pytest.raises(InvalidValue, match=rf"{which}\[2\]\['x'\] holds nan"):
        trainer.fit(agl.rollout(lambda task: 1.0), **data)
    assert not began
    assert list(tmp_path.iterdir()) == []


class Ends(agl.Algorithm):
    """Lets one rollout end in each of these ways."""

    def __init__(self, *ways: AttemptEnd) -> None:
        self.ways = ways

    async def run(self, train_dataset: Any = None, val_dataset: Any = None) -> None:
        store = self.get_store()
        for way in self.ways:
            begun = await store.start_rollout(1, config=agl.RolloutConfig())
            await store.finish_attempt(
                begun.rollout_id,
                begun.attempt.attempt_id,
                way,
                [],
                reason_message=f"it {way}",
                reason_code="agent_error",
            )


async def carry_out(store: agl.LightningStore, algorithm: agl.Algorithm, run: Run | None = None) -> None:
    await algorithm_role(algorithm, run=run)(store, cast("Any", ThreadingEvent()))


async def test_a_run_in_which_every_rollout_failed_is_an_error_that_says_why() -> None:
    async with agl.InMemoryLightningStore() as store:
        await carry_out(store, Ends("succeeded", "failed"))
        await carry_out(store, Ends())  # nothing was asked for
        with pytest.raises(NothingToLearn, match=r"2 in all \(agent_error: 2\); the last one with: .*it failed"):
            await carry_out(store, Ends("failed", "failed"))  # what succeeded earlier was another run's


async def test_a_success_is_found_among_more_rollouts_than_a_page_has() -> None:
    async with agl.InMemoryLightningStore() as store:
        failures: list[AttemptEnd] = ["failed"] * 210
        await carry_out(store, Ends("succeeded", *failures))
        with pytest.raises(NothingToLearn, match=r"210 in all"):
            await carry_out(store, Ends(*failures))


class Serves(Ends):
    """An algorithm that serves its store, so that others make the rollouts."""

    async def run(self, train_dataset: Any = None, val_dataset: Any = None) -> None:
        server = agl.LightningStoreServer(self.get_store(), "127.0.0.1", 0)
        async with server, agl.LightningStoreClient(server.endpoint) as client:
            self.set_store(client)
            await super().run()


async def test_rollouts_that_others_make_through_the_algorithms_store_count() -> None:
    async with agl.InMemoryLightningStore() as store:
        await carry_out(store, Serves("failed", "succeeded"))
        with pytest.raises(NothingToLearn, match=r"1 in all"):
            await carry_out(store, Serves("failed"))


async def test_of_a_run_that_is_resumed_all_rollouts_count(tmp_path: Path) -> None:
    run = Run("r", tmp_path)
    async with agl.InMemoryLightningStore() as store:
        with pytest.raises(NothingToLearn):
            await carry_out(store, Ends("failed"), run)
        with pytest.raises(NothingToLearn):
            await carry_out(store, Ends(), run)  # started again, it has nothing left to do
        await carry_out(store, Ends("succeeded"), run)
        await carry_out(store, Ends("failed"), run)
