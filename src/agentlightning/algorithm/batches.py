"""Datasets in batches, repeatable enqueueing, runs of many rollouts, and checks of arguments."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from agentlightning.algorithm.base import Algorithm
from agentlightning.errors import IdReused, IllegalMove, InvalidValue
from agentlightning.store.base import LightningStore, is_finished
from agentlightning.types import Dataset, EnqueueRolloutRequest, Rollout, RolloutMode, Span
from agentlightning.types.attempt_spans import used_default_resources
from agentlightning.types.rewards import find_final_reward

T = TypeVar("T")

_READS_AT_ONCE = 32
"""A limit, so that a step of thousands of rollouts does not open thousands of requests."""

_WRITES_AT_ONCE = 500
"""Rollouts in one request: its body stays below the limit of any server."""


def batch_iter_over_dataset(dataset: Dataset[T], batch_size: int) -> Iterator[Sequence[T]]:
    """Yield the inputs in order, ``batch_size`` at a time; the last batch may be smaller.

    Raises:
        ValueError: ``batch_size`` is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")
    size = len(dataset)
    for begin in range(0, size, batch_size):
        yield [dataset[index] for index in range(begin, min(begin + batch_size, size))]


def reads_by_position(dataset: object) -> bool:
    """Whether it has a length and is read by position; dicts and data frames are read by key or column."""
    sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    by_name = hasattr(dataset, "keys") or hasattr(dataset, "iloc")
    return sized and not by_name and not isinstance(dataset, (str, bytes))


def check_datasets(**datasets: object) -> None:
    """Raise ``InvalidValue`` unless each dataset is None or can be read by position."""
    for name, dataset in datasets.items():
        if dataset is not None and not reads_by_position(dataset):
            raise InvalidValue(
                f"{name} is a {type(dataset).__name__}; give something with a length that is read by position, such as "
                "a list of inputs (of a table: table.to_dict('records'))"
            )


async def enqueue_inputs(
    algorithm: Algorithm,
    inputs: Sequence[Any],
    *,
    mode: RolloutMode,
    resources_id: str | None,
    step: int,
    kind: str = "",
    first_index: int = 0,
) -> list[str]:
    """Enqueue one rollout for each input, with the algorithm's rollout config, and return their ids in order.

    If the algorithm has a run, the ids follow from it, and rollouts that exist already are left as they are.

    Args:
        algorithm: whose rollouts they are.
        inputs: one for each rollout.
        mode, resources_id: of all rollouts.
        step, kind: see ``Run.rollout_id``.
        first_index: index of the first rollout in the step.

    Raises:
        IdReused: a rollout exists with another input.
    """
    store, run, config = algorithm.get_store(), algorithm.get_run(), algorithm.get_rollout_config()
    ids = [None if run is None else run.rollout_id(step, first_index + index, kind) for index in range(len(inputs))]
    known: dict[str | None, Rollout] = {}
    for some in batch_iter_over_dataset([each for each in ids if each is not None], _WRITES_AT_ONCE):
        known |= {rollout.rollout_id: rollout for rollout in await store.query_rollouts(rollout_id_in=some)}
    fresh: list[EnqueueRolloutRequest] = []
    for rollout_id, each in zip(ids, inputs, strict=True):
        if rollout_id not in known:
            fresh.append(
                EnqueueRolloutRequest(
                    input=each, mode=mode, resources_id=resources_id, config=config, rollout_id=rollout_id
                )
            )
        elif known[rollout_id].input != each:
            raise IdReused(
                f"rollout {rollout_id!r} exists with the input {known[rollout_id].input!r:.80}, not {each!r:.80}; "
                "the run of that name was begun with other tasks: give this one another name"
            )
    new_ids: list[str] = []
    for some in batch_iter_over_dataset(fresh, _WRITES_AT_ONCE):
        new_ids += [rollout.rollout_id for rollout in await store.enqueue_many_rollouts(some)]
    made = iter(new_ids)
    return [rollout_id if rollout_id is not None and rollout_id in known else next(made) for rollout_id in ids]


@dataclass(frozen=True)
class EndedRollout:
    """A rollout that has ended, and the spans of its newest attempt, if they were to be read."""

    rollout: Rollout
    spans: Sequence[Span]

    @property
    def on_defaults(self) -> bool:
        """Whether it ran with the default resources of its runner, so that it says nothing about those it was for."""
        return used_default_resources(self.spans) is not None

    @property
    def reward(self) -> float | None:
        """Its reward; none if it ran with default resources. A failed attempt may have emitted one before it failed;
        that is not the reward of the rollout."""
        counts = self.rollout.status == "succeeded" and not self.on_defaults
        return find_final_reward(self.spans) if counts else None


async def wait_for_ends(
    store: LightningStore,
    rollout_ids: Sequence[str],
    timeout_seconds: float | None = None,
    *,
    reads_failed: bool = True,
) -> list[EndedRollout | None]:
    """Wait until all rollouts have ended, and return them in order; None for one that is not in the store any more.

    Args:
        reads_failed: whether the spans of those that did not succeed are wanted, too.
        timeout_seconds: those that have not ended by then are cancelled, and returned as None.
    """
    slots = asyncio.Semaphore(_READS_AT_ONCE)
    found = await store.wait_for_rollouts(rollout_ids=rollout_ids, timeout=timeout_seconds)
    ended = {rollout.rollout_id: rollout for rollout in found}

    async def read(rollout_id: str) -> EndedRollout | None:
        async with slots:
            if rollout_id in ended:
                rollout = ended[rollout_id]
                is_wanted = reads_failed or rollout.status == "succeeded"
                return EndedRollout(rollout, list(await store.query_spans(rollout_id, "latest")) if is_wanted else [])
            if timeout_seconds is not None:
                await _cancel(store, rollout_id, f"not done after {timeout_seconds:g} s")
            return None

    return list(await asyncio.gather(*map(read, rollout_ids)))


async def _cancel(store: LightningStore, rollout_id: str, message: str) -> None:
    try:
        await store.cancel_rollout(rollout_id, message=message)
    except IllegalMove:  # it ended in the meantime, too late to count
        rollout = await store.get_rollout_by_id(rollout_id)
        if rollout is None or not is_finished(rollout):
            raise


def check_counts(*, least: int = 1, **counts: int) -> None:
    """Raise ``InvalidValue`` unless all are whole numbers of at least ``least``."""
    for name, count in counts.items():
        if type(count) is not int or count < least:
            raise InvalidValue(f"{name} is {count!r}; give a whole number, at least {least}")


def check_seconds(**times: float) -> None:
    """Raise ``InvalidValue`` unless all are finite times above 0."""
    for name, seconds in times.items():
        if type(seconds) not in (int, float) or not 0 < seconds < math.inf:
            raise InvalidValue(f"{name} is {seconds!r}; give seconds, more than 0")
