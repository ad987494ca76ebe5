"""Every error Agent Lightning raises on purpose, as one tree.

There is one class for each decision a caller can take: correct the value, look elsewhere, accept that somebody else
was first, wait, or call the operator. Each class has a stable ``code`` (its name, as in ``stale_attempt``, unless it
says another) and the HTTP ``status`` it crosses the network with, so that the same exception is raised on both sides.
Each message says what was wrong, with what value, and what to do.

Errors for unknown ids and for invalid values are ``ValueError`` too, because callers of
agentlightning 0.3 catch that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple


class AgentLightningError(Exception):
    """Root of the tree. Raised as itself only for a bug of ours."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    refused_spans: Sequence[RefusedSpan] = ()
    """Of a call that carries spans, and stored none: which of them are refused, in their order, where that is known.
    Then the others can be sent again at once. Checks are made one after another, so some of those may be refused, too.
    """

    def __init_subclass__(cls) -> None:
        if cls.__module__ == __name__ and "code" not in vars(cls):  # one of somebody else crosses as its base class
            cls.code = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class RefusedSpan(NamedTuple):
    """One of the spans for which a call is refused."""

    place: int
    """Where it is in the call, from 0."""
    span_id: str
    error: AgentLightningError
    """Why this one is refused."""


class InvalidValue(AgentLightningError, ValueError):
    """An argument has a value that no store accepts. Correct the value; a repeat fails again."""

    status = 422
    places: Sequence[Mapping[str, Any]] = ()
    """Which parts of a request are not valid, and why, where a server has found it."""


class InvalidId(InvalidValue):
    """An id is empty, too long, reserved, or has characters that do not fit into a URL."""


class NotJson(InvalidValue):
    """A value is not strict JSON: another type, NaN or an infinity, NUL, or a lone surrogate."""


class TooLarge(InvalidValue):
    """A value is larger, or nested deeper, than the store takes."""

    status = 413


class TemplateOutOfBounds(InvalidValue):
    """Filling a prompt template takes more text, work or time than is allowed. Simplify it, or raise the bound."""


class NotFound(AgentLightningError, ValueError):
    """An id is unknown to this store."""

    status = 404


class Conflict(AgentLightningError):
    """The record is not in a state that allows this. Read it again before trying anything else."""

    status = 409


class IllegalMove(Conflict):
    """The state machine has no such move from the present state."""


class StaleAttempt(Conflict):
    """The attempt has lost its rollout: it expired, was replaced, or its rollout ended. Stop working on it."""


class IdReused(Conflict):
    """The id was used before, with other content. A repeat must carry the same content."""


class StoreUnavailable(AgentLightningError):
    """The store cannot do this now, whatever the request says."""

    status = 503


class Overloaded(StoreUnavailable):
    """The server has too much to do and took nothing of this request. Wait, then send it again."""

    status = 429


class StoreUnreachable(StoreUnavailable):
    """No server answered in time. What was asked may have been done; a repeat with the same ids is safe."""


class SpoolFull(StoreUnavailable):
    """The server is out of reach, and the disk has no room left for spans that wait for it. Wait, then repeat."""


class StoreClosed(StoreUnavailable):
    """The store was closed. Open a new one."""


class StoreForked(StoreUnavailable):
    """The store was opened in another process and inherited by fork. Open one here, or use a client."""


class StoreOwned(StoreUnavailable):
    """Another process, or another store object, owns the database file."""


class StoreStopped(StoreUnavailable):
    """A write to the disk failed, so the store acknowledges nothing any more. Reads go on."""


class DiskFull(StoreStopped):
    """The disk is full. Free space, then open the store again."""

    status = 507


class CorruptStore(StoreStopped):
    """The database file is damaged. Restore a backup."""

    status = 500


class ForeignFile(StoreUnavailable):
    """The file is not an Agent Lightning database. Give another path."""


class NewerSchema(StoreUnavailable):
    """The database was written by a newer Agent Lightning. Upgrade; there is no way down."""


class NotAuthenticated(AgentLightningError):
    """The server asks for an API key, and got none or another. Give the right one."""

    status = 401


class NotAllowed(AgentLightningError):
    """The server refuses requests that come this way: under this host name, or from this web page."""

    status = 403


class BadRequest(AgentLightningError):
    """What was sent is not a request that this server understands: no such path, method or content type."""

    status = 400


class NoSuchRoute(BadRequest):
    """The server has nothing under this path. Check the URL, and that it is a server of this version."""

    status = 404


class UnsupportedMedia(BadRequest):
    """The body is of a type, or encoded in a way, that the route does not read."""

    code = "unsupported_media_type"
    status = 415


class ExecutionFailed(AgentLightningError, RuntimeError):
    """A run could not go on. The message says why; ``child_traceback`` is what happened in the process that failed."""

    def __init__(self, message: str, child_traceback: str = "") -> None:
        super().__init__(message)
        self.child_traceback = child_traceback
        if child_traceback:
            self.add_note(f"In the process that failed:\n{child_traceback}")


class WrongServer(AgentLightningError):
    """The server that answers is not the one that was meant: it serves another run, or does not take the key."""

    status = 409


class NothingToLearn(AgentLightningError):
    """Rollouts ended, and an algorithm can learn from none of them. Check the agent and how it is recorded."""


class MissingExtra(AgentLightningError, ImportError):
    """An optional dependency is not installed. The message names the extra that brings it."""


def error_classes() -> dict[str, type[AgentLightningError]]:
    """All classes of the tree by ``code``, for turning an error that crossed a wire into itself."""
    found: dict[str, type[AgentLightningError]] = {}
    pending: list[type[AgentLightningError]] = [AgentLightningError]
    while pending:
        cls = pending.pop()
        found.setdefault(cls.code, cls)  # a class of somebody else has the code of its base class
        pending.extend(cls.__subclasses__())
    return found
