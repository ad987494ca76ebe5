"""The policy: words, choices, and what is kept of it."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path

import pytest

from agentlightning.algorithm.policy_update import Choice, GroupMember, PolicyUpdate, update_policy
from agentlightning.demo.softmax_policy import SoftmaxPolicy
from agentlightning.errors import InvalidValue

WORDS = ["red", "green", "blue"]


def test_words_that_it_does_not_know_are_passed_over() -> None:
    policy = SoftmaxPolicy(WORDS)
    assert policy.encode("Is it green, or blue? Not greenish. green!") == [1, 2, 1]
    assert policy.decode([2, 0]) == "blue red"
    with pytest.raises(InvalidValue, match="outside 0 to 2"):
        policy.decode([3])


@pytest.mark.parametrize(
    ("vocabulary", "actions", "named"),
    [
        (["b", "a", "a"], None, "'a' more than once"),
        (["two words"], None, "'two words', which is neither"),
        ([""], None, "'', which is neither"),
        ([], None, "at least one"),
        (WORDS, ["pink"], "'pink'"),
        (WORDS, ["red", "red"], "each once"),
    ],
)
def test_words_that_cannot_be(vocabulary: list[str], actions: list[str] | None, named: str) -> None:
    with pytest.raises(InvalidValue, match=named):
        SoftmaxPolicy(vocabulary, actions)


def test_an_untaught_context_is_uniform_and_a_taught_one_is_drawn_in_proportion() -> None:
    policy = SoftmaxPolicy(WORDS, actions=["green", "blue"], logits={(0,): [math.log(3), 0.0]})
    assert policy.logprobs((2,)) == pytest.approx([math.log(0.5)] * 2)
    drawn = Counter(policy.choose((0,), rng).token_id for rng in [random.Random(5)] for _ in range(4000))
    assert drawn.keys() == {1, 2}
    assert drawn[1] / 4000 == pytest.approx(0.75, abs=0.03)


def test_temperature_and_nucleus() -> None:
    policy = SoftmaxPolicy(WORDS, logits={(): [1.0, 2.0, 2.0]})
    rng = random.Random(0)
    state = rng.getstate()
    assert {policy.choose((), rng, temperature=0).token_id for _ in range(20)} == {1}, "the first of equals"
    assert rng.getstate() == state, "greedy needs no chance"
    assert {policy.choose((), rng, top_p=0.5).token_id for _ in range(200)} == {1, 2}
    cold = Counter(policy.choose((), rng, temperature=0.1).token_id for _ in range(500))
    assert cold[0] < 5
    choice = policy.choose((), rng, temperature=0.1)
    assert choice.logprob == policy.logprobs(())[choice.token_id], "at temperature 1, whatever it was drawn with"


def test_what_is_saved_comes_back_exactly(tmp_path: Path) -> None:
    policy = SoftmaxPolicy(WORDS, actions=["blue", "red"], logits={(): [0.1 + 0.2, -1e-17], (1, 1): [1 / 3, 2.0]})
    policy.save(tmp_path / "policy.json")
    loaded = SoftmaxPolicy.load(tmp_path / "policy.json")
    assert loaded.to_json() == policy.to_json()
    assert list(loaded.contexts()) == [(), (1, 1)]
    assert list(tmp_path.iterdir()) == [tmp_path / "policy.json"]
    other = SoftmaxPolicy(WORDS, actions=["blue", "red"])
    other.restore(policy.to_json())
    assert other.to_json() == policy.to_json()


def test_what_is_no_policy_is_refused(tmp_path: Path) -> None:
    good = SoftmaxPolicy(WORDS, logits={(0,): [1, 2, 3]}).to_json()
    wrong = [{}, {**good, "format": "x"}, {**good, "logits": [[[0], [1.0]]]}, {**good, "logits": 5}]
    for data in wrong:
        with pytest.raises(InvalidValue):
            SoftmaxPolicy.from_json(data)
    with pytest.raises(InvalidValue, match="another vocabulary"):
        SoftmaxPolicy(["other"]).restore(good)
    (tmp_path / "broken").write_text("{")
    with pytest.raises(InvalidValue, match="broken"):
        SoftmaxPolicy.load(tmp_path / "broken")


def member(reward: float, word: int, logprob: float | None) -> GroupMember:
    return GroupMember("", reward, [Choice((0,), word, logprob)])


def test_an_update_makes_what_was_better_more_probable() -> None:
    policy = SoftmaxPolicy(WORDS)
    group = [member(1.0, 2, math.log(1 / 3)), member(0.0, 1, math.log(1 / 3))]
    numbers = update_policy(policy, policy.copy(), [group], PolicyUpdate(learning_rate=1, entropy_weight=0), 0)
    red, green, blue = policy.logprobs((0,))
    assert blue > red > green
    assert numbers.entropy == pytest.approx(math.log(3))
    assert numbers.loss == pytest.approx(0)


def test_without_recorded_logprobs_the_policy_that_is_updated_counts_as_the_one_that_spoke() -> None:
    recorded, unrecorded = SoftmaxPolicy(WORDS), SoftmaxPolicy(WORDS)
    for policy, logprob in ((recorded, math.log(1 / 3)), (unrecorded, None)):
        update_policy(policy, policy.copy(), [[member(1, 2, logprob), member(0, 0, logprob)]], PolicyUpdate(), 0.5)
    assert recorded.logits((0,)) == pytest.approx(unrecorded.logits((0,)))


def test_clipping_stops_a_step_that_has_gone_far_enough() -> None:
    settings = PolicyUpdate(learning_rate=0.3, epochs=200, clip=0.2, entropy_weight=0)
    policy = SoftmaxPolicy(WORDS)
    numbers = update_policy(policy, policy.copy(), [[member(1, 2, None), member(0, 0, None)]], settings, 0)
    blue = math.exp(policy.logprobs((0,))[2])
    assert 1.2 / 3 < blue < 1.6 / 3
    assert numbers.clipped == 1
    free = SoftmaxPolicy(WORDS)
    wide = PolicyUpdate(learning_rate=0.3, epochs=200, clip=1e9, entropy_weight=0)
    update_policy(free, free.copy(), [[member(1, 2, None), member(0, 0, None)]], wide, 0)
    assert math.exp(free.logprobs((0,))[2]) > 0.9, "the negative control: without the clip it goes on"


def test_the_penalty_holds_the_policy_to_its_beginning() -> None:
    moved = []
    for weight in (0.0, 5.0):
        policy = SoftmaxPolicy(WORDS)
        reference = policy.copy()
        for _ in range(20):
            group = [member(1, 2, None), member(0, 0, None)]
            numbers = update_policy(
                policy, reference, [group], PolicyUpdate(learning_rate=0.1, entropy_weight=0, kl_weight=weight), 0
            )
        moved.append(numbers.kl)
    assert moved[0] > moved[1] * 2 > 0
