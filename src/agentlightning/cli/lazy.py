"""Commands that are imported when they are called, and the edge where errors become text.

The root knows of each command only a name, a line of help and where its function is. So
`agl --help` costs nothing but the command line library, whatever the commands import.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from agentlightning.cli.exits import ExitCode, exit_code
from agentlightning.errors import AgentLightningError

_HELP_NAMES = {"help_option_names": ["-h", "--help"]}


class Command(NamedTuple):
    """A command by reference."""

    target: str
    """Its function, as ``module:function``."""
    help: str
    """One line for the list of commands."""
    panel: str | None = None
    """The heading it is listed under."""


class Group(NamedTuple):
    """Commands that share a first word."""

    help: str
    commands: Mapping[str, Command]
    panel: str | None = None


def build(root: Callable[..., None], table: Mapping[str, Command | Group]) -> TyperGroup:
    """The command line of a table: ``root`` has the options before the command."""
    group = _group(root, inspect.getdoc(root), add_completion=True)
    for name, entry in table.items():
        if isinstance(entry, Command):
            group.add_command(_LazyCommand(name, entry), name)
        else:
            inner = _group(_no_options, entry.help, add_completion=False)
            inner.name, inner.rich_help_panel = name, entry.panel
            for inner_name, command in entry.commands.items():
                inner.add_command(_LazyCommand(inner_name, command), inner_name)
            group.add_command(inner, name)
    return group


def _group(callback: Callable[..., None], text: str | None, *, add_completion: bool) -> TyperGroup:
    app = typer.Typer(rich_markup_mode="rich", no_args_is_help=True, add_completion=add_completion)
    app.callback(help=text, context_settings=_HELP_NAMES)(callback)
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    return group


def _no_options() -> None:
    pass


class _LazyCommand(TyperCommand):
    """Stands for a command in lists; becomes it when called.

    Args:
        name: what the user types.
        command: where it is.
    """

    def __init__(self, name: str, command: Command) -> None:
        super().__init__(name, help=command.help, params=[], rich_help_panel=command.panel)
        self._target = command.target

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """A context of the real command, which from here on takes this one's place."""
        module_name, _, function_name = self._target.partition(":")
        app = typer.Typer(rich_markup_mode="rich", add_completion=False)
        function = getattr(import_module(module_name), function_name)
        text = _unwrapped(inspect.getdoc(function) or "")
        app.command(info_name, cls=_EdgeCommand, context_settings=_HELP_NAMES, help=text)(function)
        return get_command(app).make_context(info_name, args, parent, **extra)


def _unwrapped(text: str) -> str:
    """A docstring whose paragraphs are lines, to be wrapped to the terminal; what is indented stays as it is."""
    return "\n\n".join(
        part if any(line.startswith(" ") for line in part.splitlines()) else part.replace("\n", " ")
        for part in text.split("\n\n")
    )


class _EdgeCommand(TyperCommand):
    """A command whose errors are told in a line, with an exit code that programs can tell apart."""

    def invoke(self, ctx: Any) -> Any:
        """Run it."""
        if ctx.find_root().params.get("debug"):
            return super().invoke(ctx)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise typer.Exit(_interrupted(interrupt)) from None
        except AgentLightningError as error:
            _end(error.message, exit_code(error))
        except BrokenPipeError:
            raise  # the library knows how to end quietly when the reader of a pipe has gone
        except OSError as error:
            _end(_operating_system(error), ExitCode.FAILED)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:  # the boundary of a command: what comes here is a mistake of ours
            if _is_usage_error(error):
                raise
            _end(
                f"{type(error).__name__}: {error}. This is a bug of Agent Lightning; "
                f"`agl --debug {ctx.command_path.partition(' ')[2]} …` shows where",
                ExitCode.FAILED,
            )


def _interrupted(interrupt: KeyboardInterrupt) -> int:
    """The exit code: what a run that was stopped by a signal asks for, or that of Ctrl+C."""
    if isinstance(interrupt, SystemExit) and isinstance(interrupt.code, int):
        return interrupt.code
    return ExitCode.INTERRUPTED


def _is_usage_error(error: Exception) -> bool:
    """Whether the command line library will tell it: its class is private in some versions, its face is not."""
    return hasattr(error, "exit_code") and hasattr(error, "format_message")


def _operating_system(error: OSError) -> str:
    text = error.strerror or str(error)
    return f"{error.filename}: {text}" if error.filename else text


def _end(message: str, code: ExitCode) -> NoReturn:
    sys.stdout.flush()
    typer.secho("error: ", fg=typer.colors.RED, bold=True, nl=False, err=True)
    typer.echo(message, err=True)
    raise typer.Exit(code)
