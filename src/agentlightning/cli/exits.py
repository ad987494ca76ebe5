"""What the exit code of a command says, and which error ends with which."""

from __future__ import annotations

from enum import IntEnum

from agentlightning.errors import (
    AgentLightningError,
    InvalidValue,
    NotFound,
    StoreStopped,
    StoreUnavailable,
)


class ExitCode(IntEnum):
    """Exit codes of `agl`, the same for every command."""

    OK = 0
    FAILED = 1
    """It was tried and did not work out, or `doctor` found a problem."""
    USAGE = 2
    """An option or argument is wrong; nothing was done."""
    NOT_FOUND = 3
    """There is no rollout, worker, version or file of that name."""
    UNREACHABLE = 4
    """The store could not be opened, or the server did not answer."""
    VIOLATIONS = 5
    """`verify` found records that break the rules."""
    INTERRUPTED = 130
    """Ctrl+C."""


def exit_code(error: AgentLightningError) -> ExitCode:
    """The exit code for an error that nobody handled."""
    match error:
        case NotFound():
            return ExitCode.NOT_FOUND
        case InvalidValue():
            return ExitCode.USAGE
        case StoreStopped():  # it can be reached, and has failed
            return ExitCode.FAILED
        case StoreUnavailable():
            return ExitCode.UNREACHABLE
        case _:
            return ExitCode.FAILED
