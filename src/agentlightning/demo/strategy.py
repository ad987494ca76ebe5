"""What a policy for the guessing game has learned: how often it wins, and its strategy in words."""

from __future__ import annotations

import random

from agentlightning.algorithm.softmax_policy import SoftmaxPolicy
from agentlightning.demo import game

__all__ = ["best_guess", "in_words", "win_rate"]


def best_guess(policy: SoftmaxPolicy, now: game.Game) -> int:
    """The most probable guess (temperature 0) in a situation."""
    context = tuple(policy.encode(game.prompt(now)))
    choice = policy.choose(context, random.Random(0), temperature=0)  # chance has no part in it
    return game.parse(now, policy.decode([choice.token_id]))


def win_rate(policy: SoftmaxPolicy) -> float:
    """The share of all secrets that the policy finds when it always takes its best guess."""
    secrets = range(game.LOWEST, game.HIGHEST + 1)
    return sum(_plays(policy, secret).reward for secret in secrets) / len(secrets)


def in_words(policy: SoftmaxPolicy) -> str:
    """The first two guesses of the strategy, such as ``first guess 8; if higher 12, if lower 4``."""
    opening = game.Game(secret=game.LOWEST)
    first = best_guess(policy, opening)
    following = [(first + 1, game.HIGHEST), (game.LOWEST, first - 1)]
    guesses = {(game.LOWEST, game.HIGHEST): first}
    for low, high in following:
        if low <= high:
            left = opening.guesses_left - 1
            guesses[low, high] = best_guess(policy, game.Game(secret=low, low=low, high=high, guesses_left=left))
    return game.describe(guesses)


def _plays(policy: SoftmaxPolicy, secret: int) -> game.Game:
    now = game.start(secret)
    while now.outcome == "playing":
        now = game.step(now, best_guess(policy, now))
    return now
