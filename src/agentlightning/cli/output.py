"""Printing: tables for people, JSON for programs, and nothing that a stored text could do to a terminal.

On a terminal, tables are drawn by rich and fit its width. Anywhere else (a pipe, a file) they are plain columns,
whole and uncut.
"""

from __future__ import annotations

import codecs
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from agentlightning.types import PaginatedResult


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
    "ERROR": "red",
}
"""The colour of a state, wherever one is printed."""


_UNPRINTABLE = re.compile(r"[^ -~]")
"""What may be unprintable: all but ASCII's printable characters."""
_UNLIMITED = 10_000
_WIDE = 20
"""To how many characters a wide column may shrink."""


class Cell(NamedTuple):
    """A text and how it looks."""

    text: str
    style: str = ""


class Column(NamedTuple):
    """A heading; ``right`` for numbers; ``wide`` for what is wrapped, or put below its row, when there is no room."""

    title: str
    right: bool = False
    wide: bool = False


def console() -> Console:
    """The terminal. What stands in its place (a pipe, a file) is so wide that nothing is cut or wrapped."""
    from rich.console import Console

    screen = Console(highlight=False, markup=False, emoji=False)
    if not screen.is_terminal:
        screen = Console(highlight=False, markup=False, emoji=False, width=_UNLIMITED)
    return screen


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
            style = STATUS_STYLES.get(text, "")
            screen.print(Text.assemble((f"{name:<12}", "bold"), (clean(text), style)))


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[Cell | str]], *, empty: str) -> None:
    """Print rows under headings, or ``empty`` if there are none."""
    if not rows:
        typer.echo(empty)
        return
    screen = console()
    if screen.is_terminal:
        screen.print(table(columns, rows), crop=False)
    else:
        typer.echo("\n".join(_plain_lines(columns, rows)))


def print_rest(page: PaginatedResult[Any]) -> None:
    """Say, beside the output, that there is more than this page."""
    if page.offset + len(page) < page.total:
        typer.echo(f"{len(page):,} of {page.total:,}; more with --limit and --offset", err=True)


def table(columns: Sequence[Column], rows: Sequence[Sequence[Cell | str]]) -> RenderableType:
    """Rows under headings, as rich draws them."""
    from rich.table import Table
    from rich.text import Text

    if _narrowest(columns, rows) > console().width:
        return _stacked(columns, rows)
    drawn = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold dim")
    for column in columns:
        drawn.add_column(
            column.title,
            justify="right" if column.right else "left",
            overflow="fold",
            no_wrap=not column.wide,
        )
    for row in rows:
        drawn.add_row(*(Text(clean(each.text), style=each.style) for each in map(_cell, row)))
    return drawn


def _stacked(columns: Sequence[Column], rows: Sequence[Sequence[Cell | str]]) -> RenderableType:
    """Rows without their wide columns, which stand below them.

    Ids are whole, so that they can be copied: if there is no room even for the rest, the terminal wraps the line.
    """
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    narrow = [index for index, column in enumerate(columns) if not column.wide]
    cells = [[Cell(clean(text), style) for text, style in map(_cell, row)] for row in rows]
    widths = {index: max(len(columns[index].title), *(len(row[index].text) for row in cells)) for index in narrow}

    def line(row: Sequence[Cell]) -> Text:
        fitted = (
            (row[index].text.rjust(widths[index]) if columns[index].right else row[index].text.ljust(widths[index]))
            for index in narrow
        )
        parts = zip(fitted, (row[index].style for index in narrow), strict=True)
        text = Text("  ", no_wrap=True, overflow="ignore").join(Text(*part) for part in parts)
        text.rstrip()
        return text

    lines: list[RenderableType] = [line([Cell(column.title, "bold dim") for column in columns])]
    for row in cells:
        lines.append(line(row))
        for column, cell in zip(columns, row, strict=True):
            if column.wide and cell.text:
                told = Text.assemble((f"{column.title}  ", "dim"), (cell.text, cell.style), overflow="fold")
                lines.append(Padding(told, (0, 0, 0, 4)))
    return Group(*lines)


def _narrowest(columns: Sequence[Column], rows: Sequence[Sequence[Cell | str]]) -> int:
    """How wide a table is at least, with every column whole but the wide ones."""
    widths = [
        max(len(each) for each in (column.title, *(clean(_cell(row[index]).text) for row in rows)))
        for index, column in enumerate(columns)
    ]
    whole = [min(width, _WIDE) if column.wide else width for width, column in zip(widths, columns, strict=True)]
    return sum(whole) + 2 * (len(columns) - 1)


def _plain_lines(columns: Sequence[Column], rows: Sequence[Sequence[Cell | str]]) -> list[str]:
    texts = [[column.title for column in columns], *([clean(_cell(each).text) for each in row] for row in rows)]
    widths = [max(len(row[index]) for row in texts) for index in range(len(columns))]
    return [
        "  ".join(
            text.rjust(width) if column.right else text.ljust(width)
            for text, width, column in zip(row, widths, columns, strict=True)
        ).rstrip()
        for row in texts
    ]


def _cell(value: Cell | str) -> Cell:
    return value if isinstance(value, Cell) else Cell(value)


def plain(value: Any) -> Any:
    """Records as what JSON has for them."""
    from pydantic import BaseModel

    if isinstance(value, BaseModel):
        return json.loads(value.model_dump_json())
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in cast("Sequence[Any]", value)]
    return value


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
    if seconds < 172_800:
        return f"{seconds / 3600:.0f} h"
    return f"{seconds / 86_400:.0f} d"


def ago(moment: float | None, now: float | None = None) -> str:
    """How long ago a moment of the wall clock was; "never" without one."""
    if moment is None:
        return "never"
    seconds = max(0.0, (time.time() if now is None else now) - moment)
    return "now" if seconds < 1 else f"{duration(seconds)} ago"


def size(number: float) -> str:
    """A number of bytes."""
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" or number >= 99.5 else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
