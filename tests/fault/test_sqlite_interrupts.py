"""Ctrl-C in the middle of a group of operations: none of them is written, and the store works on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agentlightning import SqliteLightningStore
from agentlightning.errors import StoreUnavailable
from agentlightning.store.backend import Transaction
from store_state import assert_sound


async def interrupted(_tx: Transaction) -> None:
    """An operation in the course of which the user presses Ctrl-C."""
    raise KeyboardInterrupt


def test_an_interrupted_group_is_not_written_and_those_who_share_it_are_told(tmp_path: Path) -> None:
    store = SqliteLightningStore(tmp_path / "store.db")
    outcomes: list[BaseException] = []

    async def enqueue(number: int) -> None:
        try:
            await store.enqueue_rollout("input", rollout_id=f"ro-{number}")
        except StoreUnavailable as error:
            outcomes.append(error)

    async def together() -> None:
        writing = [asyncio.create_task(enqueue(number)) for number in range(5)]
        writing.insert(3, asyncio.ensure_future(store._core.write(interrupted)))
        try:
            await asyncio.gather(*writing)
        finally:
            await asyncio.wait(writing)

    async def after() -> None:
        assert (await store.statistics())["total_rollouts"] == 1
        await store.enqueue_rollout("input", rollout_id="ro-after")
        await assert_sound(store)
        await store.close()

    asyncio.run(store.enqueue_rollout("input", rollout_id="ro-before"))  # pyright: ignore[reportArgumentType]
    loop = asyncio.new_event_loop()
    task = loop.create_task(together())
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(task)
    with pytest.raises(StoreUnavailable, match="nothing was written"):
        loop.run_until_complete(task)
    loop.close()
    assert len(outcomes) == 5
    asyncio.run(after())
