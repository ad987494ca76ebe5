"""What each backend can be asked for beyond what agents ask, found out by asking, per kind of call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from agentlightning.proxy.dialects.base import CaptureField, ModelRequest, WireDialect
from agentlightning.proxy.models import ModelBackend

_REMEMBERED_SECONDS = 600.0
"""A server may be replaced by one that can do more, or less."""
_FAILURES = 3
"""After so many calls in a row that failed with the fields, and were answered without, these are not asked for."""


class CallKind(NamedTuple):
    """What servers tell apart: some cannot say token ids in streams, or log-probabilities beside tools."""

    backend: str
    path: str
    is_streamed: bool = False
    has_tools: bool = False
    has_format: bool = False
    has_choices: bool = False

    @classmethod
    def of(cls, backend: ModelBackend, request: ModelRequest, dialect: WireDialect) -> CallKind:
        """Return the kind of a call."""
        body = request.body
        several = body.get("n") not in (None, 1)
        tools, form = bool(body.get("tools") or body.get("functions")), bool(body.get("response_format"))
        return cls(backend.name, dialect.backend_path, request.is_streamed, tools, form, several)


class CaptureMemory:
    """Remembers for some minutes which fields each kind of call may ask for.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[tuple[CallKind, CaptureField], tuple[bool, float]] = {}
        """Whether it is accepted, and until when that is remembered."""
        self._failures: dict[CallKind, int] = {}

    def _find(self, kind: CallKind, field: CaptureField) -> bool | None:
        """Whether a kind of call may ask for a field. What the plainest calls may not, no others may."""
        now = self._clock()
        accepted, until = self._known.get((kind, field), (None, 0.0))
        if now >= until:
            accepted, until = self._known.get((CallKind(kind.backend, kind.path), field), (None, 0.0))
            accepted = False if accepted is False and now < until else None
        return accepted

    def askable(self, kind: CallKind, fields: Iterable[CaptureField]) -> frozenset[CaptureField]:
        """Return those of ``fields`` that are not known to be refused."""
        return frozenset(field for field in fields if self._find(kind, field) is not False)

    def are_accepted(self, kind: CallKind, fields: Iterable[CaptureField]) -> bool:
        """Whether calls of this kind have been answered with all these fields."""
        return all(self._find(kind, field) for field in fields)

    def learn(
        self, kind: CallKind, accepted: frozenset[CaptureField], refused: frozenset[CaptureField] = frozenset()
    ) -> None:
        """Note that a call was answered with the fields ``accepted``, after it was refused with ``refused`` as well."""
        until = self._clock() + _REMEMBERED_SECONDS
        for field in accepted | refused:
            self._known[kind, field] = (field in accepted, until)
        if accepted:
            self._failures.pop(kind, None)

    def failed(self, kind: CallKind, fields: frozenset[CaptureField]) -> bool:
        """Note that a call was answered without ``fields``, after the backend had failed with them. Returns whether it
        happened so often that they are not asked for any more: a failure may have had another reason."""
        count = self._failures[kind] = self._failures.get(kind, 0) + 1
        if count < _FAILURES:
            return False
        del self._failures[kind]
        self.learn(kind, frozenset(), fields)
        return True
