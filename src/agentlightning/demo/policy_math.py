"""Losses and gradients of policies that choose by softmax, on plain numbers.

Sources, by the numbers used below:

[1] Shao et al., DeepSeekMath, 2024, https://arxiv.org/abs/2402.03300 (GRPO: section 4.1)
[2] Schulman et al., Proximal Policy Optimization Algorithms, 2017, https://arxiv.org/abs/1707.06347
[3] Schulman, Approximating KL Divergence, 2020, http://joschu.net/blog/kl-approx.html

Shapes: [A] is one number for each action of a softmax. All logarithms are natural.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def log_softmax(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Return the logarithms of the probabilities, which are proportional to ``exp(logit / temperature)``: shape [A].

    Args:
        logits: shape [A], at least one.
        temperature: greater than 0.
    """
    scaled = [logit / temperature for logit in logits]
    top = max(scaled)  # subtracted, so that no exponential overflows
    log_total = top + math.log(math.fsum(math.exp(logit - top) for logit in scaled))
    return [logit - log_total for logit in scaled]


def softmax(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Return the probabilities themselves, shape [A]; they sum to 1. See ``log_softmax``."""
    return [math.exp(logprob) for logprob in log_softmax(logits, temperature)]


def choice_loss(logprob: float, old_logprob: float, advantage: float, clip: float) -> float:
    """Return the clipped loss of one choice, to be minimised.

    ``-min(ρ A, clip(ρ, 1 - ε, 1 + ε) A)`` with ``ρ = exp(logprob - old_logprob)``: [2], equation 7.

    Args:
        logprob: of the choice, under the weights that are trained.
        old_logprob: of the choice, under the weights that sampled it.
        clip: ε, greater than 0.
    """
    ratio = math.exp(logprob - old_logprob)
    clipped = min(max(ratio, 1 - clip), 1 + clip)
    return -min(ratio * advantage, clipped * advantage)


def kl_penalty(logprob: float, reference_logprob: float) -> float:
    """Return an estimate of the KL divergence from a reference: never negative, and unbiased.

    ``q - log q - 1`` with ``q = exp(reference_logprob - logprob)``: [1], equation 4; k3 of [3].
    """
    log_ratio = reference_logprob - logprob
    return math.exp(log_ratio) - log_ratio - 1


def choice_slope(logprob: float, old_logprob: float, advantage: float, clip: float) -> float:
    """Return the derivative of ``choice_loss`` by ``logprob``: ``-ρ A``, or 0 where the clipped term is the minimum."""
    ratio = math.exp(logprob - old_logprob)
    clipped_away = ratio > 1 + clip if advantage > 0 else ratio < 1 - clip
    return 0.0 if clipped_away else -ratio * advantage


def kl_slope(logprob: float, reference_logprob: float) -> float:
    """Return the derivative of ``kl_penalty`` by ``logprob``: ``1 - q``."""
    return 1 - math.exp(reference_logprob - logprob)


def logits_gradient(logprobs: Sequence[float], slopes: Sequence[float]) -> list[float]:
    """Return derivatives by logits, from derivatives by log-probabilities of the same softmax.

    ``g_k = slope_k - π_k Σ_a slope_a``, since ``d logprob_a / d logit_k = [a = k] - π_k``.

    Args:
        logprobs: shape [A].
        slopes: shape [A], for each action the sum of the derivatives of all choices of it.

    Returns:
        Shape [A]. They sum to 0.
    """
    total = math.fsum(slopes)
    return [slope - math.exp(logprob) * total for logprob, slope in zip(logprobs, slopes, strict=True)]


def entropy(logprobs: Sequence[float]) -> float:
    """Return ``H = -Σ π log π`` in nats: 0 for certainty, ``log A`` for equal probabilities."""
    return -math.fsum(math.exp(logprob) * logprob for logprob in logprobs)


def entropy_gradient(logprobs: Sequence[float]) -> list[float]:
    """Return the derivatives of ``entropy`` by the logits, ``-π_k (log π_k + H)``: shape [A]. They sum to 0.

    Adding it, weighted, keeps a policy exploring: the bonus S of [2], equation 9.
    """
    nats = entropy(logprobs)
    return [-math.exp(logprob) * (logprob + nats) for logprob in logprobs]
