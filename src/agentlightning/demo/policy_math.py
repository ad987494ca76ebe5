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


def group_advantages(rewards: Sequence[float], *, scale_by_deviation: bool) -> list[float]:
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


def choice_slope(logprob: float, old_logprob: float, advantage: float, clip: float) -> float:
    """The derivative of ``choice_loss`` by ``logprob``: ``-ρ A`` where the minimum takes the unclipped term, else 0."""
    ratio = math.exp(logprob - old_logprob)
    clipped_away = ratio > 1 + clip if advantage > 0 else ratio < 1 - clip
    return 0.0 if clipped_away else -ratio * advantage


def kl_slope(logprob: float, reference_logprob: float) -> float:
    """The derivative of ``kl_penalty`` by ``logprob``: ``1 - q``."""
    return 1 - math.exp(reference_logprob - logprob)


def logits_gradient(logprobs: Sequence[float], slopes: Sequence[float]) -> list[float]:
    """What derivatives by log-probabilities come to as derivatives by logits, for one softmax.

    ``g_k = slope_k - π_k Σ_a slope_a``, since ``d logprob_a / d logit_k = [a = k] - π_k``.

    Args:
        logprobs: of all actions.
        slopes: for each action, the sum of the derivatives of all choices of it.

    Returns:
        One number for each action. They sum to 0.
    """
    total = math.fsum(slopes)
    return [slope - math.exp(logprob) * total for logprob, slope in zip(logprobs, slopes, strict=True)]


def entropy(logprobs: Sequence[float]) -> float:
    """``H = -Σ π log π`` in nats: 0 for certainty, the logarithm of their number for equal probabilities."""
    return -math.fsum(math.exp(logprob) * logprob for logprob in logprobs)


def entropy_gradient(logprobs: Sequence[float]) -> list[float]:
    """The derivatives of ``entropy`` by the logits: ``-π_k (log π_k + H)``. They sum to 0.

    Adding it, weighted, keeps a policy trying what it does not know yet: the bonus S of [2], equation 9.
    """
    nats = entropy(logprobs)
    return [-math.exp(logprob) * (logprob + nats) for logprob in logprobs]
