"""`SoftmaxPolicy`: a `SoftmaxTable` that can be served, trained by `GRPO`, and saved."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from agentlightning.algorithm.policy import PolicyBatch, PolicyUpdate, SampledCall
from agentlightning.demo.policy_endpoint import PolicyEndpoint
from agentlightning.demo.softmax_table import (
    Context,
    SoftmaxTable,
    choice_loss,
    choice_slope,
    entropy,
    entropy_gradient,
    kl_divergence,
    kl_gradient,
    logits_gradient,
)
from agentlightning.errors import InvalidValue
from agentlightning.security.tls import TlsFiles
from agentlightning.types import Triplet

_FORMAT = "agentlightning.softmax_policy.v1"
_MEANS: Sequence[str] = ("loss", "entropy", "clipped", "kl")
"""What `SoftmaxPolicy.update` returns."""


class SoftmaxPolicy(SoftmaxTable):
    """A table from contexts to logits that learns; `agentlightning.algorithm.policy.Policy` says what its parts do.

    Arguments, and what is raised, are those of `SoftmaxTable`.
    """

    _reference: SoftmaxPolicy | None = None
    """The policy at the start of the run, which ``kl_weight`` holds this one to."""

    def make_endpoint(
        self, *, model: str, host: str, port: int, seed: int, tls: TlsFiles | None = None
    ) -> PolicyEndpoint:
        """Return a server that answers from this table, to those who show the key that it makes."""
        certificate, key = (None, None) if tls is None else tls
        return PolicyEndpoint(self, host, port, model=model, seed=seed, tls_certificate=certificate, tls_key=key)

    def read_call(self, triplet: Triplet) -> SampledCall:
        """Return the tokens of a recorded call. Text is enough: words and token ids determine each other.

        Raises:
            InvalidValue: the reply has no word, or one that this policy cannot answer with.
        """
        prompt: Sequence[int] = triplet.prompt["token_ids"]
        reply: Sequence[int] = triplet.response["token_ids"]
        logprobs: Sequence[float] | None = triplet.metadata.get("logprobs")
        if not prompt or not reply:
            prompt = self.encode("\n".join(_text_of(message) for message in triplet.prompt["messages"]))
            reply = self.encode(_text_of(triplet.response["message"] or {}))
            logprobs = None
        if not reply or any(self.place_of(token_id) is None for token_id in reply):
            raise InvalidValue("the reply has no word, or one that the policy never says")
        return SampledCall(prompt, reply, logprobs)

    def begin_run(self) -> None:
        """Take the present logits as the reference that ``kl_weight`` holds the policy to."""
        self._reference = self.copy()

    def update(self, batch: PolicyBatch) -> dict[str, float]:
        """Change each row of logits along the gradient of the loss of the words sampled in its context.

        With ``kl_weight`` β and learning rate η, the step of logit k is ``-η g_k / (1 + η β π_k)``, where g is the
        whole gradient: a linearly implicit Euler step, in which ``β π_k`` stands for the second derivative of the
        penalty. It ends where plain descent ends, but does not overshoot, however large η β is: with a large one it
        leads to the optimum itself, ``π ∝ ρ exp(A / β)`` of the reference ρ.

        Returns:
            Means over the sampled words, in the last epoch and before it changed the rows; all 0 for an empty batch:
            ``loss``, ``entropy`` (nats), ``clipped`` (share of words whose gradient was clipped), ``kl`` (nats from
            the reference).
        """
        settings = batch.settings
        reference = self._reference or self
        samples = self._samples_by_context(batch)
        entropy_weight = settings.entropy_weight * (1 - batch.progress)
        sums = dict.fromkeys(_MEANS, 0.0)
        for _ in range(settings.epochs):
            sums = dict.fromkeys(_MEANS, 0.0)
            for context, sampled in samples.items():
                logprobs, far = self.logprobs(context), reference.logprobs(context)
                gradient = _row_gradient(logprobs, far, sampled, settings, entropy_weight, sums)
                rates = [
                    settings.learning_rate / (1 + settings.learning_rate * settings.kl_weight * math.exp(logprob))
                    for logprob in logprobs
                ]
                row = zip(self.logits(context), rates, gradient, strict=True)
                self.set_logits(context, [logit - rate * slope for logit, rate, slope in row])
        count = sum(map(len, samples.values())) or 1
        return {name: total / count for name, total in sums.items()}

    def _samples_by_context(self, batch: PolicyBatch) -> dict[Context, list[_Sample]]:
        samples: dict[Context, list[_Sample]] = {}
        for member in (member for group in batch.groups for member in group):
            for call in member.calls:
                for index, token_id in enumerate(call.completion_ids):
                    context = (*call.prompt_ids, *call.completion_ids[:index])
                    place = self.place_of(token_id)
                    assert place is not None  # read_call refused every other token
                    old = self.logprobs(context)[place] if call.logprobs is None else call.logprobs[index]
                    samples.setdefault(context, []).append(_Sample(place, old, member.advantage))
        return samples

    def save_state(self, folder: Path) -> dict[str, Any]:
        """Return the policy and its reference as a JSON object; both are small, so no file is written."""
        return {"policy": self.to_json(), "reference": (self._reference or self).to_json()}

    def load_state(self, state: Mapping[str, Any], folder: Path) -> None:
        """Become the policy that `save_state` saved.

        Raises:
            InvalidValue: this is not such a state, or it is of a policy with other words.
        """
        self.restore(state["policy"])
        self._reference = SoftmaxPolicy.from_json(state["reference"])

    def copy(self) -> SoftmaxPolicy:
        """Return a policy that answers the same, and learns independently."""
        return SoftmaxPolicy(self._vocabulary, self._actions(), self._rows)

    def to_json(self) -> dict[str, Any]:
        """Return the policy as a JSON object. Numbers are restored exactly."""
        rows = [[list(context), list(row)] for context, row in list(self._rows.items())]
        return {"format": _FORMAT, "vocabulary": list(self._vocabulary), "actions": self._actions(), "logits": rows}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SoftmaxPolicy:
        """Return the policy of which `to_json` made this object.

        Raises:
            InvalidValue: it is not such an object.
        """
        try:
            if data["format"] != _FORMAT:
                raise InvalidValue(f"the format is {data['format']!r}, not {_FORMAT!r}")
            rows = {tuple(cast("list[int]", context)): row for context, row in data["logits"]}
            return cls(data["vocabulary"], data["actions"], rows)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidValue(f"this is not a saved policy: {error!r}") from error

    def restore(self, data: Mapping[str, Any]) -> None:
        """Become the policy of which `to_json` made this object.

        Raises:
            InvalidValue: it is not such an object, or of a policy with other words.
        """
        other = SoftmaxPolicy.from_json(data)
        if other._vocabulary != self._vocabulary or other._action_ids != self._action_ids:
            raise InvalidValue("the saved policy has another vocabulary, or other actions")
        self._rows = other._rows

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy to a file, which is replaced atomically."""
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
            InvalidValue: the file does not hold a policy.
            OSError: it cannot be read.
        """
        try:
            data: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise InvalidValue(f"{os.fspath(path)} is not a saved policy: {error}") from error
        return cls.from_json(data)

    def _actions(self) -> list[str]:
        return [self._vocabulary[token_id] for token_id in self._action_ids]


class _Sample(NamedTuple):
    """One sampled word, by its index in the row of its context."""

    place: int
    old_logprob: float
    advantage: float


def _row_gradient(
    logprobs: Sequence[float],
    reference: Sequence[float],
    samples: Sequence[_Sample],
    settings: PolicyUpdate,
    entropy_weight: float,
    sums: dict[str, float],
) -> list[float]:
    """Return the gradient of the mean loss of one context's samples by the context's row of logits."""
    slopes = [0.0] * len(logprobs)
    for sample in samples:
        logprob = logprobs[sample.place]
        slope = choice_slope(logprob, sample.old_logprob, sample.advantage, settings.clip)
        sums["loss"] += choice_loss(logprob, sample.old_logprob, sample.advantage, settings.clip)
        sums["clipped"] += slope == 0 and sample.advantage != 0
        slopes[sample.place] += slope / len(samples)
    sums["entropy"] += entropy(logprobs) * len(samples)
    sums["kl"] += kl_divergence(logprobs, reference) * len(samples)
    parts = zip(
        logits_gradient(logprobs, slopes), kl_gradient(logprobs, reference), entropy_gradient(logprobs), strict=True
    )
    # The entropy bonus is maximised, loss and distance are minimised: hence the minus.
    return [descent + settings.kl_weight * far - entropy_weight * spread for descent, far, spread in parts]


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        parts = [cast("Mapping[str, Any]", part) for part in cast("list[Any]", content) if isinstance(part, dict)]
        return " ".join(str(part.get("text", "")) for part in parts)
    return content if isinstance(content, str) else ""
