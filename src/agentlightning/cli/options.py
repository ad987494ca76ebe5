"""Options that many commands share, so that they have the same names, help and environment everywhere."""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Annotated

import typer

from agentlightning.errors import AgentLightningError, InvalidValue, NotFound, StoreStopped, StoreUnavailable


class Format(StrEnum):
    """How a command prints what it found."""

    TABLE = "table"
    JSON = "json"


class LogLevel(StrEnum):
    """From which importance on a program that serves logs."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        "-u",
        envvar="AGL_SERVER_URL",
        metavar="URL|FILE",
        show_default=False,
        help=(
            "The store: a server (http://host:4747), or a database file. [dim]\\[default: http://127.0.0.1:4747][/dim]"
        ),
    ),
]

ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        help="The server's key, if it has one. [dim]\\[env var: AGL_API_KEY][/dim]",
        show_default=False,
    ),
]

Output = Annotated[
    Format, typer.Option("--output", "-o", help="For people (table), or for programs (json), whole and unchanged.")
]

Level = Annotated[LogLevel, typer.Option("--log-level", case_sensitive=False, help="The least important lines.")]

Limit = Annotated[int, typer.Option("--limit", "-n", min=1, max=10_000, help="At most so many.")]


# --- What the exit code of a command says, and which error ends with which ---


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
