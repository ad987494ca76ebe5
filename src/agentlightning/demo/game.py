"""The guessing game: rules, and how a turn is put to a language model.

The agent is to find a secret number in a few guesses, and is told after each whether the secret is
higher or lower. Perfect play halves what is left: with 15 numbers the first guess is 8, and four guesses
are always enough. All here is pure.

The model is not told the numbers but how many are left, and answers with a place among them: "8" of 15
is the one in the middle. So what it learns of 7 numbers holds for the 7 below the middle and the 7 above.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from agentlightning.demo.softmax_table import SoftmaxTable
from agentlightning.errors import InvalidValue

LOWEST = 1
HIGHEST = 15
GUESSES = 4

VOCABULARY: Sequence[str] = [str(count) for count in range(1, HIGHEST - LOWEST + 2)]
"""The words that a policy for this game knows, which are also what it can say: how many, and which place."""

Outcome = Literal["playing", "won", "lost"]


@dataclass(frozen=True)
class Game:
    """One game, between two guesses."""

    secret: int

    low: int = LOWEST
    """The secret is known to be at least this."""

    high: int = HIGHEST
    """The secret is known to be at most this."""

    guesses_left: int = GUESSES
    outcome: Outcome = "playing"

    @property
    def reward(self) -> float:
        """1 for a game that was won, 0 for one that was lost, or is not over."""
        return 1.0 if self.outcome == "won" else 0.0


def start(secret: int) -> Game:
    """A new game.

    Raises:
        InvalidValue: the secret is not one of the numbers.
    """
    if not LOWEST <= secret <= HIGHEST:
        raise InvalidValue(f"the secret is {secret}; give a number from {LOWEST} to {HIGHEST}")
    return Game(secret)


def step(game: Game, guess: int) -> Game:
    """The game after a guess. A guess that could not be right is a guess lost, and teaches nothing.

    Raises:
        InvalidValue: the game is over.
    """
    if game.outcome != "playing":
        raise InvalidValue(f"the game was {game.outcome}; start another")
    left = game.guesses_left - 1
    if guess == game.secret:
        return replace(game, low=guess, high=guess, guesses_left=left, outcome="won")
    narrowed = replace(
        game,
        low=max(game.low, guess + 1) if guess < game.secret else game.low,
        high=min(game.high, guess - 1) if guess > game.secret else game.high,
        guesses_left=left,
    )
    return narrowed if left else replace(narrowed, outcome="lost")


def prompt(game: Game) -> str:
    """What the model is asked. The only numeral is how many numbers are left."""
    left = game.high - game.low + 1
    return f"One of {left} numbers in a row is the secret. Which one do you guess? Give its place, from the lowest."


def parse(game: Game, reply: str) -> int:
    """The guess that a model's reply means: its first number is the place among those that are left.

    A place beyond them is a guess that could not be right.

    Raises:
        InvalidValue: the reply has no number.
    """
    found = re.search(r"\d+", reply)
    if found is None:
        raise InvalidValue(f"the reply {reply!r} has no number in it")
    return game.low + int(found.group()) - 1


def describe(best_guesses: Mapping[tuple[int, int], int]) -> str:
    """A strategy in words, from its best guess for each pair of bounds.

    Follows the strategy two guesses deep: ``first guess 8; if higher 12, if lower 4``.
    """
    first = best_guesses[(LOWEST, HIGHEST)]
    higher = best_guesses.get((first + 1, HIGHEST))
    lower = best_guesses.get((LOWEST, first - 1))
    then = [f"if {word} {guess}" for word, guess in (("higher", higher), ("lower", lower)) if guess is not None]
    return f"first guess {first}" + (f"; {', '.join(then)}" if then else "")


# --- What a policy for the guessing game has learned: how often it wins, and its strategy in wo ---


def best_guess(policy: SoftmaxTable, now: Game) -> int:
    """The most probable guess (temperature 0) in a situation."""
    context = tuple(policy.encode(prompt(now)))
    choice = policy.choose(context, random.Random(0), temperature=0)  # chance has no part in it
    return parse(now, policy.decode([choice.token_id]))


def win_rate(policy: SoftmaxTable) -> float:
    """The share of all secrets that the policy finds when it always takes its best guess."""
    secrets = range(LOWEST, HIGHEST + 1)
    return sum(_plays(policy, secret).reward for secret in secrets) / len(secrets)


def in_words(policy: SoftmaxTable) -> str:
    """The first two guesses of the strategy, such as ``first guess 8; if higher 12, if lower 4``."""
    opening = Game(secret=LOWEST)
    first = best_guess(policy, opening)
    following = [(first + 1, HIGHEST), (LOWEST, first - 1)]
    guesses = {(LOWEST, HIGHEST): first}
    for low, high in following:
        if low <= high:
            left = opening.guesses_left - 1
            guesses[low, high] = best_guess(policy, Game(secret=low, low=low, high=high, guesses_left=left))
    return describe(guesses)


def _plays(policy: SoftmaxTable, secret: int) -> Game:
    now = start(secret)
    while now.outcome == "playing":
        now = step(now, best_guess(policy, now))
    return now
