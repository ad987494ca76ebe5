"""`GRPO`: reinforcement learning by comparing attempts at the same task, for a `SoftmaxPolicy`.

The mathematics are in `grpo_math`. Here is the round: enqueue a group of rollouts for each task, wait for
them, read what the policy said and what it was worth, change the policy, keep a checkpoint.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from agentlightning.adapter.triplet import TracerTraceToTriplet, TraceToTripletBase
from agentlightning.algorithm.base import Algorithm, ModelProxy
from agentlightning.algorithm.batches import check_counts, check_dataset, enqueue_once, spans_of
from agentlightning.algorithm.grpo_groups import GatheredGroups, GroupReader
from agentlightning.algorithm.policy_update import PolicyUpdate, update_policy
from agentlightning.algorithm.resume import give_to_leftovers
from agentlightning.algorithm.wiring import running_proxy
from agentlightning.demo.policy_endpoint import PolicyEndpoint
from agentlightning.demo.softmax_policy import SoftmaxPolicy
from agentlightning.errors import InvalidValue, NothingToLearn
from agentlightning.types import LLM, Dataset, EnqueueRolloutRequest, ResourcesUpdate, Rollout, RolloutMode
from agentlightning.types.rewards import find_final_reward

_logger = logging.getLogger(__name__)

_EMPTY_STEPS = 3
"""After so many steps in a row without one whole group the run fails: something is wrong with the agent."""
_DROPPED_WORDS = {
    "failed": "failed rollouts",
    "unrewarded": "rollouts without a reward",
    "unusable": "rollouts without a model call that can be learned from",
}


@dataclass(frozen=True)
class _Session:
    """What holds while the policy is served."""

    endpoint: PolicyEndpoint
    train_resources_id: str
    val_resources_id: str
    took_up_step: int | None
    """The step that another process may have begun; None if there was none before."""


class GRPO(Algorithm):
    """Trains a policy that agents call as a language model, without knowing that it learns.

    In each step ``batch_size`` tasks are attempted ``group_size`` times each. What the attempts at one task
    were worth, compared with their mean, says which of the policy's words were good ones. A group counts
    whole or not at all, and an attempt that failed is no attempt with reward 0; how many were dropped is
    reported with every step, as ``groups_dropped``, ``rollouts_failed``, ``rollouts_unrewarded``,
    ``rollouts_unusable``, ``attempts_retried`` and ``calls_unusable``.

    The policy is served by an endpoint of its own. With an LLM proxy agents reach it through that, which
    records every call, and is paused while the policy changes. Without one they get the endpoint itself,
    and the calls must be recorded by the agent's tracer: texts are enough, token ids are not needed.

    Agents find the model as the resource ``llm``. Training rollouts are told temperature 1, validation
    rollouts temperature 0: always the most probable word.

    Under a run's name the policy is kept after every step. A process that takes the run up again does the
    step that was interrupted again, with the rollouts of it that have finished, and runs only the others.

    Args:
        policy: what is trained. It is changed in place.
        group_size: attempts at each task, at least 2.
        batch_size: tasks in each step; of a smaller dataset all.
        n_steps: how many steps.
        seed: of the order of tasks, and of the words that are drawn. (Which rollout gets which word also
            depends on who calls first.)
        validate_every: steps between validations; there is one at the end in any case. 0: only that.
        update: how the policy learns.
        model: the name that the policy is called by.
        endpoint_host, endpoint_port: where it is served. Without a proxy runners must be able to reach it.

    Raises:
        InvalidValue: a number is out of its range.
    """

    def __init__(
        self,
        policy: SoftmaxPolicy,
        *,
        group_size: int = 16,
        batch_size: int = 16,
        n_steps: int = 26,
        seed: int = 0,
        validate_every: int = 0,
        update: PolicyUpdate | None = None,
        model: str = "policy",
        endpoint_host: str = "127.0.0.1",
        endpoint_port: int = 0,
    ) -> None:
        if not isinstance(policy, SoftmaxPolicy):  # pyright: ignore[reportUnnecessaryIsInstance] - callers may not check types
            raise InvalidValue(f"policy is {policy!r}, a {type(policy).__name__}; GRPO trains an agl.SoftmaxPolicy")
        check_counts(group_size=group_size, least=2)
        check_counts(batch_size=batch_size, n_steps=n_steps)
        check_counts(validate_every=validate_every, endpoint_port=endpoint_port, least=0)
        self._policy = policy
        self._reference = policy.copy()
        self._group_size = group_size
        self._batch_size = batch_size
        self._n_steps = n_steps
        self._seed = seed
        self._validate_every = validate_every
        self._update = update or PolicyUpdate()
        self._model = model
        self._endpoint_host = endpoint_host
        self._endpoint_port = endpoint_port

    @property
    def policy(self) -> SoftmaxPolicy:
        """What is trained."""
        return self._policy

    async def run(  # pyright: ignore[reportIncompatibleMethodOverride] - may be awaited, which the base allows
        self, train_dataset: Dataset[Any] | None = None, val_dataset: Dataset[Any] | None = None
    ) -> None:
        """Train to the last step.

        Args:
            train_dataset: tasks to learn from; at least one.
            val_dataset: tasks to measure with.

        Raises:
            InvalidValue: there are no tasks, or the run of this name was begun with other settings.
            IdReused: the run of this name was begun with other tasks.
            NothingToLearn: in three steps on end, or in all if there are fewer, no group was whole.
        """
        check_dataset(train_dataset, "train_dataset")
        check_dataset(val_dataset, "val_dataset")
        if train_dataset is None or len(train_dataset) == 0:
            raise InvalidValue("GRPO has no tasks to learn from; pass train_dataset")
        took_up = self._take_up()
        begin = took_up or 0
        if begin >= self._n_steps:
            _logger.warning(
                "this run has done its steps already (%d of %d); the policy is as it was left. For more, raise "
                "n_steps; to begin anew, give the run another name",
                begin,
                self._n_steps,
            )
            return
        if took_up is None:
            self._keep(0)
        async with self._serving(took_up) as session:
            empty_steps = 0
            for step in range(begin, self._n_steps):
                gathered = await self._step(step, train_dataset, val_dataset, session)
                empty_steps = 0 if gathered.groups else empty_steps + 1
                if empty_steps == min(_EMPTY_STEPS, self._n_steps):
                    raise _nothing_to_learn(empty_steps, gathered)

    # --- One step --------------------------------------------------------------------------------

    async def _step(
        self, step: int, train_dataset: Dataset[Any], val_dataset: Dataset[Any] | None, session: _Session
    ) -> GatheredGroups:
        tasks = self._tasks_of(step, train_dataset)
        attempts = [task for task in tasks for _ in range(self._group_size)]
        rollouts = await self._run_all("train", "", step, attempts, session.train_resources_id)
        if step == session.took_up_step:
            rollouts = await self._replace_failed(step, attempts, rollouts, session)
        succeeded = [rollout for rollout in rollouts if rollout is not None and rollout.status == "succeeded"]
        spans = await spans_of(self.get_store(), succeeded)
        gathered = self._reader().gather(
            rollouts, {rollout.rollout_id: each for rollout, each in zip(succeeded, spans, strict=True)}
        )
        if gathered.dropped_groups:
            _logger.warning("step %d: %s", step, _describe_dropped(gathered))
        numbers = gathered.numbers() | await self._learn(step, gathered, session.endpoint)
        is_last = step + 1 == self._n_steps
        if val_dataset is not None and (is_last or (self._validate_every and (step + 1) % self._validate_every == 0)):
            numbers |= await self._validate(step, val_dataset, session.val_resources_id)
        self._keep(step + 1)
        self.report(step, total_steps=float(self._n_steps), **numbers)
        return gathered

    def _tasks_of(self, step: int, dataset: Dataset[Any]) -> list[Any]:
        """The tasks of a step: all in a random order, then all in another, and so on."""
        size = len(dataset)
        count = min(self._batch_size, size)
        orders: dict[int, list[int]] = {}
        tasks: list[Any] = []
        for position in range(step * count, (step + 1) * count):
            epoch, place = divmod(position, size)
            if epoch not in orders:
                orders[epoch] = random.Random(f"{self._seed} {epoch}").sample(range(size), size)
            tasks.append(dataset[orders[epoch][place]])
        return tasks

    async def _replace_failed(
        self, step: int, attempts: Sequence[Any], rollouts: Sequence[Rollout | None], session: _Session
    ) -> list[Rollout | None]:
        """Give those that failed in the step that was taken up one more chance, as new rollouts.

        An agent that was at work elsewhere when the process before died has tried to reach a model that died
        with it, in vain.
        """
        failed = [index for index, rollout in enumerate(rollouts) if rollout is None or rollout.status != "succeeded"]
        inputs = [attempts[index] for index in failed]
        others = await self._run_all("train", "again", step, inputs, session.train_resources_id)
        replaced = dict(zip(failed, others, strict=True))
        return [replaced.get(index, rollout) for index, rollout in enumerate(rollouts)]

    async def _run_all(
        self, mode: RolloutMode, kind: str, step: int, inputs: Sequence[Any], resources_id: str
    ) -> list[Rollout | None]:
        """Run an agent on each input, and return the rollouts when all have ended, in order.

        Args:
            kind: tells them apart from others of the same step.
        """
        if not inputs:
            return []
        run = self.get_run()
        requests = [
            EnqueueRolloutRequest(
                input=each,
                mode=mode,
                resources_id=resources_id,
                config=self.get_rollout_config(),
                rollout_id=None if run is None else run.rollout_id(step, index, kind),
            )
            for index, each in enumerate(inputs)
        ]
        store = self.get_store()
        rollout_ids = await enqueue_once(store, requests)
        ended = {each.rollout_id: each for each in await store.wait_for_rollouts(rollout_ids=rollout_ids)}
        return [ended.get(rollout_id) for rollout_id in rollout_ids]

    def _reader(self) -> GroupReader:
        # The trainer's adapter may be one that makes something else than triplets; then it is not for us.
        adapter = self._adapter if isinstance(self._adapter, TraceToTripletBase) else TracerTraceToTriplet()
        return GroupReader(self._policy, self._model, adapter, self._group_size)

    async def _learn(self, step: int, gathered: GatheredGroups, endpoint: PolicyEndpoint) -> dict[str, float]:
        """Change the policy while nobody is being answered."""
        proxy = self.get_llm_proxy()
        if proxy is not None:
            await proxy.pause()
        try:
            numbers = update_policy(self._policy, self._reference, gathered.groups, self._update, step / self._n_steps)
            self._announce(step + 1, endpoint, proxy)
        finally:
            if proxy is not None:
                await proxy.resume()
        return {"loss": numbers.loss, "entropy": numbers.entropy, "clipped": numbers.clipped, "kl": numbers.kl}

    async def _validate(self, step: int, dataset: Dataset[Any], resources_id: str) -> dict[str, float]:
        inputs = [dataset[index] for index in range(len(dataset))]
        rollouts = await self._run_all("val", "val", step, inputs, resources_id)
        succeeded = [rollout for rollout in rollouts if rollout is not None and rollout.status == "succeeded"]
        spans = await spans_of(self.get_store(), succeeded)
        rewards = [reward for each in spans if (reward := find_final_reward(each)) is not None]
        numbers = {"val_rollouts": float(len(inputs)), "val_unrewarded": float(len(inputs) - len(rewards))}
        return numbers | ({"val_reward_mean": math.fsum(rewards) / len(rewards)} if rewards else {})

    # --- Serving the policy ----------------------------------------------------------------------

    @asynccontextmanager
    async def _serving(self, took_up: int | None) -> AsyncGenerator[_Session]:
        """Serve the policy, through the proxy if there is one; all is as it was after."""
        begin = took_up or 0
        # A run that is taken up must not draw once more the words of its first steps.
        seed = random.Random(f"{self._seed} {begin}").getrandbits(63)
        endpoint = PolicyEndpoint(self._policy, self._endpoint_host, self._endpoint_port, model=self._model, seed=seed)
        await endpoint.start()
        try:
            async with self._behind_proxy(endpoint) as proxy:
                self._announce(begin, endpoint, proxy)
                store = self.get_store()
                train = await store.add_resources({**self._own_resources(), "llm": self._llm(endpoint, proxy, 1.0)})
                val = await store.add_resources({**self._own_resources(), "llm": self._llm(endpoint, proxy, 0.0)})
                await self._give_to_leftovers(train, val)
                yield _Session(endpoint, train.resources_id, val.resources_id, took_up)
        finally:
            await endpoint.stop()

    async def _give_to_leftovers(self, train: ResourcesUpdate, val: ResourcesUpdate) -> None:
        run = self.get_run()
        if run is not None:
            await give_to_leftovers(self.get_store(), run.name, lambda mode: val if mode == "val" else train)

    @asynccontextmanager
    async def _behind_proxy(self, endpoint: PolicyEndpoint) -> AsyncGenerator[ModelProxy | None]:
        proxy = self.get_llm_proxy()
        if proxy is None:
            yield None
            return
        before = list(proxy.model_list)
        others = [entry for entry in before if entry["model_name"] != self._model]
        backend = {"model": f"openai/{self._model}", "api_base": endpoint.url, "api_key": "not-needed"}
        proxy.update_model_list([*others, {"model_name": self._model, "litellm_params": backend}])
        try:
            async with running_proxy(proxy, self.get_store()):
                yield proxy
        finally:
            proxy.update_model_list(before)

    def _llm(self, endpoint: PolicyEndpoint, proxy: ModelProxy | None, temperature: float) -> LLM:
        sampling = {"temperature": temperature}
        if proxy is None:
            return LLM(endpoint=endpoint.url, model=self._model, api_key="not-needed", sampling_parameters=sampling)
        return proxy.as_resource(model=self._model, sampling_parameters=sampling)

    def _own_resources(self) -> dict[str, Any]:
        return dict(self.get_initial_resources() or {})

    def _announce(self, updates: int, endpoint: PolicyEndpoint, proxy: ModelProxy | None) -> None:
        """Say which weights answer from now on: by how many updates made them."""
        endpoint.version = str(updates)
        if proxy is not None:
            proxy.set_model_version(str(updates))

    # --- Checkpoints -----------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """What rollout ids and tasks of a step follow from: a run cannot change it on the way."""
        return {"group_size": self._group_size, "batch_size": self._batch_size, "seed": self._seed}

    def _take_up(self) -> int | None:
        """Restore what the run has learned, and return the step to go on with; None if it has not begun."""
        run = self.get_run()
        checkpoint = None if run is None else run.load_checkpoint()
        if run is None or checkpoint is None:
            return None
        if checkpoint.get("settings") != self._settings():
            raise InvalidValue(
                f"the run {run.name!r} was begun with {checkpoint.get('settings')}, not {self._settings()}; "
                "give the same settings, or another name"
            )
        self._policy.restore(checkpoint["policy"])
        self._reference.restore(checkpoint["reference"])
        _logger.info("the run %r goes on with step %d", run.name, checkpoint["step"])
        return int(checkpoint["step"])

    def _keep(self, step: int) -> None:
        run = self.get_run()
        if run is not None:
            run.save_checkpoint(
                {
                    "step": step,
                    "settings": self._settings(),
                    "policy": self._policy.to_json(),
                    "reference": self._reference.to_json(),
                }
            )


def _describe_dropped(gathered: GatheredGroups) -> str:
    counts = [f"{_DROPPED_WORDS[why]}: {count}" for why, count in gathered.dropped_rollouts.most_common()]
    reasons = [*gathered.failures.most_common(1), *gathered.unusable_calls.most_common(1)]
    most = "".join(f"; {count}× {reason}" for reason, count in reasons)
    groups = "1 group" if gathered.dropped_groups == 1 else f"{gathered.dropped_groups} groups"
    return f"dropped {groups} ({', '.join(counts)}{most})"


def _nothing_to_learn(steps: int, gathered: GatheredGroups) -> NothingToLearn:
    return NothingToLearn(
        f"in {steps} {'step' if steps == 1 else 'steps on end'} no group of rollouts was whole, so nothing could be "
        f"learned; the last step {_describe_dropped(gathered)}. Does every rollout succeed, call the model and get a "
        "reward?"
    )
