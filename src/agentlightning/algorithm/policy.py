"""`Policy`: the protocol of what `GRPO` trains, the plain data that passes between the two, and how that is made.

`GRPO` decides which rollouts run, reads from their spans what the policy sampled and how good it was, and computes
advantages. The policy serves its model while agents run, and changes its own weights. `agl.SoftmaxPolicy` is one; a
language model on a GPU can be another, because everything that crosses this seam is token ids and numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from agentlightning.adapter.adapters import TraceToTripletBase
from agentlightning.algorithm.batches import EndedRollout
from agentlightning.errors import InvalidValue
from agentlightning.types import AttemptedRollout, Rollout, Span, Triplet


@dataclass(frozen=True, slots=True)
class SampledCall:
    """One model call of an attempt, as tokens: P of the prompt and C of the completion."""

    prompt_ids: Sequence[int]
    """Token ids of the prompt, shape [P]. Never trained on."""
    completion_ids: Sequence[int]
    """Token ids that the policy sampled, shape [C], at least one."""
    logprobs: Sequence[float] | None
    """Natural logarithm of each completion token's probability, shape [C], at temperature 1, under the weights that
    sampled it. None: not recorded. The policy then uses its present weights, so the ratio of new to old is 1."""


@dataclass(frozen=True, slots=True)
class GroupMember:
    """One attempt of a group: everything that the policy sampled in it, and how good it was."""

    rollout_id: str
    reward: float
    advantage: float
    """The reward compared with those of the group. It applies to every completion token of the attempt."""
    calls: Sequence[SampledCall]
    """At least one, in the order in which the agent made them."""


@dataclass(frozen=True)
class PolicyUpdate:
    """How a policy learns from one step's groups. The defaults suit the guessing game of `agl demo`.

    Raises:
        InvalidValue: a number is out of its range.
    """

    learning_rate: float = 30.0
    """Step size along the gradient. `SoftmaxPolicy` applies it to each row of logits separately, to the mean over the
    tokens sampled in that context, so that rare contexts learn as fast as frequent ones. Tables take far larger rates
    than neural networks."""
    clip: float = 0.2
    """ε of PPO: the ratio of new to old probability counts within 1 ± ε. It matters from the second epoch on."""
    epochs: int = 1
    """How often to pass over the same groups."""
    entropy_weight: float = 0.15
    """Value of one nat of entropy, in advantages, at the start of the run. It falls linearly to 0 at the end."""
    kl_weight: float = 0.0
    """Cost of one nat of distance from the policy at the start of the run, in advantages."""
    scale_by_deviation: bool = False
    """Whether advantages are divided by the standard deviation of their group's rewards, as GRPO does. If not, they
    are not scaled, as Dr. GRPO proposes."""

    def __post_init__(self) -> None:
        numbers = (self.learning_rate, self.clip, self.entropy_weight, self.kl_weight)
        if not all(math.isfinite(number) and number >= 0 for number in numbers) or self.clip == 0 or self.epochs < 1:
            raise InvalidValue(f"{self} is out of range: no number may be negative, clip and epochs not 0")


@dataclass(frozen=True)
class PolicyBatch:
    """What a policy learns from in one step."""

    groups: Sequence[Sequence[GroupMember]]
    """Attempts at one task each; the advantages of a group sum to 0. Empty if no group of the step was complete."""
    settings: PolicyUpdate
    progress: float
    """Share of the run's steps that are done, from 0 to less than 1; for schedules."""


class ModelEndpoint(Protocol):
    """A server of the OpenAI protocol that answers with the policy's present weights."""

    version: str
    """Number of updates behind the weights that answer. `GRPO` sets it after each update; replies should carry it."""

    @property
    def url(self) -> str:
        """Base URL for OpenAI's clients, such as ``http://127.0.0.1:8000/v1``. Final once `start` has returned."""
        ...

    async def start(self) -> None:
        """Listen; requests are answered after it returns. Raises ``OSError`` if the address cannot be listened on."""
        ...

    async def stop(self) -> None:
        """Finish the requests in progress, and free the port. May be called again."""
        ...


@runtime_checkable
class Policy(Protocol):
    """A model that can be sampled from by agents and trained on what they did with it.

    `GRPO` calls `update`, `save_state` and `load_state` in a worker thread, one at a time, so that they may take long.
    While `update` runs behind an LLM proxy, no request reaches the endpoint. Without a proxy requests may arrive at any
    time, and must be answered with the weights from before or after the update.
    """

    def make_endpoint(self, *, model: str, host: str, port: int, seed: int) -> ModelEndpoint:
        """Return a server for this policy, which is not started yet.

        Args:
            model: name that requests use for it.
            host: address to listen on. For a server that runs elsewhere it may be ignored.
            port: 0 takes a free one.
            seed: of the sampling.
        """
        ...

    def read_call(self, triplet: Triplet) -> SampledCall:
        """Return the tokens of one recorded call, as they are to be trained on.

        Args:
            triplet: ``prompt`` has ``token_ids`` [P] and ``messages``, ``response`` has ``token_ids`` [C] and
                ``message``, ``metadata`` has ``logprobs`` [C] or None. The token ids are empty if the call was
                recorded as text only; a policy whose tokens do not follow from the text must refuse it then.

        Raises:
            InvalidValue: the call cannot be trained on. `GRPO` counts it under the error's message, which should
                therefore be the same for all calls with the same problem.
        """
        ...

    def begin_run(self) -> None:
        """Take the present weights as the reference that ``kl_weight`` holds the policy to.

        Called once, when a run begins; a run that is resumed gets its reference by `load_state`.
        """
        ...

    def update(self, batch: PolicyBatch) -> Mapping[str, float]:
        """Change the weights by what the batch teaches.

        Returns:
            Numbers to report with the step, by name, such as ``loss``, ``entropy``, ``clipped`` and ``kl``.
        """
        ...

    def save_state(self, folder: Path) -> dict[str, Any]:
        """Return everything that `load_state` needs to continue: weights, reference, optimiser.

        `GRPO` puts the JSON object into the run's checkpoint, which is replaced atomically. Large arrays belong into
        files in ``folder``, under a new name at each call, and only their names into the object. The files of the call
        before must stay until the next call, because a crash before the checkpoint is replaced goes back to them.
        """
        ...

    def load_state(self, state: Mapping[str, Any], folder: Path) -> None:
        """Become the policy that `save_state` saved.

        Raises:
            InvalidValue: the state is damaged, or belongs to a policy of another shape.
        """
        ...


# --- Groups: the attempts at one task that GRPO compares with each other ---
#
# A group is used as a whole or not at all. If one of its attempts failed, has no reward, or has no call to train on,
# the group is dropped. A reward of 0 in its place would teach that the policy caused the failure; and the mean of the
# others would be the mean of another experiment, because attempts do not fail at random.

_SAME_REWARD = 1e-9
"""A standard deviation up to this is rounding: all rewards of the group are equal."""


def group_advantages(rewards: Sequence[float], *, scale_by_deviation: bool) -> list[float]:
    """Return how much better than its group each attempt did.

    ``A_i = (r_i - mean(r)) / std(r)`` with the population's standard deviation: Shao et al., DeepSeekMath, 2024,
    https://arxiv.org/abs/2402.03300, section 4.1.2 (GRPO). Or ``A_i = r_i - mean(r)``: Liu et al., Understanding
    R1-Zero-Like Training, 2025, https://arxiv.org/abs/2503.20783 (Dr. GRPO), because dividing by the deviation gives
    tasks that are almost always, or almost never, solved more weight than others.

    Args:
        rewards: r_1 … r_G, shape [G], finite, at least one.
        scale_by_deviation: GRPO, else Dr. GRPO.

    Returns:
        Shape [G]. They sum to 0, and all are 0 if all rewards are equal: such a group teaches nothing.
    """
    mean = math.fsum(rewards) / len(rewards)
    differences = [reward - mean for reward in rewards]
    deviation = math.sqrt(math.fsum(difference * difference for difference in differences) / len(rewards))
    if deviation <= _SAME_REWARD:
        return [0.0] * len(rewards)
    return [difference / deviation for difference in differences] if scale_by_deviation else differences


@dataclass
class StepGroups:
    """What the rollouts of one step gave: the complete groups, and counts of everything that was dropped."""

    groups: list[list[GroupMember]] = field(default_factory=list[list[GroupMember]])
    """The complete groups, in the order of their tasks."""
    rewards: list[float] = field(default_factory=list[float])
    """Of all rollouts that have one, also of those whose group was dropped."""
    dropped_groups: int = 0
    dropped_rollouts: Counter[str] = field(default_factory=Counter[str])
    """Rollouts because of which their group was dropped, by cause: ``failed``, ``unrewarded`` or ``unusable``."""
    retried_attempts: int = 0
    """Attempts that ended without a result and were followed by another."""
    unusable_calls: Counter[str] = field(default_factory=Counter[str])
    """Model calls that cannot be trained on, by reason."""
    failures: Counter[str] = field(default_factory=Counter[str])
    """Rollouts that did not succeed, by status and reason as the store gives them."""

    def numbers(self) -> dict[str, float]:
        """Return all counts, for ``Algorithm.report``."""
        numbers = {
            "groups_used": float(len(self.groups)),
            "groups_dropped": float(self.dropped_groups),
            "rollouts_failed": float(self.dropped_rollouts["failed"]),
            "rollouts_unrewarded": float(self.dropped_rollouts["unrewarded"]),
            "rollouts_unusable": float(self.dropped_rollouts["unusable"]),
            "attempts_retried": float(self.retried_attempts),
            "calls_unusable": float(self.unusable_calls.total()),
        }
        if self.rewards:
            numbers["reward_mean"] = math.fsum(self.rewards) / len(self.rewards)
        return numbers


@dataclass(frozen=True)
class GroupReader:
    """Makes groups of rollouts and their spans.

    Args:
        policy: reads the tokens of each call.
        model: name of the policy; calls of other models are ignored.
        adapter: makes triplets of spans.
        group_size: number of consecutive rollouts that have the same task.
        scale_by_deviation: see ``group_advantages``.
    """

    policy: Policy
    model: str
    adapter: TraceToTripletBase
    group_size: int
    scale_by_deviation: bool

    def read(self, rollouts: Sequence[EndedRollout | None]) -> StepGroups:
        """Return the complete groups, and counts of what was dropped.

        Args:
            rollouts: group after group; None for one that is not in the store any more.
        """
        step = StepGroups()
        for begin in range(0, len(rollouts), self.group_size):
            group = [self._attempt(each, step) for each in rollouts[begin : begin + self.group_size]]
            complete = [attempt for attempt in group if attempt is not None]
            if len(complete) < len(group):
                step.dropped_groups += 1
                continue
            advantages = group_advantages(
                [reward for _, reward, _ in complete], scale_by_deviation=self.scale_by_deviation
            )
            step.groups.append(
                [
                    GroupMember(rollout_id, reward, advantage, calls)
                    for (rollout_id, reward, calls), advantage in zip(complete, advantages, strict=True)
                ]
            )
        return step

    def _attempt(self, ended: EndedRollout | None, step: StepGroups) -> tuple[str, float, list[SampledCall]] | None:
        rollout = None if ended is None else ended.rollout
        if isinstance(rollout, AttemptedRollout):
            step.retried_attempts += rollout.attempt.sequence_id - 1
        if ended is None or rollout is None or rollout.status != "succeeded":
            step.dropped_rollouts["failed"] += 1
            step.failures[_failure_of(rollout)] += 1
            return None
        reward = ended.reward
        if reward is None:
            step.dropped_rollouts["unrewarded"] += 1
            return None
        step.rewards.append(reward)
        calls = self._calls(ended.spans, step.unusable_calls)
        if not calls:
            step.dropped_rollouts["unusable"] += 1
            return None
        return rollout.rollout_id, reward, calls

    def _calls(self, spans: Sequence[Span], unusable: Counter[str]) -> list[SampledCall]:
        adapted = self.adapter.examine(spans)
        unusable.update(each.reason for each in adapted.unusable)
        calls: list[SampledCall] = []
        for triplet in adapted.made:
            if triplet.metadata.get("model") not in (None, self.model):
                continue
            try:
                calls.append(self.policy.read_call(triplet))
            except InvalidValue as error:
                unusable[error.message] += 1
        return calls


def _failure_of(rollout: Rollout | None) -> str:
    if rollout is None:
        return "not in the store any more"
    return f"{rollout.status}, {rollout.reason_code or 'no reason'}: {rollout.reason_message or 'not explained'}"
