"""What commands share: options, exit codes, and printing.

On a terminal, tables fit its width. Anywhere else (a pipe, a file) they are plain columns, whole and uncut. Nothing
that a stored text has can command a terminal.
"""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

T = TypeVar("T")


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


# --- Options that many commands have, with the same names, help and environment everywhere ---

Format = Literal["table", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

Output = Annotated[
    Format, typer.Option("--output", "-o", help="For people (table), or for programs (json, or just --json).")
]
Limit = Annotated[int, typer.Option("--limit", "-n", min=1, max=10_000, help="At most so many.")]
Offset = Annotated[int, typer.Option(min=0, help="Pass over so many.")]
Match = Annotated[str | None, typer.Option(help="Only those whose id has this in it.")]

_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}


class OptionGroup:
    """Options that go together. A command takes them as one parameter; its fields are the options.

    Subclasses are dataclasses, whose fields are annotated as parameters of commands are.
    """


def seconds_of(text: str) -> float:
    """A length of time as people write it (90m, 12h, 7d), in seconds; for the ``parser`` of an option.

    Raises:
        typer.BadParameter: it is none.
    """
    age = _AGE.fullmatch(text.strip())
    if age is None:
        raise typer.BadParameter(f"{text!r} is no length of time; write a number and s, m, h or d, such as 7d")
    return float(age[1]) * _SECONDS[age[2]]


Age = partial(typer.Option, parser=seconds_of, metavar="AGE")
"""An option that is a length of time."""


# --- Printing ------------------------------------------------------------------------------------------

STATUS_STYLES: Mapping[str, str] = {
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
    "timeout": "red",
    "unresponsive": "red",
    "running": "cyan",
    "preparing": "cyan",
    "requeuing": "yellow",
    "busy": "cyan",
    "idle": "green",
    "unknown": "red",
    "left": "dim",
    "worker_lost": "red",
    "resource_exhausted": "red",
}
"""The colour of a state, wherever one is printed."""

_UNPRINTABLE = re.compile(r"[^ -~]")
"""What may be unprintable: all but ASCII's printable characters."""
_UNLIMITED = 10_000


@dataclass(frozen=True)
class Column(Generic[T]):
    """How a table shows one thing of its records."""

    title: str
    text: Callable[[T], str]
    right: bool = False
    """For numbers."""
    wide: bool = False
    """Put below its row where a line has not room for all."""
    style: str = ""
    """Default: the colour of the state that the text names."""


def console() -> Console:
    """The terminal. What stands in its place (a pipe, a file) is so wide that nothing is cut or wrapped."""
    from rich.console import Console

    make = partial(Console, highlight=False, markup=False, emoji=False)
    screen = make()
    return screen if screen.is_terminal else make(width=_UNLIMITED)


def print_json(value: Any) -> None:
    """Print records, or anything made of them, as one JSON document."""
    typer.echo(json_text(plain(value), indent=2))


def json_text(value: Any, *, indent: int | None = None) -> str:
    """JSON in readable characters, as far as the output has them. What it lacks, and what a terminal might obey, is
    escaped, which changes nothing of the value."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    ascii_only = codecs.lookup(encoding).name != "utf-8"
    return _UNPRINTABLE.sub(_escaped, json.dumps(value, indent=indent, ensure_ascii=ascii_only, allow_nan=False))


def _escaped(match: re.Match[str]) -> str:
    return match[0] if match[0].isprintable() or match[0] == "\n" else json.dumps(match[0])[1:-1]


def print_facts(facts: Mapping[str, str]) -> None:
    """Print names and what they are, one in a line; empty ones are left out."""
    from rich.text import Text

    screen = console()
    for name, text in facts.items():
        if text:
            screen.print(Text.assemble((f"{name:<12}", "bold"), (clean(text), STATUS_STYLES.get(text, ""))))


def print_table(columns: Sequence[Column[T]], records: Iterable[T], *, empty: str) -> None:
    """Print records under headings, or ``empty`` if there are none."""
    from rich.console import Group

    screen = console()
    lines = table(columns, records, screen.width)
    screen.print(Group(*lines) if lines[1:] else empty, crop=False)


def table(columns: Sequence[Column[T]], records: Iterable[T], width: int) -> list[RenderableType]:
    """Headings, and a line for each record. Where lines would be wider than ``width``, wide columns stand below them.

    Ids are whole, so that they can be copied: if there is no room even for the rest, the terminal wraps the line.
    """
    from rich.padding import Padding
    from rich.text import Text

    rows = [[clean(column.text(each)) for column in columns] for each in records]
    widths = [max(map(len, cells)) for cells in zip([column.title for column in columns], *rows, strict=True)]
    fits = sum(widths) + 2 * (len(widths) - 1) <= width

    def line(cells: Sequence[str], style: str = "") -> Text:
        text = Text(no_wrap=True, overflow="ignore")
        for column, cell, room in zip(columns, cells, widths, strict=True):
            if fits or not column.wide:
                fitted = cell.rjust(room) if column.right else cell.ljust(room)
                text.append(fitted, style or column.style or STATUS_STYLES.get(cell)).append("  ")
        text.rstrip()
        return text

    lines: list[RenderableType] = [line([column.title for column in columns], "bold dim")]
    for row in rows:
        lines.append(line(row))
        for column, cell in zip(columns, row, strict=True):
            if column.wide and cell and not fits:
                below = Text.assemble((f"{column.title}  ", "dim"), (cell, column.style), overflow="fold")
                lines.append(Padding(below, (0, 0, 0, 4)))
    return lines


def plain(value: Any) -> Any:
    """Records as what JSON has for them."""
    from pydantic_core import to_json

    return json.loads(to_json(value))


def clean(text: str) -> str:
    """The text without characters that a terminal would obey: agents write what is stored, and anybody may read it."""
    return "".join(
        each if each.isprintable() else " " if each in "\t\r\n" else "\N{REPLACEMENT CHARACTER}" for each in text
    )


def one_line(value: Any, length: int = 120) -> str:
    """A JSON value, or a text, in one line of at most ``length`` characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = clean(text[: 4 * length])
    return text if len(text) <= length else text[: length - 1] + "…"


def count(number: int, noun: str) -> str:
    """A number of things, such as ``1 rollout`` or ``2,000 rollouts``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def duration(seconds: float) -> str:
    """A length of time in the two figures that matter."""
    if seconds < 0.000_05:
        return "0 ms"
    if seconds < 0.0995:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} d"


def ago(moment: float | None, now: float) -> str:
    """How long ago a moment was, by the clock that ``now`` was read from; "never" without one."""
    if moment is None:
        return "never"
    return "now" if now - moment < 1 else f"{duration(now - moment)} ago"


def size(number: float) -> str:
    """A number of bytes."""
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" or number >= 99.5 else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
