"""The policy: words, choices, and what is kept of it."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest

from agentlightning.algorithm.groups import group_advantages
from agentlightning.algorithm.policy import GroupMember, Policy, PolicyBatch, PolicyUpdate, SampledCall
from agentlightning.demo.softmax_policy import SoftmaxPolicy
from agentlightning.demo.softmax_table import kl_divergence
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


def good_and_bad(good: int, bad: int, logprob: float | None) -> list[GroupMember]:
    """A group of two attempts of one word each, one with reward 1 and one with reward 0."""
    return [
        GroupMember("", 1.0, 0.5, [SampledCall((0,), [good], None if logprob is None else [logprob])]),
        GroupMember("", 0.0, -0.5, [SampledCall((0,), [bad], None if logprob is None else [logprob])]),
    ]


def test_a_softmax_policy_is_a_policy() -> None:
    assert isinstance(SoftmaxPolicy(WORDS), Policy)


def test_an_update_makes_what_was_better_more_probable() -> None:
    policy = SoftmaxPolicy(WORDS)
    settings = PolicyUpdate(learning_rate=1, entropy_weight=0)
    numbers = policy.update(PolicyBatch([good_and_bad(2, 1, math.log(1 / 3))], settings, 0))
    red, green, blue = policy.logprobs((0,))
    assert blue > red > green
    assert numbers["entropy"] == pytest.approx(math.log(3))
    assert numbers["loss"] == pytest.approx(0)


def test_every_word_of_a_completion_has_the_words_before_it_as_context() -> None:
    policy = SoftmaxPolicy(WORDS)
    call = SampledCall([0], [2, 1], [math.log(1 / 3)] * 2)
    policy.update(PolicyBatch([[GroupMember("", 1.0, 1.0, [call])]], PolicyUpdate(entropy_weight=0), 0))
    assert list(policy.contexts()) == [(0,), (0, 2)]
    assert [policy.choose(context, random.Random(0), 0).token_id for context in policy.contexts()] == [2, 1]


def test_an_empty_batch_changes_nothing() -> None:
    policy = SoftmaxPolicy(WORDS)
    assert policy.update(PolicyBatch([], PolicyUpdate(), 0)) == {"loss": 0, "entropy": 0, "clipped": 0, "kl": 0}
    assert list(policy.contexts()) == []


def test_without_recorded_logprobs_the_policy_that_is_updated_counts_as_the_one_that_spoke() -> None:
    recorded, unrecorded = SoftmaxPolicy(WORDS), SoftmaxPolicy(WORDS)
    for policy, logprob in ((recorded, math.log(1 / 3)), (unrecorded, None)):
        policy.update(PolicyBatch([good_and_bad(2, 0, logprob)], PolicyUpdate(), 0.5))
    assert recorded.logits((0,)) == pytest.approx(unrecorded.logits((0,)))


def test_clipping_stops_a_step_that_has_gone_far_enough() -> None:
    settings = PolicyUpdate(learning_rate=0.3, epochs=200, clip=0.2, entropy_weight=0)
    policy = SoftmaxPolicy(WORDS)
    numbers = policy.update(PolicyBatch([good_and_bad(2, 0, None)], settings, 0))
    blue = math.exp(policy.logprobs((0,))[2])
    assert 1.2 / 3 < blue < 1.6 / 3
    assert numbers["clipped"] == 1
    free = SoftmaxPolicy(WORDS)
    wide = PolicyUpdate(learning_rate=0.3, epochs=200, clip=1e9, entropy_weight=0)
    free.update(PolicyBatch([good_and_bad(2, 0, None)], wide, 0))
    assert math.exp(free.logprobs((0,))[2]) > 0.9, "the negative control: without the clip it goes on"


def test_the_penalty_holds_the_policy_to_its_beginning() -> None:
    moved: list[float] = []
    for weight in (0.0, 5.0):
        policy = SoftmaxPolicy(WORDS)
        policy.begin_run()
        settings = PolicyUpdate(learning_rate=0.1, entropy_weight=0, kl_weight=weight)
        numbers = [policy.update(PolicyBatch([good_and_bad(2, 0, None)], settings, 0)) for _ in range(20)]
        moved.append(numbers[-1]["kl"])
    assert moved[0] > moved[1] * 2 > 0


def test_the_state_of_a_run_comes_back_with_its_reference(tmp_path: Path) -> None:
    policy = SoftmaxPolicy(WORDS)
    policy.begin_run()
    settings = PolicyUpdate(learning_rate=0.1, kl_weight=1.0)
    policy.update(PolicyBatch([good_and_bad(2, 0, None)], settings, 0))
    resumed = SoftmaxPolicy(WORDS)
    resumed.load_state(json.loads(json.dumps(policy.save_state(tmp_path))), tmp_path)
    batch = PolicyBatch([good_and_bad(2, 0, None)], settings, 0.5)
    assert resumed.update(batch) == policy.update(batch)
    assert resumed.to_json() == policy.to_json()


def learn_one_word(kl_weight: float, epochs: int, words: int = 15) -> tuple[float, float]:
    """Train with the default learning rate on one task, where only the word 3 is right; returns its probability at the
    end, and the distance from the beginning in nats."""
    policy, rng = SoftmaxPolicy([f"w{number}" for number in range(words)]), random.Random(0)
    policy.begin_run()
    settings = PolicyUpdate(kl_weight=kl_weight, epochs=epochs)
    for step in range(26):
        groups: list[list[GroupMember]] = []
        for _ in range(8):
            said = [policy.choose((0,), rng) for _ in range(16)]
            rewards = [float(word.token_id == 3) for word in said]
            advantages = group_advantages(rewards, scale_by_deviation=False)
            calls = [[SampledCall((0,), [word.token_id], [word.logprob])] for word in said]
            groups.append([GroupMember("", *each) for each in zip(rewards, advantages, calls, strict=True)])
        policy.update(PolicyBatch(groups, settings, step / 26))
    logprobs = policy.logprobs((0,))
    return math.exp(logprobs[3]), kl_divergence(logprobs, [-math.log(words)] * words)


@pytest.mark.parametrize("epochs", [1, 4])
def test_a_penalty_lets_the_reward_rise_and_keeps_the_policy_near(epochs: int) -> None:
    free, light, strict = (learn_one_word(weight, epochs) for weight in (0.0, 0.04, 1.0))
    assert light[0] > 0.9, "0.04 nats cost far less than the reward is worth"
    assert free[1] > light[1] > strict[1]
    # The optimum of the reward minus the penalty: every probability in proportion to exp(reward / weight).
    assert 1 / 15 < strict[0] <= 1.3 * math.e / (math.e + 14)
    assert strict[1] < 0.1


@pytest.mark.parametrize("epochs", [1, 4])
@pytest.mark.parametrize("kl_weight", [0.01, 0.1, 0.3, 3.0, 100.0, 1e6])
def test_no_penalty_destroys_the_policy(kl_weight: float, epochs: int) -> None:
    assert learn_one_word(kl_weight, epochs)[0] > 0.9 / 15
