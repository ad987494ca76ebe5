"""What is printed: whole for programs, short for people, harmless for terminals."""

from __future__ import annotations

import io
import json
import math
import re
from contextlib import redirect_stdout
from operator import itemgetter
from typing import Any

import pytest

from agentlightning.cli.terminal import (
    Column,
    ago,
    clean,
    duration,
    one_line,
    print_facts,
    print_json,
    print_table,
    size,
)
from agentlightning.types import PaginatedResult, Span


def printed(call: Any, *arguments: Any, **options: Any) -> str:
    with redirect_stdout(io.StringIO()) as out:
        call(*arguments, **options)
    return out.getvalue()


class Terminal(io.StringIO):
    """Says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


COLUMNS = (
    Column("name", itemgetter(0)),
    Column("number", itemgetter(1), right=True),
    Column("text", itemgetter(2), wide=True, style="red"),
)
ROWS = [["a", "1", "x" * 300], ["long name", "12,000", "y"]]


def test_where_there_is_no_terminal_a_table_is_plain_columns_whole() -> None:
    lines = printed(print_table, COLUMNS, ROWS, empty="none").splitlines()
    assert lines == [
        "name       number  text",
        "a               1  " + "x" * 300,
        "long name  12,000  y",
    ]


def test_on_a_terminal_a_table_fits_and_has_colours(terminal: None) -> None:
    with redirect_stdout(Terminal()) as out:
        print_table(COLUMNS, ROWS, empty="none")
    text = out.getvalue()
    assert "\x1b[31m" in text
    assert len(text.splitlines()) > 3  # the long text is wrapped


def test_on_a_narrow_terminal_what_is_not_wide_stays_whole(terminal: None) -> None:
    with redirect_stdout(Terminal()) as out:
        columns = (Column("id", itemgetter(0)), Column("text", itemgetter(1), wide=True))
        print_table(columns, [["i" * 59, "some text"], ["j", ""]], empty="none")
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in out.getvalue().splitlines()]
    assert lines == ["id", "i" * 59, "    text  some text", "j"]


def test_no_rows_are_said_to_be_none() -> None:
    assert printed(print_table, COLUMNS, [], empty="No rollouts.") == "No rollouts.\n"


def test_empty_facts_are_left_out() -> None:
    assert printed(print_facts, {"one": "1", "two": "", "three": "3"}) == "one         1\nthree       3\n"


@pytest.mark.parametrize("hostile", ["\x1b[2J", "\x1b]0;title\x07", "a\rb", "\x9b31m", "\u202eevil", "\x00"])
def test_stored_text_cannot_command_a_terminal(hostile: str, terminal: None) -> None:
    assert clean(hostile).isprintable()
    with redirect_stdout(Terminal()) as out:
        print_table((Column("text", itemgetter(0)),), [[hostile]], empty="")
        print_facts({"text": hostile})
    assert hostile not in out.getvalue()


@pytest.mark.parametrize("hostile", ["\x1b[2J", "\x9b31m", "\u202eevil", "\U000e0041"])
def test_stored_text_cannot_command_a_terminal_through_json(hostile: str) -> None:
    text = printed(print_json, {"text": f"ü{hostile}"})
    assert hostile not in text
    assert "ü" in text
    assert json.loads(text) == {"text": f"ü{hostile}"}


def test_stored_text_is_no_markup(terminal: None) -> None:
    with redirect_stdout(Terminal()) as out:
        print_table((Column("text", itemgetter(0)),), [["[red]x[/red] :smile:"]], empty="")
    assert "[red]x[/red] :smile:" in out.getvalue()


def test_json_is_what_the_api_has_floats_that_are_no_numbers_included() -> None:
    span = Span.from_attributes(rollout_id="ro-1", attempt_id="at-1", attributes={"x": math.nan, "text": "ü"})
    page = PaginatedResult[Span](items=[span], limit=-1, offset=0, total=1)
    text = printed(print_json, {"page": page, "spans": [span]})
    told = json.loads(text)
    assert told["page"]["items"] == told["spans"] == [json.loads(span.model_dump_json())]
    assert told["spans"][0]["attributes"] == {"x": "NaN", "text": "ü"}
    assert "ü" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [("a\nb", "a b"), ({"b": [1, None]}, '{"b": [1, null]}'), ("x" * 50, "x" * 19 + "…"), (True, "true")],
)
def test_one_line(value: Any, text: str) -> None:
    assert one_line(value, 20) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.0012, "1.2 ms"),
        (0.5, "0.5 s"),
        (9.94, "9.9 s"),
        (59, "59 s"),
        (150, "2 min"),
        (7_300, "2 h"),
        (200_000, "2 d"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_ages() -> None:
    assert ago(None, 0.0) == "never"
    assert ago(100.0, 100.5) == "now"
    assert ago(100.0, 99.0) == "now"  # clocks of two machines need not agree
    assert ago(100.0, 130.0) == "30 s ago"


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (999, "999 B"), (1_500, "1.5 KB"), (250_000_000, "250 MB"), (2.5e12, "2.5 TB")]
)
def test_sizes(number: float, text: str) -> None:
    assert size(number) == text
