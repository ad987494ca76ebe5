"""Algorithms that end quickly and do not learn, for trying out an agent as `Trainer.dev` does."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from agentlightning.algorithm.base import Algorithm
from agentlightning.algorithm.batches import (
    EndedRollout,
    check_counts,
    check_datasets,
    check_seconds,
    enqueue_inputs,
    wait_for_ends,
)
from agentlightning.algorithm.model_proxy import running_proxy
from agentlightning.algorithm.resume import reassign_unfinished
from agentlightning.errors import InvalidValue
from agentlightning.store.base import LightningStore
from agentlightning.types import LLM, Dataset, ResourceUnion, RolloutMode, Span

_logger = logging.getLogger(__name__)

_Work = tuple[RolloutMode, Any]
"""A mode and an input."""


class FastAlgorithm(Algorithm):
    """Marks an algorithm that is quick enough for `Trainer.dev`."""


class Baseline(FastAlgorithm):
    """Runs every input, and logs status, reward and spans of each rollout. It does not learn.

    If there is an LLM proxy and no language model among the initial resources, the agent gets the proxy's model as the
    resource ``llm``. The proxy is started if it is not running.

    If the run has a name, a process that resumes it continues with the first unfinished epoch, and runs no finished
    rollout again.

    Args:
        n_epochs: number of passes over the inputs.
        train_split: share of the training inputs that is run in the mode ``train`` if there is no validation dataset;
            the rest is run in the mode ``val``. With a validation dataset all are run as ``train``.
        polling_interval: seconds between checks whether the queue has room, while no rollout ends.
        max_queue_length: number of rollouts that may wait in the queue at a time.
        span_verbosity: what to log of each span: ``none``: only its name, ``keys``: also the names of its attributes,
            ``key_values``: also their values.

    Raises:
        InvalidValue: an argument is out of its range.
    """

    def __init__(
        self,
        *,
        n_epochs: int = 1,
        train_split: float = 0.5,
        polling_interval: float = 5.0,
        max_queue_length: int = 4,
        span_verbosity: Literal["keys", "key_values", "none"] = "keys",
    ) -> None:
        check_counts(n_epochs=n_epochs, max_queue_length=max_queue_length)
        check_seconds(polling_interval=polling_interval)
        if not isinstance(train_split, (int, float)) or not 0 <= train_split <= 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidValue(f"train_split is {train_split!r}; give a share from 0 to 1")
        if span_verbosity not in ("keys", "key_values", "none"):
            raise InvalidValue(f"span_verbosity is {span_verbosity!r}; give 'keys', 'key_values' or 'none'")
        self._n_epochs = n_epochs
        self._train_split = train_split
        self._polling_interval = polling_interval
        self._max_queue_length = max_queue_length
        self._span_verbosity = span_verbosity

    async def run(  # pyright: ignore[reportIncompatibleMethodOverride] - may be awaited, which the base allows
        self, train_dataset: Dataset[Any] | None = None, val_dataset: Dataset[Any] | None = None
    ) -> None:
        """Run all inputs `n_epochs` times.

        Raises:
            IdReused: the run of this name was begun with other inputs.
            InvalidValue: it was begun with another number of inputs; or a dataset cannot be read by position; or the
                proxy has several models, so the initial resources must say which one to use.
        """
        check_datasets(train_dataset=train_dataset, val_dataset=val_dataset)
        work = self._split(train_dataset, val_dataset)
        if not work:
            _logger.warning("Baseline was given no inputs, so there is nothing to run")
            return
        proxy = self.get_llm_proxy()
        if proxy is None:
            await self._run_epochs(work, self.get_initial_resources())
            return
        async with running_proxy(proxy, self.get_store()):
            resources = self.get_initial_resources() or {}
            if not any(isinstance(resource, LLM) for resource in resources.values()):
                resources = {**resources, "llm": proxy.as_resource()}
            await self._run_epochs(work, resources)

    async def _run_epochs(self, work: Sequence[_Work], resources: Mapping[str, ResourceUnion] | None) -> None:
        store = self.get_store()
        run = self.get_run()
        resources_id = None
        if resources is not None:
            published = await store.add_resources(resources)
            resources_id = published.resources_id
            await reassign_unfinished(store, run, lambda _: published)
        for epoch in range(self._epochs_done(len(work)), self._n_epochs):
            await self._run_epoch(store, epoch, work, resources_id)
            if run is not None:
                run.save_checkpoint({"epoch": epoch + 1, "inputs": len(work)})

    def _epochs_done(self, inputs: int) -> int:
        """Return the number of epochs that earlier starts of the run have completed.

        Raises:
            InvalidValue: they had another number of inputs.
        """
        run = self.get_run()
        checkpoint = None if run is None else run.load_checkpoint()
        if run is None or checkpoint is None:
            return 0
        if checkpoint["inputs"] != inputs:
            raise InvalidValue(
                f"the run {run.name!r} was begun with {checkpoint['inputs']} inputs, not {inputs}; give the same, or "
                "another name"
            )
        if checkpoint["epoch"] >= self._n_epochs:
            _logger.info("the run %r has completed its %d epochs; there is nothing to run", run.name, self._n_epochs)
        return int(checkpoint["epoch"])

    def _split(self, train: Dataset[Any] | None, val: Dataset[Any] | None) -> list[_Work]:
        inputs, checks = ([] if data is None else [data[index] for index in range(len(data))] for data in (train, val))
        if val is None:
            border = round(len(inputs) * self._train_split)
            inputs, checks = inputs[:border], inputs[border:]
        train_work: list[_Work] = [("train", each) for each in inputs]
        return [*train_work, *(("val", each) for each in checks)]

    async def _run_epoch(
        self, store: LightningStore, epoch: int, work: Sequence[_Work], resources_id: str | None
    ) -> None:
        following: set[asyncio.Task[EndedRollout]] = set()
        run, begun = self.get_run(), set[str]()
        if run is not None:  # some rollouts exist already, from an earlier start of the run
            prefix = run.rollout_id(epoch, 0).removesuffix("0")
            begun = {each.rollout_id for each in await store.query_rollouts(rollout_id_contains=prefix)}
        try:
            for index, (mode, each) in enumerate(work):
                if run is None or run.rollout_id(epoch, index) not in begun:
                    await self._wait_for_room(store, following)
                (rollout_id,) = await enqueue_inputs(
                    self, [each], mode=mode, resources_id=resources_id, step=epoch, first_index=index
                )
                following.add(asyncio.create_task(self._follow(store, rollout_id)))
            ended = await asyncio.gather(*following)
        finally:
            for task in following:
                task.cancel()
        rewards = [each.reward for each in ended if each.reward is not None]
        numbers = {"rollouts": float(len(ended)), "rewarded": float(len(rewards))}
        numbers["on_defaults"] = float(sum(each.on_defaults for each in ended))
        for status in ("succeeded", "failed", "cancelled"):
            numbers[status] = float(sum(each.rollout.status == status for each in ended))
        if rewards:
            numbers["reward_mean"] = math.fsum(rewards) / len(rewards)
        self.report(epoch, **numbers)

    async def _wait_for_room(self, store: LightningStore, following: set[asyncio.Task[Any]]) -> None:
        """Return when fewer than `max_queue_length` rollouts wait."""
        while (await store.query_rollouts(status_in=["queuing", "requeuing"], limit=1)).total >= self._max_queue_length:
            running = [task for task in following if not task.done()]
            if running:
                await asyncio.wait(running, timeout=self._polling_interval, return_when=asyncio.FIRST_COMPLETED)
            else:  # the queue is full of rollouts of others, whose end is not awaited here
                await asyncio.sleep(self._polling_interval)

    async def _follow(self, store: LightningStore, rollout_id: str) -> EndedRollout:
        """Wait for the end of a rollout, log it, and return it."""
        (ended,) = await wait_for_ends(store, [rollout_id])
        assert ended is not None, "nobody deletes rollouts that are not finished"
        rollout = ended.rollout
        why = f", {rollout.reason_code}: {rollout.reason_message}" if rollout.reason_code else ""
        told = (rollout_id, rollout.mode, rollout.status, why, ended.reward, len(ended.spans))
        _logger.info("rollout %s (%s) %s%s; reward %s, %d spans", *told)
        for span in ended.spans:
            _logger.info("  %s", self._describe(span))
        return ended

    def _describe(self, span: Span) -> str:
        head = f"span {span.sequence_id} {span.name!r} {span.status.status_code}"
        if self._span_verbosity == "keys":
            return f"{head}: {', '.join(sorted(span.attributes))}"
        if self._span_verbosity == "key_values":
            return f"{head}: {dict(sorted(span.attributes.items()))}"
        return head
