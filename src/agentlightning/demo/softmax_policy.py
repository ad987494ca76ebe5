"""`SoftmaxPolicy`: the smallest language model there is, a table from contexts to softmax choices.

It knows a vocabulary of words; a token id is a word's place in it. Of a prompt it sees those words that
it knows, in their order, and passes over the rest: that is the context. For every context it has a row
of logits, one for each word that it may say, and it says one. A context that it has never been taught
has a row of zeros, so that all words are equally probable.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

from agentlightning.demo.policy_math import log_softmax, softmax
from agentlightning.errors import InvalidValue

Context: TypeAlias = tuple[int, ...]
"""Token ids."""

_WORD = re.compile(r"\w+|[^\w\s]")
_FORMAT = "agentlightning.softmax_policy.v1"


class WordChoice(NamedTuple):
    """What the policy said."""

    token_id: int
    logprob: float
    """Natural logarithm of the word's probability at temperature 1, whatever it was chosen with."""


class SoftmaxPolicy:
    """A table from contexts to logits.

    Any thread may read while one writes: a row is replaced as a whole, never changed in place.

    Args:
        vocabulary: the words it knows, without repeats; each is one word by itself, or one sign.
        actions: those it may say; None for all.
        logits: rows to begin with, as many numbers as there are actions.

    Raises:
        InvalidValue: a word is no word or is repeated, an action is no word of the vocabulary, there is
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
        said = self._vocabulary if actions is None else tuple(actions)
        unknown = [word for word in said if word not in self._ids]
        if unknown or not said or len(set(said)) != len(said):
            raise InvalidValue(
                f"actions must be words of the vocabulary, at least one, each once; unknown: {unknown}, of {len(said)}"
            )
        self._action_ids = tuple(self._ids[word] for word in said)
        self._places = {token_id: place for place, token_id in enumerate(self._action_ids)}
        self._rows: dict[Context, tuple[float, ...]] = {}
        for context, row in (logits or {}).items():
            self.set_logits(context, row)

    # --- Words and ids ---------------------------------------------------------------------------

    @property
    def vocabulary(self) -> Sequence[str]:
        """The words, by token id."""
        return self._vocabulary

    @property
    def action_ids(self) -> Sequence[int]:
        """Token ids of what it may say, in the order of a row of logits."""
        return self._action_ids

    def encode(self, text: str) -> list[int]:
        """Token ids of the words in the text that it knows, in their order."""
        return [self._ids[word] for word in _WORD.findall(text) if word in self._ids]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The words, with blanks between them.

        Raises:
            InvalidValue: an id is no token's.
        """
        if not all(0 <= token_id < len(self._vocabulary) for token_id in token_ids):
            raise InvalidValue(f"{list(token_ids)} has an id outside 0 to {len(self._vocabulary) - 1}")
        return " ".join(self._vocabulary[token_id] for token_id in token_ids)

    def place_of(self, token_id: int) -> int | None:
        """Where a token stands in a row of logits; None if the policy never says it."""
        return self._places.get(token_id)

    # --- Choosing --------------------------------------------------------------------------------

    def logits(self, context: Context) -> Sequence[float]:
        """The row of a context, one number for each of `action_ids`."""
        return self._rows.get(context) or (0.0,) * len(self._action_ids)

    def logprobs(self, context: Context) -> list[float]:
        """Natural logarithms of the probabilities of `action_ids`, at temperature 1."""
        return log_softmax(self.logits(context))

    def choose(self, context: Context, rng: random.Random, temperature: float = 1.0, top_p: float = 1.0) -> WordChoice:
        """Say one word.

        Args:
            context: token ids of the prompt.
            rng: where chance comes from; not used at temperature 0.
            temperature: flattens the probabilities above 1, sharpens them below. 0 takes the most probable
                word, the first of equals.
            top_p: choose among the most probable words that together have this probability.
        """
        row = self.logits(context)
        logprobs = log_softmax(row)
        if temperature == 0:
            place = max(range(len(row)), key=row.__getitem__)
        else:
            place = _draw(_nucleus(softmax(row, temperature), top_p), rng)
        return WordChoice(self._action_ids[place], logprobs[place])

    # --- Learning and keeping --------------------------------------------------------------------

    def set_logits(self, context: Context, row: Sequence[float]) -> None:
        """Replace the row of a context.

        Raises:
            InvalidValue: the row has another length than there are actions.
        """
        if len(row) != len(self._action_ids):
            raise InvalidValue(f"a row of {len(row)} logits does not fit {len(self._action_ids)} actions")
        self._rows[tuple(context)] = tuple(float(logit) for logit in row)

    def contexts(self) -> Iterator[Context]:
        """The contexts that it was taught, in the order in which they came."""
        return iter(list(self._rows))

    def copy(self) -> SoftmaxPolicy:
        """A policy that says the same, and learns by itself."""
        return SoftmaxPolicy(self._vocabulary, self._actions(), self._rows)

    def to_json(self) -> dict[str, Any]:
        """The policy as a JSON object. Numbers come back exactly."""
        rows = [[list(context), list(row)] for context, row in list(self._rows.items())]
        return {"format": _FORMAT, "vocabulary": list(self._vocabulary), "actions": self._actions(), "logits": rows}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SoftmaxPolicy:
        """The policy that `to_json` made this of.

        Raises:
            InvalidValue: it is no such object.
        """
        try:
            if data["format"] != _FORMAT:
                raise InvalidValue(f"the format is {data['format']!r}, not {_FORMAT!r}")
            rows = {tuple(cast("list[int]", context)): row for context, row in data["logits"]}
            return cls(data["vocabulary"], data["actions"], rows)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidValue(f"this is no saved policy: {error!r}") from error

    def restore(self, data: Mapping[str, Any]) -> None:
        """Become the policy that `to_json` made this of.

        Raises:
            InvalidValue: it is no such object, or of a policy with other words.
        """
        other = SoftmaxPolicy.from_json(data)
        if other._vocabulary != self._vocabulary or other._action_ids != self._action_ids:
            raise InvalidValue("the saved policy has another vocabulary, or other actions")
        self._rows = other._rows

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy to a file, which is replaced as a whole or not at all."""
        target = Path(path)
        unfinished = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        try:
            unfinished.write_text(json.dumps(self.to_json()), encoding="utf-8")
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SoftmaxPolicy:
        """Read a policy from a file that `save` wrote.

        Raises:
            InvalidValue: the file holds no policy.
            OSError: it cannot be read.
        """
        try:
            data: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise InvalidValue(f"{os.fspath(path)} is no saved policy: {error}") from error
        return cls.from_json(data)

    def _actions(self) -> list[str]:
        return [self._vocabulary[token_id] for token_id in self._action_ids]


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


def _draw(weights: list[float], rng: random.Random) -> int:
    return rng.choices(range(len(weights)), weights)[0]
