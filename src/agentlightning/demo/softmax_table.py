"""`SoftmaxTable`: the smallest language model there is, a table from contexts to softmax choices.

It knows a vocabulary of words; a token id is a word's index in it. From a prompt it keeps the words that it knows, in
their order, and ignores the rest: that is the context. Every context has a row of logits, one for each word that the
table may answer with, and an answer is one word. An unknown context has a row of zeros: all words are equally probable.

The mathematics below it is that of losses and gradients of policies that choose by softmax, on plain numbers.
Sources, by the numbers used below:

[1] Shao et al., DeepSeekMath, 2024, https://arxiv.org/abs/2402.03300 (GRPO: section 4.1)
[2] Schulman et al., Proximal Policy Optimization Algorithms, 2017, https://arxiv.org/abs/1707.06347
[3] Schulman, Approximating KL Divergence, 2020, http://joschu.net/blog/kl-approx.html

Shapes: [A] is one number for each action of a softmax. All logarithms are natural.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from agentlightning.errors import InvalidValue

Context: TypeAlias = tuple[int, ...]
"""Token ids."""

_WORD = re.compile(r"\w+|[^\w\s]")
_MAX_LOG_RATIO = 20.0


class WordChoice(NamedTuple):
    """A word that was sampled."""

    token_id: int
    logprob: float
    """Natural logarithm of the word's probability at temperature 1, whatever temperature it was sampled at."""


class SoftmaxTable:
    """A table from contexts to logits.

    Any thread may read while one writes: a row is replaced as a whole, never changed in place.

    Args:
        vocabulary: the known words, without repeats; each is one word (letters, digits, ``_``) or one sign.
        actions: those that may be answers; None for all.
        logits: rows to begin with, one number for each action.

    Raises:
        InvalidValue: a vocabulary entry is not one word or is repeated, an action is not in the vocabulary, there is
            no action, or a row has another length.
    """

    def __init__(
        self,
        vocabulary: Sequence[str],
        actions: Sequence[str] | None = None,
        logits: Mapping[Context, Sequence[float]] | None = None,
    ) -> None:
        self._vocabulary = tuple(vocabulary)
        self._ids = {word: token_id for token_id, word in enumerate(self._vocabulary)}
        odd = [word for word in self._vocabulary if not _WORD.fullmatch(word)]
        if odd:
            raise InvalidValue(
                f"the vocabulary has {odd[0]!r}, which is neither one word (letters, digits, '_') nor one sign; "
                "give its parts"
            )
        repeated = [word for word, count in Counter(self._vocabulary).items() if count > 1]
        if repeated:
            raise InvalidValue(f"the vocabulary has {repeated[0]!r} more than once")
        answers = self._vocabulary if actions is None else tuple(actions)
        unknown = [word for word in answers if word not in self._ids]
        if unknown or not answers or len(set(answers)) != len(answers):
            raise InvalidValue(
                f"actions must be words of the vocabulary, at least one, each once; unknown: {unknown}, of "
                f"{len(answers)}"
            )
        self._action_ids = tuple(self._ids[word] for word in answers)
        self._places = {token_id: place for place, token_id in enumerate(self._action_ids)}
        self._rows: dict[Context, tuple[float, ...]] = {}
        for context, row in (logits or {}).items():
            self.set_logits(context, row)

    @property
    def vocabulary(self) -> Sequence[str]:
        """The words, by token id."""
        return self._vocabulary

    @property
    def action_ids(self) -> Sequence[int]:
        """Token ids of the possible answers, in the order of a row of logits."""
        return self._action_ids

    def encode(self, text: str) -> list[int]:
        """Return the token ids of the known words in the text, in their order."""
        return [self._ids[word] for word in _WORD.findall(text) if word in self._ids]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the words, separated by blanks.

        Raises:
            InvalidValue: an id is not of this vocabulary.
        """
        if not all(0 <= token_id < len(self._vocabulary) for token_id in token_ids):
            raise InvalidValue(f"{list(token_ids)} has an id outside 0 to {len(self._vocabulary) - 1}")
        return " ".join(self._vocabulary[token_id] for token_id in token_ids)

    def place_of(self, token_id: int) -> int | None:
        """Return the index of a token in a row of logits; None if it is not a possible answer."""
        return self._places.get(token_id)

    def logits(self, context: Context) -> Sequence[float]:
        """Return the row of a context, one number for each of `action_ids`."""
        return self._rows.get(context) or (0.0,) * len(self._action_ids)

    def logprobs(self, context: Context) -> list[float]:
        """Return the natural logarithms of the probabilities of `action_ids`, at temperature 1."""
        return log_softmax(self.logits(context))

    def choose(self, context: Context, rng: random.Random, temperature: float = 1.0, top_p: float = 1.0) -> WordChoice:
        """Sample one word.

        Args:
            context: token ids of the prompt.
            rng: source of randomness; not used at temperature 0.
            temperature: flattens the probabilities above 1, sharpens them below. 0 takes the most probable word,
                the first of equals.
            top_p: sample from the most probable words that together have this probability (nucleus sampling).
        """
        row = self.logits(context)
        logprobs = log_softmax(row)
        if temperature == 0:
            place = max(range(len(row)), key=row.__getitem__)
        else:
            weights = _nucleus(softmax(row, temperature), top_p)
            place = rng.choices(range(len(weights)), weights)[0]
        return WordChoice(self._action_ids[place], logprobs[place])

    def set_logits(self, context: Context, row: Sequence[float]) -> None:
        """Replace the row of a context.

        Raises:
            InvalidValue: the row has another length than there are actions.
        """
        if len(row) != len(self._action_ids):
            raise InvalidValue(f"a row of {len(row)} logits does not fit {len(self._action_ids)} actions")
        self._rows[tuple(context)] = tuple(float(logit) for logit in row)

    def contexts(self) -> Iterator[Context]:
        """Iterate over the contexts that have a row, in the order in which they were first set."""
        return iter(list(self._rows))


def _nucleus(probabilities: list[float], top_p: float) -> list[float]:
    """Weights: the probabilities of the fewest words that reach ``top_p`` together, and 0 for the rest."""
    if top_p >= 1:
        return probabilities
    weights = [0.0] * len(probabilities)
    reached = 0.0
    for place in sorted(range(len(probabilities)), key=lambda each: -probabilities[each]):
        weights[place] = probabilities[place]
        reached += probabilities[place]
        if reached >= top_p:
            break
    return weights


# --- Losses and gradients --------------------------------------------------------------------------------


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


def _ratio(logprob: float, old_logprob: float) -> float:
    """Return ``exp(logprob - old_logprob)``, of which the logarithm counts within ±20, so that nothing overflows."""
    return math.exp(min(max(logprob - old_logprob, -_MAX_LOG_RATIO), _MAX_LOG_RATIO))


def choice_loss(logprob: float, old_logprob: float, advantage: float, clip: float) -> float:
    """Return the clipped loss of one choice, to be minimised.

    ``-min(ρ A, clip(ρ, 1 - ε, 1 + ε) A)`` with ``ρ = exp(logprob - old_logprob)``: [2], equation 7.

    Args:
        logprob: of the choice, under the weights that are trained.
        old_logprob: of the choice, under the weights that sampled it.
        clip: ε, greater than 0.
    """
    ratio = _ratio(logprob, old_logprob)
    clipped = min(max(ratio, 1 - clip), 1 + clip)
    return -min(ratio * advantage, clipped * advantage)


def choice_slope(logprob: float, old_logprob: float, advantage: float, clip: float) -> float:
    """Return the derivative of ``choice_loss`` by ``logprob``: ``-ρ A``, or 0 where the clipped term is the minimum."""
    ratio = _ratio(logprob, old_logprob)
    clipped_away = ratio > 1 + clip if advantage > 0 else ratio < 1 - clip
    return 0.0 if clipped_away else -ratio * advantage


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


def kl_divergence(logprobs: Sequence[float], reference: Sequence[float]) -> float:
    """Return ``KL(π‖ρ) = Σ π_a (log π_a - log ρ_a)`` in nats: 0 for equal distributions, else more.

    Args:
        logprobs: log π, shape [A].
        reference: log ρ, shape [A].
    """
    nats = math.fsum(math.exp(one) * (one - other) for one, other in zip(logprobs, reference, strict=True))
    return max(0.0, nats)  # rounding


def kl_gradient(logprobs: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Return the derivatives of ``kl_divergence`` by the logits of π, shape [A]: they sum to 0.

    ``g_k = π_k (log π_k - log ρ_k - KL(π‖ρ))``, from ``d π_a / d logit_k = π_a ([a = k] - π_k)``. It is exact. The
    estimator k3 of [3], which [1] uses in equation 4, needs only the sampled action's probability, as a language model
    must. But its derivative, ``1 - ρ_a / π_a`` by ``log π_a``, has no bound where an action was sampled that has become
    rare, and its mean is not the gradient of this divergence.
    """
    nats = kl_divergence(logprobs, reference)
    return [math.exp(one) * (one - other - nats) for one, other in zip(logprobs, reference, strict=True)]
