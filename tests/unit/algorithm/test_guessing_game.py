"""The guessing game, and that the policy learns to play it: rules, policy and mathematics, without any process."""

from __future__ import annotations

import random

import pytest

from agentlightning.algorithm.groups import group_advantages
from agentlightning.algorithm.policy import GroupMember, PolicyBatch, PolicyUpdate, SampledCall
from agentlightning.demo import game
from agentlightning.demo.game import in_words, win_rate
from agentlightning.demo.softmax_policy import SoftmaxPolicy
from agentlightning.errors import InvalidValue

STEPS = 26
GROUP_SIZE = 16
SECRETS = range(game.LOWEST, game.HIGHEST + 1)


def play(policy: SoftmaxPolicy, secret: int, rng: random.Random) -> tuple[float, list[SampledCall]]:
    now = game.start(secret)
    calls: list[SampledCall] = []
    while now.outcome == "playing":
        context = tuple(policy.encode(game.prompt(now)))
        word = policy.choose(context, rng)
        calls.append(SampledCall(context, [word.token_id], [word.logprob]))
        now = game.step(now, game.parse(now, policy.decode([word.token_id])))
    return now.reward, calls


def play_group(policy: SoftmaxPolicy, secret: int, rng: random.Random, settings: PolicyUpdate) -> list[GroupMember]:
    played = [play(policy, secret, rng) for _ in range(GROUP_SIZE)]
    advantages = group_advantages([reward for reward, _ in played], scale_by_deviation=settings.scale_by_deviation)
    return [
        GroupMember("", reward, advantage, calls) for (reward, calls), advantage in zip(played, advantages, strict=True)
    ]


def train(seed: int, settings: PolicyUpdate) -> tuple[SoftmaxPolicy, list[float]]:
    """The policy after as many rollouts as the demo has, and the mean reward of each step."""
    policy, rng = SoftmaxPolicy(game.VOCABULARY), random.Random(seed)
    policy.begin_run()
    means: list[float] = []
    for step in range(STEPS):
        groups = [play_group(policy, secret, rng, settings) for secret in SECRETS]
        rewards = [member.reward for group in groups for member in group]
        means.append(sum(rewards) / len(rewards))
        policy.update(PolicyBatch(groups, settings, step / STEPS))
    return policy, means


@pytest.mark.parametrize("seed", range(5))
def test_binary_search_is_discovered_from_reward_alone(seed: int) -> None:
    policy, means = train(seed, PolicyUpdate())
    assert means[0] < 0.35
    assert means[-1] > 0.8
    assert win_rate(policy) >= 0.85
    assert in_words(policy).startswith("first guess ")


@pytest.mark.slow
def test_it_is_discovered_on_every_one_of_twenty_seeds() -> None:
    rates = [win_rate(train(seed, PolicyUpdate())[0]) for seed in range(100, 120)]
    assert min(rates) >= 0.85, rates
    assert sum(rates) / len(rates) >= 0.93, rates


def test_without_learning_nothing_is_discovered() -> None:
    """The negative control: the same rollouts, and no step along the gradient."""
    policy, means = train(0, PolicyUpdate(learning_rate=0.0))
    assert max(means) < 0.4
    assert win_rate(policy) < 0.5


def test_perfect_play_always_wins() -> None:
    for secret in SECRETS:
        now = game.start(secret)
        while now.outcome == "playing":
            now = game.step(now, (now.low + now.high) // 2)
        assert (now.outcome, now.reward) == ("won", 1.0)


def test_the_rules() -> None:
    now = game.step(game.start(11), 8)
    assert (now.low, now.high, now.guesses_left, now.outcome, now.reward) == (9, 15, 3, "playing", 0.0)
    now = game.step(now, 20)  # could not be right: a guess lost, nothing learned
    assert (now.low, now.high, now.guesses_left) == (9, 15, 2)
    now = game.step(game.step(now, 13), 10)
    assert (now.low, now.high, now.outcome, now.reward) == (11, 12, "lost", 0.0)
    with pytest.raises(InvalidValue, match="lost"):
        game.step(now, 11)
    with pytest.raises(InvalidValue, match="16"):
        game.start(16)


def test_a_reply_is_a_place_among_the_numbers_that_are_left() -> None:
    now = game.step(game.start(11), 8)
    assert "7 numbers" in game.prompt(now)
    assert game.parse(now, "4") == 12
    assert game.parse(now, "I say 1, or 2.") == 9
    assert game.parse(now, "15") == 23
    with pytest.raises(InvalidValue, match="'no idea'"):
        game.parse(now, "no idea")


def test_a_strategy_in_words() -> None:
    assert in_words(policy_with({15: 8, 7: 4})) == "first guess 8; if higher 12, if lower 4"
    assert in_words(policy_with({15: 15, 14: 7})) == "first guess 15; if lower 7"


def policy_with(places: dict[int, int]) -> SoftmaxPolicy:
    """A policy that answers with these places, by how many numbers are left."""
    words = SoftmaxPolicy(game.VOCABULARY)
    rows = {
        tuple(words.encode(str(left))): [float(word == str(place)) for word in game.VOCABULARY]
        for left, place in places.items()
    }
    return SoftmaxPolicy(game.VOCABULARY, logits=rows)
