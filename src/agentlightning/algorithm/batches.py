"""Datasets in batches, repeatable enqueueing, reads of many rollouts, and checks of arguments."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from agentlightning.algorithm.base import Algorithm
from agentlightning.errors import IdReused, InvalidValue
from agentlightning.store.base import LightningStore
from agentlightning.types import Dataset, EnqueueRolloutRequest, Rollout, RolloutMode, Span

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


def check_dataset(dataset: object, name: str) -> None:
    """Raise unless the dataset is None or can be read by position.

    Args:
        dataset: as the user gave it.
        name: of the argument, for the message.

    Raises:
        InvalidValue: it cannot.
    """
    by_position = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    by_name = hasattr(dataset, "keys") or hasattr(dataset, "iloc")  # dicts and data frames are read by key or column
    if dataset is not None and (by_name or not by_position or isinstance(dataset, (str, bytes))):
        raise InvalidValue(
            f"{name} is a {type(dataset).__name__}; give something with a length that is read by position, such as a "
            "list of inputs (of a table: table.to_dict('records'))"
        )


def requests_for(
    algorithm: Algorithm,
    inputs: Sequence[Any],
    *,
    mode: RolloutMode,
    resources_id: str | None,
    step: int,
    kind: str = "",
    first_index: int = 0,
) -> list[EnqueueRolloutRequest]:
    """Return one request for each input, with the algorithm's rollout config and the ids of its run, if it has one.

    Args:
        algorithm: whose rollouts they are.
        inputs: one for each rollout.
        mode, resources_id: of all rollouts.
        step, kind: see ``Run.rollout_id``.
        first_index: index of the first rollout in the step.
    """
    run, config = algorithm.get_run(), algorithm.get_rollout_config()
    return [
        EnqueueRolloutRequest(
            input=each,
            mode=mode,
            resources_id=resources_id,
            config=config,
            rollout_id=None if run is None else run.rollout_id(step, index, kind),
        )
        for index, each in enumerate(inputs, first_index)
    ]


async def enqueue_once(store: LightningStore, requests: Sequence[EnqueueRolloutRequest]) -> list[str]:
    """Enqueue the rollouts that do not exist yet, and return the ids of all, in order.

    A rollout that exists is left as it is, in any status.

    Args:
        requests: those with a ``rollout_id`` may exist already.

    Raises:
        IdReused: a rollout exists with another input.
    """
    named = [request.rollout_id for request in requests if request.rollout_id is not None]
    known: dict[str, Rollout] = {}
    for begin in range(0, len(named), _WRITES_AT_ONCE):
        page = await store.query_rollouts(rollout_id_in=named[begin : begin + _WRITES_AT_ONCE])
        known |= {rollout.rollout_id: rollout for rollout in page}
    fresh: list[EnqueueRolloutRequest] = []
    for request in requests:
        rollout = known.get(request.rollout_id or "")
        if rollout is None:
            fresh.append(request)
        else:
            _check_same(rollout, request)
    made: list[Rollout] = []
    for begin in range(0, len(fresh), _WRITES_AT_ONCE):
        made.extend(await store.enqueue_many_rollouts(fresh[begin : begin + _WRITES_AT_ONCE]))
    new_ids = iter([rollout.rollout_id for rollout in made])
    return [
        request.rollout_id if request.rollout_id is not None and request.rollout_id in known else next(new_ids)
        for request in requests
    ]


async def spans_of(store: LightningStore, rollouts: Sequence[Rollout]) -> list[list[Span]]:
    """Return the spans of the newest attempt of each rollout, in order."""
    slots = asyncio.Semaphore(_READS_AT_ONCE)

    async def read(rollout: Rollout) -> list[Span]:
        async with slots:
            return list(await store.query_spans(rollout.rollout_id, "latest"))

    return list(await asyncio.gather(*(read(rollout) for rollout in rollouts)))


def _check_same(rollout: Rollout, request: EnqueueRolloutRequest) -> None:
    if rollout.input != request.input:
        raise IdReused(
            f"rollout {rollout.rollout_id!r} exists with the input {_short(rollout.input)}, not "
            f"{_short(request.input)}; the run of that name was begun with other tasks: give this one another name"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def check_counts(*, least: int = 1, **counts: int) -> None:
    """Raise unless all are whole numbers of at least ``least``.

    Raises:
        InvalidValue: one is not.
    """
    for name, count in counts.items():
        if type(count) is not int or count < least:
            raise InvalidValue(f"{name} is {count!r}; give a whole number, at least {least}")


def check_seconds(**times: float) -> None:
    """Raise unless all are finite times above 0.

    Raises:
        InvalidValue: one is not.
    """
    for name, seconds in times.items():
        if type(seconds) not in (int, float) or not 0 < seconds < math.inf:
            raise InvalidValue(f"{name} is {seconds!r}; give seconds, more than 0")
