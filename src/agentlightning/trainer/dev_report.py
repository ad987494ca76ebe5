"""What ``Trainer.dev`` prints at its end: for each rollout input, output and reward, and where its traces are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from agentlightning.emitter.emit import get_message_value
from agentlightning.semconv import GenAIAttributes, LightningSpanAttributes
from agentlightning.store.base import LightningStore
from agentlightning.types import Rollout, Span
from agentlightning.types.rewards import find_final_reward

_MOST_ROLLOUTS = 50
_MOST_CHARACTERS = 400


async def dev_report(store: LightningStore, since: float, place: str | None) -> str:
    """The text.

    Args:
        store: where the rollouts are.
        since: only those that were enqueued after that time.
        place: what `agl` calls the store (`--url`); None: it cannot be reached later.
    """
    newest = await store.query_rollouts(sort_by="start_time", sort_order="desc", limit=_MOST_ROLLOUTS + 1)
    rollouts = [each for each in reversed(newest.items) if each.start_time >= since]
    lines = [line for each in rollouts[-_MOST_ROLLOUTS:] for line in await _rollout_lines(store, each)]
    if len(rollouts) > _MOST_ROLLOUTS:
        lines.insert(0, f"The last {_MOST_ROLLOUTS} rollouts:")
    if place is None and rollouts:
        lines.append("The store is in this process: read the traces from trainer.store.")
    elif rollouts:
        lines += [
            f"The traces are in {place}. Look into them:",
            f"  agl rollouts ls --url {place}",
            f"  agl trace {rollouts[-1].rollout_id} --url {place}",
        ]
    return "\n".join(lines)


async def _rollout_lines(store: LightningStore, rollout: Rollout) -> Iterable[str]:
    spans = (await store.query_spans(rollout.rollout_id, "latest")).items
    reward = find_final_reward(spans) if rollout.status == "succeeded" else None
    lines = [
        f"{rollout.rollout_id}  {rollout.status}",
        f"  input   {_short(rollout.input)}",
        f"  output  {_short(_output(spans))}",
        f"  reward  {'none' if reward is None else f'{reward:g}'}",
    ]
    if rollout.status != "succeeded":
        lines.append(f"  why     {rollout.reason_code}: {_short(rollout.reason_message)}")
    return lines


def _output(spans: Sequence[Span]) -> Any:
    """What the agent said last: a message of its own, the output of an operation, or the reply of a model."""
    for span in reversed(spans):
        for found in _outputs(span):
            if found:
                return found
    return "nothing was recorded"


def _outputs(span: Span) -> Iterator[Any]:
    yield get_message_value(span)
    yield span.attributes.get(LightningSpanAttributes.OPERATION_OUTPUT.value)
    messages = span.attributes.get(GenAIAttributes.OUTPUT_MESSAGES.value)
    with suppress(ValueError, LookupError, AttributeError, TypeError):  # as other libraries have recorded it
        last = cast("list[dict[str, Any]]", json.loads(str(messages)))[-1]
        texts = [each.get("content") for each in last.get("parts", [])] or [last.get("content")]
        yield " ".join(each for each in texts if isinstance(each, str))


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"


def dev_store_file(folder: Path, now: float) -> Path:
    """A new database file for the traces of one call of ``dev``."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"dev-{now:.3f}.db"
