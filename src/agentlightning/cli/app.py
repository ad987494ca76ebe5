"""`agl`: the table of commands, how they are loaded, and where errors become one line and an exit code.

The table has a line of help for each command, so that `agl --help` imports no command and stays quick; a command's
module is imported when it is called.
"""

from __future__ import annotations

import inspect
import io
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Annotated, Any, NamedTuple, NoReturn, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from agentlightning.cli.terminal import ExitCode, OptionGroup
from agentlightning.errors import AgentLightningError, InvalidValue, NotFound, StoreStopped, StoreUnavailable


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


_RUN, _LOOK, _KEEP = "Run", "Look into it", "Maintain it"

COMMANDS: dict[str, Command | Group] = {
    "demo": Command(
        "agentlightning.cli.demo:demo", "Train a policy from nothing, here and now: no GPU, key or network.", _RUN
    ),
    "store": Command("agentlightning.cli.services:store", "Serve the store: queue, attempts, spans, resources.", _RUN),
    "runner": Command("agentlightning.cli.services:runner", "Run agents: claim rollouts from a store.", _RUN),
    "proxy": Command("agentlightning.cli.services:proxy", "Serve models, and record every call of an attempt.", _RUN),
    "status": Command("agentlightning.cli.status:status", "One screen: what runs, what waits, and why.", _LOOK),
    "rollouts": Group(
        "List rollouts, show, cancel or delete them.",
        {
            "ls": Command("agentlightning.cli.rollouts:ls", "List rollouts, the newest first."),
            "show": Command("agentlightning.cli.rollouts:show", "Show one rollout: input, attempts, spans, reward."),
            "cancel": Command("agentlightning.cli.rollouts:cancel", "Cancel rollouts."),
            "prune": Command("agentlightning.cli.rollouts:prune", "Delete rollouts that ended long ago."),
        },
        _LOOK,
    ),
    "runs": Group(
        "List the runs that trainers keep, show, resume, compare or delete them.",
        {
            "ls": Command("agentlightning.cli.runs:ls", "List runs, the one used last first."),
            "show": Command("agentlightning.cli.runs:show", "Show one run: what it trains, and how far it is."),
            "resume": Command("agentlightning.cli.runs:resume", "Begin its program again, to go on with it."),
            "compare": Command("agentlightning.cli.runs:compare", "Put runs side by side."),
            "rm": Command("agentlightning.cli.runs:rm", "Delete runs with all that they have."),
        },
        _LOOK,
    ),
    "workers": Group(
        "List workers, let them finish, stop or forget them.",
        {
            "ls": Command("agentlightning.cli.workers:ls", "List workers and what they do."),
            "drain": Command("agentlightning.cli.workers:drain", "Let workers finish what they hold, then end."),
            "stop": Command("agentlightning.cli.workers:stop", "Let workers abort what they hold, then end."),
            "resume": Command("agentlightning.cli.workers:resume", "Take back a drain or stop not yet followed."),
            "prune": Command("agentlightning.cli.workers:prune", "Forget workers that ended or died long ago."),
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
    "trace": Command("agentlightning.cli.trace:trace", "Show an attempt as a transcript, or its spans.", _LOOK),
    "doctor": Command("agentlightning.cli.doctor:doctor", "Find what is wrong, and say how to fix it.", _KEEP),
    "verify": Command("agentlightning.cli.database:verify", "Check every record against the rules.", _KEEP),
    "backup": Command("agentlightning.cli.database:backup", "Copy a database while it is used.", _KEEP),
    "restore": Command("agentlightning.cli.database:restore", "Make a database from a backup, checked first.", _KEEP),
}
"""Every command, by the words that call it."""


# --- Loading -----------------------------------------------------------------------------------------

_HELP_NAMES = {"help_option_names": ["-h", "--help"]}
_KEYWORD = inspect.Parameter.KEYWORD_ONLY


class _LazyGroup(TyperGroup):
    """Holds a name and a line of help for each command, and imports the one that is called."""

    table: Mapping[str, Command | Group]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        entry = self.table.get(name or "")
        return name, _load(name, entry.target) if isinstance(entry, Command) else command, rest


def build(
    callback: Callable[..., None],
    table: Mapping[str, Command | Group],
    text: str | None = None,
    *,
    add_completion: bool = True,
) -> TyperGroup:
    """The command line of a table.

    Args:
        callback: has the options that come before the command.
        table: the commands.
        text: the help; default: the callback's docstring.
        add_completion: whether it has the options that install completion in a shell.
    """
    app = typer.Typer(cls=_LazyGroup, rich_markup_mode="rich", no_args_is_help=True, add_completion=add_completion)
    app.callback(help=text or inspect.getdoc(callback), context_settings=_HELP_NAMES)(callback)
    group = get_command(app)
    assert isinstance(group, _LazyGroup)
    group.table = table
    for name, entry in table.items():
        if isinstance(entry, Command):
            listed = TyperCommand(name, help=entry.help, rich_help_panel=entry.panel)
        else:
            listed = build(lambda: None, entry.commands, entry.help, add_completion=False)
            listed.name, listed.rich_help_panel = name, entry.panel
        group.add_command(listed, name)
    return group


def _load(name: str | None, target: str) -> Any:
    module_name, _, function_name = target.partition(":")
    function = getattr(import_module(module_name), function_name)
    app = typer.Typer(rich_markup_mode="rich", add_completion=False)
    text = _unwrapped(inspect.getdoc(function) or "")
    app.command(name, cls=_ReportingCommand, context_settings=_HELP_NAMES, help=text)(_spread(function))
    return get_command(app)


def _spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command with options in place of parameters that stand for several: ``target``, and each ``OptionGroup``."""
    hints, parameters = get_type_hints(command, include_extras=True), inspect.signature(command).parameters
    makers: dict[str, tuple[Callable[..., Any], list[inspect.Parameter]]] = {}
    for name, hint in hints.items():
        if name == "target":
            from agentlightning.cli.target import locate

            makers[name] = locate, _parameters_of(locate)
        elif isinstance(hint, type) and issubclass(hint, OptionGroup):
            makers[name] = hint, _parameters_of(hint)
    if not makers:
        return command

    def called(**given: Any) -> None:
        for name, (make, options) in makers.items():
            given[name] = make(**{each.name: given.pop(each.name) for each in options})
        command(**given)

    spread: list[inspect.Parameter] = []
    for name, each in parameters.items():
        own = inspect.Parameter(name, _KEYWORD, default=each.default, annotation=hints[name])
        spread += makers[name][1] if name in makers else [own]
    called.__dict__["__signature__"] = inspect.Signature(spread)
    called.__annotations__ = {each.name: each.annotation for each in spread}
    return called


def _parameters_of(maker: Callable[..., Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(maker, include_extras=True)
    found = inspect.signature(maker).parameters.values()
    return [inspect.Parameter(each.name, _KEYWORD, default=each.default, annotation=hints[each.name]) for each in found]


def _unwrapped(text: str) -> str:
    """A docstring whose paragraphs are lines, to be wrapped to the terminal; what is indented stays as it is."""
    return "\n\n".join(
        part if any(line.startswith(" ") for line in part.splitlines()) else part.replace("\n", " ")
        for part in text.split("\n\n")
    )


# --- Errors ------------------------------------------------------------------------------------------


def exit_code(error: AgentLightningError) -> ExitCode:
    """The exit code for an error that nobody handled."""
    match error:
        case NotFound():
            return ExitCode.NOT_FOUND
        case InvalidValue():
            return ExitCode.USAGE
        case StoreUnavailable() if not isinstance(error, StoreStopped):  # that can be reached, and has failed
            return ExitCode.UNREACHABLE
        case _:
            return ExitCode.FAILED


class _ReportingCommand(TyperCommand):
    """A command whose errors become one line on stderr and an exit code that programs can tell apart."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if any(each.name == "output" for each in self.params):  # a short form, wherever there is the long one
            end = args.index("--") if "--" in args else len(args)
            args = [*("--output=json" if each == "--json" else each for each in args[:end]), *args[end:]]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        if ctx.find_root().params.get("debug"):
            return super().invoke(ctx)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:  # a run that a signal stopped says which code it wants
            code = getattr(interrupt, "code", None)
            raise typer.Exit(code if isinstance(code, int) else ExitCode.INTERRUPTED) from None
        except (BrokenPipeError, typer.Exit, typer.Abort):
            raise  # typer ends quietly, also when the reader of a pipe has gone
        except AgentLightningError as error:
            message, code = error.message, exit_code(error)
        except OSError as error:
            text = error.strerror or str(error)
            message, code = f"{error.filename}: {text}" if error.filename else text, ExitCode.FAILED
        except Exception as error:  # the boundary of a command: anything else is a bug of ours
            # Typer reports errors of usage. Their classes are private in some versions: this looks at what they offer.
            if hasattr(error, "exit_code") and hasattr(error, "format_message"):
                raise
            again = f"`agl --debug {ctx.command_path.partition(' ')[2]} …` shows where"
            message = f"{type(error).__name__}: {error}. This is a bug of Agent Lightning; {again}"
            code = ExitCode.FAILED
        sys.stdout.flush()
        typer.secho("error: ", fg=typer.colors.RED, bold=True, nl=False, err=True)
        typer.echo(message, err=True)
        raise typer.Exit(code)


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
