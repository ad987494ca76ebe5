"""What the backend is asked for beyond what the agent asked: token ids, log-probabilities, usage of streams.

The fields are vLLM's: ``return_token_ids`` in the request; ``prompt_token_ids`` and, per choice, ``token_ids`` in the
reply (https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html). What was added to the request is taken
out of the reply again, so that the agent sees what it would have got without the proxy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias, cast

from agentlightning.proxy.models import Ask, Backend
from agentlightning.proxy.replies import choices_of

CallKind: TypeAlias = Literal["chat", "text_completion"]
"""OpenTelemetry's ``gen_ai.operation.name`` of the two kinds of call."""

_FIELD_NAMES: Mapping[Ask, tuple[str, ...]] = {
    "token_ids": ("return_token_ids",),
    "logprobs": ("logprobs",),
    "usage": ("stream_options", "include_usage"),
}
"""By what a backend's error message is known to be about what was asked for."""


class Capabilities:
    """What each backend can be asked for, as found out by asking."""

    def __init__(self) -> None:
        self._takes: set[tuple[str, CallKind, Ask]] = set()
        self._refuses: set[tuple[str, CallKind, Ask]] = set()

    def to_ask(self, backend: Backend, kind: CallKind, wanted: frozenset[Ask]) -> frozenset[Ask]:
        """What of the ``wanted`` may be asked: what the backend is not known to refuse."""
        if backend.ask_for is not None:
            return wanted & backend.ask_for
        return frozenset(ask for ask in wanted if (backend.name, kind, ask) not in self._refuses)

    def are_known(self, backend: Backend, kind: CallKind, asked: frozenset[Ask]) -> bool:
        """Whether a refusal of a request with these can only be about the rest of the request."""
        return backend.ask_for is not None or all((backend.name, kind, ask) in self._takes for ask in asked)

    def learn(self, backend: Backend, kind: CallKind, taken: Iterable[Ask], refused: Iterable[Ask]) -> None:
        """The backend answered a request with ``taken`` after it had refused the same one with ``refused``."""
        self._takes.update((backend.name, kind, ask) for ask in taken)
        self._refuses.update((backend.name, kind, ask) for ask in refused)


def missing_asks(kind: CallKind, body: Mapping[str, Any], wanted: Iterable[Ask]) -> frozenset[Ask]:
    """What of the ``wanted`` the agent does not ask for itself. Usage is only ever missing from streams."""
    missing = set(wanted)
    if body.get("return_token_ids"):
        missing.discard("token_ids")
    logprobs = body.get("logprobs")
    if logprobs or (kind == "text_completion" and type(logprobs) is int):
        missing.discard("logprobs")
    if not body.get("stream") or _has_usage(body.get("stream_options")):
        missing.discard("usage")
    return frozenset(missing)


def _has_usage(options: object) -> bool:
    """Whether ``stream_options`` asks for usage, or is nothing that could: then it is the backend's to refuse."""
    if not isinstance(options, dict):
        return options is not None
    return bool(cast("dict[str, Any]", options).get("include_usage"))


def added_to(kind: CallKind, body: dict[str, Any], asks: frozenset[Ask]) -> dict[str, Any]:
    """The request with the asks in it; ``body`` stays as it is."""
    if not asks:
        return body
    more: dict[str, Any] = {}
    if "token_ids" in asks:
        more["return_token_ids"] = True
    if "logprobs" in asks:
        more["logprobs"] = True if kind == "chat" else 1
    if "usage" in asks:
        more["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
    return {**body, **more}


def refused_in(error: bytes, asks: frozenset[Ask]) -> frozenset[Ask]:
    """Which of the asks an error is about: those that it names, or else all."""
    named = frozenset[Ask](ask for ask in asks if any(name.encode() in error for name in _FIELD_NAMES[ask]))
    return named or asks


def without_asked(reply: dict[str, Any], asks: frozenset[Ask]) -> bool:
    """Take out of a reply, or of a chunk of one, what only the proxy asked for.

    Returns:
        Whether anything is left for the agent: a chunk that only carried the usage is nothing.
    """
    choices = choices_of(reply)
    if "token_ids" in asks:
        reply.pop("prompt_token_ids", None)
        for choice in choices:
            choice.pop("token_ids", None)
            choice.pop("prompt_token_ids", None)
    if "logprobs" in asks:
        for choice in choices:
            if "logprobs" in choice:
                choice["logprobs"] = None
    if "usage" in asks and "usage" in reply:
        usage = reply.pop("usage")
        return bool(choices) or usage is None or "error" in reply
    return True
