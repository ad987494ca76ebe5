"""`GRPO`: reinforcement learning by comparing attempts at the same task, for any `Policy`.

A step enqueues a group of rollouts for each task, waits for them, reads what the policy sampled and what reward it
got, updates the policy, and saves a checkpoint. Group relative policy optimisation: Shao et al., DeepSeekMath, 2024,
https://arxiv.org/abs/2402.03300, section 4.1.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic

from typing_extensions import TypeVar

from agentlightning.adapter.adapters import TracerTraceToTriplet, TraceToTripletBase
from agentlightning.algorithm.base import Algorithm
from agentlightning.algorithm.batches import EndedRollout, check_counts, check_datasets, enqueue_inputs, wait_for_ends
from agentlightning.algorithm.groups import GroupReader, OnFailure, StepGroups, reward_of
from agentlightning.algorithm.model_proxy import ModelProxy, running_proxy
from agentlightning.algorithm.policy import ModelEndpoint, Policy, PolicyBatch, PolicyUpdate
from agentlightning.algorithm.resume import reassign_unfinished
from agentlightning.errors import InvalidValue, NothingToLearn
from agentlightning.security.hosts import is_loopback
from agentlightning.types import LLM, Dataset, RolloutMode

_logger = logging.getLogger(__name__)

PolicyT = TypeVar("PolicyT", bound=Policy, default=Any)

_EMPTY_STEPS = 3
"""After so many consecutive steps without a group to compare the run fails: something is wrong with the agent."""

_ENOUGH_ATTEMPTS = 32
"""In a shorter run all rewards of each group can be equal by chance."""

_RETRY_WORDS = (
    "A rollout that fails is not run again by default; Trainer(rollout_config=agl.RolloutConfig(max_attempts=3, "
    "retry_condition=['failed', 'timeout', 'unresponsive'])) retries it."
)

TRAIN_SAMPLING: Mapping[str, float | None] = MappingProxyType(
    {"temperature": 1.0, "top_p": 1.0, "top_k": None, "min_p": None, "seed": None}
)
"""Samples of the policy's own distribution: `GRPO` has the proxy send these parameters, and remove those with None."""


@dataclass(frozen=True)
class _Serving:
    """What holds while the policy is served."""

    endpoint: ModelEndpoint
    train_resources_id: str
    val_resources_id: str
    resumed_step: int | None
    """The step that an earlier process may have begun; None if this run is new."""


class GRPO(Algorithm, Generic[PolicyT]):
    """Trains a policy that agents call as a language model, without knowing that it learns.

    In each step ``batch_size`` tasks are attempted ``group_size`` times each. The reward of each attempt, compared with
    the mean of its group, says which of the policy's tokens were good. A failed attempt is not an attempt with reward
    0: by default it is left out, and a group needs two attempts with a reward. Every step reports how much was dropped:
    ``groups_dropped``, ``rollouts_failed``, ``rollouts_unrewarded``, ``rollouts_unusable``, ``attempts_retried``,
    ``failures`` (failed attempts, also those that were retried), ``calls_unusable``, ``calls_set_aside`` (by the
    adapter) and ``no_model_calls`` (attempts without a recorded call). It also reports ``frac_reward_zero_std``, the
    share of groups of which all rewards are equal, which teach nothing.

    The policy is served by its own endpoint. With an LLM proxy agents reach it through the proxy, which records every
    call, imposes the sampling of training rollouts, and is paused while the policy is updated. Without one they get
    the endpoint itself, and the agent's tracer must record the calls.

    Agents find the model as the resource ``llm``. Training rollouts get temperature 1, validation rollouts
    temperature 0: always the most probable token.

    If the run has a name, the policy is saved after every step. A process that resumes the run repeats the interrupted
    step: it uses the rollouts of it that have finished, and runs only the others.

    Args:
        policy: what is trained, in place: an ``agl.SoftmaxPolicy``, or any object with the methods of ``agl.Policy``.
        group_size: attempts at each task, at least 2.
        batch_size: tasks in each step; of a smaller dataset all.
        n_steps: number of steps.
        seed: of the order of tasks, and of the sampling. (Which rollout gets which sample also depends on the order
            in which agents call.)
        validate_every: steps between validations; there is one at the end in any case. 0: only that.
        update: how the policy learns.
        on_failure: what becomes of a group with a failed attempt. ``"drop_member"``: the others are compared.
            ``"drop_group"``: the group is not used, nor is one in which an attempt has no reward or no usable call. A
            number: the reward of an attempt that failed by an error of the agent, or took too long. A lost worker is
            never counted as that.
        imposed_sampling: what the LLM proxy puts in place of the sampling parameters that agents send in training.
            None: agents' own are kept. Validation always has the agents' own.
        model: name of the policy in requests.
        endpoint_host, endpoint_port: where it is served. Without a proxy, runners must be able to reach it.

    Raises:
        InvalidValue: a number is out of its range, or the policy lacks a method.
    """

    def __init__(
        self,
        policy: PolicyT,
        *,
        group_size: int = 16,
        batch_size: int = 16,
        n_steps: int = 26,
        seed: int = 0,
        validate_every: int = 0,
        update: PolicyUpdate | None = None,
        on_failure: OnFailure = "drop_member",
        imposed_sampling: Mapping[str, float | None] | None = TRAIN_SAMPLING,
        model: str = "policy",
        endpoint_host: str | None = None,
        endpoint_port: int = 0,
    ) -> None:
        if not isinstance(policy, Policy):  # pyright: ignore[reportUnnecessaryIsInstance] - callers may not check types
            raise InvalidValue(
                f"policy is {policy!r}, a {type(policy).__name__}; GRPO trains an agl.SoftmaxPolicy, or an object with "
                "all methods of agl.Policy"
            )
        check_counts(group_size=group_size, least=2)
        check_counts(batch_size=batch_size, n_steps=n_steps)
        check_counts(validate_every=validate_every, endpoint_port=endpoint_port, least=0)
        if isinstance(on_failure, str):
            is_known = on_failure in ("drop_member", "drop_group")
        else:
            is_known = type(on_failure) in (int, float) and math.isfinite(on_failure)
        if not is_known:
            raise InvalidValue(f"on_failure is {on_failure!r}; give 'drop_member', 'drop_group' or a finite number")
        self._policy = policy
        self._group_size = group_size
        self._batch_size = batch_size
        self._n_steps = n_steps
        self._seed = seed
        self._validate_every = validate_every
        self._update = update or PolicyUpdate()
        self._on_failure: OnFailure = on_failure
        self._imposed_sampling = None if imposed_sampling is None else dict(imposed_sampling)
        self._warned: set[str] = set()
        self._compared, self._had_spread = 0, False
        """How many attempts of this run were compared, and whether any was better than another."""
        self._model = model
        self._endpoint_host = endpoint_host
        self._endpoint_port = endpoint_port

    @property
    def policy(self) -> PolicyT:
        """The policy that is trained."""
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
            NothingToLearn: in three consecutive steps, or in all if there are fewer, no group had two attempts to
                compare; or, at the end, no attempt was ever better than another at the same task.
        """
        check_datasets(train_dataset=train_dataset, val_dataset=val_dataset)
        if train_dataset is None or len(train_dataset) == 0:
            raise InvalidValue("GRPO has no tasks to learn from; pass train_dataset")
        self._compared, self._had_spread = 0, False
        self._warned.clear()
        resumed_step = await asyncio.to_thread(self._load_checkpoint)
        begin = resumed_step or 0
        if begin >= self._n_steps:
            _logger.warning(
                "all steps of this run are done (%d of %d); the policy is as the run left it. Raise n_steps to go on, "
                "or give the run another name to begin anew",
                begin,
                self._n_steps,
            )
            self._check_learned("its log says why")
            return
        if resumed_step is None:
            self._policy.begin_run()
            await asyncio.to_thread(self._save_checkpoint, 0)
        async with self._serving(resumed_step) as serving:
            empty_steps = 0
            groups = StepGroups()
            for step in range(begin, self._n_steps):
                groups = await self._step(step, train_dataset, val_dataset, serving)
                empty_steps = 0 if groups.groups else empty_steps + 1
                if empty_steps == min(_EMPTY_STEPS, self._n_steps):
                    raise _nothing_to_learn(empty_steps, groups)
        self._check_learned(_causes_of(groups))

    def _check_learned(self, why: str) -> None:
        """Raise ``NothingToLearn`` if no step had anything to teach; only say so if that can be chance."""
        if self._had_spread:
            return
        words = f"nothing was learned: in no step was an attempt better than another at the same task; {why}"
        if self._compared >= _ENOUGH_ATTEMPTS:
            raise NothingToLearn(words)
        _logger.warning("%s", words)

    # --- One step --------------------------------------------------------------------------------

    async def _step(
        self, step: int, train_dataset: Dataset[Any], val_dataset: Dataset[Any] | None, serving: _Serving
    ) -> StepGroups:
        inputs = [task for task in self._tasks_of(step, train_dataset) for _ in range(self._group_size)]
        rollouts = await self._run_all("train", "", step, inputs, serving.train_resources_id)
        if step == serving.resumed_step:
            rollouts = await self._replace_failed(step, inputs, rollouts, serving)
        # The trainer's adapter may make something else than triplets, such as messages; GRPO cannot use it then.
        adapter = self._adapter if isinstance(self._adapter, TraceToTripletBase) else TracerTraceToTriplet()
        deviation = self._update.scale_by_deviation
        reader = GroupReader(self._policy, self._model, adapter, self._group_size, deviation, self._on_failure)
        groups = reader.read(rollouts)
        self._warn(step, groups)
        self._compared, self._had_spread = self._compared + groups.attempts, self._had_spread or groups.has_spread
        numbers = groups.numbers() | await self._learn(step, groups, serving.endpoint)
        is_last = step + 1 == self._n_steps
        if val_dataset is not None and (is_last or (self._validate_every and (step + 1) % self._validate_every == 0)):
            numbers |= await self._validate(step, val_dataset, serving.val_resources_id)
        await asyncio.to_thread(self._save_checkpoint, step + 1)
        self.report(step, total_steps=float(self._n_steps), **numbers)
        return groups

    def _warn(self, step: int, groups: StepGroups) -> None:
        if groups.dropped_rollouts:
            hint = f". {_RETRY_WORDS}" if groups.failures and "failures" not in self._warned else ""
            _logger.warning("step %d: %s%s", step, groups.describe_dropped(), hint)
            self._warned.update(["failures"] if hint else [])
        # Later on it is what becomes of a policy that always succeeds.
        if groups.groups and not groups.has_spread and not self._had_spread and "spread" not in self._warned:
            self._warned.add("spread")
            _logger.warning("step %d has taught nothing: %s", step, _causes_of(groups))

    def _tasks_of(self, step: int, dataset: Dataset[Any]) -> list[Any]:
        """Return the tasks of a step: the whole dataset in a random order, then in another one, and so on."""
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
        self, step: int, inputs: Sequence[Any], rollouts: Sequence[EndedRollout | None], serving: _Serving
    ) -> list[EndedRollout | None]:
        """Run those that failed in the resumed step once more, as new rollouts.

        The endpoint died with the earlier process, so an agent that ran on another machine at that time may have failed
        only because its model was gone.
        """
        failed = [index for index, each in enumerate(rollouts) if each is None or each.rollout.status != "succeeded"]
        again = [inputs[index] for index in failed]
        others = await self._run_all("train", "again", step, again, serving.train_resources_id)
        replaced = dict(zip(failed, others, strict=True))
        return [replaced.get(index, rollout) for index, rollout in enumerate(rollouts)]

    async def _run_all(
        self, mode: RolloutMode, kind: str, step: int, inputs: Sequence[Any], resources_id: str
    ) -> list[EndedRollout | None]:
        """Run the agent on each input, and return the rollouts when all have ended, in order.

        Args:
            kind: distinguishes their ids from those of other rollouts of the same step.
        """
        if not inputs:
            return []
        rollout_ids = await enqueue_inputs(self, inputs, mode=mode, resources_id=resources_id, step=step, kind=kind)
        # Failed attempts are learned from only if they have a reward.
        reads_failed = not isinstance(self._on_failure, str)
        return await wait_for_ends(self.get_store(), rollout_ids, reads_failed=reads_failed)

    async def _learn(self, step: int, groups: StepGroups, endpoint: ModelEndpoint) -> dict[str, float]:
        """Update the policy. The proxy is paused meanwhile, so that no call mixes two versions of the weights."""
        proxy = self.get_llm_proxy()
        if proxy is not None:
            await proxy.pause()
        try:
            # In a thread: a large policy learns for minutes, and heartbeats and progress go on meanwhile.
            batch = PolicyBatch(groups.groups, self._update, progress=step / self._n_steps)
            numbers = await asyncio.to_thread(self._policy.update, batch)
            self._set_version(step + 1, endpoint, proxy)
        finally:
            if proxy is not None:
                await proxy.resume()
        return dict(numbers)

    async def _validate(self, step: int, dataset: Dataset[Any], resources_id: str) -> dict[str, float]:
        inputs = [dataset[index] for index in range(len(dataset))]
        rollouts = await self._run_all("val", "val", step, inputs, resources_id)
        own = [each for each in rollouts if each is None or not each.on_defaults]
        found = [reward_of(each, self._on_failure) for each in own]
        rewards = [reward for reward in found if reward is not None]
        numbers = {
            "val_rollouts": float(len(inputs)),
            "val_unrewarded": float(len(own) - len(rewards)),
            "val_on_defaults": float(len(rollouts) - len(own)),
        }
        return numbers | ({"val_reward_mean": math.fsum(rewards) / len(rewards)} if rewards else {})

    # --- Serving the policy ----------------------------------------------------------------------

    @asynccontextmanager
    async def _serving(self, resumed_step: int | None) -> AsyncGenerator[_Serving]:
        """Serve the policy inside the block, through the proxy if there is one."""
        begin = resumed_step or 0
        # With the same seed a resumed run would sample the same tokens as its first steps did.
        seed = random.Random(f"{self._seed} {begin}").getrandbits(63)
        host, more = self._endpoint_place()
        endpoint = self._policy.make_endpoint(model=self._model, host=host, port=self._endpoint_port, seed=seed, **more)
        await endpoint.start()
        try:
            async with self._behind_proxy(endpoint) as proxy:
                self._set_version(begin, endpoint, proxy)
                store = self.get_store()
                own = self.get_initial_resources() or {}
                train = await store.add_resources({**own, "llm": self._llm(endpoint, proxy, 1.0)})
                val = await store.add_resources({**own, "llm": self._llm(endpoint, proxy, 0.0)})
                await reassign_unfinished(store, self.get_run(), lambda mode: val if mode == "val" else train)
                yield _Serving(endpoint, train.resources_id, val.resources_id, resumed_step)
        finally:
            await endpoint.stop()

    def _endpoint_place(self) -> tuple[str, dict[str, Any]]:
        """The host of the policy's endpoint, and further arguments for it. Where agents call it themselves, it is
        served as the store is; behind a proxy only the proxy has to reach it."""
        serving = None if self.get_llm_proxy() is not None else self.get_serving()
        host = self._endpoint_host or ("127.0.0.1" if serving is None else serving.host)
        tls = None if serving is None or is_loopback(host) else serving.tls
        return host, {} if tls is None else {"tls": tls}

    def why_no_guests(self) -> str | None:
        """Why agents on other machines cannot reach the policy, if they are to call it without a proxy."""
        host, _ = self._endpoint_place()
        if not is_loopback(host):
            return None
        return (
            f"the policy is served at {host}, which leads every machine to itself. Leave out endpoint_host= of GRPO, "
            "and it is served where the store is; or give the Trainer an llm_proxy"
        )

    @asynccontextmanager
    async def _behind_proxy(self, endpoint: ModelEndpoint) -> AsyncGenerator[ModelProxy | None]:
        """Make the proxy forward to the endpoint inside the block; its list of models is restored after."""
        proxy = self.get_llm_proxy()
        if proxy is None:
            yield None
            return
        before = list(proxy.model_list)
        others = [entry for entry in before if entry["model_name"] != self._model]
        backend = {"model": f"openai/{self._model}", "api_base": endpoint.url, "api_key": _key_of(endpoint)}
        proxy.update_model_list([*others, {"model_name": self._model, "litellm_params": backend}])
        proxy.impose_sampling(self._imposed_sampling or {}, self._model)
        try:
            async with running_proxy(proxy, self.get_store()):
                yield proxy
        finally:
            proxy.update_model_list(before)
            proxy.impose_sampling({}, self._model)

    def _llm(self, endpoint: ModelEndpoint, proxy: ModelProxy | None, temperature: float) -> LLM:
        sampling = {"temperature": temperature}
        if proxy is None:
            key = _key_of(endpoint)
            return LLM(endpoint=endpoint.url, model=self._model, api_key=key, sampling_parameters=sampling)
        return proxy.as_resource(model=self._model, sampling_parameters=sampling)

    def _set_version(self, updates: int, endpoint: ModelEndpoint, proxy: ModelProxy | None) -> None:
        """Label the calls from now on with the number of updates behind the weights that answer them."""
        endpoint.version = str(updates)
        if proxy is not None:
            proxy.set_model_version(str(updates))

    # --- Checkpoints -----------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """Return what the rollout ids and tasks of a step depend on, and a run therefore cannot change."""
        return {"group_size": self._group_size, "batch_size": self._batch_size, "seed": self._seed}

    def _load_checkpoint(self) -> int | None:
        """Restore the policy as the run left it, and return the step to continue with; None if the run is new."""
        run = self.get_run()
        checkpoint = None if run is None else run.load_checkpoint()
        if run is None or checkpoint is None:
            return None
        if checkpoint.get("settings") != self._settings():
            raise InvalidValue(
                f"the run {run.name!r} was begun with {checkpoint.get('settings')}, not {self._settings()}; "
                "give the same settings, or another name"
            )
        # Checkpoints of earlier versions have the parts of a SoftmaxPolicy's state beside the step.
        self._policy.load_state(checkpoint.get("state", checkpoint), run.checkpoint_path.parent)
        self._compared, self._had_spread = checkpoint.get("compared", 0), checkpoint.get("had_spread", True)
        _logger.info("the run %r is resumed at step %d", run.name, checkpoint["step"])
        return int(checkpoint["step"])

    def _save_checkpoint(self, step: int) -> None:
        run = self.get_run()
        if run is not None:
            folder = run.checkpoint_path.parent
            folder.mkdir(parents=True, exist_ok=True)
            state = self._policy.save_state(folder)
            learned = {"compared": self._compared, "had_spread": self._had_spread}
            run.save_checkpoint({"step": step, "settings": self._settings(), "state": state, **learned})


def _key_of(endpoint: ModelEndpoint) -> str:
    """The key of an endpoint. OpenAI's clients refuse to start without any."""
    return getattr(endpoint, "api_key", None) or "not-needed"


def _causes_of(step: StepGroups) -> str:
    if not step.groups:
        return f"the last step {step.describe_dropped()}"
    return f"all rewards of each of its {len(step.groups)} group(s) are equal, and {step.describe_equal()}"


def _nothing_to_learn(steps: int, last: StepGroups) -> NothingToLearn:
    return NothingToLearn(
        f"in {steps} consecutive step(s) no group had two rollouts to compare, so nothing could be learned; the last "
        f"step {last.describe_dropped()}. Does every rollout succeed, call the model and get a reward? {_RETRY_WORDS}"
    )
