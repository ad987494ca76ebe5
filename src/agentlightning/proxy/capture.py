"""Capture fields: what the proxy asks backends for beyond what agents ask, for the record only.

How a field is written on a wire, and how it is removed from the reply again, is known to the ``WireDialect``. This
module knows which fields there are, and remembers which of them each backend accepts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Literal, TypeAlias, get_args

from agentlightning.errors import InvalidValue

CaptureField: TypeAlias = Literal["token_ids", "logprobs", "usage"]
"""Token ids of prompt and reply, log-probabilities of the reply's tokens, and usage of streams."""

CAPTURE_FIELDS = frozenset[CaptureField](get_args(CaptureField))

_FIELDS_OF_CALLBACKS: Mapping[str, CaptureField | None] = {
    "return_token_ids": "token_ids",
    "logprobs": "logprobs",
    "opentelemetry": None,
}
"""The callbacks of agentlightning 0.3 that made LiteLLM capture something."""


def check_capture_fields(ask_for: Collection[CaptureField]) -> frozenset[CaptureField]:
    """Return the fields that an argument ``ask_for`` names.

    Raises:
        InvalidValue: one of them is unknown.
    """
    if isinstance(ask_for, str) or not set(ask_for) <= CAPTURE_FIELDS:
        raise InvalidValue(f"ask_for is {ask_for!r}; give some of {', '.join(sorted(CAPTURE_FIELDS))}")
    return frozenset(ask_for)


def capture_fields_of_callbacks(callbacks: Iterable[object]) -> frozenset[CaptureField]:
    """Return the fields that an argument ``callbacks`` of agentlightning 0.3 stands for.

    Raises:
        InvalidValue: a callback is unknown, or recording is left out.
    """
    given = [each if isinstance(each, str) else repr(each) for each in callbacks]
    unknown = [each for each in given if each not in _FIELDS_OF_CALLBACKS]
    if unknown:
        raise InvalidValue(
            f"callbacks has {unknown!r}; the proxy has no LiteLLM and knows only {', '.join(_FIELDS_OF_CALLBACKS)} "
            "(in place of the first two, give ask_for)"
        )
    if "opentelemetry" not in given:
        raise InvalidValue(
            "callbacks leaves out 'opentelemetry', but the proxy always records the calls of an attempt; "
            "let agents call the backend itself if nothing is to be recorded"
        )
    fields = set[CaptureField](("usage",))
    for name, field in _FIELDS_OF_CALLBACKS.items():
        if field is not None and name in given:
            fields.add(field)
    return frozenset(fields)


class CaptureSupport:
    """Which capture fields each backend accepts on each wire, as found out by asking.

    A backend that refuses a request with capture fields may refuse the fields or the request itself. The proxy
    therefore repeats the request without the fields, and only a repeat that succeeds proves that they were the
    reason.
    """

    def __init__(self) -> None:
        self._accepted: set[tuple[str, str, CaptureField]] = set()
        self._refused: set[tuple[str, str, CaptureField]] = set()

    def usable(self, backend: str, dialect: str, wanted: Iterable[CaptureField]) -> frozenset[CaptureField]:
        """Return the ``wanted`` fields that the backend is not known to refuse."""
        return frozenset(each for each in wanted if (backend, dialect, each) not in self._refused)

    def are_accepted(self, backend: str, dialect: str, fields: Iterable[CaptureField]) -> bool:
        """Whether the backend has accepted all these fields before, so that a refusal is about the request."""
        return all((backend, dialect, each) in self._accepted for each in fields)

    def learn(
        self, backend: str, dialect: str, accepted: Iterable[CaptureField], refused: Iterable[CaptureField]
    ) -> None:
        """Remember that a request succeeded with ``accepted`` after it had failed with ``refused`` in it."""
        self._accepted.update((backend, dialect, each) for each in accepted)
        self._refused.update((backend, dialect, each) for each in refused)
