"""How an attempt ended, as it is reported to the store."""

from __future__ import annotations

from typing import Final, NamedTuple

from agentlightning.lifecycle.reasons import RESOURCE_EXHAUSTED
from agentlightning.tracer.mending import fits, mend_text
from agentlightning.types import AttemptStatus
from agentlightning.types.attributes import full_qualified_name

__all__ = [
    "ABORTED",
    "AGENT_ERROR",
    "BAD_RESULT",
    "MISSING_RESOURCES",
    "RUNNER_ERROR",
    "SUCCEEDED",
    "TIMEOUT",
    "TRACE_NOT_STORED",
    "Outcome",
    "agent_failed",
    "failed",
]

AGENT_ERROR: Final = "agent_error"
"""The agent raised an exception."""
BAD_RESULT: Final = "bad_result"
"""The agent returned what is neither a reward nor spans."""
MISSING_RESOURCES: Final = "missing_resources"
"""The resources that the rollout was enqueued with are not in the store."""
TRACE_NOT_STORED: Final = "trace_not_stored"
"""The agent is done, but the store did not take its spans."""
RUNNER_ERROR: Final = "runner_error"
"""The runner failed at something of its own, which is a bug; its log says where."""
ABORTED: Final = "aborted"
"""The runner was told to stop."""
TIMEOUT: Final = "timeout"
"""It took longer than the rollout's ``timeout_seconds``."""

_MESSAGE_CHARACTERS = 2000


class Outcome(NamedTuple):
    """What is reported of an attempt."""

    status: AttemptStatus
    reason_code: str | None = None
    reason_message: str | None = None
    error: BaseException | None = None
    """What was raised, for ``step``."""


SUCCEEDED: Final = Outcome("succeeded")


def failed(code: str, error: BaseException) -> Outcome:
    """The outcome of an attempt that an exception has ended; its message begins with the exception's type."""
    message = f"{full_qualified_name(type(error))}: {_text_of(error)}"
    message = message if fits(message) else mend_text(message)
    if len(message) > _MESSAGE_CHARACTERS:
        message = message[:_MESSAGE_CHARACTERS] + "…"
    return Outcome("failed", code, message, error)


def agent_failed(error: BaseException) -> Outcome:
    """The outcome of an attempt whose agent has raised. Memory that could not be had is not a mistake of the agent."""
    return failed(RESOURCE_EXHAUSTED if isinstance(error, MemoryError) else AGENT_ERROR, error)


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as mistake:  # noqa: BLE001 - it is the agent's class, and may do anything
        return f"(its text cannot be had: {type(mistake).__name__})"
