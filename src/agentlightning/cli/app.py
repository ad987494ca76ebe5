"""`agl`: the command line. One file per command; this one only knows where they are."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from agentlightning.cli.exits import ExitCode
from agentlightning.cli.lazy import Command, Group, build

_RUN = "Run"
_LOOK = "Look into it"
_KEEP = "Keep it well"

COMMANDS: dict[str, Command | Group] = {
    "demo": Command(
        "agentlightning.cli.demo:demo", "Train a policy from nothing, here and now: no GPU, key or network.", _RUN
    ),
    "store": Command("agentlightning.cli.store:store", "Serve the store: queue, attempts, spans, resources.", _RUN),
    "runner": Command("agentlightning.cli.runner:runner", "Run agents: claim rollouts from a store.", _RUN),
    "proxy": Command("agentlightning.cli.proxy:proxy", "Serve models, and record every call of an attempt.", _RUN),
    "status": Command("agentlightning.cli.status:status", "One screen: what goes on, what stands still, why.", _LOOK),
    "rollouts": Group(
        "List rollouts, show, cancel or delete them.",
        {
            "ls": Command("agentlightning.cli.rollouts:ls", "List rollouts, the newest first."),
            "show": Command("agentlightning.cli.rollouts:show", "Show one rollout: input, attempts, spans, reward."),
            "cancel": Command("agentlightning.cli.rollout_orders:cancel", "End rollouts that nobody wants any more."),
            "prune": Command("agentlightning.cli.rollout_orders:prune", "Delete rollouts that ended long ago."),
        },
        _LOOK,
    ),
    "workers": Group(
        "List workers, let them finish, or stop them.",
        {
            "ls": Command("agentlightning.cli.workers:ls", "List workers and what they do."),
            "drain": Command("agentlightning.cli.workers:drain", "Let workers finish what they hold, then end."),
            "stop": Command("agentlightning.cli.workers:stop", "Let workers abort what they hold, then end."),
            "resume": Command("agentlightning.cli.workers:resume", "Take back a drain or stop not yet followed."),
        },
        _LOOK,
    ),
    "resources": Group(
        "List, show, compare and roll back resources.",
        {
            "ls": Command("agentlightning.cli.resources:ls", "List resources, or all versions of one."),
            "show": Command("agentlightning.cli.resources:show", "Show the content of one version."),
            "diff": Command("agentlightning.cli.resources:diff", "Show what changed between two versions."),
            "rollback": Command(
                "agentlightning.cli.resources:rollback", "Make the content of an old version the newest version."
            ),
        },
        _LOOK,
    ),
    "trace": Command("agentlightning.cli.trace:trace", "Draw the spans of an attempt as a waterfall.", _LOOK),
    "doctor": Command("agentlightning.cli.doctor:doctor", "Find what is wrong, and say how to mend it.", _KEEP),
    "verify": Command("agentlightning.cli.verify:verify", "Check every record against the rules.", _KEEP),
    "backup": Command("agentlightning.cli.backup:backup", "Copy a database while it is used.", _KEEP),
    "restore": Command("agentlightning.cli.restore:restore", "Make a database from a backup, checked first.", _KEEP),
}
"""Every command, by the words that call it."""


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"agentlightning {version('agentlightning')}")
        raise typer.Exit()


def _root(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="AGL_DEBUG", help="Show tracebacks and logs instead of one-line errors.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Agent Lightning: train agents that run anywhere.

    Begin with [bold]agl demo[/bold]. Then serve a store with [bold]agl store[/bold], run your agent with
    [bold]agl runner[/bold], and look on with [bold]agl status[/bold]. Each command has its own --help, with examples.

    Commands that ask a store take [bold]--url[/bold]: a server (http://host:4747), or a database file.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not found,
    4 store not reachable, 5 violations found, 130 Ctrl+C.
    """
    if debug:
        logging.basicConfig(level=logging.DEBUG)
    else:  # a command says by itself what its user has to know; those that serve set up a log of their own
        logging.getLogger("agentlightning").addHandler(logging.NullHandler())


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code.

    Args:
        arguments: the words after ``agl``; default: those of this process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character gets another, not an error
    command_line = build(_root, COMMANDS)
    try:
        command_line.main(args=None if arguments is None else list(arguments), prog_name="agl")
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
    sys.exit(ExitCode.OK)
