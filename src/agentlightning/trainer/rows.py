"""Rows of datasets, looked at before a run begins: each becomes the input of a rollout, so it has to be strict JSON."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any, cast

from agentlightning.algorithm.batches import reads_by_position
from agentlightning.errors import InvalidValue, NotJson, TooLarge
from agentlightning.store.validation import MAX_DEPTH, encode_json
from agentlightning.types import Dataset

_CHECK_SECONDS = 30.0
"""For how long rows are checked. One that takes long to make must not keep a run from beginning."""

_logger = logging.getLogger(__name__)


def check_rows(name: str, dataset: Dataset[Any] | None) -> None:
    """Read every row once. What is not read by position is left to the algorithm.

    Args:
        name: of the dataset, for the message.
        dataset: what a trainer was given.

    Raises:
        NotJson, TooLarge: no store takes a row as an input; the message names the row, the field, and the value.
        Exception: what reading a row raises.
    """
    if not reads_by_position(dataset):
        return
    until = time.monotonic() + _CHECK_SECONDS
    for index in range(len(cast("Dataset[Any]", dataset))):
        row: Any = cast("Dataset[Any]", dataset)[index]
        try:
            encode_json(row, name)
        except (NotJson, TooLarge) as error:
            raise _located(row, f"{name}[{index}]", error) from None
        if time.monotonic() > until:
            _logger.info("%s: %d rows are checked; the others are when they are enqueued", name, index + 1)
            return


def _located(value: Any, place: str, error: InvalidValue) -> InvalidValue:
    """The error of the innermost part that is refused, which names its place, as in ``train_dataset[5]['hint']``."""
    for _ in range(MAX_DEPTH):
        for key, part in _parts(value):
            inner = f"{place}[{key!r}]"
            try:
                encode_json(part, inner)
            except (NotJson, TooLarge) as found:
                value, place, error = part, inner, found
                break
        else:
            break
    try:
        encode_json(value, place)
    except (NotJson, TooLarge) as found:
        error = found
    return type(error)(
        f"{error.message}. Each row becomes the input of a rollout; rows that an algorithm turns into inputs first are "
        "given to the algorithm, not to fit()"
    )


def _parts(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, dict):
        return cast("dict[Any, Any]", value).items()
    return enumerate(cast("list[Any]", value)) if isinstance(value, (list, tuple)) else ()
