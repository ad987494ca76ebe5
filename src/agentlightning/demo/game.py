"""The guessing game: its rules, how a turn is put to a language model, and what a policy has learned of it.

The agent must find a secret number in a few guesses, and is told after each whether the secret is higher or lower.
Binary search is perfect play: with 15 numbers the first guess is 8, and four guesses are always enough.

The model is not told which numbers are left, only how many, and answers with a place among them: "8" of 15 is the one
in the middle. So what it learns about 7 numbers holds for the 7 below the middle and for the 7 above. Everything here
is pure.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from agentlightning.demo.softmax_table import SoftmaxTable
from agentlightning.errors import InvalidValue

LOWEST = 1
HIGHEST = 15
GUESSES = 4

VOCABULARY: Sequence[str] = [str(count) for count in range(1, HIGHEST - LOWEST + 2)]
"""The words of a policy for this game. Prompts have them as counts, replies as places."""

GameStatus = Literal["playing", "won", "lost"]


@dataclass(frozen=True)
class Game:
    """One game, between two guesses."""

    secret: int

    low: int = LOWEST
    """The secret is known to be at least this."""

    high: int = HIGHEST
    """The secret is known to be at most this."""

    guesses_left: int = GUESSES
    outcome: GameStatus = "playing"

    @property
    def reward(self) -> float:
        """1 for a game that was won, 0 for one that was lost or is not over."""
        return 1.0 if self.outcome == "won" else 0.0


def start(secret: int) -> Game:
    """Return a new game.

    Raises:
        InvalidValue: the secret is not one of the numbers.
    """
    if not LOWEST <= secret <= HIGHEST:
        raise InvalidValue(f"the secret is {secret}; give a number from {LOWEST} to {HIGHEST}")
    return Game(secret)


def step(game: Game, guess: int) -> Game:
    """Return the game after a guess. A guess outside the numbers that are left is wasted, and narrows nothing.

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
    """Return the question to the model. Its only numeral is how many numbers are left."""
    left = game.high - game.low + 1
    return f"One of {left} numbers in a row is the secret. Which one do you guess? Give its place, from the lowest."


def parse(game: Game, reply: str) -> int:
    """Return the guess in a model's reply: the first number in it is the place among the numbers that are left.

    Raises:
        InvalidValue: the reply has no number.
    """
    found = re.search(r"\d+", reply)
    if found is None:
        raise InvalidValue(f"the reply {reply!r} has no number in it")
    return game.low + int(found.group()) - 1


def best_guess(policy: SoftmaxTable, now: Game) -> int:
    """Return the most probable guess (temperature 0) in a situation."""
    context = tuple(policy.encode(prompt(now)))
    choice = policy.choose(context, random.Random(0), temperature=0)  # at temperature 0 the generator is not used
    return parse(now, policy.decode([choice.token_id]))


def win_rate(policy: SoftmaxTable) -> float:
    """Return the share of all secrets that the policy finds when it always takes its best guess."""
    games = [start(secret) for secret in range(LOWEST, HIGHEST + 1)]
    for index, now in enumerate(games):
        while now.outcome == "playing":
            now = step(now, best_guess(policy, now))
        games[index] = now
    return sum(each.reward for each in games) / len(games)


def in_words(policy: SoftmaxTable) -> str:
    """Return the first two guesses of the policy, such as ``first guess 8; if higher 12, if lower 4``."""
    first = best_guess(policy, Game(secret=LOWEST))
    answers = {"higher": (first + 1, HIGHEST), "lower": (LOWEST, first - 1)}
    seconds = [
        f"if {answer} {best_guess(policy, Game(secret=low, low=low, high=high, guesses_left=GUESSES - 1))}"
        for answer, (low, high) in answers.items()
        if low <= high
    ]
    return f"first guess {first}" + (f"; {', '.join(seconds)}" if seconds else "")
