"""The mathematics of GRPO for policies that choose by softmax: advantages, loss, gradient.

For one task the policy makes a *group* of G attempts, with rewards r_1 … r_G. Attempt i consists of the
choices (tokens) o_{i,t} made in the contexts s_{i,t}. Sources, by the numbers used below:

[1] Shao et al., DeepSeekMath, 2024, https://arxiv.org/abs/2402.03300 (GRPO: section 4.1)
[2] Schulman et al., Proximal Policy Optimization Algorithms, 2017, https://arxiv.org/abs/1707.06347
[3] Liu et al., Understanding R1-Zero-Like Training (Dr. GRPO), 2025, https://arxiv.org/abs/2503.20783
[4] Schulman, Approximating KL Divergence, 2020, http://joschu.net/blog/kl-approx.html

Nothing here knows of stores, spans or tables: numbers come in, numbers go out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = [
    "choice_gradient",
    "choice_loss",
    "group_advantages",
    "kl_penalty",
    "log_softmax",
    "softmax",
]

_SAME_REWARD = 1e-9
"""Standard deviations up to here are rounding: all attempts were worth the same."""


def log_softmax(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Natural logarithms of the probabilities, which are in proportion to ``exp(logit / temperature)``.

    Args:
        logits: one for each action, at least one.
        temperature: greater than 0.
    """
    scaled = [logit / temperature for logit in logits]
    top = max(scaled)  # subtracted, so that no exponential overflows
    log_total = top + math.log(math.fsum(math.exp(logit - top) for logit in scaled))
    return [logit - log_total for logit in scaled]


def softmax(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    """The probabilities themselves; they sum to 1. See ``log_softmax``."""
    return [math.exp(logprob) for logprob in log_softmax(logits, temperature)]


def group_advantages(rewards: Sequence[float], scale_by_deviation: bool = True) -> list[float]:
    """How much better than its group each attempt did: one advantage for all its choices.

    ``A_i = (r_i - mean(r)) / std(r)`` of [1], equation in section 4.1.2, with the population's standard
    deviation; or ``A_i = r_i - mean(r)`` of [3], which weighs easy and hard tasks alike. Advantages of a
    group sum to 0, and all are 0 where all rewards are the same: such a group teaches nothing.

    Args:
        rewards: r_1 … r_G, finite, at least one.
        scale_by_deviation: [1], else [3].
    """
    mean = math.fsum(rewards) / len(rewards)
    differences = [reward - mean for reward in rewards]
    deviation = math.sqrt(math.fsum(difference * difference for difference in differences) / len(rewards))
    if deviation <= _SAME_REWARD:
        return [0.0] * len(rewards)
    return [difference / deviation for difference in differences] if scale_by_deviation else differences


def choice_loss(logprob: float, old_logprob: float, advantage: float, clip: float) -> float:
    """The clipped loss of one choice, to be made small.

    ``-min(ρ A, clip(ρ, 1 - ε, 1 + ε) A)`` with ``ρ = exp(logprob - old_logprob)``: [2], equation 7.

    Args:
        logprob: of the choice, under the policy that is trained.
        old_logprob: of the choice, under the policy that made it.
        clip: ε, greater than 0.
    """
    ratio = math.exp(logprob - old_logprob)
    clipped = min(max(ratio, 1 - clip), 1 + clip)
    return -min(ratio * advantage, clipped * advantage)


def kl_penalty(logprob: float, reference_logprob: float) -> float:
    """An estimate of how far the policy has moved from a reference; never negative, and without bias.

    ``q - log q - 1`` with ``q = exp(reference_logprob - logprob)``: [1], equation 4; k3 of [4].
    """
    log_ratio = reference_logprob - logprob
    return math.exp(log_ratio) - log_ratio - 1


def choice_gradient(
    logits: Sequence[float],
    choice: int,
    old_logprob: float,
    advantage: float,
    clip: float,
    kl_weight: float = 0.0,
    reference_logprob: float = 0.0,
) -> list[float]:
    """The gradient by the logits of ``choice_loss + kl_weight * kl_penalty`` of one choice.

    By the chain rule through ``logprob = logits[choice] - log Σ exp(logits)``, whose derivative by logit
    k is ``[k = choice] - π_k``. By ``logprob`` the loss has the derivative ``-ρ A`` while the minimum
    takes the unclipped term, and 0 otherwise; the penalty has ``1 - q``.

    Args:
        logits: of the context in which the choice was made, under the policy that is trained.
        choice: index of the action that was chosen.
        old_logprob, advantage, clip: as for ``choice_loss``.
        kl_weight: β of [1]; 0 for no penalty.
        reference_logprob: of the choice, under the reference; read only when there is a penalty.

    Returns:
        As many numbers as there are logits. They sum to 0.
    """
    logprobs = log_softmax(logits)
    logprob = logprobs[choice]
    ratio = math.exp(logprob - old_logprob)
    clipped_away = ratio > 1 + clip if advantage > 0 else ratio < 1 - clip
    slope = 0.0 if clipped_away else -ratio * advantage
    if kl_weight:
        slope += kl_weight * (1 - math.exp(reference_logprob - logprob))
    if slope == 0:
        return [0.0] * len(logits)
    gradient = [-slope * math.exp(each) for each in logprobs]
    gradient[choice] += slope
    return gradient
