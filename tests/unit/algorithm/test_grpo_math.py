"""The mathematics of GRPO, against definitions and numerical gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, strategies as st

from agentlightning.algorithm.groups import group_advantages
from agentlightning.demo import softmax_table as maths

LOGITS = st.lists(st.floats(-6, 6), min_size=2, max_size=6)
REWARDS = st.lists(st.floats(-5, 5), min_size=2, max_size=8)


def numerical(function: Callable[[Sequence[float]], float], at: Sequence[float], step: float = 1e-6) -> list[float]:
    """Central differences."""
    slopes: list[float] = []
    for index in range(len(at)):
        up, down = list(at), list(at)
        up[index] += step
        down[index] -= step
        slopes.append((function(up) - function(down)) / (2 * step))
    return slopes


@given(LOGITS, st.floats(0.1, 5))
def test_softmax_is_a_distribution_in_proportion_to_the_exponentials(logits: list[float], temperature: float) -> None:
    probabilities = maths.softmax(logits, temperature)
    assert math.fsum(probabilities) == pytest.approx(1)
    for probability, logit in zip(probabilities, logits, strict=True):
        expected = math.exp((logit - logits[0]) / temperature)
        assert probability / probabilities[0] == pytest.approx(expected, rel=1e-9)


def test_softmax_of_huge_logits_does_not_overflow() -> None:
    assert maths.softmax([1e4, 0.0]) == [1.0, 0.0]
    assert maths.log_softmax([1e4, 0.0])[1] == -1e4


@given(REWARDS, st.booleans())
def test_advantages_sum_to_nothing_and_keep_the_order(rewards: list[float], scaled: bool) -> None:
    advantages = group_advantages(rewards, scale_by_deviation=scaled)
    assert math.fsum(advantages) == pytest.approx(0, abs=1e-6)
    for one, other in zip(sorted(zip(rewards, advantages, strict=True)), sorted(advantages), strict=True):
        assert one[1] == pytest.approx(other, abs=1e-9)


def test_advantages_by_hand() -> None:
    assert group_advantages([1, 0, 0, 1], scale_by_deviation=False) == [0.5, -0.5, -0.5, 0.5]
    assert group_advantages([1, 0, 0, 1], scale_by_deviation=True) == [1, -1, -1, 1]
    assert group_advantages([3, 0, 0], scale_by_deviation=True) == pytest.approx(
        [math.sqrt(2), -1 / math.sqrt(2), -1 / math.sqrt(2)]
    )


@pytest.mark.parametrize("rewards", [[0.0, 0.0], [0.1 + 0.2, 0.3, 0.3], [7.0]])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_group_of_equals_teaches_nothing(rewards: list[float], scaled: bool) -> None:
    assert group_advantages(rewards, scale_by_deviation=scaled) == [0.0] * len(rewards)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [
        (1.0, 2.0, -2.0),
        (1.1, 2.0, -2.2),
        (1.5, 2.0, -2.4),  # clipped: no more gain than at 1.2
        (0.5, 2.0, -1.0),  # not clipped: going back is free
        (0.5, -2.0, 1.6),  # clipped: no more gain than at 0.8
        (1.5, -2.0, 3.0),  # not clipped: the harm counts in full
    ],
)
def test_the_clipped_loss_by_hand(ratio: float, advantage: float, loss: float) -> None:
    assert maths.choice_loss(math.log(ratio), 0.0, advantage, clip=0.2) == pytest.approx(loss)


@given(st.floats(-1, 1), st.floats(-3, 3), st.floats(0.05, 0.5))
def test_slopes_are_derivatives(logprob: float, advantage: float, clip: float) -> None:
    near_a_corner = min(abs(logprob - math.log(1 + clip)), abs(logprob - math.log(1 - clip))) < 1e-4
    if not near_a_corner:  # where the loss has no derivative
        (slope,) = numerical(lambda x: maths.choice_loss(x[0], 0.0, advantage, clip), [logprob])
        assert maths.choice_slope(logprob, 0.0, advantage, clip) == pytest.approx(slope, abs=1e-5)


@given(LOGITS, st.data())
def test_the_gradient_of_a_whole_row(logits: list[float], data: st.DataObject) -> None:
    """Several choices in one context, and their distance from a reference: loss and penalty together, by the logits."""
    place = st.integers(0, len(logits) - 1)
    # An old probability that is the present one: no corner of the clipped loss is near.
    choices = data.draw(st.lists(st.tuples(place, st.floats(-2, 2)), min_size=1, max_size=5))
    before = maths.log_softmax(logits)
    reference = maths.log_softmax(data.draw(st.lists(st.floats(-6, 6), min_size=len(logits), max_size=len(logits))))

    def loss(row: Sequence[float]) -> float:
        logprobs = maths.log_softmax(row)
        return math.fsum(
            maths.choice_loss(logprobs[at], before[at], advantage, 0.2) for at, advantage in choices
        ) + 0.3 * maths.kl_divergence(logprobs, reference)

    slopes = [0.0] * len(logits)
    for at, advantage in choices:
        slopes[at] += maths.choice_slope(before[at], before[at], advantage, 0.2)
    parts = zip(maths.logits_gradient(before, slopes), maths.kl_gradient(before, reference), strict=True)
    gradient = [slope + 0.3 * far for slope, far in parts]
    assert gradient == pytest.approx(numerical(loss, logits), abs=2e-4, rel=1e-4)
    assert math.fsum(gradient) == pytest.approx(0, abs=1e-6)


@given(LOGITS)
def test_the_gradient_of_entropy(logits: list[float]) -> None:
    def entropy(row: Sequence[float]) -> float:
        return maths.entropy(maths.log_softmax(row))

    gradient = maths.entropy_gradient(maths.log_softmax(logits))
    assert gradient == pytest.approx(numerical(entropy, logits), abs=1e-5)


def test_entropy_and_distance_have_their_least_and_largest_values() -> None:
    assert maths.entropy(maths.log_softmax([0.0] * 4)) == pytest.approx(math.log(4))
    assert maths.entropy(maths.log_softmax([800.0, 0.0])) == pytest.approx(0)
    even, odd = maths.log_softmax([0.0, 0.0]), maths.log_softmax([math.log(3), 0.0])
    assert maths.kl_divergence(odd, odd) == 0
    assert maths.kl_divergence(even, odd) == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert maths.kl_divergence(odd, even) == pytest.approx(0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))


def test_nothing_overflows_however_far_the_weights_have_moved() -> None:
    for logprob, old_logprob in ((0.0, -2000.0), (-2000.0, 0.0)):
        for advantage in (1.0, -1.0):
            assert math.isfinite(maths.choice_loss(logprob, old_logprob, advantage, 0.2))
            assert math.isfinite(maths.choice_slope(logprob, old_logprob, advantage, 0.2))
    far, near = maths.log_softmax([2000.0, 0.0]), maths.log_softmax([0.0, 2000.0])
    assert maths.kl_divergence(far, near) == pytest.approx(2000)
    assert maths.kl_gradient(far, near) == pytest.approx([0, 0])


def test_the_numerical_gradient_notices_a_wrong_one() -> None:
    """The negative control of the tests above."""
    logits = [0.5, -0.5, 0.0]
    without_normaliser = [1.0, 0.0, 0.0]  # d logprob / d logits, as if the sum did not change
    assert numerical(lambda row: maths.log_softmax(row)[0], logits) != pytest.approx(without_normaliser, abs=1e-2)
